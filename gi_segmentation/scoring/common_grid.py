"""Bring the structures of several sides of a comparison to one grid, voxel by voxel, without interpolation."""

import itertools
from collections.abc import Sequence

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.read_segments import read_segment_masks
from gi_segmentation.formats.label_maps import SAME_GRID_SHARE, align, describe_grid
from gi_segmentation.formats.nifti import farthest_mm
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume


def stands_alone(one: StructureSet) -> bool:
    """Tell whether a segmentation was read without its scan. Its grid ends with its last frame, then."""
    return one.kind == "seg" and one.volume.origin is None


def choose_grid(sides: Sequence[StructureSet]) -> Volume:
    """Choose the grid on which one scan is scored: that of the first side which knows the whole scan.

    Args:
        sides: What each side has drawn on the scan, the truth first.

    Raises:
        InputError: If no side knows it, and the grids of two segmentations do not fit to each other.
    """
    # A CSV does not say where its slices lie.
    whole = [one.volume for one in sides if one.kind != "kaggle" and not stands_alone(one)]
    if whole:
        return whole[0]
    alone = [one.volume for one in sides if stands_alone(one)]
    if len(alone) < len(sides):
        return next(one.volume for one in sides if one.kind == "kaggle")
    return join_grids(alone)


def join_grids(volumes: Sequence[Volume]) -> Volume:
    """Return the grid of the first volume, enlarged so that it holds the others.

    Raises:
        InputError: If the voxels of one are not those of the first.

    Example:
        >>> from pathlib import Path
        >>> first = Volume("a", Path("a"), (4, 4, 2), np.eye(4))
        >>> moved = np.eye(4)
        >>> moved[2, 3] = -3
        >>> joined = join_grids([first, Volume("b", Path("b"), (4, 4, 4), moved)])
        >>> joined.shape, joined.affine[:3, 3].tolist()
        ((4, 4, 5), [0.0, 0.0, -3.0])
    """
    first = volumes[0]
    low, high = np.zeros(3), np.array(first.shape) - 1.0
    for volume in volumes[1:]:
        steps = np.linalg.inv(first.affine) @ volume.affine
        whole = np.rint(steps)
        distance = farthest_mm(first.affine @ whole, volume.affine, volume.shape)
        if abs(abs(np.linalg.det(whole)) - 1) > 1e-6 or distance > SAME_GRID_SHARE * min(first.spacing_mm):
            raise InputError(
                f"{volume.path}: lies on another grid than {first.path} ({describe_grid(volume)}, and the other "
                f"{describe_grid(first)}); segment the same scan"
            )
        corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in volume.shape))])
        places = (corners @ whole.T)[:, :3]
        low, high = np.minimum(low, places.min(axis=0)), np.maximum(high, places.max(axis=0))
    affine = first.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    width, height, depth = (int(n) for n in high - low + 1)
    return Volume(first.name, first.path, (width, height, depth), affine)


def check_grid(one: StructureSet, grid: Volume) -> None:
    """Check that structures lie on a grid, as far as their headers tell.

    Raises:
        InputError: If not.
    """
    if one.volume is grid or stands_alone(one):
        # The frames of a segmentation are placed one by one, see `read_segment_masks`.
        return
    if one.kind != "kaggle":
        align(grid, one.volume)
        return
    sizes = [np.array(volume.spacing_mm) for volume in (one.volume, grid)]
    if one.volume.training_shape != grid.training_shape or abs(sizes[0] / sizes[1] - 1).max() > SAME_GRID_SHARE:
        raise InputError(
            f"{one.volume.path}: {one.volume.name} lies on another grid than {grid.path} ({one.volume.describe()}, "
            f"and the other {grid.describe()}); score masks of the same scan, not resampled"
        )


def read_on_grid(one: StructureSet, names: Sequence[str], grid: Volume) -> np.ndarray:
    """Read the masks of structures on a grid.

    Args:
        one: What is drawn on the scan.
        names: The structures.
        grid: From `choose_grid`.

    Returns:
        bool, shape `(names, slices, rows, columns)`, in the orientation of the training.

    Raises:
        InputError: If they lie on another grid, or a file is damaged.
    """
    if stands_alone(one):
        masks = read_segment_masks(one.paths[0], grid, names)
    elif one.volume is grid:
        masks = one.read(names)
    elif one.kind == "kaggle":
        check_grid(one, grid)
        return np.stack([one.volume.to_training(mask) for mask in one.read(names)])
    else:
        order, flipped = align(grid, one.volume)
        masks = np.stack([np.flip(mask.transpose(order), flipped) for mask in one.read(names)])
    return np.stack([grid.to_training(mask) for mask in masks])
