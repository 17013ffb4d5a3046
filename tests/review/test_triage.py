"""A usual scan is good. Each fault gives a verdict with a reason that names it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.review.measures import ScanMeasures, measure_scan
from gi_segmentation.review.ranges import TrainingRanges, find_ranges, list_features
from gi_segmentation.review.triage import Triage, judge_scan

ORGANS = GI_TRACT.names

SPACING_MM = (3.0, 1.5, 1.5)


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A scan of 40 slices: a bright body with a box for each organ, and the masks of the boxes.

    The stomach lies near the head and at the patient's left, which is the right of the image.
    """
    random = np.random.default_rng(seed)
    scaled = 0.02 + 0.01 * random.random((40, 80, 100))
    scaled[:, 15:65, 20:80] += 0.5
    masks = np.zeros((3, 40, 80, 100), dtype=bool)
    shift = int(random.integers(0, 3))
    masks[0, 15:30, 25:45, 25 + shift : 38] = True
    masks[1, 20:35, 30:50, 42 : 58 + shift] = True
    masks[2, 5 + shift : 18, 25:40, 60:75] = True
    return scaled, masks


def measure(scaled: np.ndarray, masks: np.ndarray, confidence: float = 0.95) -> ScanMeasures:
    numbers = list(range(1, masks.shape[1] + 1))
    return measure_scan(
        masks, scaled, SPACING_MM, numbers, ORGANS, np.where(masks, confidence, 0.01).astype(np.float16)
    )


@pytest.fixture(scope="module")
def ranges() -> TrainingRanges:
    return find_ranges([measure(*draw(seed)) for seed in range(8)], ORGANS)


def checks(triage: Triage) -> set[str]:
    return {reason.check for reason in triage.reasons}


def test_a_scan_like_those_of_the_training_is_good(ranges: TrainingRanges) -> None:
    triage = judge_scan(measure(*draw(9)), ranges, dict.fromkeys(ORGANS, 0.95))
    assert triage.verdict == "good" and not triage.reasons and not triage.unchecked


FAULTS = {
    "left and right": (lambda array: array[..., ::-1], "stomach_left_mm", "left and right may be swapped"),
    "head and feet": (lambda array: array[..., ::-1, :, :], "stomach_lower_mm", "head and feet may be swapped"),
    "rows and columns": (lambda array: array.swapaxes(-1, -2), "stomach_left_mm", "left and right may be swapped"),
    "half": (lambda array: array[..., :25, :, :], "small_bowel_end_share", "cut off by the scan's end"),
    "cropped": (lambda array: array[..., 30:45], "large_bowel_edge_share", "cut off by the field of view"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_orientation_or_a_cut_is_found(fault: str, ranges: TrainingRanges) -> None:
    change, check, text = FAULTS[fault]
    scaled, masks = (change(array) for array in draw(9))
    triage = judge_scan(measure(scaled, masks), ranges)
    assert triage.verdict != "good"
    (reason,) = [reason for reason in triage.reasons if reason.check == check]
    assert text in reason.text and "in the training" in reason.text


def test_inverted_intensities_and_noise_are_found(ranges: TrainingRanges) -> None:
    scaled, masks = draw(9)
    inverted = judge_scan(measure(1 - scaled, masks), ranges)
    assert inverted.verdict == "fail" and {"border", "p5"} <= checks(inverted)
    noise = np.random.default_rng(0).normal(0, 0.2, scaled.shape)
    assert "roughness" in checks(judge_scan(measure(scaled + noise, masks), ranges))


def test_missing_and_doubtful_organs_need_no_ranges() -> None:
    scaled, masks = draw()
    empty = masks.copy()
    empty[2] = False
    one = judge_scan(measure(scaled, empty), None)
    assert one.verdict == "look" and [reason.text for reason in one.reasons] == ["stomach: not found"]
    nothing = judge_scan(measure(scaled, np.zeros_like(masks)), None)
    assert nothing.verdict == "fail" and nothing.reasons[0].text == "no organ was found"
    assert judge_scan(measure(scaled, masks, confidence=0.7), None).verdict == "look"
    assert judge_scan(measure(scaled, masks, confidence=0.5), None).verdict == "fail"


def test_without_ranges_the_report_says_what_was_not_checked() -> None:
    scaled, masks = draw()
    triage = judge_scan(measure(1 - scaled, masks), None)
    # Inverted intensities cannot be seen without ranges, and the user is told so.
    assert triage.verdict == "good" and "does not say which scans it was trained on" in triage.unchecked[0]
    masks[2, 5:15, 66:78, 2:18] = True
    assert checks(judge_scan(measure(scaled, masks), None)) == {"fragments"}
    masks[2, 5:15, 66:78, 2:18] = False
    masks[2, :18, 25:40, 60:75] = True
    assert checks(judge_scan(measure(scaled, masks), None)) == {"cut_off"}


def test_disagreement_is_a_reason() -> None:
    measured = measure(*draw())
    triage = judge_scan(measured, None, {"large_bowel": 0.9, "small_bowel": 0.7, "stomach": 0.3})
    assert [(reason.verdict, reason.check) for reason in triage.reasons] == [
        ("fail", "agreement"),
        ("look", "agreement"),
    ]
    assert triage.reasons[0].text.startswith("stomach: models or flips disagree")
    # An organ in no mask has no Dice.
    assert not judge_scan(measured, None, {"stomach": math.nan}).reasons


def test_a_gap_within_the_scan_is_a_reason() -> None:
    scaled, masks = draw()
    numbers = [*range(1, 21), *range(23, 43)]
    gap = measure_scan(masks, scaled, SPACING_MM, numbers, ORGANS)
    assert gap.shape[0] == 42 and gap.missing_slices == 2
    assert "2 slices are missing within the scan" in [reason.text for reason in judge_scan(gap, None).reasons]


def test_another_slice_distance_is_found(ranges: TrainingRanges) -> None:
    thick = replace(measure(*draw(9)), spacing_mm=(9.0, 1.5, 1.5))
    assert {"slice_distance_mm", "length_mm"} <= checks(judge_scan(thick, ranges))


def test_ranges_survive_the_configuration(ranges: TrainingRanges) -> None:
    assert TrainingRanges.from_config(ranges.to_config(), GI_TRACT) == ranges
    assert set(ranges.ranges) == set(list_features(ORGANS)) and ranges.scans == 8
    # A feature of a later version is passed over.
    assert TrainingRanges.from_config({"scans": 1, "ranges": {"later": "?"}}, GI_TRACT).ranges == {}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"scans": 1},
        {"scans": "many", "ranges": {}},
        {"scans": 1, "ranges": {"p50": [0.5]}},
        {"scans": 1, "ranges": {"p50": [0.5, 0.1]}},
        {"scans": 1, "ranges": {"p50": [0.1, math.nan]}},
        {"scans": 1, "ranges": {"p50": [True, 2]}},
    ],
)
def test_malformed_ranges_are_one_clear_error(value: Any) -> None:
    with pytest.raises(InputError, match=r"^training_ranges"):
        TrainingRanges.from_config(value, GI_TRACT)
