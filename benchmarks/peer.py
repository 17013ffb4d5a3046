"""The usual way to fine-tune a segmentation model with Hugging Face, as a peer to measure ourselves against.

It does what the example script `run_semantic_segmentation` of `transformers` does: its transforms, its collator, the
`Trainer` with the model's own loss, and the mean IoU of all logits. The code is ours. The peer's scores mean nothing
here, because it clips 16-bit intensities at 255; only its speed counts.
"""

from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from datasets import Dataset, DatasetDict
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments, default_data_collator

# What ImageNet's mean and standard deviation are for image processors.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def with_peer_transform(dataset: Dataset, image_size: int, training: bool) -> Dataset:
    """Return a split that decodes, crops or resizes, flips and normalises each slice when it is read."""
    if training:
        steps = [A.PadIfNeeded(image_size, image_size), A.RandomCrop(image_size, image_size), A.HorizontalFlip()]
    else:
        steps = [A.Resize(image_size, image_size)]
    compose = A.Compose([*steps, A.Normalize(MEAN, STD), ToTensorV2()])

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        pairs = zip(rows["image"], rows["annotation"], strict=True)
        made = [compose(image=np.array(image.convert("RGB")), mask=np.array(mask)) for image, mask in pairs]
        return {
            "pixel_values": [one["image"] for one in made],
            "labels": [one["mask"].long() for one in made],
        }

    return dataset.with_transform(transform, columns=["image", "annotation"])


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """Upsample all logits to the labels, and return the mean IoU, as `evaluate`'s `mean_iou` counts it."""
    labels = np.asarray(prediction.label_ids)
    logits = torch.from_numpy(np.asarray(prediction.predictions))
    num_labels = logits.shape[1]
    preds = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1).numpy()
    # As in `evaluate`: the pixels of each label in both masks, in the prediction and in the truth.
    counts = np.zeros((3, num_labels), dtype=np.int64)
    edges = np.arange(num_labels + 1) - 0.5
    for pred, label in zip(preds, labels, strict=True):
        for total, values in zip(counts, (pred[pred == label], pred, label), strict=True):
            total += np.histogram(values, bins=edges)[0]
    both, predicted, true = counts
    return {"mean_iou": float(np.nanmean(both / np.maximum(predicted + true - both, 1)))}


def make_peer(model: PreTrainedModel, slices: DatasetDict, image_size: int, output_dir: Path, **flags: Any) -> Trainer:
    """Return the peer's trainer.

    Args:
        model: A semantic segmentation model. Its own loss is used.
        slices: `train` and `validation` of `gi_tract`, without transforms.
        image_size: Height and width of the model's input in pixels.
        output_dir: Folder for the trainer's files.
        **flags: More `TrainingArguments`.
    """
    arguments = TrainingArguments(output_dir=str(output_dir), remove_unused_columns=False, **flags)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=with_peer_transform(slices["train"], image_size, training=True),
        eval_dataset=with_peer_transform(slices["validation"], image_size, training=False),
        compute_metrics=mean_iou,
        data_collator=default_data_collator,
    )
