"""Surfaces and distances of masks against SciPy and against the definition."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial.distance import cdist

from gi_segmentation.scoring.surface import bounding_box, crop_to_both, distances_to, find_surface, greatest_distance

SPACING = (3.0, 1.63, 1.5)


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one shape, from a few voxels to most of the volume."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 20, 3))
    preds, target = (rng.random(shape) < rng.choice([0.005, 0.05, 0.5, 0.9]) for _ in range(2))
    preds[tuple(rng.integers(0, shape))] = target[tuple(rng.integers(0, shape))] = True
    return preds, target


def nearest_by_definition(voxels: np.ndarray, others: np.ndarray) -> np.ndarray:
    return cdist(np.argwhere(voxels) * SPACING, np.argwhere(others) * SPACING).min(axis=1)


@pytest.mark.parametrize("seed", range(40))
class TestRandomMasks:
    def test_the_box_holds_both_and_no_more(self, seed: int) -> None:
        masks = random_pair(seed)
        cropped = crop_to_both(*masks)
        for mask, crop in zip(masks, cropped, strict=True):
            assert mask[bounding_box(mask)].sum() == mask.sum() == crop.sum()
            assert crop[1:-1, 1:-1, 1:-1].sum() == crop.sum()
            steps = [np.argwhere(volume) - np.argwhere(volume)[0] for volume in (mask, crop)]
            assert np.array_equal(*steps)
        inner = (cropped[0] | cropped[1])[1:-1, 1:-1, 1:-1]
        for axis in range(3):
            assert inner.take(0, axis).any() and inner.take(-1, axis).any()

    @pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)])
    def test_surfaces_are_what_erosion_takes_away(self, seed: int, axes: tuple[int, ...]) -> None:
        structure = generate_binary_structure(3, 1)
        if 0 not in axes:
            structure[[0, 2]] = False
        for mask in crop_to_both(*random_pair(seed)):
            assert np.array_equal(find_surface(mask, axes), mask & ~binary_erosion(mask, structure))

    def test_distances_agree_with_the_definition(self, seed: int) -> None:
        preds, target = random_pair(seed)
        for voxels, others in ((preds, target), (target, preds)):
            expected = nearest_by_definition(voxels, others)
            assert distances_to(voxels, others, SPACING) == pytest.approx(expected, abs=1e-12)

    def test_the_greatest_distance_agrees_with_the_definition(self, seed: int) -> None:
        preds, target = crop_to_both(*random_pair(seed))
        for voxels, others in ((preds, target), (target, preds)):
            expected = nearest_by_definition(voxels, others).max()
            assert greatest_distance(voxels, others, SPACING) == pytest.approx(expected, abs=1e-12)


def test_whole_steps_give_exact_lengths_anywhere() -> None:
    # 2 * 1.63 is 3.26, while 9 * 1.63 - 7 * 1.63 is not: a tolerance of 3.26 mm must hold the one and the other.
    for start in range(40):
        voxels, others = np.zeros((1, 1, 50), dtype=bool), np.zeros((1, 1, 50), dtype=bool)
        voxels[..., start] = others[..., start + 2] = True
        assert distances_to(voxels, others, (3.0, 1.63, 1.63)).tolist() == [3.26]


def test_the_voxel_deep_inside_decides() -> None:
    # Of a ball in the hole of a shell the middle is farthest from the shell, though it is none of the ball's surface.
    radius = np.sqrt(sum((axis - 15) ** 2 for axis in np.ogrid[:31, :31, :31]))
    ball, shell = radius < 12.5, (radius >= 12.5) & (radius < 14)
    expected = np.linalg.norm(np.argwhere(shell) - 15, axis=1).min()
    assert greatest_distance(ball, shell, (1, 1, 1)) == pytest.approx(expected)


def test_empty_masks() -> None:
    empty, one = np.zeros((2, 3, 4), dtype=bool), np.zeros((2, 3, 4), dtype=bool)
    one[1, 1, 1] = True
    assert bounding_box(empty) is None
    assert [mask.shape for mask in crop_to_both(empty, empty)] == [(2, 2, 2)] * 2
    assert distances_to(empty, one, SPACING).tolist() == [] and distances_to(one, empty, SPACING).tolist() == [np.inf]
