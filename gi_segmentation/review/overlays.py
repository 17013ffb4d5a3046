"""Draw slices with the outlines of their organs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.labels import LabelSet
from gi_segmentation.rle import organ_masks


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


def annotated_panel(row: dict[str, Any], title: str) -> Panel:
    """Return a slice with the annotations of the dataset, which a phantom may have made.

    Args:
        row: A row of the dataset, without a transform.
        title: The text above the slice.
    """
    masks = organ_masks(row["segmentation"], row["height"], row["width"])
    return Panel(scale_intensity(np.array(row["image"])), masks, title)


def organ_lines(labels: LabelSet) -> list[dict[str, Any]]:
    """Return how the line of each organ looks. A colour that is hardly seen on white gets a dark rim."""
    rim = [Stroke(linewidth=3, foreground="0.4"), Normal()]
    return [
        {"color": colour, "path_effects": rim if 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.8 else None}
        for colour in organ_colours(labels)
    ]


def draw_panels(panels: Sequence[Panel], labels: LabelSet, columns: int, width: float = 3.2) -> Figure:
    """Draw slices row by row, with a legend below them.

    Args:
        panels: The slices to draw, at least one.
        labels: The organs of their masks.
        columns: Number of slices in a row.
        width: Width of a slice in inches.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    # An entry of the legend takes about so many inches: its line, and its letters.
    entry = 0.68 + 0.085 * max(len(organ) for organ in labels.names)
    legend_columns = max(1, min(len(labels), int(width * columns / entry)))
    legend_rows = math.ceil(len(labels) / legend_columns)
    # `Figure`, and not `pyplot`, which keeps every figure in memory and may look for a screen. The extra height is for
    # the titles and the legend.
    size = (width * columns, (width + 0.1) * rows + 0.1 + 0.2 * legend_rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_outlines(axes, panel, labels)
    handles = [
        Line2D([], [], label=organ, **line) for organ, line in zip(labels.names, organ_lines(labels), strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False)
    return figure
