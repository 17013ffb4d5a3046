"""Dice from counts of pixels."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

INTERSECTION, PREDICTED, TRUE = range(3)  # the last axis of all counts


def count_pixels(preds: Any, target: Any) -> tuple[Any, Any, Any]:
    """Count what overlap measures need.

    Args:
        preds: Predicted masks, bool, shape `(..., height, width)`; NumPy array or torch tensor.
        target: True masks, same shape and kind.

    Returns:
        Pixels in both, pixels predicted, pixels true; each of shape `(...)`.

    Example:
        >>> import numpy as np
        >>> count_pixels(np.array([[[True, True, False]]]), np.array([[[True, False, False]]]))
        (array([1]), array([2]), array([1]))
    """
    return (preds & target).sum(axis=(-2, -1)), preds.sum(axis=(-2, -1)), target.sum(axis=(-2, -1))


def dice_score(counts: Sequence[int]) -> float:
    """Dice of one organ: twice the common pixels over the pixels of both.

    Args:
        counts: Pixels in both, predicted and true.

    Returns:
        0 to 1; NaN where neither mask has a pixel, since nothing was asked.

    Example:
        >>> dice_score([1, 2, 1]), dice_score([0, 0, 0])
        (0.6666666666666666, nan)
    """
    total = counts[PREDICTED] + counts[TRUE]
    return 2 * counts[INTERSECTION] / total if total else math.nan


def sum_and_number(values: Iterable[float]) -> tuple[float, int]:
    """Sum of the values that are not NaN, the same in any order, and how many they are.

    Example:
        >>> sum_and_number([0.5, math.nan, 1.0])
        (1.5, 2)
    """
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known), len(known)


def nanmean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN, the same in any order; NaN where there are none.

    Example:
        >>> nanmean([1.0, math.nan, 0.5])
        0.75
    """
    total, number = sum_and_number(values)
    return total / number if number else math.nan
