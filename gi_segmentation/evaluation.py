"""Score predictions on the slices' native grid while the Trainer evaluates; no logits pile up."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from gi_segmentation import metrics
from gi_segmentation.schema import LABELS


def predict_labels(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Label ids on a grid of any size, as the image processor's `post_process_semantic_segmentation` gives them.

    Args:
        logits: float, shape `(B, labels, h, w)`.
        height: Height of the grid in pixels.
        width: Width of the grid in pixels.

    Returns:
        int64, shape `(B, height, width)`.
    """
    return F.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False).argmax(dim=1)


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """One binary mask per label: bool, shape `(B, labels, height, width)`."""
    return labels[:, None] == torch.arange(len(LABELS), device=labels.device)[:, None, None]


def count_batch(logits: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the pixels that the scores need, slice by slice.

    Args:
        logits: float, shape `(B, labels, h, w)`.
        batch: From `data.collate`, with `labels`, `organ_masks` and `native_size`.

    Returns:
        Counts per organ on the native grid `(B, organs, 3)` and per label at the resolution of the model's input
        `(B, labels, 3)`; int64, on the device of the logits.
    """
    organ_counts = []
    for index, (height, width) in enumerate(batch["native_size"].tolist()):
        preds = one_hot(predict_labels(logits[index : index + 1], height, width))[0, 1:]
        target = batch["organ_masks"][index, :, :height, :width]
        organ_counts.append(torch.stack(metrics.count_pixels(preds, target), dim=-1))
    preds, target = one_hot(predict_labels(logits, *batch["labels"].shape[1:])), one_hot(batch["labels"])
    return torch.stack(organ_counts), torch.stack(metrics.count_pixels(preds, target), dim=-1)


class ComputeMetrics:
    """The Trainer's `compute_metrics` with `batch_eval_metrics`: adds counts batch by batch, scores at the last."""

    def __init__(self) -> None:
        self.metric = evaluate.load(str(Path(metrics.__file__)))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch of what `count_batch` counted; the scores after the last one, nothing before."""
        organ_counts, label_counts = (counts.tolist() for counts in prediction.predictions)
        self.metric.add_counts(np.asarray(prediction.label_ids).tolist(), organ_counts, label_counts)
        return self.metric.compute() if compute_result else {}
