"""The choice of the training slices of an epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from gi_segmentation.labels import find_labels

# Row groups whose slices are mixed with each other. With more of them, a batch has slices of more scans, and a process
# needs more memory: a row group has about 4 MB.
WINDOW_GROUPS = 16


class BalancedSampler(Sampler[int]):
    """Draws as many slices per epoch as there are, from groups equally often.

    The groups are: slices without any organ, and slices with each of the organs. With three organs these are four
    groups. A slice with two organs is in two of them. An unknown organ counts as absent. Slices are drawn with
    replacement, so some come twice in an epoch and others not at all.

    Args:
        organs: Which organs each slice shows: bool, shape `(slices, organs)`.
        seed: Seed of the draws.
        epoch: The number of the epoch, one int64, as `SliceTransform` has it.
    """

    def __init__(self, organs: np.ndarray, seed: int, epoch: torch.Tensor) -> None:
        # Each slice gets the weight 1 / n from a group of n slices, so every group has a total weight of 1. A slice in
        # two groups gets the sum of both weights. An empty group adds nothing, and `clip` prevents 0 / 0.
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


class StreamingSampler(Sampler[int]):
    """Draws every slice once per epoch, in an order in which hardly any row group is read twice.

    The row groups are shuffled, and their slices are listed group by group. The processes that load slices take the
    batches of an epoch in turn. So the list is cut into equal lanes, one for each of these processes. In each lane,
    the slices of `WINDOW_GROUPS` groups at a time are shuffled. Then the lanes give a batch each, in turn.
    docs/design.md says why `datasets.IterableDataset` does not do this.

    Args:
        groups: The row group of each slice, numbered from 0: int, shape `(slices,)`.
        lanes: How many processes load batches: worker processes times training processes.
        batch_size: Number of slices in a batch of one process.
        seed: Seed of the draws.
        epoch: The number of the epoch, one int64, as `SliceTransform` has it.
    """

    def __init__(self, groups: np.ndarray, lanes: int, batch_size: int, seed: int, epoch: torch.Tensor) -> None:
        self.groups = groups
        self.lanes = lanes
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        # As in `BalancedSampler`, seed and epoch alone fix the order.
        generator = np.random.default_rng([self.seed, int(self.epoch)])
        # The place of each slice's group in the shuffled list of groups.
        turn = generator.permutation(self.groups.max(initial=-1) + 1)[self.groups]
        order = np.argsort(turn, kind="stable")
        # An incomplete batch comes last. Within a lane, it would move all later batches to other processes.
        number = len(order) // self.batch_size
        order, rest = np.split(order, [number * self.batch_size])
        lanes = np.arange(self.lanes)
        sizes = number // self.lanes + (lanes < number % self.lanes)
        lane = np.repeat(lanes, sizes)
        # `lexsort` sorts by its last key first: by lane, then by window, then at random.
        window = turn[order] // WINDOW_GROUPS
        order = order[np.lexsort((generator.random(len(order)), window, np.repeat(lane, self.batch_size)))]
        # The first batch of each lane, then the second one of each, and so on.
        place = np.arange(number) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        batches = order.reshape(number, self.batch_size)[np.lexsort((lane, place))]
        yield from batches.ravel().tolist()
        yield from rest.tolist()


def shown_organs(dataset: Dataset) -> np.ndarray:
    """Return which organs each slice shows: bool, shape `(slices, organs)`."""
    # The encodings are enough: an organ that is not shown has an empty text, and an unknown one has none. No image is
    # decoded.
    organs = find_labels(dataset.features).names
    return np.array([[bool(masks[organ]) for organ in organs] for masks in dataset.with_format(None)["segmentation"]])
