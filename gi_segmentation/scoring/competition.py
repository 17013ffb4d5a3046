"""The competition's Hausdorff distance and the weights of its score."""

import math

import numpy as np

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.surface import crop_to_both, find_surface, greatest_distance

DICE_WEIGHT, HAUSDORFF_WEIGHT = 0.4, 0.6
MAX_SIZE_RATIO = 10


def normalised_hausdorff(preds: np.ndarray, target: np.ndarray, rules: CompetitionRules = DEFAULT_RULES) -> float:
    """Normalised Hausdorff distance of two volumes.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: True mask, same shape.
        rules: What to measure.

    Returns:
        0 to 1; NaN where the rules skip.

    Raises:
        ValueError: If the shapes differ.

    Source: mle-bench, `grade.py` of uw-madison-gi-tract-image-segmentation.

    Example:
        >>> target, preds = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> target[0, 0, 0] = preds[0, 0, 2] = True
        >>> round(normalised_hausdorff(preds, target) * math.sqrt(3), 6)  # two of four pixels apart
        0.5
    """
    if preds.shape != target.shape:
        raise ValueError(f"expected volumes of one shape, but got {preds.shape} and {target.shape}")
    shape = np.array(preds.shape)
    preds, target = crop_to_both(preds, target)
    num_preds, num_target = np.count_nonzero(preds), np.count_nonzero(target)
    if not num_preds and not num_target:
        return 0.0 if rules.both_empty == "perfect" else math.nan
    if not num_preds or not num_target:
        return 1.0 if rules.one_empty == "worst" else math.nan
    if rules.oversized == "worst" and num_preds > MAX_SIZE_RATIO * num_target:
        return 1.0
    if rules.normaliser == "unit_cube":
        spacing, diagonal = tuple(1 / shape), math.sqrt(3)
    else:
        spacing, diagonal = (1.0, 1.0, 1.0), math.sqrt((shape**2).sum())
    if rules.points == "surface":
        preds, target = find_surface(preds), find_surface(target)
    ways = [(preds, target), (target, preds)] if rules.direction == "symmetric" else [(preds, target)]
    return max(greatest_distance(*way, spacing) for way in ways) / diagonal
