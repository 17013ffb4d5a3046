"""Confidence intervals of scores: how much a score depends on which patients were scored."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import stats

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.scans import (
    ScanScore,
    Totals,
    find_organs,
    score_scans,
    scores_from_totals,
    total_patients,
)

Interval: TypeAlias = tuple[float, float]
# By score: its value before and after, and the interval of the difference.
Gains: TypeAlias = dict[str, tuple[float, float, Interval | None]]
NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


def find_intervals(
    scans: Sequence[ScanScore],
    rules: CompetitionRules = DEFAULT_RULES,
    baseline: Sequence[ScanScore] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Compute confidence intervals of 95 % by the bootstrap over patients.

    A bootstrap draws patients with replacement, as many as there are, and scores the scans of these patients. This is
    repeated many times. The interval lies between two percentiles of all these scores, see `expanded_percentiles`. It
    shows the chance in the choice of patients. It does not show the chance in training, such as the random start.

    Args:
        scans: The scores of the scans.
        rules: How to read the competition's metric.
        baseline: The scores of another model on the same patients. With it, the intervals are those of the differences
            between the two. Some patients are hard for both models, which widens the interval of each score, but not
            that of the difference.
        num_resamples: How often patients are drawn.
        seed: Seed of the draws.

    Returns:
        Lower and upper end for each score of `scores_from_totals`; None if fewer than two patients have this score.

    Raises:
        ValueError: If the baseline has other patients or other organs.

    Source: Hesterberg, The American Statistician 69 (2015) 371, the expanded percentile interval.

    Example:
        >>> distances = {DEFAULT_RULES.distance: (0.0,)}
        >>> def scan(case, dice):
        ...     return ScanScore(case, case, ("liver",), 1, (dice,), (1,), (dice,), (1,), (1,), distances)
        >>> better, worse = ([scan(case, case / 10 + gain) for case in range(8)] for gain in (0.1, 0.0))
        >>> low, high = find_intervals(better)["dice"]
        >>> low < 0.45 < high
        True
        >>> [round(end, 6) for end in find_intervals(better, baseline=worse)["dice"]]
        [0.1, 0.1]
    """
    if baseline is not None and {scan.patient for scan in scans} != {scan.patient for scan in baseline}:
        raise ValueError("expected scans of the same patients to compare with; score both on the same split")
    organs, totals = find_organs([*scans, *(baseline or ())]), total_patients(scans, rules)
    patients = len(totals["dice"])
    if not patients:
        return {}
    # Each row of `weights` is one draw of n patients with replacement: how often each patient was drawn. Scans of one
    # patient are not independent, so a patient is drawn with all scans or not at all. Shape (resamples, patients).
    weights = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), num_resamples)

    # Every score is a ratio of sums over patients. So no scan is scored again: a draw's sums are the patients' sums
    # times the row of `weights`.
    def resample(of: Totals) -> dict[str, np.ndarray]:
        return scores_from_totals({name: np.tensordot(weights, total, 1) for name, total in of.items()}, organs)

    scores = resample(totals)
    # The baseline has the same draws, so each difference compares the same patients.
    if baseline is not None:
        others = resample(total_patients(baseline, rules))
        scores = {name: values - others[name] for name, values in scores.items() if name in others}
    # The scores of each patient alone. They show how many patients have a score at all: some never show an organ.
    alone = scores_from_totals(totals, organs)
    return {name: expanded_percentiles(values, alone[name]) for name, values in scores.items()}


def compare_scans(
    scans: Sequence[ScanScore], baseline: Sequence[ScanScore], rules: CompetitionRules, names: Sequence[str]
) -> Gains:
    """Compare two predictions of the same scans.

    Args:
        scans: The scores of one prediction.
        baseline: Those of the other one.
        rules: How to read the competition's metric.
        names: The scores to compare.

    Returns:
        For each score the value of the baseline, the value here, and the 95 % interval of their difference.

    Raises:
        ValueError: As `find_intervals`.
    """
    after, before = score_scans(scans, rules), score_scans(baseline, rules)
    # The same patients are drawn for both, so that what makes a patient hard does not widen the interval.
    intervals = find_intervals(scans, rules, baseline=baseline)
    return {name: (before[name], after[name], intervals[name]) for name in names}


def expanded_percentiles(values: np.ndarray, alone: np.ndarray) -> Interval | None:
    """Return the expanded percentile interval of a score.

    The plain interval lies between the percentiles 2.5 and 97.5. These belong to -1.96 and +1.96 of the normal
    distribution. With n patients, this interval is too narrow for two reasons:

    - Resampled scores have a variance with n in the denominator, and not n - 1. The factor sqrt(n / (n - 1)) corrects
      this.
    - The spread is itself an estimate from n patients. So Student's t with n - 1 degrees of freedom replaces 1.96.

    The percentiles are therefore those of the normal distribution at -r and +r, with

        r = sqrt(n / (n - 1)) * t(0.975; n - 1).

    For n = 10, r is 2.38, and the percentiles are 0.86 and 99.14.

    Args:
        values: The score of each draw, shape `(resamples,)`.
        alone: The score of each patient alone, shape `(patients,)`; NaN if the patient has none.

    Returns:
        Lower and upper end; None if fewer than two patients have the score.
    """
    # A draw may by chance hold no patient with the organ. Its score is NaN and is left out.
    values, patients = values[~np.isnan(values)], int(np.count_nonzero(~np.isnan(alone)))
    if patients < 2:
        return None
    reach = math.sqrt(patients / (patients - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, patients - 1)
    low, high = np.quantile(values, [stats.norm.cdf(-reach), stats.norm.cdf(reach)])
    return float(low), float(high)
