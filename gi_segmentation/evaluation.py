"""Score predictions on the slices' native grid while the Trainer evaluates; no logits pile up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel

from gi_segmentation import metrics
from gi_segmentation.data import collate
from gi_segmentation.schema import LABELS, ORGANS

# Axes to turn around for a test-time flip: none, left-right, up-down, both.
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def flip_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of the slices as they are and flipped, each turned back; their mean is the answer with test-time flips.

    Args:
        model: A semantic segmentation model.
        pixel_values: Model input, float, shape `(B, 3, S, S)`.

    Returns:
        float32, shape `(flips, B, channels, h, w)`, unflipped first.
    """
    return torch.stack([model(pixel_values=pixel_values.flip(axes)).logits.float().flip(axes) for axes in FLIPS])


def predict_masks(logits: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Organ masks on a grid of any size, from one model or from several.

    A single model's masks are those of the image processor's `post_process_semantic_segmentation`, or, where it gives
    each organ a channel of its own, the pixels with a probability above one half. Of several models, probabilities
    are averaged on that grid.

    Args:
        logits: Per model float, shape `(B, channels, h, w)`; 4 channels with the background first, or an organ each.
        height: Height of the grid in pixels.
        width: Width of the grid in pixels.

    Returns:
        bool, shape `(B, organs, height, width)`.

    Example:
        >>> logits = torch.tensor([0.0, 2.0, 1.0, -1.0]).reshape(1, 4, 1, 1)
        >>> predict_masks([logits], 1, 1).flatten().tolist()
        [True, False, False]
        >>> predict_masks([logits[:, 1:]], 1, 1).flatten().tolist()
        [True, True, False]
    """
    resized = [
        F.interpolate(one.float(), size=(height, width), mode="bilinear", align_corners=False) for one in logits
    ]
    if resized[0].shape[1] == len(ORGANS):
        return torch.stack([one.sigmoid() for one in resized]).mean(dim=0) > 0.5
    scores = torch.stack([one.softmax(dim=1) for one in resized]).mean(dim=0) if len(resized) > 1 else resized[0]
    return scores.argmax(dim=1, keepdim=True) == torch.arange(1, len(LABELS), device=scores.device)[:, None, None]


def label_masks(organ_masks: torch.Tensor) -> torch.Tensor:
    """One mask per label, background first; where organs overlap the highest label wins, as in `annotation`.

    Args:
        organ_masks: bool, shape `(B, organs, H, W)`.

    Returns:
        bool, shape `(B, labels, H, W)`.
    """
    labels = (organ_masks * torch.arange(1, len(LABELS), device=organ_masks.device)[:, None, None]).amax(dim=1)
    return labels[:, None] == torch.arange(len(LABELS), device=labels.device)[:, None, None]


def count_batch(logits: Sequence[torch.Tensor], batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the pixels that the scores need, slice by slice.

    Args:
        logits: As in `predict_masks`.
        batch: From `data.collate`, with `labels`, `organ_masks` and `native_size`.

    Returns:
        Counts per organ on the native grid `(B, organs, 3)` and per label at the resolution of the model's input
        `(B, labels, 3)`; int64, on the device of the logits.
    """
    organ_counts = []
    for index, (height, width) in enumerate(batch["native_size"].tolist()):
        preds = predict_masks([one[index : index + 1] for one in logits], height, width)[0]
        target = batch["organ_masks"][index, :, :height, :width]
        organ_counts.append(torch.stack(metrics.count_pixels(preds, target), dim=-1))
    return torch.stack(organ_counts), count_labels(logits, batch["labels"])


def count_labels(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Count the pixels of every label, background first, at the resolution of the model's input.

    Args:
        logits: As in `predict_masks`.
        labels: Label ids `(B, S, S)`, or masks `(B, organs, S, S)`.

    Returns:
        int64, shape `(B, labels, 3)`.
    """
    preds = label_masks(predict_masks(logits, *labels.shape[-2:]))
    ids = torch.arange(1, len(LABELS), device=labels.device)[:, None, None]
    organs = labels.bool() if labels.ndim == 4 else labels[:, None] == ids
    return torch.stack(metrics.count_pixels(preds, label_masks(organs)), dim=-1)


def score_slices(model: PreTrainedModel, dataset: Dataset, batch_size: int = 16) -> np.ndarray:
    """Count the pixels of every slice of a split, with a progress bar; for a look at single slices.

    Args:
        model: Predicts.
        dataset: A split whose `SliceTransform` is scoring.
        batch_size: Slices a forward pass.

    Returns:
        Pixels in both, predicted and true, on the native grid: int64, shape `(slices, organs, 3)`.
    """
    counts = []
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collate), desc="Scoring", unit="batch"):
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        with torch.no_grad():
            logits = model(pixel_values=batch["pixel_values"]).logits
        counts.append(count_batch([logits], batch)[0].cpu().numpy())
    return np.concatenate(counts)


class ComputeMetrics:
    """The Trainer's `compute_metrics` with `batch_eval_metrics`: adds counts batch by batch, scores at the last."""

    def __init__(self) -> None:
        self.metric = evaluate.load(str(Path(metrics.__file__)))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch of what `count_batch` counted; the scores after the last one, nothing before."""
        organ_counts, label_counts = (counts.tolist() for counts in prediction.predictions)
        self.metric.add_counts(np.asarray(prediction.label_ids).tolist(), organ_counts, label_counts)
        return self.metric.compute() if compute_result else {}
