"""The choice of the training slices of an epoch."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from gi_segmentation.arguments import SliceSampling
from gi_segmentation.data.transforms import attached_transform
from gi_segmentation.labels import find_labels

# Row groups whose slices are mixed with each other. With more of them, a batch has slices of more scans, and a process
# needs more memory: a row group has about 4 MB.
WINDOW_GROUPS = 16


def balance_groups(organs: np.ndarray) -> np.ndarray:
    """Return weights of slices that draw slices without any organ and slices with each organ equally often.

    With three organs these are four groups. A slice with two organs is in two of them.

    Args:
        organs: Which organs each slice shows: bool, shape `(slices, organs)`. An unknown organ counts as absent.

    Returns:
        float64, shape `(slices,)`. Their sum is the number of groups that have slices.

    Example:
        >>> balance_groups(np.array([[True], [False], [False]]))
        array([1. , 0.5, 0.5])
    """
    # Each slice gets the weight 1 / n from a group of n slices, so every group has a total weight of 1. A slice in two
    # groups gets the sum of both weights. An empty group adds nothing, and `clip` prevents 0 / 0.
    groups = np.column_stack([~organs.any(axis=1), organs])
    return (groups / groups.sum(axis=0).clip(min=1)).sum(axis=1)


def balance_patients(organs: np.ndarray, cases: np.ndarray) -> np.ndarray:
    """Return weights of slices that draw every patient equally often, and in a patient every group equally often.

    Args:
        organs: As in `balance_groups`.
        cases: The patient of each slice, shape `(slices,)`.

    Returns:
        float64, shape `(slices,)`. Their sum is the number of patients.

    Example:
        >>> balance_patients(np.array([[True], [False], [False], [True]]), np.array([7, 7, 7, 9]))
        array([0.5 , 0.25, 0.25, 1.  ])
    """
    weights = np.zeros(len(cases))
    for case in np.unique(cases):
        slices = cases == case
        balanced = balance_groups(organs[slices])
        weights[slices] = balanced / balanced.sum()
    return weights


class WeightedSampler(Sampler[tuple[int, int]]):
    """Draws as many slices per epoch as there are, in proportion to their weights.

    Slices are drawn with replacement, so some come several times in an epoch and others not at all. A draw is the row
    of the slice, and how often the slice was drawn before in this epoch.

    Args:
        weights: float64, shape `(slices,)`.
        seed: Seed of the draws.
        epoch: The number of the epoch, one int64, as `SliceTransform` has it.
    """

    def __init__(self, weights: np.ndarray, seed: int, epoch: torch.Tensor) -> None:
        self.weights = torch.from_numpy(weights)
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Seed and epoch alone fix the draws: all processes must draw the same slices before they share them out, and a
        # resumed run must repeat the draws of an uninterrupted one.
        seed = np.random.SeedSequence([self.seed, int(self.epoch)]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        earlier: Counter[int] = Counter()
        for row in torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist():
            yield row, earlier[row]
            earlier[row] += 1


class RepeatedSlices(TorchDataset[dict[str, Any]]):
    """The slices of an epoch in which a slice can come several times, each time with other random changes.

    Args:
        dataset: Slices with a `SliceTransform` attached.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.transform = attached_transform(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Return the examples of some draws of `WeightedSampler`."""
        rows, earlier = (list(values) for values in zip(*draws, strict=True))
        with self.transform.repeating(earlier):
            return self.dataset.__getitems__(rows)


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
        # As in `WeightedSampler`, seed and epoch alone fix the order.
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


def weigh_slices(dataset: Dataset, slice_sampling: SliceSampling) -> np.ndarray | None:
    """Return the weights with which slices are drawn; None: each of them comes once per epoch.

    Args:
        dataset: The training slices.
        slice_sampling: As in `DataArguments`.
    """
    if slice_sampling == "all":
        return None
    organs = shown_organs(dataset)
    if slice_sampling == "balanced":
        return balance_groups(organs)
    return balance_patients(organs, np.array(dataset.with_format(None)["case"]))
