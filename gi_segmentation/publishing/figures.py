"""The pictures of a run: slices with outlines, and the learning curve."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel

from gi_segmentation.files import writing_file
from gi_segmentation.inference.splits import predict_split
from gi_segmentation.labels import LabelSet, find_labels
from gi_segmentation.review.overlays import draw_panels, organ_lines
from gi_segmentation.rle import organ_masks
from gi_segmentation.training.pictures import ShownSlice, pick_slices, read_row, show_slice

# With more organs, the legend of the learning curve does not fit into it.
MAX_INSIDE = 8


def compare_slice(model: PreTrainedModel, dataset: Dataset, index: int) -> ShownSlice:
    """Predict a slice, and show it with its annotations and with the predicted masks.

    Args:
        model: The model that predicts.
        dataset: A split with a scoring `SliceTransform` attached.
        index: Row of the slice.
    """
    (preds,) = predict_split(model, dataset.select([index]))
    return show_slice(read_row(dataset, index), preds)


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
