"""Train two steps of every recipe at full size, and print the seconds of the second step and the peak memory.

The first step is slower, because libraries allocate and compile what they need. Each recipe runs in a process of its
own with random weights. The seconds are of one CPU and say little about a GPU; the memory says which machine is large
enough.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.training import flag_words
from tests.support.architectures import ARCHITECTURES, recipe_flags

ROOT = Path(__file__).resolve().parents[1]

BATCH = 2
# These flags win over the recipe, so that two steps and one evaluation are enough. All other values are the recipe's.
FLAGS = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "max_eval_samples": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "tensorboard",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_num_workers": 0,
}


class Measured(NamedTuple):
    """Millions of trained weights, seconds of the second step, and peak memory of the process."""

    millions: float
    step_seconds: float
    peak_gb: float


def write_dataset(folder: Path) -> Path:
    """Write a dataset of three patients in each split. Each has two slices, and the second slice shows the organs."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig
    from dataset_builder.phantom import write_phantom

    write_phantom(folder / "kaggle", num_cases=6, days_per_case=1, slices_per_scan=2, num_proc=1)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
    return folder / "gi_tract"


def run_and_measure_memory(command: list[str], log: Path) -> float:
    """Run a command in a process of its own.

    Returns:
        Its peak resident memory in GB, as the kernel counts it.

    Raises:
        RuntimeError: If the command fails.
    """
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        # `wait4` gives the resources of this one child. `getrusage` would give the maximum over all children so far.
        _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss * 1024 / 1e9


def second_step_seconds(output_dir: Path) -> float:
    """Return the time between the log entries of both steps: reading, forward pass, backward pass and optimizer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The name of an event file has the time of its start. The first one is the training's, and the evaluation after it
    # writes another one.
    events = min(output_dir.rglob("events.out.tfevents.*"))
    losses = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    first, second = (loss.wall_time for loss in losses)
    return second - first


def measure(recipe: str, dataset_dir: Path, scratch: Path) -> Measured:
    """Train a recipe's model from random weights. Everything but batch and steps is as in the recipe."""
    output_dir = scratch / recipe
    flags = recipe_flags(recipe) | FLAGS | {"dataset_name": dataset_dir, "output_dir": output_dir}
    command = [sys.executable, "run_segmentation.py", *flag_words(flags)]
    peak_gb = run_and_measure_memory(command, scratch / f"{recipe}.log")
    facts = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    return Measured(facts["num_parameters"] / 1e6, second_step_seconds(output_dir), peak_gb)


def main() -> None:
    """Train two steps of each recipe and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="recipes to train"
    )
    recipes = parser.parse_args().recipes
    print(f"| recipe | weights, millions | seconds a step of {BATCH} slices | peak memory, GB |\n|---|---|---|---|")
    for recipe in recipes:
        # A checkpoint of the largest model has more than a gigabyte, so the files of a recipe are removed before the
        # next.
        with tempfile.TemporaryDirectory() as scratch:
            measured = measure(recipe, write_dataset(Path(scratch)), Path(scratch))
        millions, step_seconds, peak_gb = measured
        print(f"| {recipe} | {millions:.1f} | {step_seconds:.1f} | {peak_gb:.1f} |", flush=True)


if __name__ == "__main__":
    main()
