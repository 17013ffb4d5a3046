"""Evaluate 200 and 20,000 slices, and compare the memory: it must not grow with the number of slices.

Logits of 20,000 slices would need many gigabytes. The evaluation keeps only one scan at a time, so the difference
between both runs should be small. Each run is a process of its own, because the peak memory of a process
counts from its start.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

NUMBERS = (200, 20_000)
# Slices of a scan.
SCAN = 144
# The large run may need at most this much more than the small one.
LIMIT_GB = 0.05


def write_dataset(folder: Path) -> Path:
    """Write a dataset of two patients, one for each split, with a scan of 144 slices each."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig
    from dataset_builder.phantom import write_phantom

    write_phantom(folder / "kaggle", num_cases=2, days_per_case=1, slices_per_scan=SCAN)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=2))
    return folder / "gi_tract"


def evaluate_slices(dataset_dir: str, output_dir: str, number: int) -> None:
    """Score a tiny random model on `number` slices, and print the peak memory in GB.

    The slices are copies of one scan. Each copy has another patient's number, so it counts as another scan.
    """
    # Imports stand here, because the process that only starts the others needs none of them.
    from datasets import DatasetDict, concatenate_datasets

    from gi_segmentation.arguments import parse_arguments
    from gi_segmentation.data.slices import load_slices, transform_splits
    from gi_segmentation.models.loading import load_model
    from gi_segmentation.training.trainer import build_trainer

    overrides = "depths=[1,1,1,1],hidden_sizes=[8,8,16,16],decoder_hidden_size=16"
    flags = ["--model_type", "segformer", "--config_overrides", overrides, "--image_size", "64"]
    flags += ["--report_to", "none", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    flags += ["--dataset_name", dataset_dir]
    model_args, data_args, run_args = parse_arguments([*flags, "--output_dir", output_dir])
    slices = load_slices(data_args)
    scan = slices["validation"].remove_columns("case")
    patients = [scan.add_column("case", [case] * SCAN) for case in range(1, 2 + number // SCAN)]
    # All copies share the pages of one small file. The pages of a large file would count as memory of this process,
    # although the system can take them back at any time.
    samples = DatasetDict(train=slices["train"], validation=concatenate_datasets(patients).take(number))
    model, processor = load_model(model_args, data_args.image_size)
    splits = transform_splits(samples, samples, processor, model_args, data_args, run_args.seed)
    trainer = build_trainer(model, processor, *splits, data_args, run_args)
    trainer.evaluate()
    # `ru_maxrss` is the peak of the resident memory since the start. Linux counts it in kilobytes.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main() -> None:
    """Measure and print a table; a difference above the limit is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        dataset_dir, output_dir, number = arguments.job
        evaluate_slices(dataset_dir, output_dir, int(number))
        return
    with tempfile.TemporaryDirectory() as scratch:
        dataset_dir = write_dataset(Path(scratch))
        peaks = {}
        print("| slices | peak memory, GB | more than the first, MB |\n|---|---|---|")
        for number in NUMBERS:
            job = [
                sys.executable,
                "-m",
                "benchmarks.evaluation_memory",
                "--job",
                str(dataset_dir),
                str(Path(scratch) / "run"),
                str(number),
            ]
            done = subprocess.run(job, stdout=subprocess.PIPE, text=True, check=True)
            # The last line of the output is the number that `evaluate_slices` prints.
            peaks[number] = float(done.stdout.splitlines()[-1])
            more = 1000 * (peaks[number] - peaks[NUMBERS[0]])
            print(f"| {number} | {peaks[number]:.3f} | {more:.0f} |", flush=True)
    if peaks[NUMBERS[-1]] - peaks[NUMBERS[0]] > LIMIT_GB:
        sys.exit(f"expected at most {1000 * LIMIT_GB:.0f} MB more for {NUMBERS[-1]} slices than for {NUMBERS[0]}")


if __name__ == "__main__":
    main()
