"""The scores of one scan, and of many scans.

The way from masks to scores has three steps:

    compare_masks         masks of a scan    -> ScanScore, a few numbers
    total_patients        all ScanScores     -> sums for each patient
    scores_from_totals    sums               -> scores

Every score is a ratio of two sums over patients, such as the sum of Dice over the number of pairs of slice and organ.
Two things follow from this. Processes can measure scans on their own, and their results are only added up. And
confidence intervals can draw patients thousands of times without a look at the masks.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

from gi_segmentation.rules import DEFAULT_RULES, PRESETS, CompetitionRules
from gi_segmentation.scoring.competition import DICE_WEIGHT, HAUSDORFF_WEIGHT, judge_distance, measure_distances
from gi_segmentation.scoring.dice import INTERSECTION, PREDICTED, TRUE, count_pixels, dice_score, sum_and_number

# Prefix of the clinical scores' names among the totals. `clinical.py` decides which scores there are.
CLINICAL = "clinical: "

# Sums by the name of a score. If the score is a mean, the last axis has two elements: the sum of values, their number.
Totals: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class ScanScore:
    """The scores of one scan.

    Attributes:
        patient: Name or number of the patient.
        name: Name of the scan.
        organs: Names of the organs. Everything that is per organ has their order.
        num_slices: Number of its slices.
        dice_sums: Per organ, the sum of Dice over the slices with the organ in the prediction, the truth or both.
        dice_numbers: Per organ, the number of these slices.
        volume_dice: Per organ, Dice over the whole scan; NaN if neither mask has the organ.
        preds_slices: Per organ, the number of slices with the organ in the prediction.
        target_slices: Per organ, the number of slices with the organ in the truth.
        distances: The competition's distance for each way to measure it, see `competition.measure_distances`. What
            empty masks count is not settled here, see `hausdorff`.
        label_counts: Per label, with the background first, the pixels in both masks, predicted and true, at the size
            of the model's input: shape `(labels, 3)`; None if they were not counted.
        clinical: Per organ, the scores of `clinical.compare_organ`, which are empty for an unknown organ; empty if
            they were not measured.
        unknown: Organs that nobody has drawn on this scan, although it may show them. They have no part in any score.
    """

    patient: Hashable
    name: Hashable
    organs: tuple[str, ...]
    num_slices: int
    dice_sums: tuple[float, ...]
    dice_numbers: tuple[int, ...]
    volume_dice: tuple[float, ...]
    preds_slices: tuple[int, ...]
    target_slices: tuple[int, ...]
    distances: Mapping[str, tuple[float, ...]]
    label_counts: np.ndarray | None = None
    clinical: tuple[dict[str, float], ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def known(self) -> list[bool]:
        """Whether each organ is known."""
        return [organ not in self.unknown for organ in self.organs]

    @property
    def dice(self) -> float:
        """Mean Dice over slices and organs; NaN if all of them are empty in both masks."""
        number = sum(self.dice_numbers)
        return math.fsum(self.dice_sums) / number if number else math.nan

    def hausdorff(self, rules: CompetitionRules) -> tuple[float, ...]:
        """Return the competition's distance: one of all organs together, or one per organ; NaN if it is left out.

        Raises:
            ValueError: If the scan was not measured in this way.
        """
        if rules.distance not in self.distances:
            raise ValueError(f"{self.name}: expected a distance {rules.distance!r}, but it has {list(self.distances)}")
        # Whether the prediction, the truth and the annotators have anything: of all organs together, or of each.
        sides = [[bool(number) for number in self.preds_slices], [bool(number) for number in self.target_slices]]
        sides.append(self.known)
        if rules.hausdorff_over == "union":
            sides = [[any(side)] for side in sides]
        # Two empty masks of an unknown organ are no agreement.
        return tuple(
            judge_distance(distance, has_preds, has_target, rules) if knows else math.nan
            for distance, has_preds, has_target, knows in zip(self.distances[rules.distance], *sides, strict=True)
        )

    def competition_dice(self, rules: CompetitionRules) -> np.ndarray:
        """Return the sum of Dice and the number of slices that count in the competition, shape `(organs, 2)`."""
        dice = np.column_stack([self.dice_sums, self.dice_numbers])
        if rules.target_empty_slices == "ignored":
            # A slice without the organ in the truth has a Dice of 0, so it is in the number only.
            dice[:, 1] = self.target_slices
        elif rules.both_empty == "perfect":
            # Each slice that is empty in both masks adds a Dice of 1 to the sum, and 1 to the number.
            dice += ((self.num_slices - np.array(self.dice_numbers)) * self.known)[:, None]
        if rules.target_empty_scans == "ignored":
            drawn = [bool(number) for number in self.target_slices]
            dice *= np.array([any(drawn)] if rules.hausdorff_over == "union" else drawn)[:, None]
        return dice

    @property
    def key(self) -> tuple[int, str, int, str]:
        """Key to sort scans, so that sums do not depend on the order in which scans were measured."""
        # Shorter names come first. Sorted as text alone, case10 would come before case2.
        patient, name = str(self.patient), str(self.name)
        return len(patient), patient, len(name), name


def compare_masks(
    patient: Hashable,
    name: Hashable,
    organs: Sequence[str],
    preds: np.ndarray,
    target: np.ndarray,
    rules: CompetitionRules = DEFAULT_RULES,
    label_counts: np.ndarray | None = None,
    clinical: Sequence[dict[str, float]] = (),
    unknown: Collection[str] = (),
    presets: bool = False,
) -> ScanScore:
    """Score a scan.

    Args:
        patient: Name or number of the patient.
        name: Name of the scan.
        organs: Names of the organs.
        preds: Predicted masks, bool, shape `(organs, D, H, W)`.
        target: True masks, same shape.
        rules: How to measure the competition's distance.
        label_counts: As in `ScanScore`.
        clinical: As in `ScanScore`.
        unknown: Organs that are not known in this scan. What these masks hold of them has no effect.
        presets: Whether to measure the distances of all presets too, so that the scan can be scored by each of them.

    Raises:
        ValueError: If the shapes differ, or do not have a mask for each organ.

    Example:
        >>> target = np.zeros((2, 2, 1, 4), dtype=bool)
        >>> target[0, 0, 0, :2] = target[0, 1, 0, :2] = True
        >>> preds = target.copy()
        >>> preds[0, 1] = False
        >>> scan = compare_masks("case1", "case1_day0", ("liver", "spleen"), preds, target)
        >>> scan.dice_sums, scan.dice_numbers, scan.dice
        ((1.0, 0.0), (2, 0), 0.5)
    """
    if preds.shape != target.shape or preds.ndim != 4 or len(preds) != len(organs):
        raise ValueError(
            f"{name}: expected predicted and true masks of one shape ({len(organs)}, D, H, W), "
            f"but got {preds.shape} and {target.shape}"
        )
    known = np.array([organ not in unknown for organ in organs])
    if unknown:
        preds, target = (masks & known[:, None, None, None] for masks in (preds, target))
        clinical = [scores if knows else {} for scores, knows in zip(clinical, known, strict=bool(clinical))]
        # The background stays: `count_labels` takes predicted pixels of an unknown organ for background.
        label_counts = None if label_counts is None else label_counts * np.array([True, *known])[:, None]
    # Shape (organs, D, 3): the counts of every slice. Their sum over the slices gives the Dice of the volume below.
    counts = count_pixels(preds, target)
    dice_sums, dice_numbers = zip(*(sum_and_number(map(dice_score, organ)) for organ in counts.tolist()), strict=True)
    return ScanScore(
        patient,
        name,
        tuple(organs),
        num_slices=preds.shape[1],
        dice_sums=dice_sums,
        dice_numbers=dice_numbers,
        volume_dice=tuple(map(dice_score, counts.sum(axis=1).tolist())),
        preds_slices=tuple(np.count_nonzero(counts[..., PREDICTED], axis=1).tolist()),
        target_slices=tuple(np.count_nonzero(counts[..., TRUE], axis=1).tolist()),
        distances=measure_distances(preds, target, [rules, *(PRESETS.values() if presets else ())]),
        label_counts=label_counts,
        clinical=tuple(clinical),
        unknown=tuple(organ for organ in organs if organ in unknown),
    )


def find_organs(scans: Sequence[ScanScore]) -> tuple[str, ...]:
    """Return the organs of scans; none if there are no scans.

    Raises:
        ValueError: If the scans do not have the same organs.
    """
    if len({scan.organs for scan in scans}) > 1:
        raise ValueError("expected scans with the same organs; score them with one label set")
    return scans[0].organs if scans else ()


def count_known_scans(scans: Sequence[ScanScore]) -> dict[str, int]:
    """Return for each organ the number of scans in which it is known."""
    return {organ: sum(organ not in scan.unknown for scan in scans) for organ in find_organs(scans)}


def average_patients(scans: Iterable[ScanScore]) -> pd.DataFrame:
    """Average the clinical scores over the scans of each patient.

    Returns:
        A table with a row per organ and patient and a column per score. A scan without the organ in both masks is left
        out, and so is a score that is NaN.
    """
    # The mean over patients is taken later, of these means. If all scans went into one mean, a patient with five scans
    # would count five times as much as a patient with one, although the five are much alike.
    rows = [
        {"organ": organ, "case": scan.patient, **scores}
        for scan in sorted(scans, key=lambda scan: scan.key)
        # Without clinical scores `clinical` is empty, and shorter than `organs`: this gives no rows.
        for organ, scores in zip(scan.organs, scan.clinical, strict=bool(scan.clinical))
        # An unknown organ has no scores.
        if not math.isnan(scores.get("volume_dice", math.nan))
    ]
    if not rows:
        return pd.DataFrame()
    # pandas leaves NaN out of a mean.
    return pd.DataFrame(rows).groupby(["organ", "case"]).mean()


def measured_presets(scans: Collection[ScanScore]) -> dict[str, CompetitionRules]:
    """Return all presets by name if all scans were measured by all of them, else nothing."""
    ways = {rules.distance for rules in PRESETS.values()}
    measured = scans and all(ways <= scan.distances.keys() for scan in scans)
    return {str(name): rules for name, rules in PRESETS.items()} if measured else {}


def total_patients(scans: Iterable[ScanScore], rules: CompetitionRules = DEFAULT_RULES) -> Totals:
    """Add up the scans of each patient.

    Args:
        scans: The scans, in any order.
        rules: How to read the competition's metric.

    Returns:
        Arrays with patients on the first axis:

        - `dice`, `dice_volume`: sum and number of slice Dice and of volume Dice, shape `(patients, organs, 2)`;
        - `competition_dice`: the same for slice Dice according to the rules, shape `(patients, organs, 2)`;
        - `hausdorff`: sum and number of distances according to the rules, shape `(patients, 2)`;
        - `competition_dice_{preset}` and `hausdorff_{preset}`: the same for each preset, if all scans were measured
          by all presets;
        - `labels`, if all scans have them: counts of pixels, shape `(patients, labels, 3)`;
        - each clinical score, with `CLINICAL` before it: the patient's mean and 1, or 0 and 0 if the patient
          does not have the score, shape `(patients, organs, 2)`.
    """
    scans = sorted(scans, key=lambda scan: scan.key)
    organs = find_organs(scans)
    # Row of each patient in the arrays.
    patients = {name: row for row, name in enumerate(dict.fromkeys(scan.patient for scan in scans))}
    totals = {
        "dice": np.zeros((len(patients), len(organs), 2)),
        "dice_volume": np.zeros((len(patients), len(organs), 2)),
    }
    # The scores by the rules asked for have no ending; those by a preset have its name.
    readings = {"": rules, **{f"_{name}": preset for name, preset in measured_presets(scans).items()}}
    for ending in readings:
        totals[f"competition_dice{ending}"] = np.zeros((len(patients), len(organs), 2))
        totals[f"hausdorff{ending}"] = np.zeros((len(patients), 2))
    if scans and all(scan.label_counts is not None for scan in scans):
        totals["labels"] = np.zeros((len(patients), 1 + len(organs), 3))
    for scan in scans:
        row = patients[scan.patient]
        totals["dice"][row] += np.column_stack([scan.dice_sums, scan.dice_numbers])
        totals["dice_volume"][row] += [sum_and_number([value]) for value in scan.volume_dice]
        for ending, reading in readings.items():
            totals[f"competition_dice{ending}"][row] += scan.competition_dice(reading)
            totals[f"hausdorff{ending}"][row] += sum_and_number(scan.hausdorff(reading))
        if "labels" in totals:
            totals["labels"][row] += scan.label_counts
    for name, column in average_patients(scans).items():
        total = totals[f"{CLINICAL}{name}"] = np.zeros((len(patients), len(organs), 2))
        for (organ, patient), value in column.items():
            total[patients[patient], organs.index(organ)] = sum_and_number([value])
    return totals


def divide(total: np.ndarray) -> np.ndarray:
    """Return means from sums and numbers on the last axis; NaN if the number is 0."""
    # NumPy warns about 0 / 0. Here the NaN that it gives is the answer.
    with np.errstate(invalid="ignore", divide="ignore"):
        return total[..., 0] / total[..., 1]


def scores_from_totals(totals: Totals, organs: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute the scores from sums.

    Args:
        totals: From `total_patients`, added up over patients. The first axis may also hold many such sums, or single
            patients; the scores then have this axis too.
        organs: Names of the organs.

    Returns:
        Scores by name; NaN if there is nothing to score:

        - `dice`: mean over slices and organs, and `dice_{organ}`;
        - `dice_volume`: mean over scans and organs, and `dice_volume_{organ}`;
        - `hausdorff_score`: 1 minus the mean distance;
        - `competition_dice`: mean Dice according to the rules;
        - `competition_score`: 0.4 Dice plus 0.6 Hausdorff score, according to the rules;
        - `hausdorff_score_{preset}`, `competition_dice_{preset}`, `competition_score_{preset}`: the same three for
          each preset, if all scans were measured by all presets;
        - `macro_f1_seed`: the score of the original project, if labels were counted;
        - `{score}_{organ}`: the clinical scores, means over patients, if they were measured.
    """
    scores = {}
    # The axis before the last is organs. Without its sum, the mean is of one organ. With it, every pair of slice and
    # organ counts alike, so an organ in many slices weighs more than an organ in few.
    for name in ("dice", "dice_volume"):
        scores[name] = divide(totals[name].sum(axis=-2))
        scores |= {f"{name}_{organ}": divide(totals[name][..., index, :]) for index, organ in enumerate(organs)}
    for ending in [name.removeprefix("hausdorff") for name in totals if name.startswith("hausdorff")]:
        hausdorff = 1 - divide(totals[f"hausdorff{ending}"])
        dice = divide(totals[f"competition_dice{ending}"].sum(axis=-2))
        scores[f"hausdorff_score{ending}"], scores[f"competition_dice{ending}"] = hausdorff, dice
        scores[f"competition_score{ending}"] = DICE_WEIGHT * dice + HAUSDORFF_WEIGHT * hausdorff
    # F1 of a label is 2 TP / (2 TP + FP + FN), which is the same as Dice: 2 TP over the pixels predicted and true.
    if "labels" in totals:
        common, both = totals["labels"][..., INTERSECTION], totals["labels"][..., PREDICTED:].sum(axis=-1)
        scores["macro_f1_seed"] = mean_over_labels(divide(np.stack([2 * common, both], axis=-1)))
    for key in [key for key in totals if key.startswith(CLINICAL)]:
        name = key.removeprefix(CLINICAL)
        scores |= {f"{name}_{organ}": divide(totals[key][..., index, :]) for index, organ in enumerate(organs)}
    return scores


def mean_over_labels(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis, without labels whose value is NaN."""
    # `numpy.nanmean` would warn if all labels of a draw are NaN.
    known = ~np.isnan(values)
    return divide(np.stack([np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)], axis=-1))


def add_patients(total: np.ndarray) -> np.ndarray:
    """Return the sums over the first axis."""
    # As in `dice.sum_and_number`, `fsum` gives the same bits in any order of patients.
    shape = total.shape[1:]
    return np.array([math.fsum(values) for values in total.reshape(len(total), math.prod(shape)).T]).reshape(shape)


def score_scans(scans: Iterable[ScanScore], rules: CompetitionRules = DEFAULT_RULES) -> dict[str, float]:
    """Compute the scores of scans, see `scores_from_totals`. The order of the scans does not change them."""
    scans = list(scans)
    totals = {name: add_patients(total) for name, total in total_patients(scans, rules).items()}
    return {name: float(score) for name, score in scores_from_totals(totals, find_organs(scans)).items()}
