"""Evaluate 200 and 2,000 slices, each in a new process: memory must not grow with their number."""

import sys
import tempfile
from pathlib import Path

from process_memory import measure

NUMBERS = (200, 2000)


def evaluate_slices(kaggle_dir: str, output_dir: str, number: int) -> None:
    """Score a tiny random model on `number` slices, the same few over and over."""
    import datasets
    from datasets import DatasetDict

    import dataset_builder  # noqa: F401 - registers the name
    from gi_segmentation.arguments import parse_arguments
    from gi_segmentation.data import transform_splits
    from gi_segmentation.modeling import load_model
    from gi_segmentation.trainer import build_trainer

    overrides = "depths=[1,1,1,1],hidden_sizes=[8,8,16,16],decoder_hidden_size=16"
    flags = ["--model_type", "segformer", "--config_overrides", overrides, "--image_size", "64"]
    flags += ["--report_to", "none", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    model_args, data_args, run_args = parse_arguments([*flags, "--output_dir", output_dir])
    slices = datasets.load_dataset("gi_tract", data_dir=kaggle_dir, num_folds=2)
    rows = [index % len(slices["validation"]) for index in range(number)]
    repeated = DatasetDict(train=slices["train"], validation=slices["validation"].select(rows))
    model, processor = load_model(model_args, data_args.image_size)
    splits = transform_splits(repeated, repeated, processor, model_args, data_args, run_args.seed)
    trainer = build_trainer(model, processor, *splits, data_args, run_args)
    trainer.evaluate()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        from dataset_builder.phantom import write_phantom

        kaggle_dir = Path(scratch) / "kaggle"
        write_phantom(kaggle_dir, num_cases=4, days_per_case=1, slices_per_scan=50)
        peaks = {
            number: measure([__file__, str(kaggle_dir), str(Path(scratch) / "run"), str(number)]).peak_gb
            for number in NUMBERS
        }
    print("| slices | peak memory, GB | ratio to the first |\n|---|---|---|")
    for number, peak in peaks.items():
        print(f"| {number} | {peak:.3f} | {peak / peaks[NUMBERS[0]]:.3f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        evaluate_slices(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
