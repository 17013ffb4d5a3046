"""Decide which pixels and slices of an organ a mask has, before its connected components are looked at.

Two errors are frequent: a slice gets an organ that it does not show, and an organ is missed although it has some
probability. There is a limit against each of them.

- A gate empties slices (`keep_slices`). It asks for the confidence of a slice first, with hysteresis along z, and for
  its area last.
- A lower threshold adds pixels (`lower_thresholds`).
"""

from collections.abc import Sequence

import numpy as np

from gi_segmentation.labels import LabelMode
from gi_segmentation.postprocessing.components import split_at_gaps
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing


def lower_thresholds(
    masks: np.ndarray, probabilities: np.ndarray, settings: Postprocessing, label_mode: LabelMode
) -> np.ndarray:
    """Add the pixels whose probability is above the threshold of an organ.

    With `multilabel`, these are all such pixels. With `multiclass`, a pixel has one label: only background is taken,
    by the organ with the highest probability of all organs, even if that of the background is higher.

    Args:
        masks: Predicted masks, bool, shape `(organs, D, H, W)`.
        probabilities: Probability of each organ, float, same shape.
        settings: The limits of the organs, in the order of the masks.
        label_mode: What the channels of the model mean.

    Returns:
        The masks with these pixels, bool, same shape.

    Example:
        >>> probabilities = np.array([0.4, 0.3, 0.2, 0.35]).reshape(2, 1, 1, 2)
        >>> settings = Postprocessing({organ: OrganLimits(threshold=0.25) for organ in ("liver", "spleen")})
        >>> for label_mode in ("multiclass", "multilabel"):
        ...     lower_thresholds(probabilities > 0.5, probabilities, settings, label_mode)[:, 0, 0].tolist()
        [[True, False], [False, True]]
        [[True, True], [False, True]]
    """
    # In single precision, so that a threshold stays what it is: half precision has no 0.3.
    thresholds = np.array([limits.threshold for limits in settings.organs.values()], dtype=np.float32)[:, None, None]
    if (thresholds >= 1).all():
        return masks
    lowered = masks.copy()
    # Slice by slice, because a whole scan in single precision takes much memory.
    for place in range(masks.shape[1]):
        probability = probabilities[:, place].astype(np.float32)
        above = probability > thresholds
        # Most slices of a scan have no such pixel.
        if above.any():
            if label_mode == "multiclass":
                # `argmax` takes the first of equal organs, as it does for the labels.
                highest = np.arange(len(masks))[:, None, None] == probability.argmax(axis=0)
                above &= highest & ~masks[:, place].any(axis=0)
            lowered[:, place] |= above
    return lowered


def find_slice_confidences(probability: np.ndarray) -> np.ndarray:
    """Return the greatest probability of an organ in each slice: float32, shape `(D,)`.

    Args:
        probability: Probability of the organ, float, shape `(D, H, W)`.
    """
    return probability.max(axis=(1, 2)).astype(np.float32)


def keep_slices(
    confidences: np.ndarray, areas_mm2: np.ndarray, numbers: Sequence[int], limits: OrganLimits
) -> np.ndarray:
    """Return which slices of a scan keep an organ: bool, shape `(D,)`. A slice exactly at a limit stays.

    Args:
        confidences: From `find_slice_confidences`.
        areas_mm2: Area of the organ's mask in each slice, shape `(D,)`.
        numbers: Numbers of the slices, ascending, shape `(D,)`. Slices on both sides of a gap do not touch.
        limits: The limits of the organ.

    Example:
        >>> limits = OrganLimits(min_slice_confidence=0.75, min_neighbour_confidence=0.5)
        >>> keep_slices(np.array([0.5, 0.5, 0.75, 0.25, 0.5]), np.ones(5), range(5), limits).tolist()
        [True, True, True, False, False]
    """
    # In single precision on both sides: 0.6 as a limit and as a confidence are one number then.
    high, low = (np.float32(one) for one in (limits.min_slice_confidence, limits.min_neighbour_confidence))
    kept = sure = confidences >= high
    if low < high:
        kept = np.zeros(len(confidences), dtype=bool)
        for run in split_at_gaps(numbers):
            kept[run] = grow_along_z(sure[run], confidences[run] >= low)
    return kept & (areas_mm2 >= limits.min_slice_area_mm2)


def grow_along_z(sure: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Return the slices of each row of possible slices that has a sure one: bool, shape `(D,)`.

    Args:
        sure: Slices that stay anyway, bool, shape `(D,)`. Each is possible, too.
        possible: Slices that stay beside another one that stays, bool, same shape.

    Example:
        >>> grow_along_z(np.array([False, True, False, False]), np.array([True, True, False, True])).tolist()
        [True, True, False, False]
    """
    # Number of the row of each possible slice. It rises where a slice is not possible.
    rows = np.cumsum(~possible)
    return possible & np.isin(rows, rows[sure])
