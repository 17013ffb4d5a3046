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
from scipy.spatial.distance import cdist

from gi_segmentation.scoring.clinical import (
    added_path_length,
    hausdorff_distance,
    mean_surface_distance,
    measure_organ,
    normalised_surface_dice,
    volume_dice,
    volume_difference,
)

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


def num_empty(case: Case) -> int:
    return sum(not mask.any() for mask in case[:2])


class TestMonai:
    """Random cases; MONAI computes in single precision."""

    def test_distances(self) -> None:
        for case in CASES:
            for ours, theirs in (
                (hausdorff_distance(*case), with_monai(compute_hausdorff_distance, case)),
                (hausdorff_distance(*case, 95), with_monai(compute_hausdorff_distance, case, percentile=95)),
                (hausdorff_distance(*case, 50), with_monai(compute_hausdorff_distance, case, percentile=50)),
                (
                    mean_surface_distance(*case),
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
            assert volume_dice(*case[:2]) == pytest.approx(dice, rel=1e-5, nan_ok=True)
            for tolerance in (0.0, 1.0, case[2][2], 2 * case[2][1], 5.0):
                expected = with_monai(compute_surface_dice, case, [tolerance])
                assert normalised_surface_dice(*case, tolerance) == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestSurfaceDistance:
    """Version 0.1 knows names that NumPy has no more, which it looks up where a mask is empty: those are left out."""

    def test_dice_is_the_same(self) -> None:
        for preds, target, _ in CASES:
            if preds.any() or target.any():
                expected = surface_distance.compute_dice_coefficient(target, preds)
                assert volume_dice(preds, target) == pytest.approx(expected, abs=1e-15)

    def test_hausdorff_differs_by_a_voxels_diagonal_at_most(self) -> None:
        for case in CASES:
            if num_empty(case) == 0:
                preds, target, spacing = case
                distances = surface_distance.compute_surface_distances(target, preds, spacing)
                theirs = surface_distance.compute_robust_hausdorff(distances, 100)
                assert abs(hausdorff_distance(*case) - theirs) <= math.hypot(*spacing) + 1e-9

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
            assert hausdorff_distance(preds, target, spacing) == pytest.approx(expected)
            whole = [surface_distance.compute_surface_dice_at_tolerance(distances, expected + 1e-9)]
            assert [normalised_surface_dice(preds, target, spacing, expected + 1e-9)] == pytest.approx(whole) == [1.0]


def test_one_call_gives_what_each_score_gives() -> None:
    for case in CASES:
        expected = {
            "volume_dice": volume_dice(*case[:2]),
            "hausdorff_mm": hausdorff_distance(*case),
            "hausdorff95_mm": hausdorff_distance(*case, percentile=95),
            "mean_surface_distance_mm": mean_surface_distance(*case),
            "normalised_surface_dice_1.5mm": normalised_surface_dice(*case, tolerance_mm=1.5),
            "normalised_surface_dice_4mm": normalised_surface_dice(*case, tolerance_mm=4),
            "added_path_length_mm": added_path_length(*case),
            "volume_difference_ml": volume_difference(*case),
            "volume_preds_ml": volume_difference(case[0], np.zeros_like(case[0]), case[2]),
            "volume_target_ml": volume_difference(case[1], np.zeros_like(case[1]), case[2]),
        }
        scores = measure_organ(*case, tolerances_mm=[1.5, 4])
        assert list(scores) == list(expected)
        assert scores == pytest.approx(expected, nan_ok=True)


def test_added_path_length_by_definition() -> None:
    for preds, target, (depth, height, width) in CASES:
        for tolerance in (0.0, 1.0, width, 3.1):
            pixels = 0
            for slices in zip(preds, target, strict=True):
                drawn, wanted = (np.argwhere(mask & ~binary_erosion(mask)) * (height, width) for mask in slices)
                if len(wanted):
                    near = cdist(wanted, drawn).min(axis=1, initial=np.inf) <= tolerance + 1e-9
                    pixels += np.count_nonzero(~near)
            expected = pixels * (height + width) / 2
            assert added_path_length(preds, target, (depth, height, width), tolerance) == pytest.approx(expected)


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
        preds, target = pixels((0, 0, 0)), pixels(other)
        assert hausdorff_distance(preds, target, (3.0, 1.5, 2.0)) == expected
        assert hausdorff_distance(preds, target, (3.0, 1.5, 2.0), percentile=95) == expected
        assert mean_surface_distance(preds, target, (3.0, 1.5, 2.0)) == expected
        assert normalised_surface_dice(preds, target, (3.0, 1.5, 2.0), tolerance_mm=expected) == 1
        if expected:
            assert normalised_surface_dice(preds, target, (3.0, 1.5, 2.0), tolerance_mm=expected - 0.01) == 0

    def test_on_2_pixels_2mm_away(self) -> None:
        assert hausdorff_distance(pixels((3, 3, 2)), pixels((3, 3, 4)), (3, 1, 1)) == 2

    def test_hd95_lies_between_the_greatest_distances(self) -> None:
        # 20 pixels that both have, and one 4 mm off: 95 % of 21 pixels is the 20th, whose distance is 0.
        row = [(0, y, x) for y in range(5) for x in range(4)]
        preds, target = pixels(*row, (0, 0, 7)), pixels(*row)
        assert hausdorff_distance(preds, target, (1, 1, 1)) == 4
        assert hausdorff_distance(preds, target, (1, 1, 1), percentile=95) == 0
        assert hausdorff_distance(preds, target, (1, 1, 1), percentile=97.5) == pytest.approx(2)
        assert hausdorff_distance(target, preds, (1, 1, 1), percentile=97.5) == pytest.approx(2)  # the greater way

    def test_a_hole_counts(self) -> None:
        whole = np.ones((5, 5, 5), dtype=bool)
        hollow = whole.copy()
        hollow[2, 2, 2] = False
        assert hausdorff_distance(hollow, whole, (1, 1, 1)) == 1  # the six voxels around it, a step below the surface

    def test_volume_difference_has_a_sign(self) -> None:
        preds, target = pixels((0, 0, 0)), pixels((1, 1, 1), (1, 1, 2), (1, 1, 3))
        assert volume_difference(preds, target, (10, 10, 10)) == -2.0
        assert volume_difference(target, preds, (10, 10, 10)) == 2.0

    def test_a_square_moved_by_a_pixel(self) -> None:
        target, preds = np.zeros((1, 8, 8), dtype=bool), np.zeros((1, 8, 8), dtype=bool)
        target[0, 1:5, 1:5] = preds[0, 1:5, 2:6] = True
        # Of the 12 contour pixels the upper and the lower row share 3 each with the other square's.
        assert added_path_length(preds, target, (3, 1.5, 1.5)) == 6 * 1.5
        assert added_path_length(preds, target, (3, 1.5, 1.5), tolerance_mm=1.5) == 0

    def test_paths_are_drawn_slice_by_slice(self) -> None:
        # The truth's contour lies on the next slice of the prediction: near in 3D, yet all of it is to be drawn.
        preds, target = pixels((2, 2, 2)), pixels((3, 2, 2))
        assert added_path_length(preds, target, (0.1, 1.5, 1.5), tolerance_mm=3) == 1.5

    def test_pixels_that_are_not_square(self) -> None:
        assert added_path_length(pixels(), pixels((0, 0, 0), (0, 0, 1)), (3, 1.0, 2.0)) == 2 * 1.5

    def test_empty_masks(self) -> None:
        empty, one = pixels(), pixels((1, 2, 3))
        spacing = (3.0, 1.5, 1.5)
        for preds, target, distance, dice, path, millilitres in (
            (empty, empty, 0.0, math.nan, 0.0, 0.0),
            (one, empty, math.nan, 0.0, 0.0, 0.00675),
            (empty, one, math.nan, 0.0, 1.5, -0.00675),
        ):
            scores = measure_organ(preds, target, spacing)
            assert scores == pytest.approx(
                {
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
                },
                nan_ok=True,
            )


class TestErrors:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"one shape \(D, H, W\), but got \(6, 6, 8\) and \(6, 8\)"):
            hausdorff_distance(pixels(), pixels()[0], (1, 1, 1))
        with pytest.raises(ValueError, match="one shape"):
            volume_dice(pixels()[0], pixels()[0])

    def test_masks_that_are_not_binary(self) -> None:
        labels = pixels((1, 2, 3)).astype(np.float32)
        assert volume_dice(labels, labels) == 1
        labels[4, 5, 6], labels[5, 0, 0] = 0.5, np.nan
        with pytest.raises(ValueError, match=r"preds: .* but got 0.5 at \(4, 5, 6\); 2 voxels are neither"):
            measure_organ(labels, pixels(), (1, 1, 1))

    @pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, 1, math.nan), (math.inf, 1, 1)])
    def test_spacing(self, spacing: tuple[float, ...]) -> None:
        for score in (hausdorff_distance, mean_surface_distance, added_path_length, volume_difference, measure_organ):
            with pytest.raises(ValueError, match="expected spacing_mm of three positive numbers"):
                score(pixels(), pixels(), spacing)

    @pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
    def test_tolerance(self, tolerance: float) -> None:
        for score in (normalised_surface_dice, added_path_length):
            with pytest.raises(ValueError, match="expected tolerance_mm of at least 0"):
                score(pixels(), pixels(), (1, 1, 1), tolerance)

    @pytest.mark.parametrize("percentile", [-1, 101, math.nan])
    def test_percentile(self, percentile: float) -> None:
        with pytest.raises(ValueError, match="expected a percentile of 0 to 100"):
            hausdorff_distance(pixels(), pixels(), (1, 1, 1), percentile)
