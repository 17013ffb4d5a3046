"""Train two steps of every recipe at full size, and print the seconds of the second step and the peak memory.

The first step is slower, because libraries allocate and compile what they need. Each recipe runs in a process of its
own with random weights. The seconds are of one CPU and say little about a GPU; the memory says which machine is large
enough.

With `--computed`, nothing is trained. Operations and memory are counted, and the hours of 12 epochs of all slices of
the competition on several GPUs follow from the operations per second at which a well-known model runs there.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.process_memory import measure
from benchmarks.training import flag_words, write_phantom_dataset
from gi_segmentation.models.loading import count_parameters
from tests.support.architectures import ARCHITECTURES, recipe_flags
from tests.support.full_size import ENCODERS, build, count_flops, count_slice_bytes, count_training_bytes, parse

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

# Operations a second, in units of 1e12, at which ResNet-50 runs: 8.18e9 a slice forwards (torchvision's table of its
# models: 4.09e9 products that are added), three times as many in training. Slices a second are NVIDIA's
# (DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, README of 2021). Mixed precision, except P100.
SPEEDS = {
    "T4": 1198 * 8.18e-3,  # its forward pass; no training was measured there
    # In 32 bits, because it has no tensor cores. V100 trains 367 slices a second in 32 bits. Its peak is 15.7e12
    # operations a second, and that of P100 9.3e12.
    "P100": 367 * 3 * 8.18e-3 * 9.3 / 15.7,
    "A100": 2470 * 3 * 8.18e-3,
    # As A100, with the ratio of the bandwidths of their memories: 3.35 and 2.04 TB/s.
    "H100": 2470 * 3 * 8.18e-3 * 3.35 / 2.04,
}
# 12 epochs of all slices of the competition. A fifth less if a fold is held back.
SLICES = 12 * 38_496
STEP = 32  # slices
# What a T4 or a P100 can hold: two thirds of 15 GB. The rest is for temporary buffers.
SMALL_BYTES = 10e9


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


def find_batch_size(weight_bytes: float, slice_bytes: float) -> int:
    """Return the largest batch that `SMALL_BYTES` can hold; 0 if there is none.

    Example:
        >>> find_batch_size(2e9, 0.5e9), find_batch_size(9.9e9, 0.5e9)
        (16, 0)
    """
    fitting = [size for size in (32, 16, 8, 4, 2) if weight_bytes + size * slice_bytes <= SMALL_BYTES]
    return max(fitting, default=0)


def compute_recipe(recipe: str) -> str:
    """Return a row with what follows from the shapes of a recipe's model."""
    _, data_args, run_args = parse(recipe)
    model, size, batch = build(recipe, num_labels=4), data_args.image_size, run_args.per_device_train_batch_size
    flops, slice_bytes = count_flops(model, size), count_slice_bytes(model, size)
    weight_bytes = count_training_bytes(model, size, 0)
    small = find_batch_size(weight_bytes, slice_bytes)
    hours = {name: SLICES * 3 * flops / speed / 1e12 / 3600 for name, speed in SPEEDS.items()}
    cells = [
        f"{count_parameters(model) / 1e6:.1f}",
        f"{flops / 1e9:.0f}",
        f"{slice_bytes / 1e9:.2f}",
        f"{batch} x {STEP // batch}: {(weight_bytes + batch * slice_bytes) / 1e9:.1f}",
        f"{small} x {STEP // small}: {(weight_bytes + small * slice_bytes) / 1e9:.1f}" if small else "–",
        *(f"{value:.1f}" for value in hours.values()),
    ]
    return f"| {recipe} | {' | '.join(cells)} |"


def print_computed(recipes: Sequence[str]) -> None:
    """Print a table with a row for each recipe."""
    headings = [
        *("recipe", "weights, millions", "1e9 operations a slice", "GB a slice"),
        *("recipe's batch: GB", "batch for 16 GB: GB", *(f"hours, {name}" for name in SPEEDS)),
    ]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for recipe in recipes:
        print(compute_recipe(recipe), flush=True)


def main() -> None:
    """Train two steps of each recipe, or compute what they need, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="recipes to train"
    )
    parser.add_argument("--computed", action="store_true", help="train nothing, and compute memory and hours")
    arguments = parser.parse_args()
    recipes = arguments.recipes
    if arguments.computed:
        return print_computed([*recipes, *ENCODERS])
    print(f"| recipe | weights, millions | seconds a step of {BATCH} slices | peak memory, GB |\n|---|---|---|---|")
    for recipe in recipes:
        # A checkpoint of the largest model has more than a gigabyte, so the files of a recipe are removed before the
        # next.
        with tempfile.TemporaryDirectory() as scratch:
            print(measure_recipe(recipe, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
