"""From logits to the organs' masks on a slice's own pixel grid."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from gi_segmentation.schema import LABELS, LabelMode
from gi_segmentation.scoring.dice import count_pixels

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


def predict_masks(logits: Sequence[torch.Tensor], label_mode: LabelMode, height: int, width: int) -> torch.Tensor:
    """Organ masks on a grid of any size, from one model or from several.

    A single model's masks are those of the image processor's `post_process_semantic_segmentation`, or, where it gives
    each organ a channel of its own, the pixels with a probability above one half. Of several models, probabilities
    are averaged on that grid.

    Args:
        logits: Per model float, shape `(B, channels, h, w)`; 4 channels with the background first, or an organ each.
        label_mode: Which of both.
        height: Height of the grid in pixels.
        width: Width of the grid in pixels.

    Returns:
        bool, shape `(B, organs, height, width)`.

    Example:
        >>> logits = torch.tensor([0.0, 2.0, 1.0, -1.0]).reshape(1, 4, 1, 1)
        >>> predict_masks([logits], "multiclass", 1, 1).flatten().tolist()
        [True, False, False]
        >>> predict_masks([logits[:, 1:]], "multilabel", 1, 1).flatten().tolist()
        [True, True, False]
    """
    resized = [
        F.interpolate(one.float(), size=(height, width), mode="bilinear", align_corners=False) for one in logits
    ]
    if label_mode == "multilabel":
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


def predict_batch(
    logits: Sequence[torch.Tensor], label_mode: LabelMode, native_sizes: torch.Tensor
) -> list[torch.Tensor]:
    """Organ masks of the slices of a batch, each on its own grid.

    Args:
        logits: As in `predict_masks`.
        label_mode: As in `predict_masks`.
        native_sizes: Height and width of each slice, shape `(B, 2)`.

    Returns:
        Per slice bool, shape `(organs, height, width)`.
    """
    return [
        predict_masks([one[index : index + 1] for one in logits], label_mode, height, width)[0]
        for index, (height, width) in enumerate(native_sizes.tolist())
    ]


def pack_masks(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Masks as bits, eight pixels a byte, so that many can be kept and sent to other processes.

    Args:
        masks: bool, of any shapes.

    Returns:
        uint8, shape `(masks, bytes of the largest)`, for `numpy.unpackbits`.

    Example:
        >>> pack_masks([torch.tensor([[True, False, False], [False, True, True]])]).tolist()
        [[140]]
    """
    num_bytes = max(-(-mask.numel() // 8) for mask in masks)
    bits = torch.stack([F.pad(mask.flatten().to(torch.uint8), (0, 8 * num_bytes - mask.numel())) for mask in masks])
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(len(masks), num_bytes, 8) * places).sum(dim=-1, dtype=torch.uint8)


def count_labels(logits: Sequence[torch.Tensor], label_mode: LabelMode, labels: torch.Tensor) -> torch.Tensor:
    """Count the pixels of every label, background first, at the resolution of the model's input.

    Args:
        logits: As in `predict_masks`.
        label_mode: As in `predict_masks`.
        labels: Label ids `(B, S, S)`, or masks `(B, organs, S, S)`.

    Returns:
        int64, shape `(B, labels, 3)`.
    """
    preds = label_masks(predict_masks(logits, label_mode, *labels.shape[-2:]))
    ids = torch.arange(1, len(LABELS), device=labels.device)[:, None, None]
    organs = labels.bool() if label_mode == "multilabel" else labels[:, None] == ids
    return torch.stack(count_pixels(preds, label_masks(organs)), dim=-1)
