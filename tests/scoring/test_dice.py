"""Dice from counts of pixels."""

import numpy as np
import pytest

from gi_segmentation.scoring.dice import INTERSECTION, PREDICTED, TRUE, count_pixels, dice_score


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 4, 5), (0, 4, 5)])
def test_each_mask_is_counted_on_its_own(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    preds, target = rng.random((2, *shape)) < 0.5
    counts = count_pixels(preds, target)
    assert counts.shape == (*shape[:-2], 3) and counts.dtype == np.int64
    for place, masks in ((INTERSECTION, preds & target), (PREDICTED, preds), (TRUE, target)):
        np.testing.assert_array_equal(counts[..., place], masks.sum(axis=(-2, -1)))


def test_dice_of_three_common_pixels_of_four() -> None:
    assert dice_score([3, 4, 4]) == 0.75
