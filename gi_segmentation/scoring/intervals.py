"""How far chance may have moved a score: confidence intervals over patients."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import stats

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.scans import ScanScore, Totals, scores_from_totals, total_patients

Interval: TypeAlias = tuple[float, float]
NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


def find_intervals(
    scans: Sequence[ScanScore],
    rules: CompetitionRules = DEFAULT_RULES,
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
        Lower and upper end for each score of `scores_from_totals`; None where fewer than
        two patients have it.

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
        return scores_from_totals({name: np.tensordot(weights, total, 1) for name, total in of.items()}, rules)

    scores = resample(totals)
    if baseline is not None:
        others = resample(total_patients(baseline))
        scores = {name: values - others[name] for name, values in scores.items() if name in others}
    alone = scores_from_totals(totals, rules)  # of each patient
    return {name: expanded_percentiles(values, alone[name]) for name, values in scores.items()}


def expanded_percentiles(values: np.ndarray, alone: np.ndarray) -> Interval | None:
    """The interval that a score of resampled patients gives; None where fewer than two patients have that score.

    The plain interval lies between the percentiles 2.5 and 97.5, which are the normal distribution's at ±1.96. With n
    patients two things make it too narrow. The variance of resampled scores divides by n, not by n - 1: hence the
    factor sqrt(n / (n - 1)). And their spread is itself an estimate: Student's t with n - 1 degrees of freedom takes
    the place of 1.96. So the percentiles are the normal distribution's at ±r,

        r = sqrt(n / (n - 1)) * t(0.975; n - 1),

    for n = 10 at ±2.38, the percentiles 0.86 and 99.14.
    """
    values, patients = values[~np.isnan(values)], int(np.count_nonzero(~np.isnan(alone)))
    if patients < 2:
        return None
    reach = math.sqrt(patients / (patients - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, patients - 1)
    low, high = np.quantile(values, [stats.norm.cdf(-reach), stats.norm.cdf(reach)])
    return float(low), float(high)
