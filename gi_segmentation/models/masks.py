"""From logits to masks of organs on the pixel grid of a slice.

Logits may be smaller than the model's input: those of SegFormer have a quarter of its height and width. They are first
resized to the slice's own size (the native grid), and become masks after that. Resized masks would have steps along
their contours.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from gi_segmentation.labels import LabelMode, LabelSet

# The axes of each test-time flip: no flip, left-right, up-down, both.
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def find_flips(labels: LabelSet) -> tuple[tuple[int, ...], ...]:
    """Return the axes of each test-time flip of a model.

    Example:
        >>> find_flips(LabelSet(("left kidney", "right kidney")))
        ((), (-2,))
    """
    # A left-right flip would show each kidney where the other one is. A flip up-down leaves both on their side.
    return tuple(axes for axes in FLIPS if -1 not in axes) if labels.has_sides else FLIPS


def name_flips(labels: LabelSet) -> str:
    """Return the number of the test-time flips of a model as a word."""
    return {2: "two", 4: "four"}[len(find_flips(labels))]


def flip_logits(
    model: nn.Module, pixel_values: torch.Tensor, flips: Sequence[tuple[int, ...]] = FLIPS
) -> torch.Tensor:
    """Return the logits of slices without a flip and with each flip. All logits are flipped back.

    The mean over the first axis is the prediction with test-time flips.

    Args:
        model: A semantic segmentation model.
        pixel_values: Model input, float, shape `(B, 3, S, S)`.
        flips: The axes of each flip.

    Returns:
        float32, shape `(flips, B, channels, h, w)`; the first element is without a flip.
    """
    # A flip is its own inverse, so the same axes flip the logits back. Only then do the pixels of all four fit.
    return torch.stack([model(pixel_values=pixel_values.flip(axes)).logits.float().flip(axes) for axes in flips])


def predict_masks(logits: Sequence[torch.Tensor], label_mode: LabelMode, height: int, width: int) -> torch.Tensor:
    """Predict the masks of the organs on a grid of any size, with one model or several.

    With `multiclass`, a pixel belongs to the label with the highest probability. With one model, this gives the masks
    of the image processor's `post_process_semantic_segmentation`. With `multilabel`, it belongs to each organ with a
    probability above 0.5. Probabilities of several models are averaged.

    Args:
        logits: Logits of each model, float, shape `(B, channels, h, w)`. There is a channel per organ; with
            `multiclass`, the background is another one before them.
        label_mode: What the channels mean.
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
    return choose_masks(resize_logits(logits, height, width), label_mode)


def predict_organs(
    logits: Sequence[torch.Tensor], label_mode: LabelMode, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the masks of the organs as `predict_masks` does, and the probabilities of the organs.

    Args:
        logits: As in `predict_masks`.
        label_mode: As in `predict_masks`.
        height: Height of the grid in pixels.
        width: Width of the grid in pixels.

    Returns:
        Masks, bool, and probabilities, float16, both of shape `(B, organs, height, width)`.

    Example:
        >>> masks, probabilities = predict_organs([torch.zeros(1, 3, 1, 1)], "multilabel", 1, 1)
        >>> masks.flatten().tolist(), probabilities.flatten().tolist()
        ([False, False, False], [0.5, 0.5, 0.5])
    """
    resized = resize_logits(logits, height, width)
    # Half precision is exact to 0.0005, which is enough for a mean over many voxels. A whole scan is kept in memory.
    probabilities = average_probabilities(resized, label_mode)
    organs = probabilities if label_mode == "multilabel" else probabilities[:, 1:]
    return choose_masks(resized, label_mode), organs.half()


def resize_logits(logits: Sequence[torch.Tensor], height: int, width: int) -> list[torch.Tensor]:
    """Resize the logits of each model to a grid, bilinearly: float32, shape `(B, channels, height, width)`."""
    size = height, width
    return [
        # Logits of this size would stay the same, but the interpolation would take its time.
        one.float()
        if one.shape[-2:] == size
        else F.interpolate(one.float(), size=size, mode="bilinear", align_corners=False)
        for one in logits
    ]


def average_probabilities(resized: Sequence[torch.Tensor], label_mode: LabelMode) -> torch.Tensor:
    """Return the mean over the models of the probabilities of each channel, with the shape of the logits."""
    probabilities = [one.sigmoid() if label_mode == "multilabel" else one.softmax(dim=1) for one in resized]
    return torch.stack(probabilities).mean(dim=0)


def choose_masks(resized: Sequence[torch.Tensor], label_mode: LabelMode) -> torch.Tensor:
    """Return the masks of the organs for logits that have the size of the grid, see `predict_masks`."""
    if label_mode == "multilabel":
        return average_probabilities(resized, label_mode) > 0.5
    labels = choose_labels(resized, label_mode)[:, None].to(torch.uint8)
    # Shapes: (B, 1, H, W) compared with (organs, 1, 1) gives a mask per organ, (B, organs, H, W).
    return labels == organ_ids(resized[0].shape[1] - 1, labels.device)


def choose_labels(resized: Sequence[torch.Tensor], label_mode: LabelMode) -> torch.Tensor:
    """Return a map with one label id per pixel, int64 or uint8, shape `(B, H, W)`; `resized` as in `choose_masks`."""
    if label_mode == "multilabel":
        return masks_to_labels(choose_masks(resized, label_mode))
    # Softmax does not change which label is the highest, so one model does without it. Several models need it: a mean
    # of logits would let the model with the largest numbers decide.
    scores = average_probabilities(resized, label_mode) if len(resized) > 1 else resized[0]
    # `max` finds the same places as `argmax`, and on a CPU it takes a tenth of the time.
    return scores.max(dim=1).indices


def organ_ids(organs: int, device: torch.device) -> torch.Tensor:
    """Return the label ids of so many organs, uint8, shape `(organs, 1, 1)`."""
    return torch.arange(1, organs + 1, dtype=torch.uint8, device=device)[:, None, None]


def masks_to_labels(organ_masks: torch.Tensor) -> torch.Tensor:
    """Turn masks of organs, which may overlap, into a map with one label id per pixel.

    Args:
        organ_masks: bool, shape `(B, organs, H, W)`.

    Returns:
        uint8, shape `(B, H, W)`.

    Example:
        >>> masks_to_labels(torch.tensor([[[[True, False]], [[False, False]], [[True, False]]]])).tolist()
        [[[3, 0]]]
    """
    # A mask times its label id gives 0 or the id. Where organs overlap, `amax` takes the highest id, which is the rule
    # of the column `annotation` too. A pixel of no organ stays 0, the background.
    return (organ_masks * organ_ids(organ_masks.shape[1], organ_masks.device)).amax(dim=1)


def predict_batch(
    logits: Sequence[torch.Tensor], label_mode: LabelMode, native_sizes: torch.Tensor
) -> list[torch.Tensor]:
    """Predict the masks of the slices of a batch, each on its own grid.

    Args:
        logits: As in `predict_masks`.
        label_mode: As in `predict_masks`.
        native_sizes: Height and width of each slice, shape `(B, 2)`.

    Returns:
        One tensor per slice, bool, shape `(organs, height, width)`.
    """
    # The slices of a batch may have different sizes. Those of one size are predicted together.
    indices: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (height, width) in enumerate(native_sizes.tolist()):
        indices[height, width].append(index)
    masks: dict[int, torch.Tensor] = {}
    for size, members in indices.items():
        masks |= zip(members, predict_masks([one[members] for one in logits], label_mode, *size), strict=True)
    return [masks[index] for index in range(len(native_sizes))]


def pack_masks(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pack masks into bits, eight pixels per byte.

    Args:
        masks: bool, of any shapes.

    Returns:
        uint8, shape `(masks, bytes of the largest mask)`; `numpy.unpackbits` restores the pixels.

    Example:
        >>> pack_masks([torch.tensor([[True, False, False], [False, True, True]])]).tolist()
        [[140]]
    """
    # PyTorch has no function for this. Packed masks of different sizes make one tensor, padded with zeros. The
    # processes of an evaluation can exchange only such tensors.
    num_bytes = max(-(-mask.numel() // 8) for mask in masks)
    bits = torch.stack([F.pad(mask.flatten().to(torch.uint8), (0, 8 * num_bytes - mask.numel())) for mask in masks])
    # The first pixel is the highest bit, as NumPy has it.
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.float32, device=bits.device)
    # As a matrix product, which is faster than a sum over so short an axis. Single precision is exact up to 255.
    return (bits.reshape(len(masks), num_bytes, 8).float() @ places).to(torch.uint8)


def count_labels(
    logits: Sequence[torch.Tensor], label_mode: LabelMode, labels: torch.Tensor, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Count the pixels of every label at the size of the model's input.

    The original project's score is computed from these counts.

    Args:
        logits: As in `predict_masks`.
        label_mode: As in `predict_masks`.
        labels: Label ids, shape `(B, S, S)`; with `multilabel` masks, shape `(B, organs, S, S)`.
        known: Which organs were drawn in each slice, bool, shape `(B, organs)`; None: all of them. Where an unknown
            organ is predicted, the pixel counts as predicted background.

    Returns:
        Pixels in both masks, predicted and true, for each label with the background first: int64, shape
        `(B, labels, 3)`.
    """
    preds = choose_labels(resize_logits(logits, *labels.shape[-2:]), label_mode).long()
    target = masks_to_labels(labels.bool()).long() if label_mode == "multilabel" else labels
    slices, number = len(labels), logits[0].shape[1] + (label_mode == "multilabel")
    if known is not None:
        # The label id that each predicted id counts as, shape (B, labels).
        counted = F.pad(known, (1, 0), value=True) * torch.arange(number, device=labels.device)
        preds = counted.gather(1, preds.flatten(1)).reshape(preds.shape)
    # Each pixel has a pair of a predicted and a true label. One pass counts the pairs of all slices. With four labels
    # there are 4 x 4 pairs, and pair p of slice b has the number 16 b + p.
    offsets = number**2 * torch.arange(slices, device=labels.device)[:, None, None]
    pairs = preds.mul_(number).add_(target).add_(offsets).flatten()
    table = torch.bincount(pairs, minlength=slices * number**2).reshape(slices, number, number)
    # The rows of a slice's table are predicted labels, and the columns are true ones.
    return torch.stack([table.diagonal(dim1=1, dim2=2), table.sum(dim=2), table.sum(dim=1)], dim=-1)
