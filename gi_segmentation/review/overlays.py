"""Draw a slice with the outlines of its organs."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from gi_segmentation.labels import LabelSet


class Panel(NamedTuple):
    """A slice to draw.

    Attributes:
        image: Scaled intensities between 0 and 1, shape `(height, width)`.
        masks: Mask of each organ, bool, shape `(organs, height, width)`.
        title: The text above the slice.
    """

    image: np.ndarray
    masks: np.ndarray
    title: str


def organ_colours(labels: LabelSet) -> list[tuple[float, float, float]]:
    """Return the colours of the organs as Matplotlib takes them: red, green and blue from 0 to 1."""
    return [(red / 255, green / 255, blue / 255) for red, green, blue in labels.colours]


def draw_outlines(axes: Axes, panel: Panel, labels: LabelSet) -> None:
    """Draw a slice with the outline of each organ.

    Raises:
        ValueError: If intensities are not between 0 and 1, because the slice would be white.
    """
    if panel.image.max(initial=0) > 1:
        raise ValueError(f"expected intensities between 0 and 1, but got {panel.image.max():g}; scale the slice first")
    # Without fixed limits, matplotlib would stretch each slice to its own range, and a dark slice would look bright.
    axes.imshow(panel.image, cmap="gray", vmin=0, vmax=1)
    for mask, colour in zip(panel.masks, organ_colours(labels), strict=True):
        # `contour` warns about a mask without any edge. The level 0.5 lies between outside (0) and inside (1).
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_title(panel.title, fontsize=9)
