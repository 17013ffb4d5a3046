"""Scores by which clinics compare contours: of one organ in one scan, in millimetres and millilitres.

`compare_organ` returns all of them. The surface of a mask is its voxels with at least one of their six neighbours
outside the mask. Everything beyond the volume is outside.

Two other libraries have such scores:

- MONAI 1.6 gives the same values up to its single precision, except for empty masks. If one mask is empty, its
  distances are inf, and a percentile may be NaN. If both masks are empty, its distances are NaN.
- google-deepmind's surface-distance 0.1 gives the same Dice. Its surface is made of points between the voxels, each
  with an area. So its Hausdorff distance differs by at most the diagonal of a voxel, and is the same for a box and a
  shifted copy. Its mean, percentiles and surface Dice weigh the parts of the surface by their area.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from gi_segmentation.scoring.dice import dice_score
from gi_segmentation.scoring.surface import count_voxels, find_surface, pack_both, surface_distances

# From the surface of the prediction to that of the target, and from that of the target to that of the prediction.
SurfaceDistances: TypeAlias = tuple[np.ndarray, np.ndarray]

# One stray voxel far away decides the Hausdorff distance. Its 95th percentile leaves out the farthest 5 % of a
# surface.
ROBUST_PERCENTILE = 95.0
# Tolerances of the surface Dice: the thickness of a slice, and the tolerance of FLARE 2022 for the stomach.
TOLERANCES_MM = (3.0, 5.0)


def check_binary_masks(preds: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Check that two masks are binary and have one shape.

    Returns:
        Both masks, bool, shape `(D, H, W)`.

    Raises:
        ValueError: If they do not have three axes, their shapes differ, or a value is neither 0 nor 1. The message has
            the first such voxel and their number.

    Example:
        >>> check_binary_masks(np.ones((1, 1, 2)), [[[0, 2]]])
        Traceback (most recent call last):
            ...
        ValueError: target: expected voxels of 0 or 1, but got 2 at (0, 0, 1); 1 voxel is neither
    """
    arrays = {"preds": np.asarray(preds), "target": np.asarray(target)}
    if arrays["preds"].shape != arrays["target"].shape or arrays["preds"].ndim != 3:
        shapes = " and ".join(str(array.shape) for array in arrays.values())
        raise ValueError(f"expected preds and target of one shape (D, H, W), but got {shapes}")
    # A map of label ids is a likely mistake. Taken as bool, it would be one mask of all organs, with plausible scores.
    for name, array in arrays.items():
        if array.dtype != np.bool_:
            wrong = np.argwhere((array != 0) & (array != 1))
            if len(wrong):
                first = tuple(wrong[0].tolist())
                number = f"{len(wrong)} voxel{'s are' if wrong[1:].size else ' is'} neither"
                raise ValueError(f"{name}: expected voxels of 0 or 1, but got {array[first]} at {first}; {number}")
    return arrays["preds"].astype(bool, copy=False), arrays["target"].astype(bool, copy=False)


def check_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Check the size of a voxel.

    Raises:
        ValueError: If it is not three positive numbers.
    """
    # NaN and inf are not caught by `side > 0` alone: NaN compares as False, but inf does not.
    if len(spacing_mm) != 3 or not all(math.isfinite(side) and side > 0 for side in spacing_mm):
        raise ValueError(f"expected spacing_mm of three positive numbers (z, y, x), but got {tuple(spacing_mm)}")
    depth, height, width = (float(side) for side in spacing_mm)
    return depth, height, width


def hausdorff_distance(distances: SurfaceDistances, percentile: float) -> float:
    """Return the symmetric Hausdorff distance between two surfaces.

    Args:
        distances: From `surface_distances`.
        percentile: Percentile of the distances from one surface to the other, 0 to 100. 100 is the greatest distance,
            and 95 gives HD95. Between two distances it is interpolated linearly, as in `numpy.percentile`.

    Returns:
        In the unit of the distances, the greater value of both directions; NaN if exactly one mask is empty, 0.0 if
        both are.

    Source: Taha and Hanbury, BMC Medical Imaging 15 (2015) 29; MONAI's `compute_hausdorff_distance`. The competition
    measures between all voxels of the masks, not only those of the surfaces; there a hole in one mask counts less.

    Example:
        >>> hausdorff_distance((np.array([3.0, 1.0]), np.array([2.0])), 100)
        3.0
    """
    # There is no distance to an empty mask, so the value is NaN, and not 0, inf or another made-up number. Two empty
    # masks agree, so the value is 0.
    present = [way.size > 0 for way in distances]
    if not all(present):
        return math.nan if any(present) else 0.0
    # HD = max(h(A, B), h(B, A)). Each direction has its own percentile, so a missed part of a small target counts even
    # if the prediction has many more surface voxels.
    return max(float(np.percentile(way, percentile)) for way in distances)


def mean_surface_distance(distances: SurfaceDistances) -> float:
    """Return the mean distance between two surfaces, over the voxels of both.

    Args:
        distances: From `surface_distances`.

    Returns:
        In the unit of the distances; NaN if exactly one mask is empty, 0.0 if both are.

    Source: Heimann et al., IEEE TMI 28 (2009) 1251, average symmetric surface distance; MONAI's
    `compute_average_surface_distance(symmetric=True)`.

    Example:
        >>> mean_surface_distance((np.array([0.0, 1.0, 2.0]), np.array([0.0])))
        0.75
    """
    present = [way.size > 0 for way in distances]
    if not all(present):
        return math.nan if any(present) else 0.0
    # One mean over the voxels of both surfaces, (sum of A to B + sum of B to A) / (n_A + n_B). It is not the mean of
    # two means, which would give more weight to the voxels of the smaller surface.
    return float(np.concatenate(distances).mean())


def normalised_surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """Return the share of the voxels of both surfaces that are within a tolerance of the other surface.

    Args:
        distances: From `surface_distances`.
        tolerance: In their unit, at least 0.

    Returns:
        0 to 1; 0 if exactly one mask is empty, NaN if both are.

    Source: Nikolov et al., arXiv:1809.04430, measure the area of the surface. Seidlitz et al., arXiv:2111.05408, and
    MONAI's `compute_surface_dice` count its voxels, and so does this function.

    Example:
        >>> normalised_surface_dice((np.array([0.0, 1.0, 2.0]), np.array([0.0])), 1)  # 2 of 3 voxels, and 1 of 1
        0.75
    """
    # If one mask is empty, all distances of the other are inf, and the share is 0 without a special case.
    number = sum(way.size for way in distances)
    near = sum(int(np.count_nonzero(way <= tolerance)) for way in distances)
    return near / number if number else math.nan


def added_path_length(preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Return the length of the contour that must be redrawn, slice by slice, to correct the prediction.

    Args:
        preds: Predicted mask, from `pack_both`.
        target: Reference mask, from the same call.
        spacing_mm: Voxel size (z, y, x) in millimetres. The thickness of a slice has no effect.

    Returns:
        Millimetres: the number of pixels of the target's contours that are not in those of the prediction, times the
        side of a pixel (the mean of both sides if they differ). If the target is empty, the result is 0.0: a contour
        only needs to be deleted.

    Source: Vaassen et al., Physics and Imaging in Radiation Oncology 13 (2020) 1. A contour is the pixels of a mask
    with at least one of their four neighbours on the slice outside of it. Some implementations compare with the mask
    of the prediction instead of its contour, and find less.

    Example:
        >>> preds, target = np.zeros((1, 1, 4), dtype=bool), np.ones((1, 1, 4), dtype=bool)
        >>> preds[0, 0, :3] = True
        >>> added_path_length(*pack_both(preds, target), (3, 1.5, 1.5))  # one pixel
        1.5
    """
    # Neighbours within the slice only: people draw contours slice by slice.
    preds, target = (find_surface(mask, axes=(1, 2)) for mask in (preds, target))
    return count_voxels(target & ~preds) * (spacing_mm[1] + spacing_mm[2]) / 2


def compare_organ(preds: Any, target: Any, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Return all scores of one organ in one scan.

    Args:
        preds: Predicted mask, bool or of 0 and 1, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.

    Returns:
        Dice (NaN if both masks are empty), the scores of the functions above, and the volumes of both masks. The names
        end with the unit. A difference of volumes below 0 means that the prediction is too small; it does not look at
        places.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, or a spacing is not positive.

    Example:
        >>> scores = compare_organ(np.ones((1, 2, 2)), np.ones((1, 2, 2)), (3, 1, 1))
        >>> scores["volume_dice"], scores["hausdorff_mm"], scores["normalised_surface_dice_3mm"]
        (1.0, 0.0, 1.0)
    """
    spacing = check_spacing(spacing_mm)
    # The box, the surfaces and their distances take nearly all the time. All scores share them.
    preds, target = pack_both(*check_binary_masks(preds, target))
    distances = surface_distances(preds, target, spacing)
    counts = [count_voxels(mask) for mask in (preds & target, preds, target)]
    # A millilitre has 1000 cubic millimetres.
    volumes = [count * math.prod(spacing) / 1000 for count in counts[1:]]
    return {
        "volume_dice": dice_score(counts),
        "hausdorff_mm": hausdorff_distance(distances, 100.0),
        "hausdorff95_mm": hausdorff_distance(distances, ROBUST_PERCENTILE),
        "mean_surface_distance_mm": mean_surface_distance(distances),
        **{
            f"normalised_surface_dice_{limit:g}mm": normalised_surface_dice(distances, limit)
            for limit in TOLERANCES_MM
        },
        "added_path_length_mm": added_path_length(preds, target, spacing),
        "volume_difference_ml": volumes[0] - volumes[1],
        "volume_preds_ml": volumes[0],
        "volume_target_ml": volumes[1],
    }


def compare_organs(
    preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float] | None
) -> list[dict[str, float]]:
    """Return the scores of `compare_organ` for each organ of a scan.

    Args:
        preds: Predicted masks, bool, shape `(organs, D, H, W)`.
        target: Reference masks, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres; None if it is not known or the scores are not wanted. The
            result is then empty.
    """
    if spacing_mm is None:
        return []
    return [compare_organ(*masks, spacing_mm) for masks in zip(preds, target, strict=True)]
