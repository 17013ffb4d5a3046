"""What a split by slice or by scan flatters: the same small model trained under three splits of the same slices.

Each seed holds some patients out of all splits. The slices of the others are divided three times, with as many to
validate on each time: by slice, at random; by scan, so that other days of a patient may be trained on; by patient. A
split claims the Dice of its best checkpoint on its own validation slices. It flatters by what that is above the Dice
of the same checkpoint on the patients held out.

A single split by patient is not exact either: it claims what a few patients happen to score, too much or too little.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import SegformerImageProcessorPil

from benchmarks.training import (
    add_job_flag,
    do_job,
    evaluation_flags,
    flag_words,
    make_trainer,
    mean_and_spread,
    run_apart,
    write_phantom_dataset,
)
from dataset_builder.difficulty import DIFFICULTIES
from gi_segmentation.arguments import DataArguments, ModelArguments, parse_arguments
from gi_segmentation.data.slices import load_slices, select_samples, transform_splits
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.trainer import SegmentationTrainer, train

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("slice", "scan", "patient")
# What is changed in the demo's recipe: smaller slices, and more of those with organs. By trial, benchmarks/README.md.
RECIPE = {"config": ROOT / "recipes" / "demo.yaml", "image_size": 96, "slice_sampling": "balanced"}


class Parts(NamedTuple):
    """Rows of the slices to train on, to validate on, and of the patients who stand in neither."""

    train: list[int]
    validation: list[int]
    held_out: list[int]


class Trained(NamedTuple):
    """Dice of a best checkpoint on its validation slices, on training slices, on new patients; seconds in all."""

    claimed: float
    training: float
    honest: float
    seconds: float


def count_share(num_patients: int, share: float) -> int:
    """How many patients a share is, at least one."""
    return max(1, round(share * num_patients))


def draw_groups(groups: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Draw whole groups at random, each if it brings the number of slices nearer to a target.

    Args:
        groups: Group of each slice.
        target: How many slices are wanted.
        rng: Draws.

    Returns:
        bool, per slice whether its group was drawn.
    """
    names, sizes = np.unique(groups, return_counts=True)
    drawn, missing = [], target
    for index in rng.permutation(len(names)):
        if abs(missing - sizes[index]) < missing:
            drawn.append(names[index])
            missing -= sizes[index]
    return np.isin(groups, drawn)


def divide(slices: Dataset, way: str, share: float, seed: int) -> Parts:
    """Hold patients out and divide the slices of the others.

    Args:
        slices: All of them.
        way: "slice", "scan" or "patient". The same patients are held out for all three, and about as many slices
            validate: those of as many patients as are held out.
        share: Of the patients to hold out, and of the patients to validate on.
        seed: Draws.
    """
    rng = np.random.default_rng(seed)
    cases = np.array(slices["case"])
    patients = rng.permutation(np.unique(cases))
    number = count_share(len(patients), share)
    is_held_out = np.isin(cases, patients[:number])
    is_validation = np.isin(cases, patients[number : 2 * number])
    if way != "patient":
        groups = np.arange(len(cases)) if way == "slice" else np.array(slices["scan"])
        target = int(np.count_nonzero(is_validation))
        is_validation[:] = False
        is_validation[~is_held_out] = draw_groups(groups[~is_held_out], target, rng)
    is_train = ~is_held_out & ~is_validation
    return Parts(*(np.flatnonzero(part).tolist() for part in (is_train, is_validation, is_held_out)))


def pool_slices(data_args: DataArguments) -> Dataset:
    """The slices of a dataset's train and validation together."""
    return concatenate_datasets(list(load_slices(data_args).values()))


def check_slices(slices: Dataset, share: float) -> None:
    """Check that slices can be divided in the three ways.

    Raises:
        InputError: If there are too few patients or scans.
    """
    num_patients, num_scans = len(slices.unique("case")), len(slices.unique("scan"))
    number = count_share(num_patients, share)
    if not 0 < share < 1 or 2 * number >= num_patients:
        raise InputError(
            f"--share {share:g}: expected patients left to train on when {number} are held out and {number} validate; "
            f"got {num_patients} in all; take a share between 0 and 0.5, or more patients"
        )
    if num_scans == num_patients:
        raise InputError(
            f"--dataset_name: expected patients with several scans, got one of each of the {num_patients} patients, "
            f"so that a split by scan is one by patient; take a dataset with several days of a patient"
        )


def score(
    trainer: SegmentationTrainer, part: Dataset, every: int, model_args: ModelArguments, data_args: DataArguments
) -> float:
    """Dice of the trainer's model on every so many slices of a part."""
    whole = DatasetDict(train=part, validation=part)
    samples = DatasetDict(train=part, validation=part.select(range(0, len(part), every)))
    processor = cast(SegformerImageProcessorPil, trainer.processing_class)
    _, dataset = transform_splits(whole, samples, processor, model_args, data_args, trainer.args.seed)
    trainer.compute_metrics = ComputeMetrics(dataset)
    return trainer.evaluate(dataset)["eval_dice"]


def run(flags: dict[str, Any], words: list[str], parts: list[list[int]]) -> Trained:
    """Train and score in this process."""
    start = time.perf_counter()
    model_args, data_args, run_args = parse_arguments([*flag_words(flags), *words])
    trained_on, validation, held_out = map(pool_slices(data_args).select, parts)
    splits = DatasetDict(train=trained_on, validation=validation)
    samples = select_samples(splits, data_args, run_args.seed)
    trainer = make_trainer(splits, samples, model_args, data_args, run_args)
    claimed = train(trainer).scores["eval_dice"]
    training = score(trainer, trained_on, -(-len(trained_on) // len(validation)), model_args, data_args)
    honest = score(trainer, held_out, 1, model_args, data_args)
    return Trained(claimed, training, honest, time.perf_counter() - start)


def run_flags(dataset: str, seed: int, steps: int) -> dict[str, Any]:
    """The flags of a training but for its output."""
    return {**RECIPE, **evaluation_flags(steps), "dataset_name": dataset, "seed": seed}


def report(dataset: str, arguments: argparse.Namespace) -> dict[str, list[Trained]]:
    """Train under each split with each seed, the splits in turn, and say of each what came out."""
    words = [*flag_words(run_flags(dataset, 0, arguments.steps)), *arguments.flags]
    slices = pool_slices(parse_arguments(words)[1])
    check_slices(slices, arguments.share)
    trained_by: dict[str, list[Trained]] = {way: [] for way in WAYS}
    for seed, way in itertools.product(arguments.seeds, WAYS):
        parts = divide(slices, way, arguments.share, seed)
        job = {"flags": run_flags(dataset, seed, arguments.steps), "words": arguments.flags, "parts": parts}
        trained = Trained(*run_apart("benchmarks.leakage", f"by {way}, seed {seed}", job))
        trained_by[way].append(trained)
        print(
            f"by {way}, seed {seed}, {' + '.join(str(len(rows)) for rows in parts)} slices: claims "
            f"{trained.claimed:.3f}, new patients {trained.honest:.3f}, training slices {trained.training:.3f}, "
            f"{trained.seconds:.0f} s",
            flush=True,
        )
    return trained_by


def format_table(trained_by: dict[str, list[Trained]]) -> str:
    """The scores as Markdown, mean ± standard deviation over seeds; differences are taken seed by seed."""
    names = ["split", "claims", "new patients", "flatters by", "claims more than by patient", "training slices"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for way, runs in trained_by.items():
        more = [one.claimed - other.claimed for one, other in zip(runs, trained_by["patient"], strict=True)]
        cells = [
            mean_and_spread([one.claimed for one in runs]),
            mean_and_spread([one.honest for one in runs]),
            mean_and_spread([one.claimed - one.honest for one in runs], "+"),
            "" if way == "patient" else mean_and_spread(more, "+"),
            mean_and_spread([one.training for one in runs]),
        ]
        lines.append(f"| by {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train under each split and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--dataset_name", help="folder of a built dataset, or a Hub id; None: make one from the phantom"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of splits, weights and order")
    parser.add_argument("--steps", type=int, default=800, help="number of optimizer steps of each training")
    parser.add_argument(
        "--share", type=float, default=0.25, help="share of the patients to hold out, and share to validate on"
    )
    parser.add_argument("--patients", type=int, default=16, help="number of patients in the phantom")
    parser.add_argument("--days", type=int, default=3, help="number of scans of each patient in the phantom")
    parser.add_argument("--slices", type=int, default=24, help="number of slices of each scan in the phantom")
    parser.add_argument("--difficulty", choices=tuple(DIFFICULTIES), default="hard", help="difficulty of the phantom")
    parser.add_argument(
        "flags",
        nargs="*",
        help="after --: flags of run_segmentation.py for all trainings, for example --image_size 288",
    )
    add_job_flag(parser)
    arguments = parser.parse_args()
    if arguments.job:
        do_job(arguments.job, run)
        return
    with tempfile.TemporaryDirectory() as scratch:
        sizes = arguments.patients, arguments.days, arguments.slices
        dataset = arguments.dataset_name
        if dataset is None:
            dataset = write_phantom_dataset(Path(scratch), *sizes, num_folds=2, difficulty=arguments.difficulty)
        print(f"\n{format_table(report(str(dataset), arguments))}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
