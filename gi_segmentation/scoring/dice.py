"""Dice from counts of pixels.

For the predicted pixels P and the true pixels T of an organ,

    Dice = 2 |P and T| / (|P| + |T|).

Three counts are all that it needs. Counts of a scan's slices add up to the counts of its volume, so masks need not be
kept.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

# The order of the counts, on the last axis of every array of counts.
INTERSECTION, PREDICTED, TRUE = range(3)


def count_pixels(preds: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Count the pixels of masks and of their overlap.

    Args:
        preds: Predicted masks, bool, shape `(..., height, width)`.
        target: True masks, same shape.

    Returns:
        For each mask, the numbers of pixels in both masks, in `preds` and in `target`: int64, shape `(..., 3)`.

    Example:
        >>> count_pixels(np.array([[[True, True, False]]]), np.array([[[True, False, False]]]))
        array([[1, 2, 1]])
    """
    # Mask by mask, because a sum along axes takes four times as long.
    size, count = preds.shape[-2:], np.count_nonzero
    pairs = zip(preds.reshape(-1, *size), target.reshape(-1, *size), strict=True)
    counts = [(count(first & second), count(first), count(second)) for first, second in pairs]
    return np.array(counts, dtype=np.int64).reshape(*preds.shape[:-2], 3)


def dice_score(counts: Sequence[int]) -> float:
    """Return the Dice of one organ: twice the common pixels, divided by the pixels of both masks.

    Args:
        counts: Pixels in both masks, in the prediction and in the truth.

    Returns:
        0 to 1; NaN if both masks are empty.

    Example:
        >>> dice_score([1, 2, 1]), dice_score([0, 0, 0])
        (0.6666666666666666, nan)
    """
    # 0 / 0 has no value. A Dice of 1 for two empty masks would raise the mean by slices that show nothing.
    total = counts[PREDICTED] + counts[TRUE]
    return 2 * counts[INTERSECTION] / total if total else math.nan


def sum_and_number(values: Iterable[float]) -> tuple[float, int]:
    """Return the sum of the values that are not NaN, and their number.

    Example:
        >>> sum_and_number([0.5, math.nan, 1.0])
        (1.5, 2)
    """
    # `math.fsum` rounds once, at the end. So the sum has the same bits for any order of slices and processes.
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known), len(known)


def nanmean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN, or NaN if all of them are.

    Example:
        >>> nanmean([1.0, math.nan, 0.5])
        0.75
    """
    total, number = sum_and_number(values)
    return total / number if number else math.nan
