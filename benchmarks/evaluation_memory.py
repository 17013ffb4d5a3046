"""Evaluate 100 scans, and look at the memory meanwhile: it must not grow with the number of slices.

Logits of 14,400 slices would need many gigabytes. The evaluation keeps only the scans that it works on.
"""

import argparse
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import TrainerCallback

from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import load_slices, transform_splits
from gi_segmentation.labels import find_labels
from gi_segmentation.models.loading import load_model
from gi_segmentation.schema import scan_name, slice_name
from gi_segmentation.training.trainer import build_trainer

# Slices of a scan, and the scans of an evaluation.
SCAN = 144
NUM_SCANS = 100
# Parts of the evaluation, each with a row of the table.
PARTS = 5
# The last part may need at most this much more than the one before it. Memory varies by a few megabytes.
LIMIT_GB = 0.02


class MemoryCallback(TrainerCallback):
    """Notes the resident memory in GB after each batch of an evaluation."""

    def __init__(self) -> None:
        self.resident: list[float] = []
        self.peaks: list[float] = []

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Read what Linux says about this process: its memory now (VmRSS) and at most (VmHWM), in KiB."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for name, values in (("VmRSS", self.resident), ("VmHWM", self.peaks)):
            values.append(int(status[name].split()[0]) * 1024 / 1e9)


def write_dataset(folder: Path) -> Path:
    """Write a dataset of two patients, one for each split, with a scan of 144 slices each."""
    write_phantom(folder / "kaggle", num_cases=2, days_per_case=1, slices_per_scan=SCAN)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=2))
    return folder / "gi_tract"


def copy_slices(slices: Dataset, case: int) -> Dataset:
    """Return slices under the names of another patient. Their other columns are not copied."""
    scans = [scan_name(case, day) for day in slices["day"]]
    ids = [slice_name(scan, number) for scan, number in zip(scans, slices["slice"], strict=True)]
    for column, values in {"case": [case] * len(slices), "scan": scans, "id": ids}.items():
        slices = slices.remove_columns(column).add_column(column, values)
    return slices


def evaluate_scans(dataset_dir: Path, output_dir: Path, num_scans: int) -> MemoryCallback:
    """Score a tiny random model on `num_scans` copies of a scan, each of another patient, and return the memory."""
    overrides = "depths=[1,1,1,1],hidden_sizes=[8,8,16,16],decoder_hidden_size=16"
    flags = ["--model_type", "segformer", "--config_overrides", overrides, "--image_size", "64"]
    flags += ["--report_to", "none", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    flags += ["--dataset_name", str(dataset_dir), "--output_dir", str(output_dir)]
    model_args, data_args, run_args = parse_arguments(flags)
    slices = load_slices(data_args)
    # All copies share the pages of one small file. The pages of a large file would count as memory of this process,
    # although the system can take them back at any time.
    copies = [copy_slices(slices["validation"], case) for case in range(1, num_scans + 1)]
    samples = DatasetDict(train=slices["train"], validation=concatenate_datasets(copies))
    model, processor, _ = load_model(model_args, find_labels(slices["train"].features), data_args.image_size)
    splits = transform_splits(samples, samples, processor, model_args, data_args, run_args.seed)
    trainer = build_trainer(model, processor, *splits, data_args, run_args)
    memory = MemoryCallback()
    trainer.add_callback(memory)
    trainer.evaluate()
    return memory


def main() -> None:
    """Measure and print a table; growth above the limit is an error."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        memory = evaluate_scans(write_dataset(Path(scratch)), Path(scratch) / "run", NUM_SCANS)
    steps = len(memory.resident)
    ends = [steps * part // PARTS for part in range(PARTS + 1)]
    medians = [statistics.median(memory.resident[start:end]) for start, end in pairwise(ends)]
    print("| scans | resident memory, GB | peak until then, GB |\n|---|---|---|")
    for part, median in enumerate(medians, start=1):
        scans = f"{NUM_SCANS * (part - 1) // PARTS + 1} to {NUM_SCANS * part // PARTS}"
        print(f"| {scans} | {median:.3f} | {memory.peaks[ends[part] - 1]:.3f} |")
    if medians[-1] - medians[-2] > LIMIT_GB:
        sys.exit(f"expected at most {1000 * LIMIT_GB:.0f} MB more in the last scans than in those before")


if __name__ == "__main__":
    main()
