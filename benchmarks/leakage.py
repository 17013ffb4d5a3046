"""Measure how much a split by slice or by scan flatters: train the same small model under three splits.

Each seed first puts some patients aside. The slices of the other patients are divided in three ways, with about as
many validation slices each time:

- by slice: single slices are drawn at random, so neighbours of a validation slice are trained on;
- by scan: whole scans are drawn, so other days of a patient may be trained on;
- by patient: whole patients are drawn.

A split claims the Dice of its best checkpoint on its own validation slices. It flatters by the difference to the Dice
of the same checkpoint on the patients put aside. Both numbers are of one model, so the difference comes from
the slices alone.

A single split by patient is not exact either. It claims the Dice of a few patients, which can be too high or too low.
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
from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import load_slices, select_samples, transform_splits
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.trainer import SegmentationTrainer, train

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("slice", "scan", "patient")
# Changes of the demo's recipe: smaller slices, and slices with organs are drawn more often. Both were found by trial
# (docs/benchmark_notes.md). A leak can be seen only if the model has learnt its own patients.
RECIPE = {"config": ROOT / "recipes" / "demo.yaml", "image_size": 96, "slice_sampling": "balanced"}


class Parts(NamedTuple):
    """Row numbers of the slices to train on, of those to validate on, and of those of the patients put aside."""

    train: list[int]
    validation: list[int]
    held_out: list[int]


class Trained(NamedTuple):
    """The scores of one training.

    Attributes:
        claimed: Dice of the best checkpoint on the validation slices, by which it was chosen.
        training: Its Dice on some of its training slices.
        honest: Its Dice on the patients put aside.
        seconds: Seconds of training and scoring.
    """

    claimed: float
    training: float
    honest: float
    seconds: float


def count_share(num_patients: int, share: float) -> int:
    """Return how many patients make a share, at least one."""
    return max(1, round(share * num_patients))


def draw_groups(groups: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Draw whole groups at random, until about as many slices are drawn as wanted.

    Args:
        groups: Group of each slice, shape `(slices,)`.
        target: Number of slices wanted.
        rng: Source of random numbers.

    Returns:
        For each slice whether its group was drawn, bool, shape `(slices,)`.
    """
    names, sizes = np.unique(groups, return_counts=True)
    drawn, missing = [], target
    for index in rng.permutation(len(names)):
        # A group is taken only if the number of slices comes nearer to the target by it. So the result differs from
        # the target by at most half of the largest group.
        if abs(missing - sizes[index]) < missing:
            drawn.append(names[index])
            missing -= sizes[index]
    return np.isin(groups, drawn)


def divide(slices: Dataset, way: str, share: float, seed: int) -> Parts:
    """Put some patients aside, and divide the slices of the others.

    Args:
        slices: The slices of all patients.
        way: "slice", "scan" or "patient".
        share: Share of the patients to put aside. As many patients, or about as many slices as these have, are for
            validation.
        seed: Seed of all draws. The same seed puts the same patients aside for all three ways.

    Returns:
        The row numbers of the three parts. Each slice is in one of them.
    """
    rng = np.random.default_rng(seed)
    cases = np.array(slices["case"])
    # This permutation is the first draw in all three ways. So they put the same patients aside, and their models are
    # compared on the same slices.
    patients = rng.permutation(np.unique(cases))
    number = count_share(len(patients), share)
    is_held_out = np.isin(cases, patients[:number])
    is_validation = np.isin(cases, patients[number : 2 * number])
    if way != "patient":
        # With a group for each slice, single slices are drawn. The target is the number of slices that the split by
        # patient has, so all ways train on about as many slices.
        groups = np.arange(len(cases)) if way == "slice" else np.array(slices["scan"])
        target = int(np.count_nonzero(is_validation))
        is_validation[:] = False
        is_validation[~is_held_out] = draw_groups(groups[~is_held_out], target, rng)
    is_train = ~is_held_out & ~is_validation
    return Parts(*(np.flatnonzero(part).tolist() for part in (is_train, is_validation, is_held_out)))


def pool_slices(data_args: DataArguments) -> Dataset:
    """Return the slices of the train and the validation split together."""
    return concatenate_datasets(list(load_slices(data_args).values()))


def check_slices(slices: Dataset, share: float) -> None:
    """Check that the slices can be divided in all three ways.

    Raises:
        InputError: If there are too few patients, or if each patient has only one scan.
    """
    num_patients, num_scans = len(slices.unique("case")), len(slices.unique("scan"))
    number = count_share(num_patients, share)
    if not 0 < share < 1 or 2 * number >= num_patients:
        raise InputError(
            f"--share {share:g}: with {number} patients put aside and {number} for validation, expected patients left "
            f"to train on, but got {num_patients} in all; take a share between 0 and 0.5, or more patients"
        )
    if num_scans == num_patients:
        raise InputError(
            f"--dataset_name: expected patients with several scans, got one of each of the {num_patients} patients. "
            f"A split by scan would be a split by patient; take a dataset with several days of each patient"
        )


def score(
    trainer: SegmentationTrainer, part: Dataset, every: int, model_args: ModelArguments, data_args: DataArguments
) -> float:
    """Return the Dice of the trainer's model on a part.

    Args:
        trainer: A trainer with the model that is scored.
        part: The slices.
        every: A step: 1 scores all slices, 2 every second one, and so on.
        model_args: As in the training.
        data_args: As in the training.
    """
    # The dataset of a split finds neighbouring slices among all slices of the part, and scores only the samples.
    whole = DatasetDict(train=part, validation=part)
    samples = DatasetDict(train=part, validation=part.select(range(0, len(part), every)))
    processor = cast(SegformerImageProcessorPil, trainer.processing_class)
    _, dataset = transform_splits(whole, samples, processor, model_args, data_args, trainer.args.seed)
    # The metrics collect the scans of one dataset, so another dataset needs new ones.
    trainer.compute_metrics = ComputeMetrics(dataset)
    return trainer.evaluate(dataset)["eval_dice"]


def run(flags: dict[str, Any], words: list[str], parts: list[list[int]]) -> Trained:
    """Train and score in this process.

    Args:
        flags: Flags of the training.
        words: More words of the command line, which come later and win.
        parts: The row numbers of `Parts`.
    """
    start = time.perf_counter()
    model_args, data_args, run_args = parse_arguments([*flag_words(flags), *words])
    trained_on, validation, held_out = map(pool_slices(data_args).select, parts)
    splits = DatasetDict(train=trained_on, validation=validation)
    samples = select_samples(splits, data_args, run_args.seed)
    trainer = make_trainer(splits, samples, model_args, data_args, run_args)
    # `train` ends with the best checkpoint and scores it. So the next two scores are of the same weights.
    claimed = train(trainer).scores["eval_dice"]
    # About as many training slices are scored as validation slices; -(-a // b) rounds up.
    training = score(trainer, trained_on, -(-len(trained_on) // len(validation)), model_args, data_args)
    honest = score(trainer, held_out, 1, model_args, data_args)
    return Trained(claimed, training, honest, time.perf_counter() - start)


def run_flags(dataset: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the flags of a training without `output_dir`."""
    return {**RECIPE, **evaluation_flags(steps), "dataset_name": dataset, "seed": seed}


def report(dataset: str, arguments: argparse.Namespace) -> dict[str, list[Trained]]:
    """Train under each split with each seed, and print a line for each training.

    Returns:
        The results of all seeds by split.
    """
    words = [*flag_words(run_flags(dataset, 0, arguments.steps)), *arguments.flags]
    slices = pool_slices(parse_arguments(words)[1])
    check_slices(slices, arguments.share)
    trained_by: dict[str, list[Trained]] = {way: [] for way in WAYS}
    # The seed is the outer loop. If the machine becomes slower or is interrupted, all splits are affected alike.
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
    """Return the scores as Markdown: mean ± standard deviation over seeds.

    Differences are taken within a seed. Much of the variation is common to all splits of a seed, because they share
    patients and first weights. It cancels in the difference.
    """
    names = ["split", "claims", "new patients", "flatters by", "claims more than by patient", "training slices"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for way, runs in trained_by.items():
        # How much more this split claims than the split by patient with the same seed.
        more = [one.claimed - other.claimed for one, other in zip(runs, trained_by["patient"], strict=True)]
        # The fifth column is harder to read than the fourth: it also contains that splits by slice and by scan train
        # on more patients (docs/leakage.md).
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
        # The split of the dataset does not matter, because `pool_slices` joins both parts again. Two folds are the
        # fewest that `build` makes.
        sizes = arguments.patients, arguments.days, arguments.slices
        dataset = arguments.dataset_name
        if dataset is None:
            dataset = write_phantom_dataset(Path(scratch), *sizes, num_folds=2, difficulty=arguments.difficulty)
        print(f"\n{format_table(report(str(dataset), arguments))}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
