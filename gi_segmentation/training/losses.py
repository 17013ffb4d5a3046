"""The training loss: soft Dice of the organs plus cross-entropy, binary where organs may overlap.

For the slices of a batch, with p the predicted probability of organ k at pixel i and t the truth, 0 or 1:

    O_k = sum over i of p_ik * t_ik           overlap
    S_k = sum over i of (p_ik + t_ik)         total
    Dice loss = mean of (1 - 2 O_k / S_k) over the organs k that the truth shows
    loss = Dice loss + cross-entropy

The sums run over all slices of the batch. So a slice without an organ counts too: a prediction there makes S_k larger.
Each batch of an accumulated step has its own Dice loss, and the loss of the step is their mean.

An organ may be unknown in a slice: it may be there, but nobody has drawn it. Then the slice is left out of the organ's
sums. Where organs may overlap, the organ's channel is left out of the cross-entropy, too. Otherwise a pixel that is
labelled background may be background or any unknown organ, so the cross-entropy takes the sum of their probabilities
(marginal loss: Shi et al. 2021, "Marginal loss and exclusion loss for partially supervised multi-organ segmentation",
Medical Image Analysis 70, 101979).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn import functional as F

from gi_segmentation.labels import LabelMode, LabelSet
from gi_segmentation.models.masks import organ_ids, resize_logits

# Adds a tensor over all processes, like `accelerate.Accelerator.reduce`.
Reduce: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
# Positions on the first axis of `dice_sums`.
OVERLAP, TOTAL, TRUE = range(3)


def find_max_loss(labels: LabelSet) -> float:
    """Return ten times the loss of an untrained model. A run with a higher loss is broken.

    Example:
        >>> round(find_max_loss(LabelSet(("liver",))), 1)
        16.9
    """
    # Its Dice loss is at most 1. Its cross-entropy is ln 4 with three organs, because it gives each of the four labels
    # the probability 1/4.
    return 10 * (1 + math.log(len(labels.labels)))


def dice_sums(
    logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sums over all pixels of a batch that soft Dice needs, for each organ.

    Args:
        logits: float. With `multiclass`: shape `(B, 1 + organs, H, W)`, background first. With `multilabel`: shape
            `(B, organs, H, W)`.
        labels: With `multiclass`: label ids, int64, shape `(B, H, W)`. With `multilabel`: masks, shape
            `(B, organs, H, W)`.
        label_mode: What the channels mean.
        known: Which organs were drawn in each slice, bool, shape `(B, organs)`; None: all of them.

    Returns:
        Shape `(3, organs)`: the overlap O of prediction and truth, the total S, and the sum of the truth alone.

    Example:
        >>> labels = torch.tensor([[[0, 1], [0, 1]]])
        >>> logits = 999.0 * F.one_hot(labels, 4).permute(0, 3, 1, 2)
        >>> dice_sums(logits, labels, "multiclass")
        tensor([[2., 0., 0.],
                [4., 0., 0.],
                [2., 0., 0.]])
    """
    # `float`, because with mixed precision the logits have 16 bits, and a sum over so many pixels needs more.
    if label_mode == "multilabel":
        probabilities, target = logits.float().sigmoid(), labels.bool()
    else:
        # `[:, 1:]` leaves out the background, which fills most of a slice and would make every Dice look good.
        probabilities = logits.float().softmax(dim=1)[:, 1:]
        target = labels[:, None] == organ_ids(probabilities.shape[1], labels.device)
    if known is not None:
        # The truth of an unknown organ is empty already.
        probabilities = probabilities * known[:, :, None, None]
    # Masks of truth values are counted much faster than masks of numbers are summed.
    overlap, predicted, true = (
        values.sum(dim=(0, 2, 3), dtype=probabilities.dtype)
        for values in (probabilities * target, probabilities, target)
    )
    return torch.stack([overlap, predicted + true, true])


def soft_dice_loss(sums: torch.Tensor) -> torch.Tensor:
    """Return one minus the soft Dice, averaged over the organs that the truth shows.

    An organ that no slice of the batch shows has no Dice and is left out. Cross-entropy still teaches its absence. If
    the truth shows no organ at all, the loss is 0. MONAI's `DiceLoss(batch=True, include_background=False)` gives the
    same value if every organ is present. It counts an absent organ as fully wrong.

    Args:
        sums: From `dice_sums`.

    Returns:
        Scalar between 0 and 1.

    Example:
        >>> soft_dice_loss(torch.tensor([[2.0, 1.0, 0.0], [4.0, 4.0, 0.5], [2.0, 2.0, 0.0]]))
        tensor(0.2500)
    """
    # The two clamps avoid 0 / 0. They change no other value: S_k is at least 1 if the truth shows the organ.
    dice = 2 * sums[OVERLAP] / sums[TOTAL].clamp(min=1e-6)
    present = sums[TRUE] > 0
    return (present * (1 - dice)).sum() / present.sum().clamp(min=1)


def pool_dice_loss(sums: torch.Tensor, reduce: Reduce, num_processes: int) -> torch.Tensor:
    """Return the soft Dice loss over the slices of all processes.

    The loss L depends on the sums s = s_1 + ... + s_P of all P processes, so its gradient is

        dL/dw = dL/ds * (ds_1/dw + ... + ds_P/dw).

    Process p can only differentiate its own s_p. For this process, the sums of the others are constants. So each
    process computes one term of the gradient. DistributedDataParallel then takes the mean of the P terms, which is 1/P
    of their sum. The factor P on the gradient corrects this.

    Args:
        sums: From `dice_sums`, for the slices of this process.
        reduce: Adds a tensor over all processes.
        num_processes: Number of processes.

    Returns:
        Scalar between 0 and 1, the same on all processes. Its gradient is that of this process, times P.

    Example:
        >>> ours = torch.tensor([[2.0], [4.0], [2.0]], requires_grad=True)
        >>> others = torch.tensor([[0.0], [4.0], [2.0]])  # of a second process, which found nothing
        >>> loss = pool_dice_loss(ours, lambda tensor: tensor + others, num_processes=2)
        >>> loss.backward()
        >>> loss.item(), ours.grad[0].item()  # 1 - 2 * 2 / 8; and 2 * -2 / 8
        (0.5, -0.5)
    """
    # `reduce` may overwrite its argument, so it gets a copy.
    others = reduce(sums.detach().clone()) - sums.detach()
    # The value of `sums + others` is s, but only `sums` carries a gradient.
    loss = soft_dice_loss(sums + others)
    # The bracket is 0, so the value stays L. Its gradient is dL/dw, so the gradient becomes P times dL/dw.
    return loss.detach() + num_processes * (loss - loss.detach())


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_mode: LabelMode,
    known: torch.Tensor | None = None,
    reduce: Reduce | None = None,
    num_processes: int = 1,
) -> torch.Tensor:
    """Return the mean cross-entropy over pixels, with `multilabel` also over the masks of known organs.

    Args:
        logits: As in `dice_sums`.
        labels: As in `dice_sums`.
        label_mode: As in `dice_sums`.
        known: As in `dice_sums`.
        reduce: As in `pool_dice_loss`. With None, the mean is that of this process only.
        num_processes: Number of processes.

    Example:
        >>> logits = torch.tensor([0.5, 0.25, 0.25]).log().reshape(1, 3, 1, 1)
        >>> background = torch.zeros(1, 1, 1, dtype=torch.long)
        >>> cross_entropy_loss(logits, background, "multiclass").exp()  # 1 / 0.5
        tensor(2.)
        >>> cross_entropy_loss(logits, background, "multiclass", torch.tensor([[True, False]])).exp()  # 1 / 0.75
        tensor(1.3333)
    """
    if label_mode == "multiclass":
        return F.nll_loss(marginal_log_probabilities(logits, known), labels)
    if known is None:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    masks = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    number = known.sum() * labels[0, 0].numel()
    if reduce is not None and num_processes > 1:
        # The processes may know unequally many masks. With their mean number in place of this process's own, the mean
        # over the processes is that over all masks.
        number = reduce(number) / num_processes
    return (masks * known[:, :, None, None]).sum() / number.clamp(min=1)


def marginal_log_probabilities(logits: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    """Return the logarithms of softmax probabilities, with those of unknown organs added to the background's.

    Args:
        logits: float, shape `(B, 1 + organs, H, W)`.
        known: As in `dice_sums`.

    Returns:
        float32 or float64, shape of the logits. The values of unknown organs have no meaning: no pixel is labelled so.
    """
    values = logits.float().log_softmax(dim=1)
    if known is None:
        return values
    # The background belongs to the background. With all organs known it is the only channel, and stays as it is.
    belongs = ~F.pad(known, (1, 0), value=False)
    background = values.masked_fill(~belongs[:, :, None, None], -math.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, values[:, 1:]], dim=1)


def dice_cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_mode: LabelMode,
    reduce: Reduce | None = None,
    num_processes: int = 1,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return soft Dice loss plus cross-entropy of one batch, at the resolution of the labels.

    Args:
        logits: float, shape `(B, channels, h, w)`, at the resolution of the model's output. Those of a SegFormer have
            a quarter of the input's height and width.
        labels: As in `dice_sums`, at the resolution of the model's input.
        label_mode: As in `dice_sums`.
        reduce: As in `pool_dice_loss`. With None, the slices of this process count only.
        num_processes: Number of processes.
        known: As in `dice_sums`.

    Returns:
        Scalar, at least 0.
    """
    # The logits are enlarged to the size of the labels. Smaller labels would lose the thin parts of an organ.
    (logits,) = resize_logits([logits], *labels.shape[-2:])
    sums = dice_sums(logits, labels, label_mode, known)
    if reduce is None or num_processes == 1:
        dice = soft_dice_loss(sums)
    else:
        dice = pool_dice_loss(sums, reduce, num_processes)
    # Cross-entropy needs no factor P. It is a mean over pixels, and all processes have the same number of them. So the
    # mean of their gradients is already the gradient of the whole.
    return dice + cross_entropy_loss(logits, labels, label_mode, known, reduce, num_processes)
