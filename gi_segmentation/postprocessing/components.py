"""Find the connected components of the masks of a scan, and which of them are small or doubtful.

A model sometimes marks a few voxels far away from an organ. Such a component hardly changes Dice, but it can decide
the Hausdorff distance of the whole scan. A component has a volume and a confidence, which is the mean probability over
its voxels. If it is below either limit of its organ, it is removed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from gi_segmentation.postprocessing.limits import OrganLimits
from gi_segmentation.scoring.surface import bounding_box

# Voxels that share a face, an edge or a corner belong to one component: 26 neighbours in 3D. With faces only, a thin
# bowel that runs diagonally would fall apart into single voxels.
TOUCHING = np.ones((3, 3, 3), dtype=bool)
CUBIC_MM_PER_ML = 1000.0


class Components(NamedTuple):
    """The components of one organ in one scan.

    Attributes:
        labels: Number of the component of each voxel, counted from 1; 0 outside the mask: int32, shape `(D, H, W)`.
        volumes_ml: Volume of each component in millilitres, shape `(components,)`.
        confidences: Mean probability of each component, shape `(components,)`.
    """

    labels: np.ndarray
    volumes_ml: np.ndarray
    confidences: np.ndarray


def split_at_gaps(numbers: Sequence[int]) -> Iterator[slice]:
    """Yield the positions of slices that follow each other without a gap.

    Example:
        >>> list(split_at_gaps([4, 5, 8, 9, 10]))
        [slice(0, 2, None), slice(2, 5, None)]
    """
    breaks = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        yield slice(start, stop)


def find_components(
    mask: np.ndarray, probability: np.ndarray, spacing_mm: Sequence[float], numbers: Sequence[int]
) -> Components:
    """Find the components of one organ in a scan, in 3D with 26 neighbours.

    Args:
        mask: bool, shape `(D, H, W)`.
        probability: Probability of the organ, float, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`. Slices on both sides of a gap are not neighbours.

    Example:
        >>> mask = np.array([[[True, False, False, True]], [[False, True, False, False]]])
        >>> found = find_components(mask, np.where(mask, 0.75, 0.0), (2.5, 20.0, 20.0), [1, 2])
        >>> found.labels.tolist(), found.volumes_ml.tolist(), found.confidences.tolist()
        ([[[1, 0, 0, 2]], [[0, 1, 0, 0]]], [2.0, 1.0], [0.75, 0.75])
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    count = 0
    for run in split_at_gaps(numbers):
        # An organ fills a small part of the scan, and the search for components takes time for every voxel.
        box = bounding_box(mask[run])
        if box is not None:
            # `ndimage.label` counts from 1 in each run, so the number of all components before is added.
            found, number = ndimage.label(mask[run][box], TOUCHING)
            labels[run][box] = np.where(found, found + count, 0)
            count += number
    # Only the voxels of the mask are counted. They are a few per cent of the scan. Element 0 would be the voxels
    # outside the mask, so it is left out.
    inside = labels[mask]
    voxels = np.bincount(inside, minlength=count + 1)[1:]
    # `bincount` adds in float64, so half precision of the probabilities does not add up.
    sums = np.bincount(inside, weights=probability[mask], minlength=count + 1)[1:]
    return Components(labels, voxels * (np.prod(spacing_mm) / CUBIC_MM_PER_ML), sums / voxels)


def keep_components(volumes_ml: np.ndarray, confidences: np.ndarray, limits: OrganLimits) -> np.ndarray:
    """Return which components stay: bool, shape `(components,)`. A component exactly at a limit stays."""
    return (volumes_ml >= limits.min_volume_ml) & (confidences >= limits.min_confidence)


def select_components(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the mask of the components that stay: bool, with the shape of `labels`."""
    # A table lookup: element 0 of the table is for voxels outside the mask.
    return np.concatenate([[False], kept])[labels]
