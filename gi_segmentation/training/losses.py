"""The training loss: soft Dice of the organs plus cross-entropy, binary where organs may overlap.

For the slices of a batch, with p the predicted probability of organ k at pixel i and t the truth, 0 or 1:

    O_k = sum over i of p_ik * t_ik           overlap
    S_k = sum over i of (p_ik + t_ik)         total
    Dice loss = mean over organs k that the truth shows of (1 - 2 O_k / S_k)
    loss = Dice loss + cross-entropy

The sums run over all slices of the batch, so that a slice without an organ counts too: what is predicted there makes
S_k larger. Each batch of an accumulated step has its own Dice loss, and the step's loss is their mean.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from gi_segmentation.schema import LABELS, LabelMode

MAX_LOSS = 10 * (1 + math.log(len(LABELS)))  # ten times the loss of a model that knows nothing
OVERLAP, TOTAL, TRUE = range(3)  # the first axis of `dice_sums`


def dice_sums(logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode) -> torch.Tensor:
    """Sum, per organ and over all slices, what soft Dice needs.

    Args:
        logits: float, shape `(B, 4, H, W)` with the background first; with `multilabel` `(B, 3, H, W)`, an organ each.
        labels: Label ids, int64, shape `(B, H, W)`; with `multilabel` masks, shape `(B, 3, H, W)`.
        label_mode: Which of both.

    Returns:
        Overlap of prediction and truth, sum of both, and truth alone; shape `(3, organs)`.

    Example:
        >>> labels = torch.tensor([[[0, 1], [0, 1]]])
        >>> logits = 999.0 * F.one_hot(labels, 4).permute(0, 3, 1, 2)
        >>> dice_sums(logits, labels, "multiclass")
        tensor([[2., 0., 0.],
                [4., 0., 0.],
                [2., 0., 0.]])
    """
    if label_mode == "multilabel":
        probabilities, target = logits.float().sigmoid(), labels.float()
    else:
        probabilities = logits.float().softmax(dim=1)[:, 1:]
        target = F.one_hot(labels, len(LABELS)).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    sums = ((probabilities * target), (probabilities + target), target)
    return torch.stack([values.sum(dim=(0, 2, 3)) for values in sums])


def soft_dice_loss(sums: torch.Tensor) -> torch.Tensor:
    """One minus the soft Dice of each organ that the truth shows, averaged over these organs.

    An organ that no slice shows has no Dice and is left out; cross-entropy still teaches its absence. Without any
    organ the loss is 0. MONAI's `DiceLoss(batch=True, include_background=False)` is the same where every organ is
    present; it counts an absent organ as fully wrong.

    Args:
        sums: From `dice_sums`.

    Returns:
        Scalar in 0 to 1.

    Example:
        >>> soft_dice_loss(torch.tensor([[2.0, 1.0, 0.0], [4.0, 4.0, 0.5], [2.0, 2.0, 0.0]]))
        tensor(0.2500)
    """
    dice = 2 * sums[OVERLAP] / sums[TOTAL].clamp(min=1e-6)
    present = sums[TRUE] > 0
    return (present * (1 - dice)).sum() / present.sum().clamp(min=1)


def pool_dice_loss(
    sums: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor], num_processes: int
) -> torch.Tensor:
    """The soft Dice loss over the slices of all processes.

    Its value is that of the sums of all processes. As to its gradient: the Dice loss L depends on the sums
    s = s_1 + ... + s_P of P processes, so

        dL/dw = dL/ds * (ds_1/dw + ... + ds_P/dw).

    Process p can only differentiate its own s_p; the others are constants to it. So each process gets its own term of
    this sum, and DistributedDataParallel then takes the mean of the gradients over the processes. The mean is 1/P of
    the sum: hence the factor P on the gradient.

    Args:
        sums: From `dice_sums`, of this process's slices.
        reduce: Adds a tensor up over all processes, as `accelerate.Accelerator.reduce` does.
        num_processes: How many there are.

    Example:
        >>> ours = torch.tensor([[2.0], [4.0], [2.0]], requires_grad=True)
        >>> others = torch.tensor([[0.0], [4.0], [2.0]])  # of a second process, which found nothing
        >>> loss = pool_dice_loss(ours, lambda tensor: tensor + others, num_processes=2)
        >>> loss.backward()
        >>> loss.item(), ours.grad[0].item()  # 1 - 2 * 2 / 8; and 2 * -2 / 8
        (0.5, -0.5)
    """
    others = reduce(sums.detach().clone()) - sums.detach()
    loss = soft_dice_loss(sums + others)
    return loss.detach() + num_processes * (loss - loss.detach())


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode) -> torch.Tensor:
    """Mean cross-entropy over pixels: of label ids, or with `multilabel` of each mask; shapes as in `dice_sums`."""
    if label_mode == "multilabel":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def resize_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Bring logits to the resolution of the labels, bilinear."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def dice_cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_mode: LabelMode,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_processes: int = 1,
) -> torch.Tensor:
    """Soft Dice loss plus cross-entropy of one batch, at the resolution of the labels.

    Cross-entropy is a mean over pixels, and all processes have equally many slices: the mean of their gradients is the
    gradient of the whole, so it needs no factor.

    Args:
        logits: float, at the model's own output resolution, shape `(B, channels, h, w)`.
        labels: As in `dice_sums`, `(H, W)` the resolution of the model's input.
        label_mode: As in `dice_sums`.
        reduce: As in `pool_dice_loss`; None takes the slices of this process alone.
        num_processes: How many processes there are.

    Returns:
        Scalar, at least 0.
    """
    logits = resize_logits(logits, labels)
    sums = dice_sums(logits, labels, label_mode)
    pooled = reduce is not None and num_processes > 1
    dice = pool_dice_loss(sums, reduce, num_processes) if pooled and reduce else soft_dice_loss(sums)
    return dice + cross_entropy_loss(logits, labels, label_mode)
