"""Train two steps of every recipe at full size, and print the seconds of the second step and the peak memory.

The first step is slower, because libraries allocate and compile what they need. Each recipe runs in a process of its
own with random weights. The seconds are of one CPU and say little about a GPU; the memory says which machine is large
enough.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.process_memory import measure
from benchmarks.training import flag_words, write_phantom_dataset
from tests.support.architectures import ARCHITECTURES, recipe_flags

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


def second_step_seconds(output_dir: Path) -> float:
    """Return the time between the log entries of both steps: reading, forward pass, backward pass and optimizer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The name of an event file has the time of its start. The first one is the training's, and the evaluation after it
    # writes another one.
    events = min(output_dir.rglob("events.out.tfevents.*"))
    losses = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    first, second = (loss.wall_time for loss in losses)
    return second - first


def measure_recipe(recipe: str, scratch: Path) -> str:
    """Train a recipe's model from random weights, and return its row. All but batch and steps is as in the recipe."""
    dataset_dir, output_dir = write_phantom_dataset(scratch, 6, 1, 2, num_folds=2), scratch / "run"
    flags = recipe_flags(recipe) | FLAGS | {"dataset_name": dataset_dir, "output_dir": output_dir}
    peak_gb = measure(["-m", "run_segmentation", *flag_words(flags)]).peak_gb
    millions = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["num_parameters"] / 1e6
    return f"| {recipe} | {millions:.1f} | {second_step_seconds(output_dir):.1f} | {peak_gb:.1f} |"


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
            print(measure_recipe(recipe, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
