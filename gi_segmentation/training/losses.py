"""The training loss: soft Dice of the organs plus cross-entropy, binary where organs may overlap."""

import math

import torch
from torch.nn import functional as F

from gi_segmentation.schema import LABELS, ORGANS

MAX_LOSS = 10 * (1 + math.log(len(LABELS)))  # ten times that of a model that knows nothing
OVERLAP, TOTAL, TRUE = range(3)  # the first axis of `dice_sums`


def dice_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum, per organ and over all slices, what soft Dice needs.

    Args:
        logits: float, shape `(B, 4, H, W)` with the background first, or `(B, 3, H, W)`, an organ each.
        labels: For the former label ids, int64, shape `(B, H, W)`; for the latter masks, shape `(B, 3, H, W)`.

    Returns:
        Overlap of prediction and truth, sum of both, and truth alone; shape `(3, organs)`.

    Example:
        >>> labels = torch.tensor([[[0, 1], [0, 1]]])
        >>> logits = 999.0 * F.one_hot(labels, 4).permute(0, 3, 1, 2)
        >>> dice_sums(logits, labels)
        tensor([[2., 0., 0.],
                [4., 0., 0.],
                [2., 0., 0.]])
    """
    if labels.ndim == 4:
        probabilities, target = logits.float().sigmoid(), labels.float()
    else:
        probabilities = logits.float().softmax(dim=1)[:, 1:]
        target = F.one_hot(labels, 1 + len(ORGANS)).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    sums = ((probabilities * target), (probabilities + target), target)
    return torch.stack([values.sum(dim=(0, 2, 3)) for values in sums])


def soft_dice_loss(sums: torch.Tensor) -> torch.Tensor:
    """One minus the soft Dice of the organs, each pooled over all slices of a step.

    Pooling makes slices without an organ count: what is predicted there lowers that organ's Dice. An organ that no
    slice shows has no Dice and is left out (cross-entropy still teaches its absence); without any organ the loss is 0.

    MONAI's `DiceLoss(batch=True, include_background=False)` is the same where every organ is present; it counts absent
    organs as fully wrong, and cannot pool over the batches of an accumulated step.

    Args:
        sums: From `dice_sums`, of as many slices as the step has.

    Returns:
        Scalar in 0 to 1.

    Example:
        >>> soft_dice_loss(torch.tensor([[2.0, 1.0, 0.0], [4.0, 4.0, 0.5], [2.0, 2.0, 0.0]]))
        tensor(0.2500)
    """
    dice = 2 * sums[OVERLAP] / sums[TOTAL].clamp(min=1e-6)
    present = sums[TRUE] > 0
    return (present * (1 - dice)).sum() / present.sum().clamp(min=1)


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of label ids, or binary cross-entropy of masks; shapes as in `dice_sums`. The mean over pixels."""
    if labels.ndim == 4:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def resize_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Bring logits to the resolution of the labels, bilinear."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def dice_cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy of one batch, at the resolution of the labels.

    Args:
        logits: float, at the model's own output resolution, shape `(B, channels, h, w)`.
        labels: As in `dice_sums`, `(H, W)` the resolution of the model's input.

    Returns:
        Scalar, at least 0.
    """
    logits = resize_logits(logits, labels)
    return soft_dice_loss(dice_sums(logits, labels)) + cross_entropy_loss(logits, labels)
