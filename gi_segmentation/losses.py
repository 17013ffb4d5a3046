"""The training loss: soft Dice of the organs plus cross-entropy."""

import torch
from torch.nn import functional as F


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One minus the soft Dice of the organs, each pooled over the batch.

    Pooling makes slices without an organ count: what is predicted there lowers that organ's Dice. An organ that no
    slice of the batch shows has no Dice and is left out (cross-entropy still teaches its absence); a batch without
    any organ has loss 0.

    Args:
        logits: float, shape `(B, labels, H, W)`; label 0 is the background and not scored.
        labels: Label ids, int64, shape `(B, H, W)`.

    Returns:
        Scalar in 0 to 1.

    Example:
        >>> labels = torch.tensor([[[0, 1], [0, 1]]])
        >>> logits = 100.0 * F.one_hot(labels, 2).permute(0, 3, 1, 2)
        >>> soft_dice_loss(logits, labels).item()
        0.0
    """
    probabilities = logits.float().softmax(dim=1)[:, 1:]
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    overlap = (probabilities * target).sum(dim=(0, 2, 3))
    total = (probabilities + target).sum(dim=(0, 2, 3))
    present = target.sum(dim=(0, 2, 3)) > 0
    dice = 2 * overlap / total.clamp(min=1e-6)
    return (present * (1 - dice)).sum() / present.sum().clamp(min=1)


def dice_cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy, at the resolution of the labels.

    Args:
        logits: float, shape `(B, labels, h, w)`, at the model's own output resolution.
        labels: Label ids, int64, shape `(B, H, W)`; logits are brought there by bilinear interpolation.

    Returns:
        Scalar, at least 0.
    """
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return soft_dice_loss(logits, labels) + F.cross_entropy(logits.float(), labels)
