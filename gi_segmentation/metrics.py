"""The scores, from counts: exact whatever the batch size, the order or the number of processes.

This file is an `evaluate` metric too: `evaluate.load("gi_segmentation/metrics.py")`.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence  # one import per line: evaluate.load parses no more
from typing import Any

import datasets
import evaluate
import numpy as np

from .schema import LABELS
from .schema import ORGANS

DESCRIPTION = """\
Dice of large bowel, small bowel and stomach: the mean over (slice, organ) pairs on the grid of the masks given, pairs
without the organ in both skipped; the same over whole scans; and macro F1 over all labels with background, pooled.
"""

INPUTS = """\
Args:
    predictions: One mask per slice: label ids `(height, width)`, or one binary mask per organ
        `(organs, height, width)` in the order large_bowel, small_bowel, stomach.
    references: The truth, likewise; sizes as the predictions', slice by slice.
    scans: Which scan each slice belongs to, any hashable; None takes every slice for a scan of its own.

Returns:
    `dice`, `dice_{organ}`, `dice_volume`, `dice_volume_{organ}`, `macro_f1_seed`: floats in 0 to 1, NaN where there
    is nothing to score.

Example:
    >>> metric = evaluate.load("gi_segmentation/metrics.py")  # doctest: +SKIP
    >>> metric.compute(predictions=[[[1, 1, 0]]], references=[[[1, 0, 0]]])["dice"]  # doctest: +SKIP
    0.6666666666666666
"""

INTERSECTION, PREDICTED, TRUE = range(3)  # the last axis of all counts
DICE_UNIT = 2**60  # Dice values are summed as whole multiples of 1/DICE_UNIT: no order of summation can change them


def count_pixels(preds: Any, target: Any) -> tuple[Any, Any, Any]:
    """Count what overlap measures need.

    Args:
        preds: Predicted masks, bool, shape `(..., classes, height, width)`; NumPy array or torch tensor.
        target: True masks, same shape and kind.

    Returns:
        Pixels in both, pixels predicted, pixels true; each of shape `(..., classes)`.

    Example:
        >>> count_pixels(np.array([[[True, True, False]]]), np.array([[[True, False, False]]]))
        (array([1]), array([2]), array([1]))
    """
    return (preds & target).sum(axis=(-2, -1)), preds.sum(axis=(-2, -1)), target.sum(axis=(-2, -1))


def dice_score(counts: Sequence[int]) -> float:
    """Dice of one organ: twice the common pixels over the pixels of both.

    Args:
        counts: Pixels in both, predicted and true.

    Returns:
        0 to 1; NaN where neither mask has a pixel, since nothing was asked.

    Example:
        >>> dice_score([1, 2, 1]), dice_score([0, 0, 0])
        (0.6666666666666666, nan)
    """
    total = counts[PREDICTED] + counts[TRUE]
    return 2 * counts[INTERSECTION] / total if total else math.nan


def nanmean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN, the same in any order; NaN where there are none.

    Example:
        >>> nanmean([1.0, math.nan, 0.5])
        0.75
    """
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


class DiceCounts:
    """What is known after some slices; its size depends on the number of scans, not of slices.

    Attributes:
        dice_sums: Per organ the sum of slice Dice in multiples of 1/`DICE_UNIT`.
        dice_numbers: Per organ the number of slices with a Dice.
        scan_counts: Per scan and organ the pixels in both, predicted and true.
        label_counts: Per label the same, pooled over all slices.
    """

    def __init__(self) -> None:
        self.dice_sums = [0] * len(ORGANS)
        self.dice_numbers = [0] * len(ORGANS)
        self.scan_counts: dict[Any, np.ndarray] = {}
        self.label_counts = np.zeros((len(LABELS), 3), dtype=np.int64)

    def add_slice(self, scan: Any, organ_counts: Sequence[Sequence[int]], label_counts: Any) -> None:
        """Add a slice.

        Args:
            scan: The scan it belongs to.
            organ_counts: Per organ, pixels in both, predicted and true; at native resolution.
            label_counts: Per label, background first, the same; at the resolution of the model.
        """
        for organ, counts in enumerate(organ_counts):
            dice = dice_score(counts)
            if not math.isnan(dice):
                self.dice_sums[organ] += round(dice * DICE_UNIT)
                self.dice_numbers[organ] += 1
        empty = np.zeros((len(ORGANS), 3), dtype=np.int64)
        self.scan_counts[scan] = self.scan_counts.get(scan, empty) + np.asarray(organ_counts, dtype=np.int64)
        self.label_counts += np.asarray(label_counts, dtype=np.int64)

    def scores(self) -> dict[str, float]:
        """The scores of all slices added; see `DESCRIPTION`."""

        def mean_dice(organs: Sequence[int]) -> float:
            number = sum(self.dice_numbers[organ] for organ in organs)
            return sum(self.dice_sums[organ] for organ in organs) / (number * DICE_UNIT) if number else math.nan

        every_organ = range(len(ORGANS))
        volume_dice = [
            [dice_score(counts[organ].tolist()) for counts in self.scan_counts.values()] for organ in every_organ
        ]
        return {
            "dice": mean_dice(every_organ),
            **{f"dice_{name}": mean_dice([organ]) for organ, name in enumerate(ORGANS)},
            "dice_volume": nanmean(dice for organ in volume_dice for dice in organ),
            **{f"dice_volume_{name}": nanmean(volume_dice[organ]) for organ, name in enumerate(ORGANS)},
            "macro_f1_seed": nanmean(dice_score(counts) for counts in self.label_counts.tolist()),
        }


def to_organ_masks(mask: Any) -> np.ndarray:
    """Bring a mask in either of its forms to one binary mask per organ.

    Args:
        mask: Label ids `(height, width)`, or binary masks `(organs, height, width)`.

    Returns:
        bool, shape `(organs, height, width)`.

    Raises:
        ValueError: If the shape is neither, or an id is unknown.
    """
    array = np.asarray(mask)
    if array.ndim == 3 and len(array) == len(ORGANS) and set(np.unique(array)) <= {0, 1}:
        return array.astype(bool)
    if array.ndim != 2 or not np.isin(array, range(len(LABELS))).all():
        raise ValueError(
            f"expected label ids 0 to {len(LABELS) - 1} of shape (height, width), or binary masks of shape "
            f"({len(ORGANS)}, height, width), but got shape {array.shape} with values {np.unique(array)[:8].tolist()}"
        )
    return array == np.arange(1, len(LABELS))[:, None, None]


def to_label_masks(organ_masks: np.ndarray) -> np.ndarray:
    """One binary mask per label, background first, where the highest organ wins: bool, `(labels, height, width)`."""
    labels = np.max(organ_masks * np.arange(1, len(LABELS))[:, None, None], axis=0)
    return labels == np.arange(len(LABELS))[:, None, None]


class GiTractDice(evaluate.Metric):
    """Dice of the three organs as an `evaluate` metric whose state is counts, not masks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = DiceCounts()

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def add_batch(
        self, *, predictions: Sequence[Any], references: Sequence[Any], scans: Sequence[Any] | None = None
    ) -> None:
        """Add slices by their masks; see `INPUTS`.

        Raises:
            ValueError: If the numbers of masks or the shapes of a pair differ.
        """
        first = len(self.counts.scan_counts)
        names = [("slice", first + index) for index in range(len(predictions))] if scans is None else scans
        if not len(predictions) == len(references) == len(names):
            raise ValueError(
                f"expected as many predictions as references and scans, "
                f"but got {len(predictions)}, {len(references)} and {len(names)}"
            )
        for index, (scan, prediction, reference) in enumerate(zip(names, predictions, references, strict=True)):
            preds, target = to_organ_masks(prediction), to_organ_masks(reference)
            if preds.shape != target.shape:
                raise ValueError(f"slice {index}: expected masks of one shape, but got {preds.shape}, {target.shape}")
            organ_counts = np.stack(count_pixels(preds, target), axis=-1)
            label_counts = np.stack(count_pixels(to_label_masks(preds), to_label_masks(target)), axis=-1)
            self.counts.add_slice(scan, organ_counts.tolist(), label_counts)

    def add(self, *, prediction: Any, reference: Any, scan: Any = None) -> None:
        """Add one slice by its masks."""
        self.add_batch(predictions=[prediction], references=[reference], scans=None if scan is None else [scan])

    def add_counts(self, scans: Any, organ_counts: Any, label_counts: Any) -> None:
        """Add slices counted elsewhere.

        Args:
            scans: The scan of each slice, length B.
            organ_counts: Pixels in both, predicted and true, shape `(B, organs, 3)`.
            label_counts: The same per label, background first, shape `(B, labels, 3)`.
        """
        for scan, organs, labels in zip(scans, organ_counts, label_counts, strict=True):
            self.counts.add_slice(scan, organs, labels)

    def compute(
        self,
        *,
        predictions: Sequence[Any] | None = None,
        references: Sequence[Any] | None = None,
        scans: Sequence[Any] | None = None,
    ) -> dict[str, float]:
        """Score the slices added so far and those given here, then start anew.

        Raises:
            ValueError: As `add_batch`, or if only one of predictions and references is given.
        """
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references, scans=scans)
        elif any(given is not None for given in (predictions, references, scans)):
            raise ValueError("expected predictions and references together, or neither; add the missing one")
        scores = self.counts.scores()
        self.counts = DiceCounts()
        return scores
