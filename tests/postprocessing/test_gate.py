"""A gate empties doubtful slices, and a lower threshold adds faint pixels."""

import numpy as np
import pytest

from gi_segmentation.labels import LabelMode
from gi_segmentation.postprocessing.cleaning import clean_masks
from gi_segmentation.postprocessing.gate import keep_slices, lower_thresholds
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing, no_postprocessing


def kept_slices(
    confidences: list[float], high: float, low: float = 1.0, numbers: list[int] | None = None, area_mm2: float = 0.0
) -> list[int]:
    """Return which slices stay. Slice k has an area of k + 1 mm²."""
    limits = OrganLimits(min_slice_confidence=high, min_neighbour_confidence=low, min_slice_area_mm2=area_mm2)
    areas_mm2 = np.arange(1.0, len(confidences) + 1)
    numbers = numbers or list(range(len(confidences)))
    return np.flatnonzero(keep_slices(np.float32(confidences), areas_mm2, numbers, limits)).tolist()


class TestGate:
    def test_a_slice_exactly_at_the_limit_stays(self) -> None:
        assert kept_slices([0.6, 0.59, 0.61], 0.6) == [0, 2]
        # Half precision of a model's probability is not 0.6, but 0.60009765625.
        assert kept_slices([float(np.float16(0.6)), float(np.nextafter(np.float16(0.6), np.float16(0)))], 0.6) == [0]

    def test_a_weaker_slice_stays_only_if_it_touches_one_that_stays(self) -> None:
        confidences = [0.5, 0.5, 0.9, 0.5, 0.4, 0.5, 0.5]
        assert kept_slices(confidences, 0.8, 0.5) == [0, 1, 2, 3]
        assert kept_slices(confidences, 0.8, 0.4) == [0, 1, 2, 3, 4, 5, 6]
        assert kept_slices(confidences, 0.8, 0.51) == kept_slices(confidences, 0.8) == [2]
        assert kept_slices(confidences, 0.95, 0.1) == []
        # A lower limit above the higher one changes nothing.
        assert kept_slices(confidences, 0.5, 0.9) == [0, 1, 2, 3, 5, 6]

    def test_slices_on_both_sides_of_a_gap_do_not_touch(self) -> None:
        assert kept_slices([0.9, 0.5, 0.5], 0.8, 0.5, numbers=[7, 8, 9]) == [0, 1, 2]
        assert kept_slices([0.9, 0.5, 0.5], 0.8, 0.5, numbers=[7, 8, 10]) == [0, 1]
        assert kept_slices([0.5, 0.5, 0.9], 0.8, 0.5, numbers=[7, 9, 11]) == [2]

    def test_the_area_comes_last(self) -> None:
        # The first slice is too small, but it still holds on to its neighbours.
        assert kept_slices([0.9, 0.5, 0.5], 0.8, 0.5, area_mm2=2.0) == [1, 2]

    def test_random_scans_equal_a_search_slice_by_slice(self) -> None:
        random = np.random.default_rng(0)
        for _ in range(50):
            confidences = random.integers(0, 5, 12) / 4
            numbers = np.cumsum(random.integers(1, 3, 12)).tolist()
            kept = {place for place in range(12) if confidences[place] >= 0.75}
            while True:
                near = {
                    place
                    for place in range(12)
                    if confidences[place] >= 0.25
                    and any(0 <= one < 12 and one in kept and abs(numbers[one] - numbers[place]) == 1
                            for one in (place - 1, place + 1))
                }  # fmt: skip
                if near <= kept:
                    break
                kept |= near
            assert kept_slices(confidences.tolist(), 0.75, 0.25, numbers) == sorted(kept)


def lowered(probabilities: list[list[float]], thresholds: list[float], label_mode: LabelMode) -> list[list[bool]]:
    """Return the masks of a row of pixels. A pixel has an organ before if its probability is above 0.5."""
    values = np.array(probabilities, dtype=np.float16)[:, None, None]
    settings = Postprocessing({f"{index}": OrganLimits(threshold=one) for index, one in enumerate(thresholds)})
    return lower_thresholds(values > 0.5, values, settings, label_mode)[:, 0, 0].tolist()


class TestThresholds:
    @pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
    def test_a_pixel_at_the_threshold_is_not_added(self, label_mode: LabelMode) -> None:
        assert lowered([[0.25, 0.26, 0.6]], [0.25], label_mode) == [[False, True, True]]
        assert lowered([[0.25, 0.26, 0.6]], [1.0], label_mode) == [[False, False, True]]

    def test_with_one_label_for_a_pixel_only_the_largest_organ_takes_background(self) -> None:
        # The organs of each pixel: the first is larger, both are equal, the second has the pixel already.
        probabilities = [[0.4, 0.3, 0.35], [0.3, 0.3, 0.6]]
        assert lowered(probabilities, [0.2, 0.2], "multiclass") == [[True, True, False], [False, False, True]]
        assert lowered(probabilities, [0.2, 0.2], "multilabel") == [[True, True, True], [True, True, True]]
        # The largest organ is below its threshold, and the second one does not take its place.
        assert lowered([[0.4], [0.3]], [0.45, 0.2], "multiclass") == [[False], [False]]


def test_the_steps_follow_each_other() -> None:
    # One row for each slice. Slice 0 is sure, slice 1 is faint, slice 2 is too faint, and slice 3 is small.
    probability = np.zeros((1, 4, 1, 6), dtype=np.float16)
    probability[0, 0], probability[0, 1], probability[0, 2], probability[0, 3, 0, 0] = 0.9, 0.4, 0.25, 0.9
    limits = OrganLimits(
        threshold=0.2, min_slice_confidence=0.8, min_neighbour_confidence=0.3, min_slice_area_mm2=2.0,
        min_volume_ml=0.01,
    )  # fmt: skip
    arguments = probability > 0.5, probability, (1.0, 1.0, 1.0), [1, 2, 3, 4]
    cleaned = clean_masks(*arguments, Postprocessing({"liver": limits}), "multiclass")
    assert cleaned[0, :, 0].sum(axis=1).tolist() == [6, 6, 0, 0]
    # Of six and six pixels, 12 mm³ are 0.012 ml. Without the faint slice, the component would be too small.
    alone = OrganLimits(min_slice_area_mm2=2.0, min_volume_ml=0.01)
    assert not clean_masks(*arguments, Postprocessing({"liver": alone}), "multiclass").any()
    assert np.array_equal(clean_masks(*arguments, no_postprocessing(["liver"]), "multiclass"), arguments[0])
