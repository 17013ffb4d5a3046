"""Predict the slices of a dataset: the split that a checkpoint is compared, searched or shown on."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import StackDataset
from transformers import PreTrainedModel

from gi_segmentation.data.slices import attach_scoring_transform
from gi_segmentation.data.transforms import attached_transform
from gi_segmentation.errors import InputError
from gi_segmentation.inference.batches import PredictionSettings, compute_logits, predict_slices
from gi_segmentation.inference.members import Member
from gi_segmentation.labels import find_labels
from gi_segmentation.rle import organ_masks
from gi_segmentation.scoring.dice import count_pixels


def read_split(members: Sequence[Member], dataset: Dataset) -> StackDataset:
    """Return a source for `batches.compute_logits`: the same slices for all checkpoints, prepared for each of them.

    Args:
        members: The checkpoints. Each has its own input size and its own neighbours.
        dataset: The slices, without a transform. Neighbours are found among them.

    Raises:
        InputError: If a model has other labels than the dataset, or if it needs neighbours and no slice has one.
    """
    for one in members:
        check_labels(one, dataset)
    return StackDataset(
        *[attach_scoring_transform(dataset, one.processor, one.label_mode, one.slice_context) for one in members]
    )


def check_labels(member: Member, dataset: Dataset) -> None:
    """Check that a checkpoint has the labels of the dataset on which it is scored.

    Raises:
        InputError: If not.
    """
    theirs, ours = member.labels, find_labels(dataset.features)
    if theirs != ours:
        raise InputError(
            f"{member.name}: expected a checkpoint with the labels of the dataset ({', '.join(ours.names)}), but it "
            f"has {', '.join(theirs.names)}; fine-tune it on this dataset first, or name another dataset"
        )


def predict_split(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 1, progress: str = ""
) -> Iterator[np.ndarray]:
    """Yield the masks of each slice on its own grid: bool, shape `(organs, height, width)`.

    Args:
        model: The model that predicts, as it is in memory.
        dataset: The slices, with a scoring `SliceTransform` attached.
        batch_size: Number of slices in a forward pass.
        progress: What a progress bar says; empty: there is none.
    """
    transform = attached_transform(dataset)
    context, mode = transform.slices.slice_context, transform.label_mode
    member = Member("", model, None, transform.processor, context, find_labels(dataset.features), mode, "")
    settings = PredictionSettings(batch_size, num_workers=0)
    for batch, votes in compute_logits([member], StackDataset(dataset), settings, progress):
        # The first logits are those without a flip.
        for one in predict_slices(batch, [flips[0] for flips in votes], mode):
            yield one.masks


def count_slice_pixels(model: PreTrainedModel, dataset: Dataset, batch_size: int = 16) -> np.ndarray:
    """Predict a split and count the pixels of the masks of each slice, with a progress bar.

    The counts give the Dice of single slices.

    Args:
        model: The model that predicts.
        dataset: A split with a scoring `SliceTransform` attached.
        batch_size: Number of slices in a forward pass.

    Returns:
        Pixels in both masks, predicted and true, on the native grid: int64, shape `(slices, organs, 3)`.
    """
    # The truth comes from the encodings and not from `labels`, which have the size of the model's input.
    annotated = dataset.with_format(None)["segmentation"]
    predicted = predict_split(model, dataset, batch_size, "Scoring")
    return np.stack(
        [
            count_pixels(preds, organ_masks(one, *preds.shape[1:]))
            for preds, one in zip(predicted, annotated, strict=True)
        ]
    )
