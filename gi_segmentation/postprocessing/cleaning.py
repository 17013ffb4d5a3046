"""Apply the limits of a checkpoint to the masks of a scan."""

from collections.abc import Sequence

import numpy as np

from gi_segmentation.labels import LabelMode
from gi_segmentation.postprocessing.components import find_components, keep_components, select_components
from gi_segmentation.postprocessing.gate import find_slice_confidences, keep_slices, lower_thresholds
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing


def clean_masks(
    masks: np.ndarray,
    probabilities: np.ndarray,
    spacing_mm: Sequence[float],
    numbers: Sequence[int],
    settings: Postprocessing,
    label_mode: LabelMode,
) -> np.ndarray:
    """Add the pixels above the thresholds, then empty slices, and then remove components.

    Args:
        masks: Predicted masks, bool, shape `(organs, D, H, W)`.
        probabilities: Probability of each organ, float, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`.
        settings: The limits of the organs, in the order of the masks.
        label_mode: What the channels of the model mean.

    Returns:
        The new masks, bool, same shape.

    Example:
        >>> masks = np.zeros((1, 1, 1, 5), dtype=bool)
        >>> masks[0, 0, 0, [0, 1, 3]] = True
        >>> settings = Postprocessing({"stomach": OrganLimits(min_volume_ml=2.0)})
        >>> clean_masks(masks, masks.astype(float), (2.5, 20.0, 20.0), [1], settings, "multiclass")[0].astype(int)
        array([[[1, 1, 0, 0, 0]]])
    """
    lowered = lower_thresholds(masks, probabilities, settings, label_mode)
    return np.stack(
        [
            clean_organ(mask, probability, spacing_mm, numbers, limits)
            for limits, mask, probability in zip(settings.organs.values(), lowered, probabilities, strict=True)
        ]
    )


def clean_organ(
    mask: np.ndarray, probability: np.ndarray, spacing_mm: Sequence[float], numbers: Sequence[int], limits: OrganLimits
) -> np.ndarray:
    """Empty slices of one organ and remove components, see `clean_masks`; shapes without the first axis."""
    areas_mm2 = np.count_nonzero(mask, axis=(1, 2)) * np.prod(spacing_mm[1:])
    kept = keep_slices(find_slice_confidences(probability), areas_mm2, numbers, limits)
    # A component is what is left of it in the slices that stay.
    labels, volumes_ml, confidences = find_components(mask & kept[:, None, None], probability, spacing_mm, numbers)
    return select_components(labels, keep_components(volumes_ml, confidences, limits))
