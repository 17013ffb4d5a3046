"""The pictures of a run: outlines on slices, and the learning curve."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from gi_segmentation.data import organ_masks, scale_intensity
from gi_segmentation.evaluation import predict_masks
from gi_segmentation.metrics import count_pixels, dice_score, nanmean
from gi_segmentation.schema import COLOURS, ORGANS

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

ORGAN_COLOURS = [(red / 255, green / 255, blue / 255) for red, green, blue in COLOURS[1:]]


def draw_outlines(axes: Axes, raw: np.ndarray, masks: np.ndarray, title: str) -> None:
    """Draw a slice with the outline of each organ.

    Args:
        axes: Where to draw.
        raw: Raw intensities, shape `(height, width)`.
        masks: bool, shape `(organs, height, width)`.
        title: What stands above.
    """
    axes.imshow(scale_intensity(raw) ** 0.6, cmap="gray")  # brightened for the eye; the few brightest pixels dominate
    for mask, colour in zip(masks, ORGAN_COLOURS, strict=True):
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


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


def draw_overlay(model: PreTrainedModel, dataset: Dataset, path: Path, number: int = 4) -> None:
    """Draw outlines by hand above the model's prediction for a few validation slices.

    Args:
        model: The model to show.
        dataset: The validation split, with a `SliceTransform` attached.
        path: PNG to write.
        number: How many slices.
    """
    indices = pick_slices(dataset, number)
    transform = dataset.format["format_kwargs"]["transform"]
    figure, grid = plt.subplots(2, len(indices), figsize=(3.2 * len(indices), 6.6), squeeze=False)
    for column, index in enumerate(indices):
        row = dataset.with_format(None)[index]
        raw, size = np.array(row["image"]), (row["height"], row["width"])
        truth = organ_masks(row["segmentation"], *size)
        with torch.no_grad():
            pixel_values = transform.pixel_values(transform.raw_slices(row))[None].to(model.device)
            preds = predict_masks([model(pixel_values=pixel_values).logits], *size)[0].cpu().numpy()
        dice = nanmean(dice_score(counts) for counts in np.stack(count_pixels(preds, truth), axis=-1).tolist())
        draw_outlines(grid[0, column], raw, truth, f"{row['id']}\noutlined by hand")
        draw_outlines(grid[1, column], raw, preds, f"predicted, Dice {dice:.2f}")
    handles = [Line2D([], [], color=colour, label=organ) for organ, colour in zip(ORGANS, ORGAN_COLOURS, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=len(ORGANS), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    figure, (loss_axes, dice_axes) = plt.subplots(1, 2, figsize=(10, 3.8))
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
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
