"""Surfaces of masks, and exact distances between them.

A usual way computes a distance map: for every voxel of the volume, the distance to a mask. Here only the box around
both masks is looked at, and only the voxels that matter are measured. This gives the same distances in less time:

- `pack_both` puts 64 voxels into one whole number, so one operation moves, compares or counts all of them;
- `distances_to` looks up the few nearest places of each voxel, and uses a search tree only if they are all empty.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.spatial import cKDTree

# A packed mask has one bit per voxel. Its words are whole numbers of 8 bytes, with 8 voxels in a byte.
BYTE_SIZE, WORD_BYTES = 8, 8
WORD_SIZE = BYTE_SIZE * WORD_BYTES
# Least background around a packed mask, in voxels. It is also how far `distances_to` looks before it uses a tree.
MARGIN = 2
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


def pack_both(preds: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pack two masks with one bit per voxel. Only the box that holds both is kept, with background around it.

    Args:
        preds: bool, shape `(D, H, W)`.
        target: bool, same shape.

    Returns:
        Both masks, packed: uint64, of one shape `(depth, height, words)`. The lowest bit of a word is its first voxel.
        There are at least `MARGIN` voxels of background at the start and at the end of each axis.

    Example:
        >>> preds, target = np.zeros((1, 9, 9), dtype=bool), np.zeros((1, 9, 9), dtype=bool)
        >>> preds[0, 4, 4] = target[0, 4, 4] = target[0, 4, 6] = True
        >>> [f"{mask[MARGIN, MARGIN, 0]:b}" for mask in pack_both(preds, target)]
        ['100000000', '10100000000']
    """
    # The background makes the border of the volume a border of the mask: an organ that the scan cuts off has a surface
    # there too. It also lets all functions look at places nearby without a check for the end of the array.
    boxes = [box for box in (bounding_box(preds), bounding_box(target)) if box is not None]
    sides = zip(*boxes, strict=True)
    joint = tuple(slice(min(one.start for one in side), max(one.stop for one in side)) for side in sides)
    # Without any box `joint` is empty. A box of no voxels takes its place.
    joint = joint or (slice(0),) * 3
    return pack(preds[joint]), pack(target[joint])


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack a whole mask of shape `(D, H, W)`, with background as in `pack_both`."""
    # A row starts with a byte of background. It fills whole words, so a step along z or y is a number of words.
    rows = np.packbits(mask, axis=2, bitorder="little")
    depth, height, num_bytes = (
        size + 2 * margin for size, margin in zip(rows.shape, (MARGIN, MARGIN, 1), strict=True)
    )
    packed = np.zeros((depth, height, -(-num_bytes // WORD_BYTES) * WORD_BYTES), dtype=np.uint8)
    packed[MARGIN : MARGIN + rows.shape[0], MARGIN : MARGIN + rows.shape[1], 1 : 1 + rows.shape[2]] = rows
    return packed.view("<u8")


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the voxels of a packed mask with its background: bool, shape `(voxels,)`, in row-major order."""
    return np.unpackbits(packed.reshape(-1).view(np.uint8), bitorder="little").view(bool)


def count_voxels(packed: np.ndarray) -> int:
    """Return the number of voxels of a packed mask."""
    return int(np.bitwise_count(packed).sum())


def find_indices(packed: np.ndarray) -> np.ndarray:
    """Return the indices of a packed mask's voxels in `unpack`, ascending: int64, shape `(n,)`."""
    # Most words are empty, so only the others are unpacked.
    words = packed.reshape(-1)
    filled = np.flatnonzero(words)
    found = np.flatnonzero(unpack(words[filled]))
    # Each index lacks the voxels of the empty words before it.
    return found + ((filled - np.arange(filled.size)) * WORD_SIZE)[found // WORD_SIZE]


def find_surface(packed: np.ndarray, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Find the voxels of a mask that have a neighbour outside the mask.

    Args:
        packed: Mask from `pack_both`.
        axes: Neighbours along these axes count. All three give the surface of a volume; (1, 2) gives the contour of
            each slice.

    Returns:
        A packed mask of the same shape.

    Example:
        >>> count_voxels(find_surface(pack(np.ones((3, 3, 3), dtype=bool))))  # all of the cube but its middle
        26
    """
    # A voxel is inside if both neighbours along every axis are in the mask; the surface is all the rest of the mask.
    # On the flat array, the neighbour along z or y is a fixed number of words away. The neighbour along x is the next
    # bit, which may be in the next word. The first and the last word are background, so they need no neighbours.
    flat = packed.reshape(-1)
    inside = flat.copy()
    for axis in axes:
        if axis == 2:
            inside[1:] &= flat[1:] << 1 | flat[:-1] >> WORD_SIZE - 1
            inside[:-1] &= flat[:-1] >> 1 | flat[1:] << WORD_SIZE - 1
        else:
            step = packed.strides[axis] // packed.itemsize
            inside[step:] &= flat[:-step]
            inside[:-step] &= flat[step:]
    return packed ^ inside.reshape(packed.shape)


def find_corners(packed: np.ndarray) -> np.ndarray:
    """Find the corners of voxels on the surface of a mask: some of the eight voxels around are inside, but not all.

    The corner at the low end of all axes has the place of its voxel. So all corners are half a voxel away from the
    places of voxels, which makes no difference to distances between corners.

    Args:
        packed: Mask from `pack_both`.

    Returns:
        A packed mask of the same shape.

    Source: google-deepmind/surface-distance, `compute_surface_distances`, whose surface elements lie at these corners.

    Example:
        >>> count_voxels(find_corners(pack(np.ones((1, 1, 1), dtype=bool))))
        8
        >>> count_voxels(find_corners(pack(np.ones((2, 2, 2), dtype=bool))))  # all of 27 but the middle one
        26
    """
    # Around a corner lie its voxel and those before it along each axis. One axis after the other, each place takes in
    # the voxel before it: `some` holds whether any of them is inside, and `every` whether all of them are.
    some, every = packed.reshape(-1).copy(), packed.reshape(-1).copy()
    for axis in range(3):
        step = packed.strides[axis] // packed.itemsize
        for flat, merge in ((some, np.bitwise_or), (every, np.bitwise_and)):
            before = np.zeros_like(flat)
            if axis == 2:
                before[:] = flat << 1
                before[1:] |= flat[:-1] >> WORD_SIZE - 1
            else:
                before[step:] = flat[:-step]
            merge(flat, before, out=flat)
    return (some & ~every).reshape(packed.shape)


def indices_to_places(packed: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the places (z, y, x) of the voxels that `find_indices` found: int64, shape `(n, 3)`.

    The first voxel of the box that was packed has the place (1, 1, 1).
    """
    depth, height, words = packed.shape
    # The start of the count decides how the tree's coordinates are rounded, and so which voxel it takes if two are
    # equally near. Their lengths may differ in the last digit. The scores of all versions count from 1.
    background = (MARGIN, MARGIN, BYTE_SIZE)
    axes = np.unravel_index(indices, (depth, height, words * WORD_SIZE))
    return np.stack([axis - (before - 1) for axis, before in zip(axes, background, strict=True)], axis=1)


def step_lengths(steps: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the lengths of steps between voxels.

    Args:
        steps: Whole numbers of voxels (z, y, x), shape `(n, 3)`.
        spacing: Voxel size (z, y, x). Its unit is the unit of the lengths.

    Returns:
        float64, shape `(n,)`.
    """
    return np.sqrt(((steps * spacing) ** 2).sum(axis=1))


def near_steps(spacing: Sequence[float]) -> list[tuple[float, np.ndarray]]:
    """Return all steps that are shorter than `MARGIN + 1` voxels along the shortest side of a voxel.

    Args:
        spacing: Voxel size (z, y, x).

    Returns:
        For each length, in ascending order, the length and all its steps (z, y, x), int64, shape `(n, 3)`.

    Example:
        >>> [(length, len(steps)) for length, steps in near_steps((9, 1, 1))]
        [(0.0, 1), (1.0, 4), (1.4142135623730951, 4), (2.0, 4), (2.23606797749979, 8), (2.8284271247461903, 4)]
    """
    # No step is missing: one that leaves this cube has at least `MARGIN + 1` voxels along an axis.
    cube = np.array(list(product(range(-MARGIN, MARGIN + 1), repeat=3)))
    lengths = step_lengths(cube, spacing)
    limit = step_lengths((MARGIN + 1) * np.eye(3), spacing).min()
    return [(float(length), cube[lengths == length]) for length in np.unique(lengths[lengths < limit])]


class NearestVoxel:
    """Finds the distance to the nearest voxel of a mask in a search tree.

    Args:
        packed: Mask from `pack_both`, not empty.
        spacing: Voxel size (z, y, x). Its unit is the unit of all distances.
    """

    def __init__(self, packed: np.ndarray, spacing: Sequence[float]) -> None:
        self.spacing = spacing
        self.places = indices_to_places(packed, find_indices(packed))
        # Voxels are longer along z than within a slice. The tree must hold lengths, because the nearest voxel by
        # length is often not the nearest by number of steps.
        self.tree = cKDTree(self.places * self.spacing, LEAF_SIZE, compact_nodes=False, balanced_tree=False)

    def distances(self, places: np.ndarray) -> np.ndarray:
        """Return the distances from voxels to the nearest voxel of the mask.

        Args:
            places: Places (z, y, x), int64, shape `(n, 3)`.

        Returns:
            float64, shape `(n,)`.
        """
        # The tree finds the nearest voxel; its distances are not used. They are differences of rounded coordinates:
        # the 2 steps from 7 to 9 would be 9 * 1.63 - 7 * 1.63, not 3.26 exactly, and might exceed a tolerance of 3.26
        # mm.
        _, nearest = self.tree.query(places * self.spacing)
        return step_lengths(places - self.places[nearest], self.spacing)


def distances_to(voxels: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the distance from each voxel of a mask to the nearest voxel of another mask.

    Args:
        voxels: Mask from `pack_both`.
        others: Mask of the same shape from `pack_both`.
        spacing: Voxel size (z, y, x).

    Returns:
        One distance per voxel of `voxels` in row-major order, float64, in the unit of `spacing`; inf if `others` is
        empty.

    Example:
        >>> voxels, others = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> voxels[0, 0, :2] = others[0, 0, 1] = True
        >>> distances_to(*pack_both(voxels, others), (3.0, 1.5, 1.5))
        array([1.5, 0. ])
    """
    indices = find_indices(voxels)
    distances = np.full(indices.size, np.inf)
    if not others.any():
        return distances
    # The steps are looked up from the shortest to the longest, so the first one that ends in `others` is the distance.
    # In a good prediction, most voxels are 0 or 1 steps away, and few need the tree.
    inside = unpack(others)
    _, height, words = others.shape
    row = words * WORD_SIZE
    # Places in `distances` of the voxels that are not found yet, and their indices.
    waiting, left = np.arange(indices.size), indices
    for length, steps in near_steps(spacing):
        found = np.zeros(left.size, dtype=bool)
        for step in steps @ (height * row, row, 1):
            found |= inside[left + step]
        # Voxels that these steps miss get another distance later.
        distances[waiting] = length
        missed = np.flatnonzero(~found)
        waiting, left = waiting[missed], left[missed]
    if waiting.size:
        distances[waiting] = NearestVoxel(others, spacing).distances(indices_to_places(voxels, left))
    return distances


def surface_distances(
    preds: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances between the surfaces of two masks, in both directions.

    Args:
        preds: Mask from `pack_both`.
        target: Mask from `pack_both`.
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
        voxels: Mask A from `pack_both`.
        others: Mask B from `pack_both`, not empty.
        spacing: Voxel size (z, y, x).

    Returns:
        The distance in the unit of `spacing`; 0 if B holds all of A.

    Example:
        >>> voxels, others = np.zeros((3, 3, 9), dtype=bool), np.zeros((3, 3, 9), dtype=bool)
        >>> voxels[1, 1, 1:8] = others[1, 1, 1:3] = True
        >>> greatest_distance(*pack_both(voxels, others), (1, 1, 1))
        5.0
    """
    # Voxels in both masks have the distance 0.
    places = indices_to_places(voxels, find_indices(voxels & ~others))
    if not places.size:
        return 0.0
    # The voxels left are outside B, so the nearest voxel of B is on its surface, and a tree of the surface is enough.
    # (From a voxel inside B, a step outwards would come nearer and still be in B.)
    nearest = NearestVoxel(find_surface(others), spacing)
    # First, one voxel m of each block is measured; let d be its distance. By the triangle inequality, another voxel a
    # of the block has at most the distance d + |a - m|. It is measured only if this limit exceeds the greatest
    # distance so far. Most voxels of the volume are never measured.
    blocks = places // BLOCK_SIZE
    num_blocks = blocks.max(axis=0) + 1
    blocks = np.ravel_multi_index(tuple(blocks.T), num_blocks)
    measured = np.full(np.prod(num_blocks), -1)
    # Voxels of one block write to the same element, and the last one stays. -1 marks a block without voxels.
    measured[blocks] = np.arange(len(places))
    distances = np.zeros(measured.size)
    distances[measured >= 0] = nearest.distances(places[measured[measured >= 0]])
    limits = distances[blocks] + step_lengths(places - places[measured[blocks]], spacing)
    farther = limits > distances.max()
    return float(max(distances.max(), nearest.distances(places[farther]).max(initial=0)))
