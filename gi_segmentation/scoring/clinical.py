"""Scores that clinics compare contours by: of one organ in one scan, in millimetres and millilitres.

All take bool volumes `(D, H, W)`, or numbers that are all 0 or 1, and the size of a voxel, `spacing_mm` (z, y, x). A
surface is the voxels of a mask with one of their six neighbours outside it; what lies beyond the volume is outside.

With MONAI 1.6 every score it has is the same up to its single precision, but for empty masks: where one is, MONAI has
a distance of inf (a percentile may be NaN), and where both are, NaN. google-deepmind's surface-distance 0.1 has the
same Dice; its surface is of points between the voxels, each weighted with an area: Hausdorff distances differ by at
most a voxel's diagonal (not at all for boxes moved without turning), and mean, percentile and surface Dice weigh the
surface otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from gi_segmentation.scoring.dice import dice_score
from gi_segmentation.scoring.surface import crop_to_both, distances_to, find_surface, surface_distances

SurfaceDistances: TypeAlias = tuple[np.ndarray, np.ndarray]  # prediction to target, target to prediction

ROBUST_PERCENTILE = 95.0
# Millimetres for the surface Dice: one slice's thickness, and what FLARE 2022 allows for the stomach.
TOLERANCES_MM = (3.0, 5.0)


def check_masks(preds: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Make sure of two masks of one shape.

    Returns:
        Both, bool, shape `(D, H, W)`.

    Raises:
        ValueError: If they have no three axes, their shapes differ, or there is a value besides 0 and 1; names the
            first such voxel and how many there are.

    Example:
        >>> check_masks(np.ones((1, 1, 2)), [[[0, 2]]])
        Traceback (most recent call last):
            ...
        ValueError: target: expected voxels of 0 or 1, but got 2 at (0, 0, 1); 1 voxel is neither
    """
    arrays = {"preds": np.asarray(preds), "target": np.asarray(target)}
    if arrays["preds"].shape != arrays["target"].shape or arrays["preds"].ndim != 3:
        shapes = " and ".join(str(array.shape) for array in arrays.values())
        raise ValueError(f"expected preds and target of one shape (D, H, W), but got {shapes}")
    for name, array in arrays.items():
        if array.dtype != np.bool_:
            wrong = np.argwhere((array != 0) & (array != 1))
            if len(wrong):
                first = tuple(wrong[0].tolist())
                number = f"{len(wrong)} voxel{'s are' if wrong[1:].size else ' is'} neither"
                raise ValueError(f"{name}: expected voxels of 0 or 1, but got {array[first]} at {first}; {number}")
    return arrays["preds"].astype(bool, copy=False), arrays["target"].astype(bool, copy=False)


def check_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Make sure of a voxel's size.

    Raises:
        ValueError: If it is not three positive numbers.
    """
    if len(spacing_mm) != 3 or not all(math.isfinite(side) and side > 0 for side in spacing_mm):
        raise ValueError(f"expected spacing_mm of three positive numbers (z, y, x), but got {tuple(spacing_mm)}")
    depth, height, width = (float(side) for side in spacing_mm)
    return depth, height, width


def check_tolerance(tolerance_mm: float) -> float:
    """Make sure of a tolerance.

    Raises:
        ValueError: If it is negative or no finite number.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"expected tolerance_mm of at least 0, but got {tolerance_mm}")
    return float(tolerance_mm)


def volume_dice(preds: np.ndarray, target: np.ndarray) -> float:
    """Dice over a whole volume: twice the common voxels over the voxels of both.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.

    Returns:
        0 to 1; NaN where both masks are empty.

    Raises:
        ValueError: If the shapes differ or a mask is not binary.

    Source: Dice, Ecology 26 (1945) 297.

    Example:
        >>> preds, target = np.ones((1, 1, 3), dtype=bool), np.array([[[True, False, False]]])
        >>> volume_dice(preds, target)
        0.5
    """
    preds, target = check_masks(preds, target)
    return _dice(*crop_to_both(preds, target))


def hausdorff_distance(
    preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float], percentile: float = 100.0
) -> float:
    """Symmetric Hausdorff distance between the surfaces of two binary volumes.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.
        percentile: Which percentile of the distances of each surface to the other to take, instead of the greatest;
            95 gives HD95. Between two distances it is interpolated, as by `numpy.percentile`.

    Returns:
        Millimetres, the greater of both ways; NaN where exactly one mask is empty, 0.0 where both are.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, a spacing is not positive or the percentile is none.

    Source: Taha and Hanbury, BMC Medical Imaging 15 (2015) 29; MONAI's `compute_hausdorff_distance`. From pixel to
    pixel of the masks, as the competition measures, a hole in one mask counts less.

    Example:
        >>> preds, target = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> preds[0, 0, 0] = target[0, 0, 2] = True
        >>> hausdorff_distance(preds, target, (3, 1.5, 1.5))  # two pixels of 1.5 mm apart
        3.0
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"expected a percentile of 0 to 100, but got {percentile}")
    return _hausdorff(_measure(preds, target, spacing_mm), percentile)


def mean_surface_distance(preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Mean distance of the voxels of either surface to the other surface.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.

    Returns:
        Millimetres; NaN where exactly one mask is empty, 0.0 where both are.

    Raises:
        ValueError: If the shapes differ, a mask is not binary or a spacing is not positive.

    Source: Heimann et al., IEEE TMI 28 (2009) 1251, average symmetric surface distance; MONAI's
    `compute_average_surface_distance(symmetric=True)`: one mean over the voxels of both surfaces, not the mean of two.

    Example:
        >>> preds, target = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> preds[0, 0, :3] = target[0, 0, 0] = True
        >>> mean_surface_distance(preds, target, (1, 1, 1))  # of 0, 1 and 2, and of 0
        0.75
    """
    return _mean_distance(_measure(preds, target, spacing_mm))


def normalised_surface_dice(
    preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> float:
    """Share of both surfaces' voxels that lie no farther from the other surface than a tolerance.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.
        tolerance_mm: At least 0.

    Returns:
        0 to 1; 0 where exactly one mask is empty, NaN where both are.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, a spacing is not positive or the tolerance negative.

    Source: Nikolov et al., arXiv:1809.04430, who weigh the surface by area; counted in voxels as by Seidlitz et al.,
    arXiv:2111.05408, and MONAI's `compute_surface_dice`.

    Example:
        >>> preds, target = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> preds[0, 0, :3] = target[0, 0, 0] = True
        >>> normalised_surface_dice(preds, target, (1, 1, 1), tolerance_mm=1)  # 2 of 3 voxels, and 1 of 1
        0.75
    """
    return _surface_dice(_measure(preds, target, spacing_mm), check_tolerance(tolerance_mm))


def added_path_length(
    preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 0.0
) -> float:
    """Length of contour to be drawn anew, slice by slice, to turn the prediction into the target.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.
        tolerance_mm: How far within the slice the prediction's contour may be from the target's and still count as
            drawn.

    Returns:
        Millimetres: pixels of the target's contours that the contour of the prediction on that slice does not cover,
        times the pixel's side (the mean of both sides where they differ). All of them where `preds` is empty; 0.0
        where `target` is, since contour to be deleted costs no path.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, a spacing is not positive or the tolerance negative.

    Source: Vaassen et al., Physics and Imaging in Radiation Oncology 13 (2020) 1; the tolerance as in the authors'
    later code, pyAPL. A contour is the pixels of the mask with one of their four neighbours on the slice outside it;
    implementations that compare with the prediction's mask instead of its contour find less.

    Example:
        >>> preds, target = np.zeros((1, 1, 4), dtype=bool), np.ones((1, 1, 4), dtype=bool)
        >>> preds[0, 0, :3] = True
        >>> added_path_length(preds, target, (3, 1.5, 1.5))  # one pixel
        1.5
        >>> added_path_length(preds, target, (3, 1.5, 1.5), tolerance_mm=1.5)
        0.0
    """
    spacing, tolerance = check_spacing(spacing_mm), check_tolerance(tolerance_mm)
    return _path_length(*crop_to_both(*check_masks(preds, target)), spacing, tolerance)


def volume_difference(preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Volume of the prediction less that of the target.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.

    Returns:
        Millilitres, below 0 where the prediction is too small.

    Raises:
        ValueError: If the shapes differ, a mask is not binary or a spacing is not positive.

    Example:
        >>> preds, target = np.ones((10, 10, 20), dtype=bool), np.zeros((10, 10, 20), dtype=bool)
        >>> volume_difference(preds, target, (1, 1, 1))
        2.0
    """
    spacing = check_spacing(spacing_mm)
    preds, target = check_masks(preds, target)
    return _millilitres(preds, spacing) - _millilitres(target, spacing)


def measure_organ(
    preds: np.ndarray,
    target: np.ndarray,
    spacing_mm: Sequence[float],
    tolerances_mm: Sequence[float] = TOLERANCES_MM,
) -> dict[str, float]:
    """All scores of one organ in one scan; the box, the surfaces and their distances are found once.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: Reference mask, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres, each > 0.
        tolerances_mm: For the normalised surface Dice, each at least 0.

    Returns:
        What each score's function gives, by name and unit, and the volumes of both masks in millilitres.

    Raises:
        ValueError: If the shapes differ, a mask is not binary, a spacing is not positive or a tolerance negative.

    Example:
        >>> scores = measure_organ(np.ones((1, 2, 2)), np.ones((1, 2, 2)), (3, 1, 1), tolerances_mm=[3.0])
        >>> scores["volume_dice"], scores["hausdorff_mm"], scores["normalised_surface_dice_3mm"]
        (1.0, 0.0, 1.0)
    """
    spacing = check_spacing(spacing_mm)
    tolerances = [check_tolerance(tolerance) for tolerance in tolerances_mm]
    preds, target = crop_to_both(*check_masks(preds, target))
    distances = surface_distances(preds, target, spacing)
    volumes = _millilitres(preds, spacing), _millilitres(target, spacing)
    return {
        "volume_dice": _dice(preds, target),
        "hausdorff_mm": _hausdorff(distances, 100.0),
        "hausdorff95_mm": _hausdorff(distances, ROBUST_PERCENTILE),
        "mean_surface_distance_mm": _mean_distance(distances),
        **{f"normalised_surface_dice_{limit:g}mm": _surface_dice(distances, limit) for limit in tolerances},
        "added_path_length_mm": _path_length(preds, target, spacing, 0.0),
        "volume_difference_ml": volumes[0] - volumes[1],
        "volume_preds_ml": volumes[0],
        "volume_target_ml": volumes[1],
    }


def measure_organs(
    preds: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float] | None
) -> list[dict[str, float]]:
    """What `measure_organ` gives for each organ of a scan; nothing where the size of a voxel is not known.

    Args:
        preds: Predicted masks, bool, shape `(organs, D, H, W)`.
        target: Reference masks, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
    """
    if spacing_mm is None:
        return []
    return [measure_organ(*masks, spacing_mm) for masks in zip(preds, target, strict=True)]


def _measure(preds: Any, target: Any, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances between two surfaces, both ways."""
    return surface_distances(*crop_to_both(*check_masks(preds, target)), check_spacing(spacing_mm))


def _dice(preds: np.ndarray, target: np.ndarray) -> float:
    counts = [int(np.count_nonzero(mask)) for mask in (preds & target, preds, target)]
    return dice_score(counts)


def _hausdorff(distances: SurfaceDistances, percentile: float) -> float:
    present = [way.size > 0 for way in distances]
    if not all(present):
        return math.nan if any(present) else 0.0
    return max(float(np.percentile(way, percentile)) for way in distances)


def _mean_distance(distances: SurfaceDistances) -> float:
    present = [way.size > 0 for way in distances]
    if not all(present):
        return math.nan if any(present) else 0.0
    return float(np.concatenate(distances).mean())


def _surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    number = sum(way.size for way in distances)
    near = sum(int(np.count_nonzero(way <= tolerance_mm)) for way in distances)
    return near / number if number else math.nan


def _path_length(preds: np.ndarray, target: np.ndarray, spacing: Sequence[float], tolerance_mm: float) -> float:
    preds, target = (find_surface(mask, axes=(1, 2)) for mask in (preds, target))
    if tolerance_mm:
        # Slices are moved so far apart that the nearest contour pixel within the tolerance is on the same slice.
        number = np.count_nonzero(distances_to(target, preds, (2 * tolerance_mm, *spacing[1:])) > tolerance_mm)
    else:
        number = np.count_nonzero(target & ~preds)
    return int(number) * (spacing[1] + spacing[2]) / 2


def _millilitres(mask: np.ndarray, spacing: Sequence[float]) -> float:
    return int(np.count_nonzero(mask)) * math.prod(spacing) / 1000
