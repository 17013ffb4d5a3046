"""Ask which score should choose the best checkpoint of a training: Dice, or the competition's score by a preset.

There are two sets of checkpoints: made-up predictions, which are true outlines with faults of drawn severity, and the
checkpoints of a training. The tables answer three questions:

- How alike do the scores rank the checkpoints? (Spearman's correlation.)
- How much is lost on other patients by choosing with a score? Patients are divided at random. The checkpoint with the
  highest score on one half is chosen. The loss is how far it stays below the best checkpoint on the other half.
- How much does a single fault change each score?
"""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from gi_segmentation.data.slices import find_dataset
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.comparison import compare_members
from gi_segmentation.inference.members import load_members
from gi_segmentation.rules import DEFAULT_RULES, PRESETS
from gi_segmentation.scoring.scans import ScanScore, compare_masks, score_scans
from gi_segmentation.scoring.submissions import decode_volume, pair_scans, read_grids, read_labels_of, read_whole_table

# The scores that may choose a checkpoint, and those by which a choice is judged.
CHOOSING = ("dice", "dice_volume", *(f"competition_score_{preset}" for preset in PRESETS))
NUM_MADE_UP, NUM_DIVISIONS = 24, 200
# Side of a false speck in pixels.
SPECK = 3
# Names of the patient, the scan and the organs, and the true masks, bool, shape `(organs, D, H, W)`.
Truth = tuple[int, str, tuple[str, ...], np.ndarray]
Fault = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def read_truths(train_csv: Path) -> list[Truth]:
    """Read the outlines of the first scan of each patient of a `train.csv`."""
    label_file = read_labels_of(train_csv.parent)
    table = read_whole_table(train_csv, "segmentation", label_file)
    pairs = {
        pair.case: pair for pair in reversed(pair_scans(table, table, read_grids(train_csv, None, False), label_file))
    }
    return [
        (pair.case, pair.name, tuple(pair.organs), decode_volume(pair, pair.target, train_csv)[0])
        for pair in sorted(pairs.values(), key=lambda pair: pair.case)
    ]


def move_border(pixels: int) -> Fault:
    """Return a fault: all masks move by this many pixels to the right."""
    return lambda masks, rng: np.roll(masks, pixels, axis=3)


def miss_slices(share: float) -> Fault:
    """Return a fault: this share of the slices with an organ loses it."""
    return lambda masks, rng: masks & (rng.random(masks.shape[:2]) >= share)[..., None, None]


def add_organs(share: float) -> Fault:
    """Return a fault: this share of the slices without an organ gets that of another slice, eroded."""

    def change(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        changed = masks.copy()
        for organ, old in zip(changed, masks, strict=True):
            drawn = old.any(axis=(1, 2))
            if drawn.any():
                for place in np.flatnonzero(~drawn & (rng.random(len(old)) < share)):
                    organ[place] = ndimage.binary_erosion(old[rng.choice(np.flatnonzero(drawn))], iterations=2)
        return changed

    return change


def add_specks(share: float) -> Fault:
    """Return a fault: this share of the organs gets a false speck at a random place of the scan."""

    def change(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        changed = masks.copy()
        for organ in changed:
            if rng.random() < share:
                z, y, x = (int(rng.integers(0, size - SPECK)) for size in organ.shape)
                organ[z, y : y + SPECK, x : x + SPECK] = True
        return changed

    return change


# One fault at a time, with the words of the table.
SINGLE_FAULTS: dict[str, Fault] = {
    "outlines moved by 1 pixel": move_border(1),
    "outlines moved by 3 pixels": move_border(3),
    "5 % of an organ's slices missed": miss_slices(0.05),
    "20 % of an organ's slices missed": miss_slices(0.2),
    "an organ in 2 % of the slices without it": add_organs(0.02),
    "an organ in 10 % of the slices without it": add_organs(0.1),
    "one speck of 3 × 3 pixels for each organ, anywhere": add_specks(1),
}


def predict(truths: Sequence[Truth], faults: Sequence[Fault], seed: int) -> list[ScanScore]:
    """Score the outlines with faults against those without."""
    rng, scans = np.random.default_rng(seed), []
    for case, name, organs, target in truths:
        preds = target
        for fault in faults:
            preds = fault(preds, rng)
        scans.append(compare_masks(case, name, organs, preds, target, presets=True))
    return scans


def draw_checkpoints(truths: Sequence[Truth]) -> list[list[ScanScore]]:
    """Score made-up checkpoints. Each has a severity of its own for every fault."""
    rng = np.random.default_rng(0)
    checkpoints = []
    for seed in range(NUM_MADE_UP):
        pixels, miss, extra, specks = int(rng.integers(1, 6)), *rng.uniform(0, [0.25, 0.1, 0.6])
        faults = [move_border(pixels), miss_slices(miss), add_organs(extra), add_specks(specks)]
        checkpoints.append(predict(truths, faults, seed))
    return checkpoints


def read_checkpoints(run_dir: Path, dataset_name: str) -> list[list[ScanScore]]:
    """Score all checkpoints of a training on the patients that it held back."""
    dataset = find_dataset(dataset_name, None)["validation"]
    scored = []
    for folder in sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        members = load_members([str(folder)], None, Computation("cpu"))
        scans, _ = compare_members(members, dataset, 16, 0, DEFAULT_RULES)
        scored.append(next(iter(scans.values())))
    return scored


def tabulate_agreement(checkpoints: Sequence[Sequence[ScanScore]]) -> str:
    """Return Spearman's correlation between the scores over checkpoints, as a Markdown table."""
    scores = [score_scans(scans) for scans in checkpoints]
    ranks = stats.spearmanr(np.array([[one[name] for name in CHOOSING] for one in scores])).statistic
    lines = [f"| {len(checkpoints)} checkpoints: rank correlation | {' | '.join(CHOOSING)} |"]
    lines.append("|---" * (len(CHOOSING) + 1) + "|")
    for name, row in zip(CHOOSING, ranks, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |")
    return "\n".join(lines)


def tabulate_losses(checkpoints: Sequence[Sequence[ScanScore]]) -> str:
    """Return what a choice on one half of the patients loses on the other half, as a Markdown table."""
    patients = sorted({scan.patient for scan in checkpoints[0]}, key=str)
    losses: dict[tuple[str, str], list[float]] = {(chosen, judge): [] for chosen in CHOOSING for judge in CHOOSING}
    rng = random.Random(0)
    for _ in range(NUM_DIVISIONS):
        half = set(rng.sample(patients, len(patients) // 2))
        here, there = (
            [score_scans([scan for scan in scans if (scan.patient in half) == inside]) for scans in checkpoints]
            for inside in (True, False)
        )
        for (chosen, judge), found in losses.items():
            best = max(range(len(here)), key=lambda place: here[place][chosen])
            found.append(max(one[judge] for one in there) - there[best][judge])
    lines = [
        f"| chosen by, on half of {len(patients)} patients | {' | '.join(f'loss of {one}' for one in CHOOSING)} |"
    ]
    lines.append("|---" * (len(CHOOSING) + 1) + "|")
    for chosen in CHOOSING:
        lines.append(f"| {chosen} | {' | '.join(f'{np.mean(losses[chosen, judge]):.4f}' for judge in CHOOSING)} |")
    return "\n".join(lines)


def tabulate_faults(truths: Sequence[Truth]) -> str:
    """Return how much single faults take from each score of perfect outlines, as a Markdown table."""
    lines = [f"| one fault, {len(truths)} scans | {' | '.join(CHOOSING)} |", "|---" * (len(CHOOSING) + 1) + "|"]
    for name, fault in SINGLE_FAULTS.items():
        scores: Mapping[str, float] = score_scans(predict(truths, [fault], 0))
        lines.append(f"| {name} | {' | '.join(f'{scores[one] - 1:+.3f}' for one in CHOOSING)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.presets", description=__doc__)
    parser.add_argument("--train_csv", type=Path, help="outlines, with the columns width and height or slices beside")
    parser.add_argument("--run_dir", type=Path, help="output folder of a training with all its checkpoints")
    parser.add_argument("--dataset_name", default="gi_tract", help="dataset of the training, as it was divided for it")
    arguments = parser.parse_args()
    if arguments.train_csv:
        truths = read_truths(arguments.train_csv)
        print(tabulate_faults(truths), end="\n\n", flush=True)
        checkpoints = draw_checkpoints(truths)
        print(tabulate_agreement(checkpoints), tabulate_losses(checkpoints), sep="\n\n", flush=True)
    if arguments.run_dir:
        checkpoints = read_checkpoints(arguments.run_dir, arguments.dataset_name)
        print(tabulate_agreement(checkpoints), tabulate_losses(checkpoints), sep="\n\n")


if __name__ == "__main__":
    main()
