"""Checkpoints at another input size: their position tables are interpolated."""

import copy
import logging
import math

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from gi_segmentation.errors import InputError

logger = logging.getLogger(__name__)


def resize_table(name: str, table: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate a table of positions, as the family itself does for images of another size.

    Args:
        name: Its name in the model's state.
        table: Position embeddings `(1, 1 + n * n, channels)` with a class token first, or relative position biases
            `((2n - 1)**2 + 3, heads)` with three entries of the class token last.
        length: Rows that the result has, the class token's included.

    Raises:
        InputError: If it is neither, or its positions are no square.
    """
    relative = name.endswith("relative_position_bias_table")
    if not relative and not name.endswith("position_embeddings"):
        raise InputError(f"--image_size: {name} depends on it and cannot be interpolated; leave the size as it is")
    rows = table if relative else table[0]
    grid, extra = (rows[:-3], rows[-3:]) if relative else (rows[1:], rows[:1])
    old, new = math.isqrt(len(grid)), math.isqrt(length - len(extra))
    if old * old != len(grid) or new * new != length - len(extra):
        raise InputError(f"--image_size: {name} holds no square of positions; leave the size as it is")
    mode = "bicubic" if name.startswith("beit.embeddings") else "bilinear"
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(new, new), mode=mode).permute(0, 2, 3, 1).reshape(new * new, -1)
    return torch.cat([resized, extra]) if relative else torch.cat([extra, resized])[None]


def resize_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """A model for another input size, with its position tables interpolated and all else as it was.

    Raises:
        InputError: If a tensor depends on the input size in a way that cannot be interpolated.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    resized = type(model)(config)
    tensors, wanted = model.state_dict(), resized.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            rows = wanted[name].shape[0 if tensor.ndim == 2 else 1]
            tensors[name] = resize_table(name, tensor, rows)
            logger.warning("%s: interpolated from %s to %s", name, list(tensor.shape), list(tensors[name].shape))
    resized.load_state_dict(tensors)
    return resized
