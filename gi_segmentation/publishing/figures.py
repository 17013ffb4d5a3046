"""The pictures of a run: outlines on slices, and the learning curve."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from transformers import PreTrainedModel

from gi_segmentation.data.preprocessing import attached_transform, scale_intensity
from gi_segmentation.inference.masks import predict_masks
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import COLOURS, ORGANS
from gi_segmentation.scoring.dice import count_pixels, dice_score, nanmean

ORGAN_COLOURS = [(red / 255, green / 255, blue / 255) for red, green, blue in COLOURS[1:]]


class Panel(NamedTuple):
    """A slice to draw.

    Attributes:
        image: Intensities in 0 to 1, shape `(height, width)`.
        masks: bool, shape `(organs, height, width)`.
        title: What stands above.
    """

    image: np.ndarray
    masks: np.ndarray
    title: str


def outlined_by_hand(row: dict[str, Any], title: str) -> Panel:
    """A row of the dataset with the outlines drawn by hand."""
    masks = organ_masks(row["segmentation"], row["height"], row["width"])
    return Panel(scale_intensity(np.array(row["image"])), masks, title)


def draw_outlines(axes: Axes, panel: Panel) -> None:
    """Draw a slice with the outline of each organ."""
    axes.imshow(panel.image, cmap="gray", vmin=0, vmax=1)  # fixed ends, so that dark slices look dark
    for mask, colour in zip(panel.masks, ORGAN_COLOURS, strict=True):
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_title(panel.title, fontsize=9)


def draw_panels(panels: Sequence[Panel], columns: int, width: float = 3.2) -> Figure:
    """Draw slices row by row, with a legend below.

    Args:
        panels: What to draw; at least one.
        columns: Slices a row.
        width: Inches a slice.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width * columns, (width + 0.1) * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_outlines(axes, panel)
    handles = [Line2D([], [], color=colour, label=organ) for organ, colour in zip(ORGANS, ORGAN_COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(ORGANS) if columns > 1 else 1, frameon=False)
    return figure


def pick_slices(dataset: Dataset, number: int) -> list[int]:
    """Rows to show: from as many scans as possible, evenly spaced among the slices that show an organ."""
    scans: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(dataset.with_format(None).select_columns(["scan", "segmentation"])):
        if any(row["segmentation"].values()):
            scans[row["scan"]].append(index)
    share = math.ceil(number / len(scans))
    chosen: list[int] = []
    for members in sorted(scans.values(), key=len, reverse=True):
        positions = np.linspace(0, len(members) - 1, share + 2)[1:-1].round()
        chosen += [members[position] for position in dict.fromkeys(positions.astype(int).tolist())]
    return chosen[:number]


def compare_slice(model: PreTrainedModel, dataset: Dataset, index: int) -> tuple[Panel, Panel]:
    """A slice as outlined by hand and as the model outlines it, with the mean Dice of its organs.

    Args:
        model: Predicts.
        dataset: A split with a `SliceTransform` attached.
        index: Row of the slice.
    """
    row, transform = dataset.with_format(None)[index], attached_transform(dataset)
    truth = outlined_by_hand(row, f"{row['id']}\noutlined by hand")
    with torch.no_grad():
        pixel_values = transform.pixel_values(transform.raw_slices(row))[None].to(model.device)
        logits = [model(pixel_values=pixel_values).logits]
        preds = predict_masks(logits, transform.label_mode, row["height"], row["width"])[0].cpu().numpy()
    dice = nanmean(dice_score(counts) for counts in np.stack(count_pixels(preds, truth.masks), axis=-1).tolist())
    return truth, Panel(truth.image, preds, f"predicted, Dice {dice:.2f}")


def draw_overlay(model: PreTrainedModel, dataset: Dataset, path: Path, number: int = 4) -> None:
    """Draw outlines by hand above the model's prediction for a few validation slices.

    Args:
        model: The model to show.
        dataset: The validation split, with a `SliceTransform` attached.
        path: PNG to write.
        number: How many slices.
    """
    by_hand, predicted = zip(*[compare_slice(model, dataset, i) for i in pick_slices(dataset, number)], strict=True)
    draw_panels([*by_hand, *predicted], columns=len(by_hand)).savefig(path, dpi=110)


def fullest_slice(dataset: Dataset, scan: str) -> int:
    """Row of the slice with the most organ outlined by hand, of those of a scan."""
    rows = [row for row, name in enumerate(dataset.with_format(None)["scan"]) if name == scan]
    slices = dataset.with_format(None).select(rows).select_columns(["segmentation", "height", "width"])
    areas = [int(organ_masks(one["segmentation"], one["height"], one["width"]).sum()) for one in slices]
    return rows[int(np.argmax(areas))]


def draw_cases(model: PreTrainedModel, dataset: Dataset, cases: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw outlines by hand above the model's for single scans, on the slice that shows most of the organs.

    Args:
        model: The model to show.
        dataset: The validation split, with a `SliceTransform` attached.
        cases: By what it is called, as best or worst, a case's `scan` and `dice`.
        path: PNG to write.
    """
    by_hand, predicted = [], []
    for name, case in cases.items():
        truth, preds = compare_slice(model, dataset, fullest_slice(dataset, case["scan"]))
        by_hand.append(truth._replace(title=f"{name} case, Dice {case['dice']:.2f}\n{truth.title}"))
        predicted.append(preds._replace(title=f"{preds.title} on this slice"))
    draw_panels([*by_hand, *predicted], columns=len(by_hand), width=3.6).savefig(path, dpi=110)


def logged(log_history: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The entries that have a key, one a step, ascending: the best checkpoint, scored again at the end, counts not."""
    first = {entry["step"]: entry for entry in reversed(log_history) if key in entry}
    return [first[step] for step in sorted(first)]


def draw_learning_curve(log_history: list[dict[str, Any]], best_step: int, path: Path) -> None:
    """Draw loss and Dice against the training step.

    Args:
        log_history: As the Trainer keeps it.
        best_step: Step of the best checkpoint, marked.
        path: PNG to write.
    """
    figure = Figure(figsize=(10, 3.8), layout="tight")
    loss_axes, dice_axes = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        entries = logged(log_history, key)
        loss_axes.plot([e["step"] for e in entries], [e[key] for e in entries], marker=".", label=label)
    loss_axes.set(xlabel="step", ylabel="loss (Dice + cross-entropy)")
    entries = logged(log_history, "eval_dice")
    steps = [entry["step"] for entry in entries]
    for organ, colour in zip(ORGANS, ORGAN_COLOURS, strict=True):
        dice_axes.plot(
            steps, [entry[f"eval_dice_{organ}"] for entry in entries], color=colour, marker=".", label=organ
        )
    dice_axes.plot(steps, [entry["eval_dice"] for entry in entries], color="black", marker=".", label="mean")
    dice_axes.axvline(best_step, color="gray", linestyle=":", label=f"best, step {best_step}")
    dice_axes.set(xlabel="step", ylabel="validation Dice", ylim=(0, 1))
    for axes in (loss_axes, dice_axes):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
