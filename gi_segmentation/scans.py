"""From scans to scores: what one scan adds, the scores of many, and how far chance may have moved them.

Every score is a ratio of sums over patients, so that the scores of any patients, drawn anew however often, follow from
a few sums of each.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from .competition import DICE_WEIGHT, HAUSDORFF_WEIGHT, PRESETS, CompetitionRules, hausdorff_distance
from .dice import count_pixels, dice_score, sum_and_number
from .schema import LABELS, ORGANS

# Relative imports, as metrics.py says.

Totals: TypeAlias = dict[str, np.ndarray]  # by name, the last axis a sum and a number where a mean is wanted
Interval: TypeAlias = tuple[float, float]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


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
        clinical: Per organ what `clinical.score_organ` gives; none where it was not asked for.
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


def score_scan(
    patient: Hashable,
    name: Hashable,
    preds: np.ndarray,
    target: np.ndarray,
    rules: CompetitionRules = PRESETS["mle_bench"],
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
        >>> scan = score_scan("case1", "case1_day0", preds, target)
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
        hausdorff = [hausdorff_distance(np.any(preds, axis=0), np.any(target, axis=0), rules)]
    else:
        hausdorff = [hausdorff_distance(*organ, rules) for organ in zip(preds, target, strict=True)]
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


def tabulate_scans(scans: Iterable[ScanScore]) -> pd.DataFrame:
    """All that is known of each scan, a row per scan and organ.

    Returns:
        Columns `case`, `scan`, `organ`, `slices`, `dice` (mean over the slices that have the organ in either mask, of
        which there are `dice_slices`), `volume_dice`, `hausdorff` (the competition's; where it is of all organs
        together, it stands in each row), and those of `clinical.score_organ` where they were asked for.
    """
    rows = []
    for scan in sorted(scans, key=lambda scan: scan.key):
        for index, organ in enumerate(ORGANS):
            number = scan.dice_numbers[index]
            rows.append(
                {
                    "case": scan.patient,
                    "scan": scan.name,
                    "organ": organ,
                    "slices": scan.num_slices,
                    "dice": scan.dice_sums[index] / number if number else math.nan,
                    "dice_slices": number,
                    "volume_dice": scan.volume_dice[index],
                    "hausdorff": scan.hausdorff[index if len(scan.hausdorff) > 1 else 0],
                    **(scan.clinical[index] if scan.clinical else {}),
                }
            )
    return pd.DataFrame(rows)


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
        totals[str(name)] = np.zeros((len(patients), len(ORGANS), 2))
        for (organ, patient), value in column.items():
            totals[str(name)][patients[patient], ORGANS.index(organ)] = sum_and_number([value])
    return totals


def divide(total: np.ndarray) -> np.ndarray:
    """Means from sums and numbers on the last axis; NaN where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return total[..., 0] / total[..., 1]


def scores_of(totals: Totals, rules: CompetitionRules) -> dict[str, np.ndarray]:
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
    for name in [name for name in totals if name not in ("dice", "empty", "dice_volume", "hausdorff", "labels")]:
        scores |= {f"{name}_{organ}": divide(totals[name][..., index, :]) for index, organ in enumerate(ORGANS)}
    return scores


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the values that are not NaN."""
    known = ~np.isnan(values)
    return divide(np.stack([np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)], axis=-1))


def score_scans(scans: Iterable[ScanScore], rules: CompetitionRules = PRESETS["mle_bench"]) -> dict[str, float]:
    """The scores of scans; see `scores_of`. The same to the last digit, in whichever order they come."""
    totals = {name: np.apply_along_axis(math.fsum, 0, total) for name, total in total_patients(scans).items()}
    return {name: float(score) for name, score in scores_of(totals, rules).items()}


def find_intervals(
    scans: Sequence[ScanScore],
    rules: CompetitionRules = PRESETS["mle_bench"],
    baseline: Sequence[ScanScore] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Confidence intervals of 95 %: how far the scores move with who happened to be among the patients.

    Patients are drawn with replacement, as many as there are and with all their scans, and scored; the interval lies
    between two percentiles of these scores. As few patients make it too narrow, the percentiles are set farther apart
    than 2.5 and 97.5, by Student's t and the root of n / (n - 1). What chance does in training is not in it.

    Args:
        scans: What was scored.
        rules: Of the competition's score.
        baseline: What the scores are compared with, of the same patients: the intervals are then of the differences,
            which are much narrower than the scores' own where both find the same patients hard.
        num_resamples: How often patients are drawn.
        seed: Of the draws.

    Returns:
        Lower and upper end for each score of `scores_of`; None where there are fewer than two patients to score.

    Raises:
        ValueError: If the baseline has other patients.

    Source: Hesterberg, The American Statistician 69 (2015) 371, the expanded percentile interval.

    Example:
        >>> nan = math.nan
        >>> scan = lambda case, dice: ScanScore(case, case, 1, (dice, 0, 0), (1, 0, 0), (dice, nan, nan), (0,))
        >>> better, worse = ([scan(case, case / 10 + gain) for case in range(8)] for gain in (0.1, 0.0))
        >>> low, high = find_intervals(better)["dice"]
        >>> low < 0.45 < high
        True
        >>> [round(end, 6) for end in find_intervals(better, baseline=worse)["dice"]]
        [0.1, 0.1]
    """
    if baseline is not None and {scan.patient for scan in scans} != {scan.patient for scan in baseline}:
        raise ValueError("expected scans of the same patients to compare with; score both on the same split")
    totals = total_patients(scans)
    patients = len(totals["dice"])
    if not patients:
        return {}
    weights = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), num_resamples)

    def resample(of: Totals) -> dict[str, np.ndarray]:
        return scores_of({name: np.tensordot(weights, total, 1) for name, total in of.items()}, rules)

    scores = resample(totals)
    if baseline is not None:
        others = resample(total_patients(baseline))
        scores = {name: values - others[name] for name, values in scores.items() if name in others}
    alone = scores_of(totals, rules)  # of each patient
    return {name: expanded_percentiles(values, alone[name]) for name, values in scores.items()}


def expanded_percentiles(values: np.ndarray, alone: np.ndarray) -> Interval | None:
    """The interval that a score of resampled patients gives; None where fewer than two patients have that score."""
    values, patients = values[~np.isnan(values)], int(np.count_nonzero(~np.isnan(alone)))
    if patients < 2:
        return None
    reach = math.sqrt(patients / (patients - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, patients - 1)
    low, high = np.quantile(values, [stats.norm.cdf(-reach), stats.norm.cdf(reach)])
    return float(low), float(high)


def describe_clinical(scans: Sequence[ScanScore]) -> dict[str, Any]:
    """The clinical scores of patients: how they lie, and how sure their mean is.

    Args:
        scans: With clinical scores, all or some of them.

    Returns:
        `scores`: by name and organ the `mean` and `sd` (n − 1) over `patients`, and the mean's `interval`; None where
        there is none. `scans`: how many were measured. `one_sided`: per organ how many of them have it in one mask
        only, and thus no distance.
    """
    measured = [scan for scan in scans if scan.clinical]
    patients, intervals = average_patients(measured), find_intervals(measured)
    known = set(patients.index.get_level_values("organ")) if len(patients) else set()
    return {
        "scores": {
            str(name): {
                organ: describe_values(patients.loc[organ, name].dropna().tolist(), intervals[f"{name}_{organ}"])
                for organ in ORGANS
                if organ in known
            }
            for name in patients.columns
        },
        "scans": len(measured),
        "one_sided": {
            organ: sum(math.isnan(scan.clinical[index]["hausdorff_mm"]) for scan in measured)
            for index, organ in enumerate(ORGANS)
        },
    }


def describe_values(values: Sequence[float], interval: Interval | None) -> dict[str, Any]:
    """Mean, standard deviation and number of patients' scores; None where they have none."""
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "patients": len(values),
        "interval": interval,
    }


def format_interval(interval: Sequence[float] | None, form: str) -> str:
    """An interval in brackets, after a blank; nothing where there is none.

    Example:
        >>> format_interval((0.81, 0.9), ".3f"), format_interval(None, ".3f")
        (' [0.810, 0.900]', '')
    """
    return "" if interval is None else f" [{', '.join(format(end, form) for end in interval)}]"


def format_clinical(described: dict[str, Any]) -> str:
    """A Markdown table of the clinical scores, a column per organ.

    Args:
        described: From `describe_clinical`.
    """
    scores = described["scores"]
    organs = [organ for organ in ORGANS if any(organ in by_organ for by_organ in scores.values())]
    head = "mean ± SD over patients [95 % interval of the mean]"
    lines = [f"| {head} | " + " | ".join(organ.replace("_", " ") for organ in organs) + " |"]
    lines.append("|---" * (len(organs) + 1) + "|")
    patients = [max(by_organ[organ]["patients"] for by_organ in scores.values()) for organ in organs]
    for name, by_organ in scores.items():
        form = ".1f" if name.endswith(("_mm", "_ml")) else ".3f"
        cells: list[str] = []
        for one in (by_organ[organ] for organ in organs):
            spread = "" if one["sd"] is None else f" ± {one['sd']:{form}}"
            mean = "none" if one["mean"] is None else f"{one['mean']:{form}}"
            fewer = f" ({one['patients']} patients)" if 0 < one["patients"] < patients[len(cells)] else ""
            cells.append(f"{mean}{spread}{format_interval(one['interval'], form)}{fewer}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| patients | {' | '.join(map(str, patients))} |")
    one_sided = [str(described["one_sided"][organ]) for organ in organs]
    lines.append(f"| scans with it in one mask only | {' | '.join(one_sided)} |")
    return "\n".join(lines)
