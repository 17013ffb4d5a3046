"""The choice of the training slices of an epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from gi_segmentation.schema import ORGANS


class BalancedSampler(Sampler[int]):
    """Draws as many slices per epoch as there are, from four groups equally often.

    The groups are: slices without any organ, and slices with each of the three organs. A slice with two organs is in
    two groups. Slices are drawn with replacement, so some come twice in an epoch and others not at all.

    Args:
        organs: Which organs each slice shows: bool, shape `(slices, organs)`.
        seed: Seed of the draws.
        epoch: The number of the epoch, one int64, as `SliceTransform` has it.
    """

    def __init__(self, organs: np.ndarray, seed: int, epoch: torch.Tensor) -> None:
        # A group of n slices gives 1 / n to each of its slices, so the weights of every group add up to 1. Slice i is
        # drawn with a weight of the sum over its groups. An empty group gives nothing, and `clip` prevents 0 / 0.
        groups = np.column_stack([~organs.any(axis=1), organs])
        self.weights = torch.from_numpy((groups / groups.sum(axis=0).clip(min=1)).sum(axis=1))
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        # Seed and epoch alone fix the draws: all processes must draw the same slices before they share them out, and a
        # resumed run must repeat the draws of an uninterrupted one.
        seed = np.random.SeedSequence([self.seed, int(self.epoch)]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()


def shown_organs(dataset: Dataset) -> np.ndarray:
    """Return which organs each slice shows: bool, shape `(slices, organs)`."""
    # The encodings are enough: an organ that is not shown has an empty text. No image is decoded.
    return np.array([[bool(masks[organ]) for organ in ORGANS] for masks in dataset.with_format(None)["segmentation"]])
