"""Measure every recipe's model on this GPU: training, evaluation and prediction, in less than ten minutes.

The models have random weights, and the slices are synthetic. Each speed is compared with the bare loop and with the
usual way, see `benchmarks.model_speed`. The table also helps to choose a batch size: it has the peak memory, and
`--batch_sizes` takes several. Without a GPU it measures the processor.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars

from benchmarks.model_speed import (
    SCAN,
    Setting,
    compare_evaluation,
    compare_prediction,
    make_ours,
    make_usual,
    time_bare_training,
    time_training,
)
from benchmarks.training import flag_words, write_phantom_dataset
from gi_segmentation.command_line import parse_arguments
from tests.support.architectures import ARCHITECTURES, recipe_flags

HEADINGS = (
    "recipe",
    "batch",
    "training, slices/s",
    "/ bare loop",
    "/ usual way",
    "waits for data",
    "GPU busy",
    "peak memory, GB",
    "evaluation, slices/s",
    "/ bare loop",
    "/ usual way",
    "`predict`, slices/s",
    "/ bare loop",
)


class GpuMeter:
    """Reads how busy the GPU is five times a second, in the `with` block."""

    def __enter__(self) -> "GpuMeter":
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self.running = (
            subprocess.Popen(query, stdout=subprocess.PIPE, text=True) if torch.cuda.is_available() else None
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.percent = None
        if self.running is not None:
            self.running.terminate()
            values = [float(line) for line in self.running.communicate()[0].split() if line.isdecimal()]
            # The beginning is the start of the training, when the GPU has nothing to do yet.
            values = values[len(values) // 2 :]
            self.percent = sum(values) / max(len(values), 1)


def measure(setting: Setting, rounds: int, scratch: Path) -> list[str]:
    """Measure a setting, and return the cells of its row after the batch size."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Each way gets a trainer of its own, because a training changes the weights and the state of the optimizer.
    with GpuMeter() as meter:
        ours = time_training(setting, make_ours(setting, scratch))
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if torch.cuda.is_available() else "–"
    bare = time_bare_training(setting, make_ours(setting, scratch))
    usual = time_training(setting, make_usual(setting, scratch)).seconds
    evaluation = compare_evaluation(setting, rounds, scratch)
    prediction = compare_prediction(setting, rounds, scratch)
    return [
        f"{1 / ours.seconds:.0f}",
        f"{bare / ours.seconds:.2f}",
        f"{usual / ours.seconds:.2f}",
        f"{ours.waiting:.0%}",
        "–" if meter.percent is None else f"{meter.percent:.0f} %",
        peak,
        f"{1 / evaluation['ours']:.0f}",
        f"{evaluation['bare'] / evaluation['ours']:.2f}",
        f"{evaluation['usual'] / evaluation['ours']:.2f}",
        f"{1 / prediction['ours']:.0f}",
        f"{prediction['bare'] / prediction['ours']:.2f}",
    ]


def main() -> None:
    """Measure and print a table with a row for each recipe and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="recipes")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="numbers of slices in a batch; None: the recipe's")
    parser.add_argument("--image_size", type=int, help="height and width of the model's input; None: the recipe's")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="precision of all measurements")
    parser.add_argument("--steps", type=int, default=20, help="number of steps of a measured training")
    parser.add_argument("--rounds", type=int, default=1, help="number of measurements of evaluation and prediction")
    parser.add_argument("--scans", type=int, default=8, help="number of scans in each split")
    arguments = parser.parse_args()
    disable_progress_bars()
    print(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dataset_dir = write_phantom_dataset(
            scratch, 2 * arguments.scans, days_per_case=1, slices_per_scan=SCAN, num_folds=2
        )
        for recipe in arguments.recipes:
            _, data_args, run_args = parse_arguments(flag_words(recipe_flags(recipe)))
            image_size = arguments.image_size or data_args.image_size
            for batch_size in arguments.batch_sizes or [run_args.per_device_train_batch_size]:
                bf16 = arguments.precision == "bf16"
                setting = Setting(recipe, dataset_dir, image_size, batch_size, bf16, arguments.steps)
                try:
                    cells = measure(setting, arguments.rounds, scratch)
                except torch.cuda.OutOfMemoryError:
                    # This is a result too: it says which batch the GPU cannot hold.
                    cells = ["out of memory", *[""] * (len(HEADINGS) - 3)]
                print(f"| {recipe} | {batch_size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
