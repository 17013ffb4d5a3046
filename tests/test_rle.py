"""Run-length encodings: real ones survive decoding and encoding, and damaged ones are refused with a reason."""

import csv
from pathlib import Path

import numpy as np
import pytest

from gi_segmentation.rle import RleError, count_overlap, decode, encode, fill_runs, parse_runs

NUM_PIXELS = 100


def test_every_real_encoding_survives_decoding_and_encoding(test_data: Path) -> None:
    with (test_data / "uwmgi_rle" / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9504
    for row in rows:
        mask = decode(row["segmentation"], height=int(row["height"]), width=int(row["width"]))
        assert mask.any() == bool(row["segmentation"])
        assert encode(mask) == row["segmentation"], row["id"]


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 1), (31, 23)])
def test_random_masks_survive_encoding_and_decoding(shape: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(shape) < density
        restored = decode(encode(mask), *shape)
        assert restored.dtype == bool
        np.testing.assert_array_equal(restored, mask)


def test_filled_runs_equal_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_pixels = int(rng.integers(1, 40))
        # The borders of the runs. Equal neighbours are dropped, so that each run has a pixel; runs may touch.
        borders = np.sort(rng.integers(0, num_pixels + 1, 2 * rng.integers(0, 6))).reshape(-1, 2)
        starts, ends = borders[borders[:, 0] < borders[:, 1]].T
        expected = [any(start <= pixel < end for start, end in zip(starts, ends, strict=True))
                    for pixel in range(num_pixels)]  # fmt: skip
        assert fill_runs((starts, ends - starts), num_pixels).tolist() == expected


def test_the_overlap_equals_that_of_the_masks() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        masks = rng.random((rng.integers(1, 4), 3, 5)) < rng.choice([0, 0.2, 0.8, 1], size=(1, 3, 1))
        found.append(int((masks.sum(axis=0) > 1).sum()))
        assert count_overlap([parse_runs(encode(mask), 15) for mask in masks]) == found[-1]
    assert {0, 15} < set(found)


@pytest.mark.parametrize(
    ("mask", "rle"),
    [
        ([[0, 0], [0, 0]], ""),
        ([[1, 1], [1, 1]], "1 4"),
        ([[1, 0, 0], [0, 0, 0]], "1 1"),
        ([[0, 0, 0], [0, 0, 1]], "6 1"),
        # A run continues from the end of a row to the start of the next one.
        ([[0, 0, 1], [1, 0, 0]], "3 2"),
        ([[1, 0, 1], [1, 0, 1]], "1 1 3 2 6 1"),
        ([[0, 7], [-2, 0]], "2 2"),
    ],
)
def test_masks_solved_by_hand(mask: list[list[int]], rle: str) -> None:
    assert encode(np.array(mask)) == rle
    np.testing.assert_array_equal(decode(rle, *np.shape(mask)), np.array(mask) != 0)


@pytest.mark.parametrize("rle", ["5 2 1 2", " 1 2  5 2 ", "1 2\t5 2\n", "1 1 2 1 5 2", "0001 2 5 2"])
def test_order_blanks_and_touching_runs_do_not_matter(rle: str) -> None:
    assert encode(decode(rle, height=2, width=5)) == "1 2 5 2"


@pytest.mark.parametrize("rle", ["", " ", "\n"])
def test_an_empty_encoding_is_an_empty_mask(rle: str) -> None:
    assert not decode(rle, height=3, width=2).any()


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        ("1", "odd count of 1"),
        ("1 2 3", "odd count of 3"),
        ("1 x", "whole positive numbers, got 'x'"),
        ("1 2.0", "got '2.0'"),
        ("nan nan", "got 'nan'"),
        *((word, f"or nothing for an empty mask, got '{word}'") for word in ("nan", "NaN", "None", "-1", "0", "1.0")),
        (" -1 ", "or nothing for an empty mask, got '-1'"),
        ("[]", r"or nothing for an empty mask, got '\[\]'"),
        ("1.0 3.0 7", "whole positive numbers, got '1.0'"),
        ("1,3", "or nothing for an empty mask, got '1,3'"),
        ("1;3;7;2", "or nothing for an empty mask, got '1;3;7;2'"),
        ("0 0", "at least 1, got 0"),
        ("1,2 3", "got '1,2'"),
        ("1_0 2", "got '1_0'"),
        ("+3 2", r"got '\+3'"),
        ("-3 2", "got '-3'"),
        ("3 -2", "got '-2'"),
        ("0x1 2", "got '0x1'"),
        ("1 2\x00", "got"),
        ("٣ 2", "got '٣'"),
        ("² 2", "got '²'"),
        ("0 2", "at least 1, got 0"),
        ("3 0", "at least 1, got 0"),
        ("1 3 3 1", "runs at 1 and 3 overlap"),
        ("3 1 1 3", "runs at 1 and 3 overlap"),
        ("5 1 5 1", "runs at 5 and 5 overlap"),
        ("1 9 3 1 20 1", "runs at 1 and 3 overlap"),
        ("100 2", "ends at pixel 101, past the image's 100 pixels"),
        ("101 1", "ends at pixel 101, past"),
        ("1 101", "ends at pixel 101, past"),
        ("1 999999999999999999", "past the image's 100 pixels"),
        # Each number fits into 64 bits, and their sum does not.
        ("9000000000000000000 9000000000000000000", "got '9000000000000000000'"),
        ("1 " + "9" * 5000, "at most 18 digits, got '9999"),
    ],
)
def test_damaged_encodings_are_refused(rle: str, reason: str) -> None:
    with pytest.raises(RleError, match=reason) as caught:
        parse_runs(rle, NUM_PIXELS)
    assert len(str(caught.value)) < 150
    with pytest.raises(RleError):
        decode(rle, height=10, width=10)


def test_random_text_raises_only_rle_errors() -> None:
    rng = np.random.default_rng(0)
    alphabet = list("0123456789" * 3 + "     -+_.,exXnafi\t\n\r\x00\x1c\xa0٣²½é{}\"'/\\\U0001d7d9")
    outcomes = {True: 0, False: 0}
    for _ in range(20_000):
        rle = "".join(rng.choice(alphabet[: rng.integers(30, len(alphabet) + 1)], size=rng.integers(1, 12)))
        try:
            starts, lengths = parse_runs(rle, NUM_PIXELS)
        except RleError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert starts.min(initial=0) >= 0 and lengths.min(initial=1) >= 1
        assert (starts + lengths).max(initial=0) <= NUM_PIXELS
        assert decode(rle, height=10, width=10).sum() == lengths.sum()
    # Both kinds of text must occur often, or the test would check little.
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_only_two_dimensional_masks_have_an_encoding(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(height, width\)"):
        encode(np.zeros(shape))
