"""Predict whole scans: masks, probabilities, agreement, post-processing."""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import isnan, nan

import numpy as np
import torch

from gi_segmentation.errors import InputError, describe_fault
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.formats.volumes import Slice
from gi_segmentation.inference.batches import (
    PredictionSettings,
    SliceFolder,
    SliceOrgans,
    compute_logits,
    predict_slices,
)
from gi_segmentation.inference.duration import Estimate
from gi_segmentation.inference.members import Member, find_common_field, find_common_ranges
from gi_segmentation.labels import LabelMode
from gi_segmentation.models.masks import predict_masks
from gi_segmentation.postprocessing.cleaning import clean_masks
from gi_segmentation.postprocessing.limits import Postprocessing
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.scoring.dice import dice_score


def predict_scans(
    members: list[Member], scans: Sequence[InputScan], settings: PredictionSettings, probabilities: bool = False
) -> Iterator[tuple[InputScan, PredictedScan | InputError]]:
    """Predict scans one after the other, with a progress bar. The slices of the next scans are read meanwhile.

    Only the masks of one scan are kept in memory.

    Args:
        members: One checkpoint, or several for an ensemble.
        scans: The scans, none of them with a problem. They are seen in the field of view of the training.
        settings: How they are predicted.
        probabilities: Whether all that a report needs is wanted: probabilities, agreement, and training ranges.

    Yields:
        A scan, and what was predicted; or the error, if one of its files is damaged. With `settings.on_error` of
        `empty`, such a slice has empty masks.

    Raises:
        InputError: If a configuration has the field of view in another form, or ranges that are wanted.
    """
    field_mm = find_common_field(members)
    scans = [scan.in_field(field_mm) for scan in scans]
    labels = members[0].labels
    algorithm = Algorithm({member.name: member.commit for member in members})
    ranges = find_common_ranges(members) if probabilities else None
    # Post-processing needs the probabilities of pixels, slices and components.
    needed = probabilities or settings.postprocessing is not None
    slices = predict_slice_files(
        members, [one for scan in scans for one in scan.slices], settings, needed, probabilities
    )
    for scan in scans:
        organs: list[SliceOrgans] | InputError
        problems: list[InputError] = []
        if settings.on_error == "empty":
            organs, problems = fill_slices(scan, slices, len(labels.names), needed)
        else:
            organs = take_slices(slices, len(scan.slices))
        if isinstance(organs, InputError):
            yield scan, organs
            continue
        masks = [one.masks for one in organs]
        means = [one.probabilities for one in organs if one.probabilities is not None]
        overlaps = [one.overlaps for one in organs if one.overlaps is not None]
        if settings.postprocessing is not None:
            try:
                masks = clean_scan(scan, masks, means, settings.postprocessing, members[0].label_mode)
            except MemoryError:
                raise
            except Exception as fault:
                yield scan, InputError(f"{scan.name}: {describe_fault(fault)}")
                continue
        agreement = find_agreement(np.sum(overlaps, axis=0), labels.names) if overlaps else None
        means_kept, emptied = means if probabilities else None, [str(problem) for problem in problems]
        yield scan, PredictedScan(scan, masks, means_kept, algorithm, labels, ranges, agreement, emptied)
        # The next scan needs the memory of this one.
        del organs, masks, means, overlaps


def take_slices(slices: Iterator[SliceOrgans | InputError], number: int) -> list[SliceOrgans] | InputError:
    """Take the next slices, those of one scan, or return the first error among them."""
    organs: list[SliceOrgans] = []
    error = None
    for one in islice(slices, number):
        if isinstance(one, InputError):
            error = error or one
            organs.clear()
        elif error is None:
            organs.append(one)
    return organs if error is None else error


def fill_slices(
    scan: InputScan, slices: Iterator[SliceOrgans | InputError], organs: int, probabilities: bool
) -> tuple[list[SliceOrgans], list[InputError]]:
    """Take the slices of a scan, with empty masks for those that could not be read.

    Args:
        scan: The scan.
        slices: Where its slices come next.
        organs: Number of organs.
        probabilities: Whether the slices have probabilities.

    Returns:
        The slices, and why some of them are empty.
    """
    filled, problems = [], []
    for one, found in zip(scan.slices, islice(slices, len(scan.slices)), strict=True):
        if isinstance(found, InputError):
            problems.append(found)
            empty = np.zeros((organs, one.height, one.width), bool)
            found = SliceOrgans(empty, empty.astype(np.float16) if probabilities else None)
        filled.append(found)
    return filled, problems


def predict_slice_files(
    members: list[Member], files: Sequence[Slice], settings: PredictionSettings, probabilities: bool, agreement: bool
) -> Iterator[SliceOrgans | InputError]:
    """Yield, for each slice file, what was predicted or why it was not, with a progress bar."""
    label_mode, source = members[0].label_mode, SliceFolder(files, members, settings.on_error)
    estimate = Estimate(len(files))
    for batch, votes in compute_logits(members, source, settings, "Predicting"):
        means = [one.mean(dim=0) for one in votes]
        organs = predict_slices(batch, means, label_mode, probabilities)
        # One model without flips always agrees with itself.
        if agreement and sum(map(len, votes)) > 1:
            overlaps = count_overlaps(votes, means, label_mode)
            organs = [one._replace(overlaps=counts) for one, counts in zip(organs, overlaps, strict=True)]
        predicted = iter(organs)
        for problem in batch.problems:
            yield next(predicted) if problem is None else problem
        estimate.add(len(batch.problems))


def count_overlaps(votes: list[torch.Tensor], means: list[torch.Tensor], label_mode: LabelMode) -> np.ndarray:
    """Compare the masks of each model and each flip alone with the common masks, on the grid of its own logits.

    Args:
        votes: From `compute_logits`.
        means: Their means over the flips, from which the common masks are made.
        label_mode: What the channels mean.

    Returns:
        int64, shape `(B, models and flips, organs, 3)`, see `SliceOrgans`.
    """
    counts = []
    for one in votes:
        common = predict_masks(means, label_mode, *one.shape[-2:]).flatten(2)
        for alone in one:
            masks = predict_masks([alone], label_mode, *one.shape[-2:]).flatten(2)
            counts.append(torch.stack([(masks & common).sum(2), masks.sum(2), common.sum(2)], dim=-1))
    return torch.stack(counts, dim=1).cpu().numpy()


def find_agreement(overlaps: np.ndarray, organs: Sequence[str]) -> dict[str, float]:
    """Return the smallest Dice of a model or a flip alone with the common mask, for each organ; NaN without a mask.

    Args:
        overlaps: Sum over the slices of a scan, shape `(models and flips, organs, 3)`, see `SliceOrgans`.
        organs: The names of the organs.

    Example:
        >>> find_agreement(np.array([[[1, 2, 1]], [[1, 1, 1]]]), ["stomach"])
        {'stomach': 0.6666666666666666}
    """
    # One mask of two that is empty has a Dice of 0. Only if both are empty, there is none.
    return {
        organ: min((dice for one in overlaps[:, index].tolist() if not isnan(dice := dice_score(one))), default=nan)
        for index, organ in enumerate(organs)
    }


def clean_scan(
    scan: InputScan,
    masks: list[np.ndarray],
    probabilities: list[np.ndarray],
    limits: Postprocessing,
    label_mode: LabelMode,
) -> list[np.ndarray]:
    """Return the masks of the slices of a scan after post-processing; shapes as in `PredictedScan`."""
    first = scan.slices[0]
    # Slices are on the second axis of a volume, (organs, D, H, W).
    cleaned = clean_masks(
        np.stack(masks, axis=1),
        np.stack(probabilities, axis=1),
        (first.thickness_mm, *first.pixel_spacing),
        [one.number for one in scan.slices],
        limits,
        label_mode,
    )
    return list(cleaned.swapaxes(0, 1))
