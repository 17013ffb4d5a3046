"""What one scan adds to the scores, and the scores of many scans.

Every score is a ratio of sums over patients, so that the scores of any patients, drawn anew however often, follow from
a few sums of each.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.schema import LABELS, ORGANS
from gi_segmentation.scoring.competition import DICE_WEIGHT, HAUSDORFF_WEIGHT, normalised_hausdorff
from gi_segmentation.scoring.dice import count_pixels, dice_score, sum_and_number

CLINICAL = "clinical: "  # begins the names of the clinical scores among the totals

Totals: TypeAlias = dict[str, np.ndarray]  # by name, the last axis a sum and a number where a mean is wanted


@dataclass(frozen=True)
class ScanScore:
    """What is known of a scan.

    Attributes:
        patient: Whose it is; chance moves the scans of a patient together.
        name: The scan's own.
        num_slices: How many there are.
        dice_sums: Per organ, the sum of Dice over the slices that have it in either mask.
        dice_numbers: Per organ, how many slices these are.
        volume_dice: Per organ, Dice over the whole scan; NaN where neither mask has it.
        hausdorff: The competition's distance, one or one of each organ; NaN where skipped.
        label_counts: Per label, background first, pixels in both, predicted and true, at the model's resolution:
            shape `(labels, 3)`; None where nothing is known of it.
        clinical: Per organ what `clinical.measure_organ` gives; none where it was not asked for.
    """

    patient: Hashable
    name: Hashable
    num_slices: int
    dice_sums: tuple[float, ...]
    dice_numbers: tuple[int, ...]
    volume_dice: tuple[float, ...]
    hausdorff: tuple[float, ...]
    label_counts: np.ndarray | None = None
    clinical: tuple[dict[str, float], ...] = ()

    @property
    def dice(self) -> float:
        """Mean over slices and organs; NaN where there is nothing to score."""
        number = sum(self.dice_numbers)
        return math.fsum(self.dice_sums) / number if number else math.nan

    @property
    def key(self) -> tuple[int, str, int, str]:
        """What scans are sorted by, so that sums do not depend on the order in which they came: 2 before 10."""
        patient, name = str(self.patient), str(self.name)
        return len(patient), patient, len(name), name


def measure_scan(
    patient: Hashable,
    name: Hashable,
    preds: np.ndarray,
    target: np.ndarray,
    rules: CompetitionRules = DEFAULT_RULES,
    label_counts: np.ndarray | None = None,
    clinical: Sequence[dict[str, float]] = (),
) -> ScanScore:
    """Score a scan.

    Args:
        patient: Whose it is.
        name: Its name.
        preds: Predicted masks, bool, shape `(organs, D, H, W)`.
        target: True masks, same shape.
        rules: Of the competition's distance.
        label_counts: As in `ScanScore`.
        clinical: As in `ScanScore`.

    Raises:
        ValueError: If the shapes differ, or there is no mask of each organ.

    Example:
        >>> target = np.zeros((3, 2, 1, 4), dtype=bool)
        >>> target[0, 0, 0, :2] = target[0, 1, 0, :2] = True
        >>> preds = target.copy()
        >>> preds[0, 1] = False
        >>> scan = measure_scan("case1", "case1_day0", preds, target)
        >>> scan.dice_sums, scan.dice_numbers, scan.dice
        ((1.0, 0.0, 0.0), (2, 0, 0), 0.5)
    """
    if preds.shape != target.shape or preds.ndim != 4 or len(preds) != len(ORGANS):
        raise ValueError(
            f"{name}: expected predicted and true masks of one shape ({len(ORGANS)}, D, H, W), "
            f"but got {preds.shape} and {target.shape}"
        )
    counts = np.stack([np.stack(count_pixels(*organ), axis=-1) for organ in zip(preds, target, strict=True)])
    dice_sums, dice_numbers = zip(*(sum_and_number(map(dice_score, organ)) for organ in counts.tolist()), strict=True)
    if rules.hausdorff_over == "union":
        hausdorff = [normalised_hausdorff(np.any(preds, axis=0), np.any(target, axis=0), rules)]
    else:
        hausdorff = [normalised_hausdorff(*organ, rules) for organ in zip(preds, target, strict=True)]
    return ScanScore(
        patient,
        name,
        num_slices=preds.shape[1],
        dice_sums=dice_sums,
        dice_numbers=dice_numbers,
        volume_dice=tuple(map(dice_score, counts.sum(axis=1).tolist())),
        hausdorff=tuple(hausdorff),
        label_counts=label_counts,
        clinical=tuple(clinical),
    )


def average_patients(scans: Iterable[ScanScore]) -> pd.DataFrame:
    """Mean clinical scores of each patient, each of whose scans counts alike.

    Returns:
        The scores by organ and case. A scan with the organ in neither mask is left out, since nothing was asked; so is
        an undefined score.
    """
    rows = [
        {"organ": organ, "case": scan.patient, **scores}
        for scan in sorted(scans, key=lambda scan: scan.key)
        for organ, scores in zip(ORGANS, scan.clinical, strict=bool(scan.clinical))
        if not math.isnan(scores["volume_dice"])
    ]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).groupby(["organ", "case"]).mean()


def total_patients(scans: Iterable[ScanScore]) -> Totals:
    """What each patient adds to the scores.

    Returns:
        Arrays whose first axis is patients: sums and numbers of slice Dice and of volume Dice, per organ; slices with
        an organ in neither mask, per organ; sum and number of distances; pixels per label; sum and number of each
        clinical score's patient means, per organ.
    """
    scans = sorted(scans, key=lambda scan: scan.key)
    patients = {name: row for row, name in enumerate(dict.fromkeys(scan.patient for scan in scans))}
    totals = {
        "dice": np.zeros((len(patients), len(ORGANS), 2)),
        "empty": np.zeros((len(patients), len(ORGANS), 1)),
        "dice_volume": np.zeros((len(patients), len(ORGANS), 2)),
        "hausdorff": np.zeros((len(patients), 2)),
    }
    if scans and all(scan.label_counts is not None for scan in scans):
        totals["labels"] = np.zeros((len(patients), len(LABELS), 3))
    for scan in scans:
        row = patients[scan.patient]
        totals["dice"][row] += np.column_stack([scan.dice_sums, scan.dice_numbers])
        totals["empty"][row, :, 0] += scan.num_slices - np.array(scan.dice_numbers)
        totals["dice_volume"][row] += [sum_and_number([value]) for value in scan.volume_dice]
        totals["hausdorff"][row] += sum_and_number(scan.hausdorff)
        if "labels" in totals:
            totals["labels"][row] += scan.label_counts
    for name, column in average_patients(scans).items():
        total = totals[f"{CLINICAL}{name}"] = np.zeros((len(patients), len(ORGANS), 2))
        for (organ, patient), value in column.items():
            total[patients[patient], ORGANS.index(organ)] = sum_and_number([value])
    return totals


def divide(total: np.ndarray) -> np.ndarray:
    """Means from sums and numbers on the last axis; NaN where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return total[..., 0] / total[..., 1]


def scores_from_totals(totals: Totals, rules: CompetitionRules) -> dict[str, np.ndarray]:
    """The scores that totals amount to.

    Args:
        totals: From `total_patients`, with patients added up.
        rules: Of the competition's score.

    Returns:
        By name: `dice`, mean over slices and organs; `dice_volume`, mean over scans and organs; both with
        `_{organ}` too; `hausdorff_score`, one minus the mean distance; `competition_dice`, the mean Dice by the
        rules; `competition_score`; `macro_f1_seed` where labels were counted; the clinical scores per organ, means
        over patients, where they were asked for. NaN where there is nothing to score.
    """
    with_empty = rules.both_empty == "perfect"
    competition = totals["dice"] + totals["empty"] if with_empty else totals["dice"]
    scores = {}
    for name in ("dice", "dice_volume"):
        scores[name] = divide(totals[name].sum(axis=-2))
        scores |= {f"{name}_{organ}": divide(totals[name][..., index, :]) for index, organ in enumerate(ORGANS)}
    scores["hausdorff_score"] = 1 - divide(totals["hausdorff"])
    scores["competition_dice"] = divide(competition.sum(axis=-2))
    scores["competition_score"] = (
        DICE_WEIGHT * scores["competition_dice"] + HAUSDORFF_WEIGHT * scores["hausdorff_score"]
    )
    if "labels" in totals:
        counts = totals["labels"]
        scores["macro_f1_seed"] = mean_known(divide(np.stack([2 * counts[..., 0], counts[..., 1:].sum(-1)], axis=-1)))
    for key in [key for key in totals if key.startswith(CLINICAL)]:
        name = key.removeprefix(CLINICAL)
        scores |= {f"{name}_{organ}": divide(totals[key][..., index, :]) for index, organ in enumerate(ORGANS)}
    return scores


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN."""
    known = ~np.isnan(values)
    return divide(np.stack([np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)], axis=-1))


def score_scans(scans: Iterable[ScanScore], rules: CompetitionRules = DEFAULT_RULES) -> dict[str, float]:
    """The scores of scans; see `scores_from_totals`. The same to the last digit, in whichever order they come."""
    totals = {name: np.apply_along_axis(math.fsum, 0, total) for name, total in total_patients(scans).items()}
    return {name: float(score) for name, score in scores_from_totals(totals, rules).items()}
