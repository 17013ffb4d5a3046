"""Dice from counts of pixels."""

import numpy as np
import torch

from gi_segmentation.schema import ORGANS
from gi_segmentation.scoring.dice import count_pixels, dice_score


def test_arrays_and_tensors_are_counted_alike() -> None:
    rng = np.random.default_rng(0)
    preds, target = rng.random((2, 3, 4, 5)) < 0.5, rng.random((2, 3, 4, 5)) < 0.5
    arrays = count_pixels(preds, target)
    tensors = count_pixels(torch.from_numpy(preds), torch.from_numpy(target))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert array.shape == (2, len(ORGANS))
        np.testing.assert_array_equal(array, tensor.numpy())
    assert dice_score([3, 4, 4]) == 0.75
