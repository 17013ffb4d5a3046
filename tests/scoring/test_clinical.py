"""The clinic's scores: solved by hand, and against MONAI and google-deepmind's surface-distance on random volumes."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.ndimage import binary_erosion, gaussian_filter

from gi_segmentation.scoring.clinical import (
    SurfaceDistances,
    compare_organ,
    hausdorff_distance,
    normalised_surface_dice,
)
from gi_segmentation.scoring.surface import pack_both, surface_distances

Case = tuple[np.ndarray, np.ndarray, tuple[float, float, float]]
KINDS = ("empty", "one voxel", "specks", "blob", "blob at the border", "full")
NUM_CASES = 72


def draw_mask(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    if kind == "one voxel":
        mask[tuple(rng.integers(0, shape))] = True
    elif kind == "specks":
        mask = rng.random(shape) < 0.1
    elif kind.startswith("blob"):
        field = gaussian_filter(rng.standard_normal(shape), rng.uniform(1, 2))
        mask = field > np.quantile(field, rng.uniform(0.5, 0.95))
        if kind == "blob":  # otherwise it touches the volume's border
            mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = False
    elif kind == "full":
        mask[:] = True
    return mask


def draw_case(seed: int) -> Case:
    """Masks of every pair of kinds, twice over the seeds, on anisotropic grids."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(3, 16, 3))
    spacing = tuple(rng.choice([1.0, 1.5, 1.63, 3.0, 0.7], 3).tolist())
    target = draw_mask(rng, shape, KINDS[seed % 6])
    preds = draw_mask(rng, shape, KINDS[seed // 6 % 6])
    if seed % 5 == 0 and target.any():
        preds = target ^ (rng.random(shape) < 0.05)  # as from a good model
    return preds, target, spacing


CASES = [draw_case(seed) for seed in range(NUM_CASES)]


def with_monai(measure: Callable[..., torch.Tensor], case: Case, *values: object, **named: object) -> float:
    preds, target, spacing = case
    volumes = (torch.from_numpy(mask[None, None]) for mask in (preds, target))
    if measure is not compute_dice:
        named["spacing"] = list(spacing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(measure(*volumes, *values, include_background=True, **named))


def distances_of(case: Case) -> SurfaceDistances:
    preds, target, spacing = case
    return surface_distances(*pack_both(preds, target), spacing)


def num_empty(case: Case) -> int:
    return sum(not mask.any() for mask in case[:2])


class TestMonai:
    """Random cases; MONAI computes in single precision."""

    def test_distances(self) -> None:
        for case in CASES:
            scores, distances = compare_organ(*case), distances_of(case)
            for ours, theirs in (
                (scores["hausdorff_mm"], with_monai(compute_hausdorff_distance, case)),
                (scores["hausdorff95_mm"], with_monai(compute_hausdorff_distance, case, percentile=95)),
                (hausdorff_distance(distances, 50), with_monai(compute_hausdorff_distance, case, percentile=50)),
                (
                    scores["mean_surface_distance_mm"],
                    with_monai(compute_average_surface_distance, case, symmetric=True),
                ),
            ):
                if num_empty(case) == 2:
                    assert ours == 0 and math.isnan(theirs)
                elif num_empty(case) == 1:
                    assert math.isnan(ours) and not math.isfinite(theirs)
                else:
                    assert ours == pytest.approx(theirs, rel=1e-5)

    def test_shares(self) -> None:
        for case in CASES:
            dice = with_monai(compute_dice, case, ignore_empty=False) if num_empty(case) < 2 else math.nan
            scores, distances = compare_organ(*case), distances_of(case)
            assert scores["volume_dice"] == pytest.approx(dice, rel=1e-5, nan_ok=True)
            for tolerance in (0.0, 1.0, case[2][2], 2 * case[2][1], 3.0, 5.0):
                expected = with_monai(compute_surface_dice, case, [tolerance])
                ours = [normalised_surface_dice(distances, tolerance)]
                ours += [scores[name] for name in scores if name == f"normalised_surface_dice_{tolerance:g}mm"]
                assert len(ours) == 1 + (tolerance in (3, 5))
                assert ours == pytest.approx([expected] * len(ours), rel=1e-5, nan_ok=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestSurfaceDistance:
    """Version 0.1 knows names that NumPy has no more, which it looks up where a mask is empty: those are left out."""

    def test_dice_is_the_same(self) -> None:
        for preds, target, spacing in CASES:
            if preds.any() or target.any():
                expected = surface_distance.compute_dice_coefficient(target, preds)
                assert compare_organ(preds, target, spacing)["volume_dice"] == pytest.approx(expected, abs=1e-15)

    def test_hausdorff_differs_by_a_voxels_diagonal_at_most(self) -> None:
        for case in CASES:
            if num_empty(case) == 0:
                preds, target, spacing = case
                distances = surface_distance.compute_surface_distances(target, preds, spacing)
                theirs = surface_distance.compute_robust_hausdorff(distances, 100)
                assert abs(compare_organ(*case)["hausdorff_mm"] - theirs) <= math.hypot(*spacing) + 1e-9

    def test_moved_boxes_are_as_far_apart(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            size, step = rng.integers(1, 6, 3), rng.integers(0, 6, 3)
            spacing = tuple(rng.uniform(0.5, 4, 3).tolist())
            preds, target = np.zeros((12, 12, 12), dtype=bool), np.zeros((12, 12, 12), dtype=bool)
            target[tuple(slice(1, 1 + n) for n in size)] = True
            preds[tuple(slice(1 + m, 1 + m + n) for m, n in zip(step, size, strict=True))] = True
            distances = surface_distance.compute_surface_distances(target, preds, spacing)
            expected = math.hypot(*(step * spacing))
            assert surface_distance.compute_robust_hausdorff(distances, 100) == pytest.approx(expected)
            assert compare_organ(preds, target, spacing)["hausdorff_mm"] == pytest.approx(expected)
            whole = [surface_distance.compute_surface_dice_at_tolerance(distances, expected + 1e-9)]
            ours = distances_of((preds, target, spacing))
            assert [normalised_surface_dice(ours, expected + 1e-9)] == pytest.approx(whole) == [1.0]


def test_volumes_by_definition() -> None:
    for preds, target, spacing in CASES:
        scores = compare_organ(preds, target, spacing)
        expected = [mask.sum() * math.prod(spacing) / 1000 for mask in (preds, target)]
        assert [scores["volume_preds_ml"], scores["volume_target_ml"]] == pytest.approx(expected)
        assert scores["volume_difference_ml"] == pytest.approx(expected[0] - expected[1])


def test_added_path_length_by_definition() -> None:
    for preds, target, (depth, height, width) in CASES:
        pixels = 0
        for slices in zip(preds, target, strict=True):
            drawn, wanted = (mask & ~binary_erosion(mask) for mask in slices)
            pixels += np.count_nonzero(wanted & ~drawn)
        scores = compare_organ(preds, target, (depth, height, width))
        assert scores["added_path_length_mm"] == pytest.approx(pixels * (height + width) / 2)


def pixels(*places: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((6, 6, 8), dtype=bool)
    for place in places:
        mask[place] = True
    return mask


class TestByHand:
    @pytest.mark.parametrize(
        ("other", "expected"),
        [((0, 0, 0), 0.0), ((0, 0, 1), 2.0), ((0, 1, 0), 1.5), ((2, 0, 0), 6.0), ((0, 2, 2), 5.0), ((1, 0, 2), 5.0)],
    )
    def test_two_pixels(self, other: tuple[int, int, int], expected: float) -> None:
        case = pixels((0, 0, 0)), pixels(other), (3.0, 1.5, 2.0)
        scores, distances = compare_organ(*case), distances_of(case)
        assert [scores[name] for name in ("hausdorff_mm", "hausdorff95_mm", "mean_surface_distance_mm")] == [
            expected
        ] * 3
        assert normalised_surface_dice(distances, expected) == 1
        if expected:
            assert normalised_surface_dice(distances, expected - 0.01) == 0

    def test_on_2_pixels_2mm_away(self) -> None:
        assert compare_organ(pixels((3, 3, 2)), pixels((3, 3, 4)), (3, 1, 1))["hausdorff_mm"] == 2

    def test_hd95_lies_between_the_greatest_distances(self) -> None:
        # 20 pixels that both have, and one 4 mm off: 95 % of 21 pixels is the 20th, whose distance is 0.
        row = [(0, y, x) for y in range(5) for x in range(4)]
        preds, target = pixels(*row, (0, 0, 7)), pixels(*row)
        scores = compare_organ(preds, target, (1, 1, 1))
        assert (scores["hausdorff_mm"], scores["hausdorff95_mm"]) == (4, 0)
        for masks in ((preds, target), (target, preds)):  # the greater way
            assert hausdorff_distance(distances_of((*masks, (1, 1, 1))), 97.5) == pytest.approx(2)

    def test_a_hole_counts(self) -> None:
        whole = np.ones((5, 5, 5), dtype=bool)
        hollow = whole.copy()
        hollow[2, 2, 2] = False
        # The six voxels around it, a step below the surface.
        assert compare_organ(hollow, whole, (1, 1, 1))["hausdorff_mm"] == 1

    def test_volume_difference_has_a_sign(self) -> None:
        preds, target = pixels((0, 0, 0)), pixels((1, 1, 1), (1, 1, 2), (1, 1, 3))
        assert compare_organ(preds, target, (10, 10, 10))["volume_difference_ml"] == -2.0
        assert compare_organ(target, preds, (10, 10, 10))["volume_difference_ml"] == 2.0

    def test_a_square_moved_by_a_pixel(self) -> None:
        target, preds = np.zeros((1, 8, 8), dtype=bool), np.zeros((1, 8, 8), dtype=bool)
        target[0, 1:5, 1:5] = preds[0, 1:5, 2:6] = True
        # Of the 12 contour pixels the upper and the lower row share 3 each with the other square's.
        assert compare_organ(preds, target, (3, 1.5, 1.5))["added_path_length_mm"] == 6 * 1.5

    def test_paths_are_drawn_slice_by_slice(self) -> None:
        # The truth's contour lies on the next slice of the prediction: near in 3D, yet all of it is to be drawn.
        preds, target = pixels((2, 2, 2)), pixels((3, 2, 2))
        assert compare_organ(preds, target, (0.1, 1.5, 1.5))["added_path_length_mm"] == 1.5

    def test_pixels_that_are_not_square(self) -> None:
        target = pixels((0, 0, 0), (0, 0, 1))
        assert compare_organ(pixels(), target, (3, 1.0, 2.0))["added_path_length_mm"] == 2 * 1.5

    def test_empty_masks(self) -> None:
        empty, one = pixels(), pixels((1, 2, 3))
        spacing = (3.0, 1.5, 1.5)
        for preds, target, distance, dice, path, millilitres in (
            (empty, empty, 0.0, math.nan, 0.0, 0.0),
            (one, empty, math.nan, 0.0, 0.0, 0.00675),
            (empty, one, math.nan, 0.0, 1.5, -0.00675),
        ):
            expected = {
                "volume_dice": dice,
                "hausdorff_mm": distance,
                "hausdorff95_mm": distance,
                "mean_surface_distance_mm": distance,
                "normalised_surface_dice_3mm": dice,
                "normalised_surface_dice_5mm": dice,
                "added_path_length_mm": path,
                "volume_difference_ml": millilitres,
                "volume_preds_ml": preds.sum() * 0.00675,
                "volume_target_ml": target.sum() * 0.00675,
            }
            scores = compare_organ(preds, target, spacing)
            assert list(scores) == list(expected)
            assert scores == pytest.approx(expected, nan_ok=True)


class TestErrors:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"one shape \(D, H, W\), but got \(6, 6, 8\) and \(6, 8\)"):
            compare_organ(pixels(), pixels()[0], (1, 1, 1))
        with pytest.raises(ValueError, match="one shape"):
            compare_organ(pixels()[0], pixels()[0], (1, 1, 1))

    def test_masks_that_are_not_binary(self) -> None:
        labels = pixels((1, 2, 3)).astype(np.float32)
        assert compare_organ(labels, labels, (1, 1, 1))["volume_dice"] == 1
        labels[4, 5, 6], labels[5, 0, 0] = 0.5, np.nan
        with pytest.raises(ValueError, match=r"preds: .* but got 0.5 at \(4, 5, 6\); 2 voxels are neither"):
            compare_organ(labels, pixels(), (1, 1, 1))

    @pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, 1, math.nan), (math.inf, 1, 1)])
    def test_spacing(self, spacing: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="expected spacing_mm of three positive numbers"):
            compare_organ(pixels(), pixels(), spacing)
