"""The pictures of a run: slices with outlines, and the learning curve."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel

from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.data.prepared import read_image
from gi_segmentation.data.transforms import attached_transform
from gi_segmentation.errors import list_some
from gi_segmentation.files import to_json, writing_file
from gi_segmentation.inference.splits import predict_split
from gi_segmentation.labels import LabelSet, find_labels
from gi_segmentation.review.overlays import Panel, draw_outlines, organ_colours
from gi_segmentation.rle import organ_masks
from gi_segmentation.scoring.dice import count_pixels, dice_score, nanmean

# With more organs, the legend of the learning curve does not fit into it.
MAX_INSIDE = 8


class ShownSlice(NamedTuple):
    """The slice of a scan that a picture shows.

    Attributes:
        truth: The slice with the annotations of the dataset.
        predicted: The same slice with the predicted masks.
        number: Its number in the scan.
        dice: Mean Dice over its organs; None if no organ is in either mask.
    """

    truth: Panel
    predicted: Panel
    number: int
    dice: float | None


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
    entry = 0.6 + 0.08 * max(len(organ) for organ in labels.names)
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


def pick_slices(dataset: Dataset, number: int) -> list[int]:
    """Choose slices that show an organ, from as many scans as possible.

    Args:
        dataset: A split.
        number: Number of slices. There may be fewer slices to choose from.

    Returns:
        Their rows.
    """
    scans: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(dataset.with_format(None).select_columns(["scan", "segmentation"])):
        if any(row["segmentation"].values()):
            scans[row["scan"]].append(index)
    # Each scan gives the same number of slices. The scans with the most slices that show an organ come first.
    share = math.ceil(number / len(scans))
    chosen: list[int] = []
    for members in sorted(scans.values(), key=len, reverse=True):
        # Evenly spaced positions without the two ends, because an organ is small on its first and last slice. If there
        # are few slices, rounding gives the same position twice. `dict.fromkeys` then keeps it once, in order.
        positions = np.linspace(0, len(members) - 1, share + 2)[1:-1].round()
        chosen += [members[position] for position in dict.fromkeys(positions.astype(int).tolist())]
    return chosen[:number]


def compare_slice(model: PreTrainedModel, dataset: Dataset, index: int) -> ShownSlice:
    """Show a slice with the annotations of the dataset, and with the predicted masks.

    Args:
        model: The model that predicts.
        dataset: A split with a scoring `SliceTransform` attached.
        index: Row of the slice.

    Returns:
        The slice. The title of the prediction has the mean Dice of its organs. Those that nobody has drawn are not
        scored, and the title of the annotations names them.
    """
    # `with_format(None)` gives the stored row, and not the tensors of the transform. A streamed row has no image.
    row, slices = dataset.with_format(None)[index], attached_transform(dataset).slices
    row["image"] = read_image(slices.images[slices.rows[row["scan"]][row["slice"]]])
    unknown = [organ for organ, rle in row["segmentation"].items() if rle is None]
    note = f"\nnot drawn: {list_some(unknown)}" if unknown else ""
    truth = annotated_panel(row, f"{row['id']}\nreference outlines{note}")
    (preds,) = predict_split(model, dataset.select([index]))
    known = [organ not in unknown for organ in row["segmentation"]]
    dice = score_slice(preds[known], truth.masks[known])
    predicted = Panel(truth.image, preds, f"predicted, Dice {dice:.2f}")
    return ShownSlice(truth, predicted, row["slice"], to_json(dice))


def score_slice(preds: np.ndarray, target: np.ndarray) -> float:
    """Return the mean Dice over the organs of a slice; NaN if no organ is in either mask.

    Args:
        preds: Predicted masks on the native grid of the slice, bool, shape `(organs, height, width)`.
        target: True masks, same shape.
    """
    # An organ that is in neither mask has a Dice of NaN and is left out of the mean.
    return nanmean(map(dice_score, count_pixels(preds, target).tolist()))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, in one step."""
    with writing_file(path) as scratch:
        figure.savefig(scratch, dpi=110)


def draw_overlay(model: PreTrainedModel, dataset: Dataset, path: Path, number: int = 4) -> None:
    """Draw a few validation slices: reference outlines in the upper row, predicted outlines in the lower row.

    Args:
        model: The model that predicts.
        dataset: The validation split, with a `SliceTransform` attached.
        path: The PNG file to write.
        number: Number of slices.
    """
    shown = [compare_slice(model, dataset, index) for index in pick_slices(dataset, number)]
    panels = [*(one.truth for one in shown), *(one.predicted for one in shown)]
    save_figure(draw_panels(panels, find_labels(dataset.features), columns=len(shown)), path)


def fullest_slice(dataset: Dataset, scan: str) -> int:
    """Return the row of the slice of a scan on which the organs of the dataset have the most pixels together."""
    rows = [row for row, name in enumerate(dataset.with_format(None)["scan"]) if name == scan]
    slices = dataset.with_format(None).select(rows).select_columns(["segmentation", "height", "width"])
    areas = [int(organ_masks(one["segmentation"], one["height"], one["width"]).sum()) for one in slices]
    return rows[int(np.argmax(areas))]


def compare_fullest_slice(model: PreTrainedModel, dataset: Dataset, scan: str) -> ShownSlice:
    """Return the slice of a scan that shows most of the organs, once with its annotations and once as predicted.

    Args:
        model: The model that predicts.
        dataset: A split with a `SliceTransform` attached.
        scan: Name of the scan.
    """
    return compare_slice(model, dataset, fullest_slice(dataset, scan))


def add_shown_slices(cases: dict[str, dict[str, Any]], shown: dict[str, ShownSlice]) -> dict[str, dict[str, Any]]:
    """Return single scans with the slice that the picture shows, and its own Dice: `slice` and `slice_dice`.

    Args:
        cases: Single scans, from `results.pick_cases`.
        shown: The slice of each scan, from `compare_fullest_slice`.
    """
    return {
        name: {**case, "slice": shown[case["scan"]].number, "slice_dice": shown[case["scan"]].dice}
        for name, case in cases.items()
    }


def draw_cases(cases: dict[str, dict[str, Any]], shown: dict[str, ShownSlice], labels: LabelSet, path: Path) -> None:
    """Draw one slice of each case, with reference outlines in the upper row and predicted ones in the lower row.

    Args:
        cases: Single scans, from `results.pick_cases`.
        shown: The slice of each scan, from `compare_fullest_slice`.
        labels: The organs of the masks.
        path: The PNG file to write.
    """
    by_hand, predicted = [], []
    for name, case in cases.items():
        truth, preds = shown[case["scan"]].truth, shown[case["scan"]].predicted
        # The Dice of the case is a mean over all slices of the scan. The Dice below is of this slice only.
        by_hand.append(
            truth._replace(title=f"{name} scan, mean Dice over its slices {case['dice']:.2f}\n{truth.title}")
        )
        predicted.append(preds._replace(title=f"{preds.title} on this slice"))
    save_figure(draw_panels([*by_hand, *predicted], labels, columns=len(by_hand), width=3.6), path)


def logged(log_history: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the entries of a log that have a key, one for each step, in the order of the steps.

    Args:
        log_history: The log of the Trainer.
        key: For example `eval_dice`.
    """
    # At the end of a run the best checkpoint is scored again, and the log gives this score the number of the last
    # step. Only the first entry of a step is a point of the curve. In reverse order, the first entry comes last and
    # replaces the others.
    first = {entry["step"]: entry for entry in reversed(log_history) if key in entry}
    return [first[step] for step in sorted(first)]


def draw_learning_curve(log_history: list[dict[str, Any]], labels: LabelSet, best_step: int, path: Path) -> None:
    """Draw loss and Dice against the training step.

    Args:
        log_history: The log of the Trainer.
        labels: The organs.
        best_step: Step of the best checkpoint. A vertical line marks it.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(10, 3.8), layout="tight")
    loss_axes, dice_axes = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        entries = logged(log_history, key)
        loss_axes.plot([e["step"] for e in entries], [e[key] for e in entries], marker=".", label=label)
    loss_axes.set(xlabel="step", ylabel="loss (Dice + cross-entropy)")
    entries = logged(log_history, "eval_dice")
    steps = [entry["step"] for entry in entries]
    for organ, line in zip(labels.names, organ_lines(labels), strict=True):
        dice_axes.plot(steps, [entry[f"eval_dice_{organ}"] for entry in entries], marker=".", label=organ, **line)
    dice_axes.plot(steps, [entry["eval_dice"] for entry in entries], color="black", marker=".", label="mean")
    dice_axes.axvline(best_step, color="gray", linestyle=":", label=f"best, step {best_step}")
    dice_axes.set(xlabel="step", ylabel="validation Dice", ylim=(0, 1))
    for axes in (loss_axes, dice_axes):
        # A long legend would hide the curves, so it stands beside them.
        beside = axes is dice_axes and len(labels) > MAX_INSIDE
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if beside else {}
        axes.legend(frameon=False, fontsize=8, ncols=2 if beside and len(labels) > 2 * MAX_INSIDE else 1, **place)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
        axes.grid(alpha=0.3)
    save_figure(figure, path)
