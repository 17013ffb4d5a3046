"""How often a 95 % interval over patients holds the true mean, by their number; beside plain percentiles."""

import argparse
import math

import numpy as np
from scipy import stats
from tqdm import trange

from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import ScanScore

PATIENTS = (4, 6, 10, 17, 50)
DICE = stats.beta(8, 2)  # of patients: mean 0.8, standard deviation 0.12, a tail of bad ones
NUM_RESAMPLES = 2000


def holds(dice: np.ndarray, seed: int) -> tuple[bool, bool]:
    """Whether our interval, and that between the plain percentiles of the same draws, hold the true mean."""
    scans = [
        ScanScore(patient, "scan", 1, (value, 0, 0), (1, 0, 0), (value, math.nan, math.nan), (math.nan,))
        for patient, value in enumerate(dice.tolist())
    ]
    low, high = find_intervals(scans, num_resamples=NUM_RESAMPLES, seed=seed)["dice"] or (math.nan, math.nan)
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
