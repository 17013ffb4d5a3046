"""How often slices are drawn, and that a slice which is drawn twice is changed differently."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from gi_segmentation.arguments import DataArguments, SliceSampling
from gi_segmentation.data.augmentation import augment, build_augmentation
from gi_segmentation.data.prepared import PreparedSlices
from gi_segmentation.data.sampling import RepeatedSlices, WeightedSampler, balance_patients, weigh_slices
from gi_segmentation.data.slices import load_slices
from gi_segmentation.data.transforms import SliceTransform, attach_transform
from gi_segmentation.models.loading import new_processor

SIZE = 32


@pytest.fixture(scope="module")
def slices(dataset_dir: Path) -> Dataset:
    """Both patients of the training split: 12 slices of one, and the first two of the other."""
    split = load_slices(DataArguments(str(dataset_dir), image_size=SIZE, cache_slices=False))["train"]
    assert Counter(split["case"]).most_common()[0][1] == 12 and len(split) == 24
    return split.select(range(14))


def test_each_patient_is_drawn_equally_often(slices: Dataset) -> None:
    cases = np.array(slices["case"])
    drawn: Counter[int] = Counter()
    weights = weigh_slices(slices, "patients")
    assert weights is not None
    for epoch in range(200):
        drawn.update(int(cases[row]) for row, _ in WeightedSampler(weights, 0, torch.tensor([epoch])))
    first, second = drawn.values()
    assert first + second == 200 * 14
    # The standard deviation is sqrt(2800) / 2 = 26 draws.
    assert abs(first - second) / 2 < 110


def test_the_groups_of_each_patient_are_drawn_equally_often() -> None:
    # Patient 1 has three slices without an organ, one with the first organ and two with the second. Patient 2 has one
    # slice with both organs.
    organs = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=bool)
    weights = balance_patients(organs, np.array([1, 1, 1, 1, 1, 1, 2]))
    np.testing.assert_allclose(weights, [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6, 1])


@pytest.mark.parametrize("sampling", ["balanced", "patients"])
def test_a_slice_that_comes_twice_in_an_epoch_is_changed_differently(sampling: SliceSampling, slices: Dataset) -> None:
    augmentation = partial(augment, build_augmentation(strong=True))
    transform = SliceTransform(new_processor(SIZE), PreparedSlices(slices, SIZE), augment=augmentation)
    repeated = RepeatedSlices(attach_transform(slices, transform))
    weights = weigh_slices(slices, sampling)
    assert weights is not None
    draws = list(WeightedSampler(weights, 0, transform.epoch))
    assert len(draws) == len(repeated) == 14 > len({row for row, _ in draws})
    examples = repeated.__getitems__(draws)
    assert len({example["images"].numpy().tobytes() for example in examples}) == 14
    # One by one, as another number of loading processes would read them, they are the same.
    for draw, example in zip(draws, examples, strict=True):
        torch.testing.assert_close(repeated[draw]["images"], example["images"], rtol=0, atol=0)
    # The first time is as in an epoch that has each slice once.
    row, _ = draws[0]
    torch.testing.assert_close(repeated.dataset[row]["images"], examples[0]["images"], rtol=0, atol=0)
