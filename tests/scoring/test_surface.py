"""Packed masks, their surfaces and distances against SciPy and against the definition."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial.distance import cdist

from gi_segmentation.scoring.surface import (
    MARGIN,
    WORD_SIZE,
    bounding_box,
    count_voxels,
    distances_to,
    find_indices,
    find_surface,
    greatest_distance,
    indices_to_places,
    near_steps,
    pack,
    pack_both,
    surface_distances,
    unpack,
)

SPACING = (3.0, 1.63, 1.5)
# Voxels that are longer along z, longer along x, and of one length.
SPACINGS = (SPACING, (0.3, 2.0, 1.7), (1.0, 1.0, 1.0))


def as_volume(packed: np.ndarray) -> np.ndarray:
    """A packed mask as bool, with the background around it."""
    return unpack(packed).reshape(*packed.shape[:2], -1)


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one shape, from a few voxels to most of the volume. Many rows are longer than a word."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, (8, 9, 140)))
    preds, target = (rng.random(shape) < rng.choice([0.0005, 0.005, 0.05, 0.5, 0.9]) for _ in range(2))
    preds[tuple(rng.integers(0, shape))] = target[tuple(rng.integers(0, shape))] = True
    return preds, target


PAIRS = [random_pair(seed) for seed in range(40)]
# The definition compares each voxel with each, so it gets the smaller masks only.
BOTH_WAYS = [way for pair in PAIRS if min(mask.sum() for mask in pair) < 500 for way in (pair, pair[::-1])]


def boxes(shape: tuple[int, int, int], *parts: tuple[slice, slice, slice]) -> list[np.ndarray]:
    """A mask for each box, all of one shape."""
    masks = [np.zeros(shape, dtype=bool) for _ in parts]
    for mask, part in zip(masks, parts, strict=True):
        mask[part] = True
    return masks


ALL = slice(None)
SHAPES = {
    "one voxel each, in opposite corners": boxes((9, 20, 140), np.s_[:1, :1, :1], np.s_[-1:, -1:, -1:]),
    "one voxel at the end of a row, one at the start of the next": boxes(
        (1, 2, 64), np.s_[:, :1, -1:], np.s_[:, 1:, :1]
    ),
    "one voxel in the last layer, one in the first": boxes((4, 2, 64), np.s_[3:, 1:, -1:], np.s_[:1, :1, :1]),
    "full": boxes((5, 6, 70), (ALL, ALL, ALL), (ALL, ALL, ALL)),
    "full, and one voxel": boxes((5, 6, 70), (ALL, ALL, ALL), np.s_[2:3, 3:4, 40:41]),
    "large and flat, one layer apart": boxes((6, 30, 130), np.s_[2:3], np.s_[3:4]),
    "large and flat, far apart": boxes((25, 20, 70), np.s_[:1], np.s_[-1:]),
    "flat across two axes": boxes((7, 20, 70), np.s_[:, 10:11], np.s_[:, :, 35:36]),
    "thin along each axis": boxes((15, 20, 140), np.s_[:, :1, :1], np.s_[7:8, :, 60:61], np.s_[7:8, 10:11, :]),
    "as far apart as the rows are long": boxes((2, 3, 300), np.s_[:, :, :3], np.s_[:, :, -3:]),
    "on both sides of the border of a word": boxes((3, 3, 200), np.s_[:, :, :62], np.s_[:, :, 62:126]),
}


def nearest_by_definition(
    voxels: np.ndarray, others: np.ndarray, spacing: tuple[float, float, float] = SPACING
) -> np.ndarray:
    return cdist(np.argwhere(voxels) * spacing, np.argwhere(others) * spacing).min(axis=1)


def surface_by_definition(mask: np.ndarray, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    structure = generate_binary_structure(3, 1)
    if 0 not in axes:
        structure[[0, 2]] = False
    return mask & ~binary_erosion(mask, structure)


class TestRandomMasks:
    def test_the_box_holds_both_and_no_more(self) -> None:
        for masks in PAIRS:
            packed = pack_both(*masks)
            for mask, crop in zip(masks, map(as_volume, packed), strict=True):
                assert mask[bounding_box(mask)].sum() == mask.sum() == crop.sum()
                steps = [np.argwhere(volume) - np.argwhere(volume)[0] for volume in (mask, crop)]
                assert np.array_equal(*steps)
            volume = as_volume(packed[0] | packed[1])
            # Along x the background fills the words.
            for axis, most in enumerate((2 * MARGIN, 2 * MARGIN, 2 * WORD_SIZE)):
                filled = np.flatnonzero(volume.any(axis=tuple({0, 1, 2} - {axis})))
                assert filled[0] >= MARGIN and volume.shape[axis] - filled[-1] > MARGIN
                assert volume.shape[axis] - len(range(filled[0], filled[-1] + 1)) <= most

    def test_packing_keeps_every_voxel(self) -> None:
        for mask, _ in PAIRS:
            packed = pack(mask)
            volume, indices = as_volume(packed), find_indices(packed)
            assert np.array_equal(indices, np.flatnonzero(volume))
            assert np.array_equal(indices_to_places(packed, indices), np.argwhere(mask) + 1)
            assert count_voxels(packed) == mask.sum()

    @pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)])
    def test_surfaces_are_what_erosion_takes_away(self, axes: tuple[int, ...]) -> None:
        for packed in itertools.chain.from_iterable(pack_both(*pair) for pair in PAIRS):
            assert np.array_equal(
                as_volume(find_surface(packed, axes)), surface_by_definition(as_volume(packed), axes)
            )

    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_distances_agree_with_the_definition(self, spacing: tuple[float, float, float]) -> None:
        for voxels, others in BOTH_WAYS:
            expected = nearest_by_definition(voxels, others, spacing)
            packed = pack_both(voxels, others)
            assert distances_to(*packed, spacing) == pytest.approx(expected, abs=1e-12)
            assert greatest_distance(*packed, spacing) == pytest.approx(expected.max(), abs=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_distances_between_shapes_agree_with_the_definition(name: str) -> None:
    for (first, second), spacing in itertools.product(itertools.pairwise(SHAPES[name]), SPACINGS):
        surfaces = surface_by_definition(first), surface_by_definition(second)
        expected = [nearest_by_definition(*way, spacing) for way in (surfaces, surfaces[::-1])]
        packed = pack_both(first, second)
        for found, way in zip(surface_distances(*packed, spacing), expected, strict=True):
            assert found == pytest.approx(way, abs=1e-12)
        expected_voxels = nearest_by_definition(first, second, spacing).max()
        assert greatest_distance(*packed, spacing) == pytest.approx(expected_voxels, abs=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_near_steps_are_all_of_their_length_in_order(spacing: tuple[float, float, float]) -> None:
    found = near_steps(spacing)
    steps = np.argwhere(np.ones((21, 21, 21), dtype=bool)) - 10
    lengths = np.linalg.norm(steps * spacing, axis=1)
    limit = (MARGIN + 1) * min(spacing) - 1e-9
    assert sorted(map(tuple, np.concatenate([group for _, group in found]))) == list(
        map(tuple, steps[lengths < limit])
    )
    for length, group in found:
        assert np.linalg.norm(group * spacing, axis=1) == pytest.approx(length)
    assert [length for length, _ in found] == sorted({length for length, _ in found})
    assert found[0][0] == 0


def test_whole_steps_give_exact_lengths_anywhere() -> None:
    # 2 * 1.63 is 3.26, while 9 * 1.63 - 7 * 1.63 is not: a tolerance of 3.26 mm must hold the one and the other. The
    # longer step is measured by the tree.
    for start in range(40):
        for step, length in ((2, 3.26), (4, 6.52)):
            voxels, others = np.zeros((1, 1, 50), dtype=bool), np.zeros((1, 1, 50), dtype=bool)
            voxels[..., start] = others[..., start + step] = True
            assert distances_to(*pack_both(voxels, others), (3.0, 1.63, 1.63)).tolist() == [length]


def test_the_voxel_deep_inside_decides() -> None:
    # Of a ball in the hole of a shell the middle is farthest from the shell, though it is none of the ball's surface.
    radius = np.sqrt(sum((axis - 15) ** 2 for axis in np.ogrid[:31, :31, :31]))
    ball, shell = radius < 12.5, (radius >= 12.5) & (radius < 14)
    expected = np.linalg.norm(np.argwhere(shell) - 15, axis=1).min()
    assert greatest_distance(*pack_both(ball, shell), (1, 1, 1)) == pytest.approx(expected)


def test_empty_masks() -> None:
    empty, one = np.zeros((2, 3, 4), dtype=bool), np.zeros((2, 3, 4), dtype=bool)
    one[1, 1, 1] = True
    assert bounding_box(empty) is None
    packed = pack_both(empty, empty)
    assert [count_voxels(mask) for mask in packed] == [0, 0]
    assert [len(way) for way in surface_distances(*packed, SPACING)] == [0, 0]
    assert distances_to(*pack_both(empty, one), SPACING).tolist() == []
    assert distances_to(*pack_both(one, empty), SPACING).tolist() == [np.inf]
