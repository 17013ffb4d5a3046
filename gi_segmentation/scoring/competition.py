"""The competition's Hausdorff distance, and the weights of its score.

    competition score = 0.4 * mean Dice + 0.6 * (1 - mean normalised Hausdorff distance)

The mean Dice is over slices and organs, the mean distance over scans. `gi_segmentation.rules` lists what this formula
leaves open.
"""

import math

import numpy as np

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.surface import count_voxels, find_surface, greatest_distance, pack_both

# From the competition's evaluation page.
DICE_WEIGHT, HAUSDORFF_WEIGHT = 0.4, 0.6
# From mle-bench, which does not measure a prediction with more than ten times the pixels of the truth.
MAX_SIZE_RATIO = 10


def normalised_hausdorff(preds: np.ndarray, target: np.ndarray, rules: CompetitionRules = DEFAULT_RULES) -> float:
    """Return the normalised Hausdorff distance of two volumes.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: True mask, same shape.
        rules: How to measure, see `CompetitionRules`.

    Returns:
        0 to 1; NaN if the rules leave the volume out of the mean.

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
    # Distances are normalised by the shape of the whole volume, so it is noted before the masks are cropped.
    shape = np.array(preds.shape)
    preds, target = pack_both(preds, target)
    num_preds, num_target = count_voxels(preds), count_voxels(target)
    if not num_preds and not num_target:
        return 0.0 if rules.both_empty == "perfect" else math.nan
    if not num_preds or not num_target:
        return 1.0 if rules.one_empty == "worst" else math.nan
    if rules.oversized == "worst" and num_preds > MAX_SIZE_RATIO * num_target:
        return 1.0
    # In the unit cube, a voxel has the sides 1 / D, 1 / H and 1 / W, and no distance is longer than the diagonal √3.
    # Otherwise a voxel is a cube with sides of 1, although a real one is about twice as long along z.
    if rules.normaliser == "unit_cube":
        spacing, diagonal = tuple(1 / shape), math.sqrt(3)
    else:
        spacing, diagonal = (1.0, 1.0, 1.0), math.sqrt((shape**2).sum())
    # The two choices differ if one mask has a hole. The voxels in the hole are close to the mask around them. But the
    # hole also has a surface of its own, which may be far from the surface of the other mask.
    if rules.points == "surface":
        preds, target = find_surface(preds), find_surface(target)
    ways = [(preds, target), (target, preds)] if rules.direction == "symmetric" else [(preds, target)]
    return max(greatest_distance(*way, spacing) for way in ways) / diagonal
