"""Measure how often a 95 % interval over patients contains the true mean.

Each trial draws a Dice for each patient from a known distribution, and computes our interval from these numbers alone.
The coverage is the share of trials in which the interval contains the known mean. It should be 0.95. Intervals from
plain percentiles of the same resampled means are measured beside ours.
"""

import argparse
import math

import numpy as np
from scipy import stats
from tqdm import trange

from gi_segmentation.rules import DEFAULT_RULES
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import ScanScore

PATIENTS = (4, 6, 10, 17, 50)
# The distribution of Dice over patients: mean 0.8, standard deviation 0.12, and a tail of bad patients.
DICE = stats.beta(8, 2)
NUM_RESAMPLES = 2000
NO_DISTANCE = {DEFAULT_RULES.distance: (math.nan,)}


def holds(dice: np.ndarray, seed: int) -> tuple[bool, bool]:
    """Return whether our interval, and the interval of plain percentiles, contain the true mean.

    Args:
        dice: Dice of each patient, shape `(patients,)`.
        seed: Seed of the resampling.
    """
    # One patient is one scan with one slice, and only the first organ counts. So the interval is that of a plain mean.
    scans = [
        ScanScore(patient, "scan", ("organ",), 1, (value,), (1,), (value,), (1,), (1,), NO_DISTANCE)
        for patient, value in enumerate(dice.tolist())
    ]
    low, high = find_intervals(scans, num_resamples=NUM_RESAMPLES, seed=seed)["dice"] or (math.nan, math.nan)
    # A bootstrap resample draws as many patients as there are, with replacement. Row r of the weights says how often
    # each patient was drawn, so the product with `dice` gives the means of all resamples.
    weights = np.random.default_rng(seed).multinomial(len(dice), np.full(len(dice), 1 / len(dice)), NUM_RESAMPLES)
    plain = np.quantile(weights @ dice / len(dice), [0.025, 0.975])
    return low <= DICE.mean() <= high, plain[0] <= DICE.mean() <= plain[1]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="number of draws for each number of patients")
    arguments = parser.parse_args()
    print("| patients | ours | plain percentiles |\n|---|---|---|")
    rng = np.random.default_rng(0)
    for number in PATIENTS:
        held = [holds(DICE.rvs(number, random_state=rng), trial) for trial in trange(arguments.trials, leave=False)]
        ours, plain = np.mean(held, axis=0)
        print(f"| {number} | {ours:.3f} | {plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
