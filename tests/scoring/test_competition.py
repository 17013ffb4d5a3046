"""The competition's distance of two volumes: as mle-bench defines it, and for every choice of the rules."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import surface_distance
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.spatial.distance import directed_hausdorff

from gi_segmentation.rules import PRESETS, CompetitionRules
from gi_segmentation.scoring.competition import normalised_hausdorff


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one shape, neither empty, from a few voxels to most of the volume."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, 3))
    preds, target = (rng.random(shape) < rng.choice([0.03, 0.2, 0.8]) for _ in range(2))
    preds[tuple(rng.integers(0, shape))] = target[tuple(rng.integers(0, shape))] = True
    return preds, target


PAIRS = [random_pair(seed) for seed in range(60)]


def nearest_by_definition(preds: np.ndarray, target: np.ndarray) -> float:
    """mle-bench's distance of two volumes, from the definition."""
    points = [np.argwhere(mask) / np.array(mask.shape) for mask in (preds, target)]
    one_way, other_way = (directed_hausdorff(a, b)[0] for a, b in (points, points[::-1]))
    return max(one_way, other_way) / math.sqrt(3)


class TestHausdorff:
    def test_random_volumes_agree_with_scipy(self) -> None:
        for preds, target in PAIRS:
            expected = 1.0 if preds.sum() > 10 * target.sum() else nearest_by_definition(preds, target)
            assert normalised_hausdorff(preds, target) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(
        ("shape", "pixel", "other", "expected"),
        [
            ((2, 4, 8), (0, 0, 0), (1, 0, 0), 1 / 2),  # one of two slices apart
            ((2, 4, 8), (0, 0, 0), (0, 1, 0), 1 / 4),
            ((2, 4, 8), (0, 0, 0), (0, 0, 2), 1 / 4),
            ((2, 4, 8), (0, 0, 0), (1, 2, 4), math.sqrt(3) / 2),
            ((2, 4, 8), (1, 3, 7), (1, 3, 7), 0),
        ],
    )
    def test_two_pixels(
        self, shape: tuple[int, ...], pixel: tuple[int, ...], other: tuple[int, ...], expected: float
    ) -> None:
        preds, target = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        preds[pixel] = target[other] = True
        assert normalised_hausdorff(preds, target) == pytest.approx(expected / math.sqrt(3), abs=1e-15)

    def test_it_is_the_greater_of_both_ways(self) -> None:
        target = np.zeros((1, 1, 10), dtype=bool)
        target[..., :2] = True
        preds = target.copy()
        preds[..., 9] = True  # 8 pixels from the target, while every target pixel is hit
        for one, other in ((preds, target), (target, preds)):
            assert normalised_hausdorff(one, other) == pytest.approx(0.8 / math.sqrt(3))

    def test_empty_volumes(self) -> None:
        empty, full = np.zeros((2, 3, 4), dtype=bool), np.ones((2, 3, 4), dtype=bool)
        assert math.isnan(normalised_hausdorff(empty, empty))
        assert normalised_hausdorff(empty, full) == normalised_hausdorff(full, empty) == 1

    def test_over_ten_times_the_pixels_is_as_bad_as_can_be(self) -> None:
        target = np.zeros((1, 1, 20), dtype=bool)
        target[..., 0] = True
        preds = np.arange(20).reshape(1, 1, 20) < 10
        assert normalised_hausdorff(preds, target) == pytest.approx(9 / 20 / math.sqrt(3))
        preds = np.arange(20).reshape(1, 1, 20) < 11
        assert normalised_hausdorff(preds, target) == 1
        assert normalised_hausdorff(target, preds) < 1  # the other way round it is no reason


def corners_by_definition(mask: np.ndarray) -> np.ndarray:
    """The corners between voxels inside and outside of a mask: one more than voxels along each axis."""
    padded = np.pad(mask, 1)
    sides = [slice(None, -1), slice(1, None)]
    around = np.stack([padded[place] for place in itertools.product(sides, repeat=3)])
    return around.any(axis=0) & ~around.all(axis=0)


def host_by_definition(preds: np.ndarray, target: np.ndarray) -> float:
    """The host's distance by distance transforms, with an axis of the unit cube as long as the volume."""
    spacing = [1 / size for size in preds.shape]
    borders = [corners_by_definition(mask) for mask in (preds, target)]
    maps = [distance_transform_edt(~border, sampling=spacing) for border in borders]
    return max(maps[1][borders[0]].max(), maps[0][borders[1]].max()) / math.sqrt(3)


def distance_by_definition(preds: np.ndarray, target: np.ndarray, rules: CompetitionRules) -> float:
    """Distance of two masks, neither empty, from the definition."""
    if rules.oversized == "worst" and preds.sum() > 10 * target.sum():
        return 1.0
    shape = np.array(preds.shape)
    diagonal = np.linalg.norm(shape)
    if rules.points == "surface":
        preds, target = (mask & ~binary_erosion(mask) for mask in (preds, target))
    elif rules.points == "corners":
        preds, target = (corners_by_definition(mask) for mask in (preds, target))
    unit = shape if rules.normaliser == "unit_cube" else np.ones(3)
    points = [np.argwhere(mask) / unit for mask in (preds, target)]
    distance = directed_hausdorff(*points)[0]
    if rules.direction == "symmetric":
        distance = max(distance, directed_hausdorff(*points[::-1])[0])
    return distance / (math.sqrt(3) if rules.normaliser == "unit_cube" else diagonal)


class TestRules:
    def test_every_choice_agrees_with_the_definition(self) -> None:
        for choice in itertools.product(
            ("symmetric", "preds_to_target"),
            ("voxels", "surface", "corners"),
            ("unit_cube", "volume_diagonal"),
            ("worst", "measured"),
        ):
            names = ("direction", "points", "normaliser", "oversized")
            rules = CompetitionRules(**dict(zip(names, choice, strict=True)))
            for preds, target in PAIRS:
                expected = distance_by_definition(preds, target, rules)
                assert normalised_hausdorff(preds, target, rules) == pytest.approx(expected, abs=1e-12), choice

    def test_first_place_agrees_with_the_functions_its_code_calls(self) -> None:
        for preds, target in PAIRS:
            edges = get_mask_edges(preds, target)
            expected = get_surface_distance(*edges).max() / math.sqrt(sum(size**2 for size in preds.shape))
            assert normalised_hausdorff(preds, target, PRESETS["first_place"]) == pytest.approx(expected, rel=1e-6)

    def test_host_agrees_with_scipy_and_with_the_package_that_its_code_calls(self) -> None:
        rules, cubes = PRESETS["host"], replace(PRESETS["host"], normaliser="volume_diagonal")
        for preds, target in PAIRS:
            expected = host_by_definition(preds, target)
            assert normalised_hausdorff(preds, target, rules) == pytest.approx(expected, abs=1e-12)
            theirs = surface_distance.compute_surface_distances(target, preds, (1, 1, 1))
            greatest = max(theirs[way].max() for way in ("distances_gt_to_pred", "distances_pred_to_gt"))
            diagonal = math.sqrt(sum(size**2 for size in preds.shape))
            assert normalised_hausdorff(preds, target, cubes) == pytest.approx(greatest / diagonal, rel=1e-9)

    @pytest.mark.parametrize(
        ("rules", "both", "only_target", "only_preds"),
        [
            (PRESETS["mle_bench"], math.nan, 1, 1),
            (PRESETS["first_place"], 0, 1, 1),
            (PRESETS["host"], math.nan, 1, math.nan),
            (CompetitionRules(preds_empty="ignored"), math.nan, math.nan, 1),
            (CompetitionRules(both_empty="perfect", target_empty_scans="ignored"), math.nan, 1, math.nan),
        ],
    )
    def test_empty_volumes(self, rules: CompetitionRules, both: float, only_target: float, only_preds: float) -> None:
        empty, full = np.zeros((2, 3, 4), dtype=bool), np.ones((2, 3, 4), dtype=bool)
        distances = [normalised_hausdorff(*pair, rules) for pair in ((empty, empty), (empty, full), (full, empty))]
        assert distances == pytest.approx([both, only_target, only_preds], nan_ok=True)

    def test_a_hole_counts_by_surfaces_alone(self) -> None:
        target = np.ones((9, 9, 9), dtype=bool)
        preds = target.copy()
        preds[4, 4, 4] = False
        # Surface: from the voxels around the hole to the outermost. Corners: from those of the hole to the border.
        for points, distance in (("voxels", 1), ("surface", 3), ("corners", 4)):
            rules = CompetitionRules(points=points, normaliser="volume_diagonal")  # type: ignore[arg-type]
            assert normalised_hausdorff(preds, target, rules) == pytest.approx(distance / math.sqrt(3 * 81))

    def test_one_direction_does_not_see_what_is_missed(self) -> None:
        target = np.zeros((1, 1, 10), dtype=bool)
        target[..., [0, 9]] = True
        preds = target.copy()
        preds[..., 9] = False
        assert normalised_hausdorff(preds, target, PRESETS["first_place"]) == 0
        assert normalised_hausdorff(preds, target) == pytest.approx(0.9 / math.sqrt(3))

    def test_a_choice_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="both_empty: expected one of skipped, perfect; got 'perfct'"):
            CompetitionRules(both_empty="perfct")  # type: ignore[arg-type]

    def test_volumes_of_two_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"one shape, but got \(1, 2, 3\) and \(1, 3, 2\)"):
            normalised_hausdorff(np.ones((1, 2, 3), dtype=bool), np.ones((1, 3, 2), dtype=bool))
