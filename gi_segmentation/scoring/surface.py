"""Surfaces of masks, and exact distances between them.

A usual way computes a distance map: for every voxel of the volume, the distance to a mask. Here only the voxels that
matter are looked up in a search tree of the other mask, and only within the box around both masks. This gives the same
distances in less time.
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

# Voxels in a leaf of the search tree. Each tree is built for one query, so a coarse tree, built fast, is better.
LEAF_SIZE = 32
# Side of a block in voxels, see `greatest_distance`. Of 4, 6, 8 and 12 it is the fastest for good and bad predictions.
BLOCK_SIZE = 6


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Find the smallest box that holds a mask.

    Args:
        mask: bool, shape `(D, H, W)`.

    Returns:
        A slice along each axis; None if the mask is empty.

    Example:
        >>> mask = np.zeros((4, 4, 4), dtype=bool)
        >>> mask[1, 2, 3] = mask[2, 0, 3] = True
        >>> bounding_box(mask)
        (slice(1, 3, None), slice(0, 3, None), slice(3, 4, None))
    """
    layers = np.flatnonzero([layer.any() for layer in mask])
    if not layers.size:
        return None
    # The shadow of the mask along z has one layer, so rows and columns need not be searched in every layer.
    shadow = np.any(mask[layers[0] : layers[-1] + 1], axis=0)
    rows, columns = (np.flatnonzero(np.any(shadow, axis=axis)) for axis in (1, 0))
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in (layers, rows, columns))


def crop_to_both(preds: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut out the box that holds both masks, with one voxel of background around it.

    Args:
        preds: bool, shape `(D, H, W)`.
        target: bool, same shape.

    Returns:
        Copies of both masks, of one shape; `(2, 2, 2)` if both masks are empty.
    """
    # The background makes the border of the volume a border of the mask: an organ that the scan cuts off has a surface
    # there too. It also lets `find_surface` look at neighbours without a check for the end of the array.
    boxes = [box for box in (bounding_box(preds), bounding_box(target)) if box is not None]
    sides = zip(*boxes, strict=True)
    joint = tuple(slice(min(one.start for one in side), max(one.stop for one in side)) for side in sides)
    # Without any box `joint` is empty. A box of no voxels takes its place.
    joint = joint or (slice(0),) * 3
    return pad_by_one(preds[joint]), pad_by_one(target[joint])


def pad_by_one(mask: np.ndarray) -> np.ndarray:
    """Copy a mask into a volume with one voxel of background around it."""
    # `numpy.pad` gives the same, and takes several times as long.
    padded = np.zeros([size + 2 for size in mask.shape], dtype=bool)
    padded[1:-1, 1:-1, 1:-1] = mask
    return padded


def find_places(mask: np.ndarray) -> np.ndarray:
    """Return the indices (z, y, x) of a mask's voxels, int64, shape `(n, 3)`."""
    # `numpy.argwhere` gives the same, and takes ten times as long on volumes.
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), axis=1)


def find_surface(mask: np.ndarray, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Find the voxels of a mask that have a neighbour outside the mask.

    Args:
        mask: bool, shape `(D, H, W)`. All outermost voxels must be False, as `crop_to_both` makes them.
        axes: Neighbours along these axes count. All three give the surface of a volume; (1, 2) gives the contour of
            each slice.

    Returns:
        bool, same shape.

    Example:
        >>> find_surface(np.pad(np.ones((3, 3, 3), dtype=bool), 1)).sum()  # all of the cube but its middle
        np.int64(26)
    """
    # A voxel is inside if both neighbours along every axis are in the mask; the surface is all the rest of the mask.
    # On the flat array, the neighbour along an axis is a fixed number of places away.
    mask = np.ascontiguousarray(mask)
    flat = mask.reshape(-1)
    inside = flat.copy()
    for axis in axes:
        # A bool takes one byte, so strides count voxels. A step from the end of a row reaches the next row, but both
        # voxels are background there.
        step = mask.strides[axis]
        inside[step:] &= flat[:-step]
        inside[:-step] &= flat[step:]
    return mask ^ inside.reshape(mask.shape)


class NearestVoxel:
    """Finds the distance to the nearest voxel of a mask.

    Args:
        mask: bool, shape `(D, H, W)`, not empty.
        spacing: Voxel size (z, y, x). Its unit is the unit of all distances.
    """

    def __init__(self, mask: np.ndarray, spacing: Sequence[float]) -> None:
        self.spacing = np.asarray(spacing, dtype=np.float64)
        self.places = find_places(mask)
        # Voxels are longer along z than within a slice. The tree must hold lengths, because the nearest voxel by
        # length is often not the nearest by number of steps.
        self.tree = cKDTree(self.places * self.spacing, LEAF_SIZE, compact_nodes=False, balanced_tree=False)

    def distances(self, places: np.ndarray) -> np.ndarray:
        """Return the distances from voxels to the nearest voxel of the mask.

        Args:
            places: Indices (z, y, x), int64, shape `(n, 3)`.

        Returns:
            float64, shape `(n,)`.
        """
        # The tree finds the nearest voxel; its distances are not used. They are differences of rounded coordinates:
        # the 2 steps from 7 to 9 would be 9 * 1.63 - 7 * 1.63, not 3.26 exactly, and might exceed a tolerance of 3.26
        # mm.
        _, nearest = self.tree.query(places * self.spacing)
        return self.lengths(places - self.places[nearest])

    def lengths(self, steps: np.ndarray) -> np.ndarray:
        """Return the lengths of steps between voxels (z, y, x), whole numbers, shape `(n, 3)`."""
        return np.sqrt(((steps * self.spacing) ** 2).sum(axis=1))


def distances_to(voxels: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the distance from each voxel of a mask to the nearest voxel of another mask.

    Args:
        voxels: bool, shape `(D, H, W)`.
        others: bool, same shape.
        spacing: Voxel size (z, y, x).

    Returns:
        One distance per voxel of `voxels` in row-major order, float64, in the unit of `spacing`; inf if `others` is
        empty.

    Example:
        >>> voxels, others = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> voxels[0, 0, :2] = others[0, 0, 1] = True
        >>> distances_to(voxels, others, (3.0, 1.5, 1.5))
        array([1.5, 0. ])
    """
    # Flat indices are many times faster to find than rows of (z, y, x).
    indices = np.flatnonzero(voxels)
    if not others.any():
        return np.full(indices.size, np.inf)
    distances = np.zeros(indices.size)
    # A voxel in both masks has the distance 0 and needs no search. In a good prediction these are most voxels.
    apart = ~others.reshape(-1)[indices]
    if apart.any():
        places = np.stack(np.unravel_index(indices[apart], voxels.shape), axis=1)
        distances[apart] = NearestVoxel(others, spacing).distances(places)
    return distances


def surface_distances(
    preds: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances between the surfaces of two masks, in both directions.

    Args:
        preds: bool, shape `(D, H, W)`, from `crop_to_both`.
        target: bool, same shape, from `crop_to_both`.
        spacing: Voxel size (z, y, x).

    Returns:
        Two arrays as from `distances_to`: from each surface voxel of `preds` to the surface of `target`, and from each
        surface voxel of `target` to the surface of `preds`. An empty mask has no distances.
    """
    preds, target = find_surface(preds), find_surface(target)
    return distances_to(preds, target, spacing), distances_to(target, preds, spacing)


def greatest_distance(voxels: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the greatest distance from a voxel of a mask A to the nearest voxel of a mask B.

    This is the Hausdorff distance in one direction, h(A, B) = max over a in A of (min over b in B of |a - b|).

    Args:
        voxels: Mask A, bool, shape `(D, H, W)`, from `crop_to_both`.
        others: Mask B, bool, same shape, from `crop_to_both`; not empty.
        spacing: Voxel size (z, y, x).

    Returns:
        The distance in the unit of `spacing`; 0 if B holds all of A.

    Example:
        >>> voxels, others = np.zeros((3, 3, 9), dtype=bool), np.zeros((3, 3, 9), dtype=bool)
        >>> voxels[1, 1, 1:8] = others[1, 1, 1:3] = True
        >>> greatest_distance(voxels, others, (1, 1, 1))
        5.0
    """
    # As in `distances_to`, voxels in both masks have the distance 0.
    places = find_places(voxels & ~others)
    if not places.size:
        return 0.0
    # The voxels left are outside B, so the nearest voxel of B is on its surface, and a tree of the surface is enough.
    # (From a voxel inside B, a step outwards would come nearer and still be in B.)
    nearest = NearestVoxel(find_surface(others), spacing)
    # First, one voxel m of each block is measured; let d be its distance. By the triangle inequality, another voxel a
    # of the block has at most the distance d + |a - m|. It is measured only if this limit exceeds the greatest
    # distance so far. Most voxels of the volume are never measured.
    num_blocks = [-(-size // BLOCK_SIZE) for size in voxels.shape]
    blocks = np.ravel_multi_index(tuple((places // BLOCK_SIZE).T), num_blocks)
    measured = np.full(np.prod(num_blocks), -1)
    # Voxels of one block write to the same element, and the last one stays. -1 marks a block without voxels.
    measured[blocks] = np.arange(len(places))
    distances = np.zeros(measured.size)
    distances[measured >= 0] = nearest.distances(places[measured[measured >= 0]])
    limits = distances[blocks] + nearest.lengths(places - places[measured[blocks]])
    farther = limits > distances.max()
    return float(max(distances.max(), nearest.distances(places[farther]).max(initial=0)))
