"""The competition's Hausdorff distance, and the weights of its score.

    competition score = 0.4 * mean Dice + 0.6 * (1 - mean normalised Hausdorff distance)

The mean Dice is over slices and organs, the mean distance over scans. `gi_segmentation.rules` lists what this formula
leaves open.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.surface import count_voxels, find_corners, find_surface, greatest_distance, pack_both

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

    Source: mle-bench, `grade.py` of uw-madison-gi-tract-image-segmentation; for other rules see `CompetitionRules`.

    Example:
        >>> target, preds = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> target[0, 0, 0] = preds[0, 0, 2] = True
        >>> round(normalised_hausdorff(preds, target) * math.sqrt(3), 6)  # two of four pixels apart
        0.5
    """
    if preds.shape != target.shape:
        raise ValueError(f"expected volumes of one shape, but got {preds.shape} and {target.shape}")
    (distance,) = measure_distances(preds[None], target[None], [rules])[rules.distance]
    return judge_distance(distance, bool(preds.any()), bool(target.any()), rules)


def judge_distance(distance: float, has_preds: bool, has_target: bool, rules: CompetitionRules) -> float:
    """Return what a volume counts: its distance, or what the rules say of empty masks.

    Args:
        distance: The distance of the two masks if neither is empty.
        has_preds: Whether the prediction has a voxel.
        has_target: Whether the truth has a voxel.
        rules: What empty masks count.

    Returns:
        0 to 1; NaN if the rules leave the volume out of the mean.

    Example:
        >>> judge_distance(math.nan, True, False, DEFAULT_RULES)
        1.0
    """
    if has_preds and has_target:
        return distance
    if has_target:
        return 1.0 if rules.preds_empty == "worst" else math.nan
    if rules.target_empty_scans == "ignored":
        return math.nan
    if has_preds:
        return 1.0
    return 0.0 if rules.both_empty == "perfect" else math.nan


def measure_distances(
    preds: np.ndarray, target: np.ndarray, ways: Iterable[CompetitionRules]
) -> dict[str, tuple[float, ...]]:
    """Measure the organs of a scan in several ways.

    Args:
        preds: Predicted masks, bool, shape `(organs, D, H, W)`.
        target: True masks, same shape.
        ways: Rules to measure by. What they say of empty masks has no effect.

    Returns:
        By `CompetitionRules.distance`, one distance of all organs together, or one for each organ; NaN if a mask is
        empty.
    """
    packed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    distances: dict[str, tuple[float, ...]] = {}
    for rules in ways:
        over = rules.hausdorff_over
        if over not in packed:
            # For `union`, a pixel counts if any organ has it. A pixel with the wrong organ does not change this
            # distance.
            united = [(np.any(preds, axis=0), np.any(target, axis=0))]
            packed[over] = [
                pack_both(*pair) for pair in (united if over == "union" else zip(preds, target, strict=True))
            ]
        if rules.distance not in distances:
            distances[rules.distance] = tuple(measure_packed(*pair, preds.shape[1:], rules) for pair in packed[over])
    return distances


def measure_packed(preds: np.ndarray, target: np.ndarray, shape: Sequence[int], rules: CompetitionRules) -> float:
    """Return the normalised distance of two masks from `pack_both`; NaN if one is empty.

    Args:
        preds: Predicted mask.
        target: True mask.
        shape: Shape `(D, H, W)` of the volume from which the masks were packed.
        rules: How to measure.
    """
    num_preds, num_target = count_voxels(preds), count_voxels(target)
    if not num_preds or not num_target:
        return math.nan
    if rules.oversized == "worst" and num_preds > MAX_SIZE_RATIO * num_target:
        return 1.0
    # In the unit cube, a voxel has the sides 1 / D, 1 / H and 1 / W, and no distance is longer than the diagonal √3.
    # Otherwise a voxel is a cube with sides of 1, although a real one is about twice as long along z.
    if rules.normaliser == "unit_cube":
        spacing, diagonal = tuple(1 / np.array(shape)), math.sqrt(3)
    else:
        spacing, diagonal = (1.0, 1.0, 1.0), math.sqrt(sum(size**2 for size in shape))
    # Voxels and surfaces differ if one mask has a hole. The voxels in the hole are close to the mask around them. But
    # the hole also has a surface of its own, which may be far from the surface of the other mask.
    if rules.points != "voxels":
        find = find_surface if rules.points == "surface" else find_corners
        preds, target = find(preds), find(target)
    ways = [(preds, target), (target, preds)] if rules.direction == "symmetric" else [(preds, target)]
    return max(greatest_distance(*way, spacing) for way in ways) / diagonal
