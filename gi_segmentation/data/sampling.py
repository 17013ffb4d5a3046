"""Which training slices an epoch draws."""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from gi_segmentation.schema import ORGANS


class BalancedSampler(Sampler[int]):
    """As many draws an epoch as there are slices, in which four groups come equally often.

    The groups are slices without any organ and slices with each of the organs; a slice with two organs is in both
    groups. Draws depend on seed and epoch alone, so that every process, and a resumed run, makes the same.

    Args:
        organs: Per slice whether it shows each organ: bool, shape `(slices, organs)`.
        seed: Of the draws.
        epoch: The transform's, one int64.
    """

    def __init__(self, organs: np.ndarray, seed: int, epoch: torch.Tensor) -> None:
        groups = np.column_stack([~organs.any(axis=1), organs])
        self.weights = torch.from_numpy((groups / groups.sum(axis=0).clip(min=1)).sum(axis=1))
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        seed = np.random.SeedSequence([self.seed, int(self.epoch)]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()


def shown_organs(dataset: Dataset) -> np.ndarray:
    """Whether each slice shows each organ: bool, shape `(slices, organs)`."""
    return np.array([[bool(masks[organ]) for organ in ORGANS] for masks in dataset.with_format(None)["segmentation"]])
