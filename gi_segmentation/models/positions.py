"""Checkpoints at another input size.

BEiT and DPT cut the image into n x n patches and learn tables over the positions of these patches. Another input size
gives another n, so these tables are interpolated. There are two kinds of tables:

- Position embeddings have a row for each patch, and one for the class token: 1 + n * n rows.
- Relative position biases have a row for each offset between two patches. Vertically and horizontally, an offset runs
  from -(n - 1) to n - 1, which makes (2n - 1)**2 rows. Three more rows belong to the class token.
"""

import copy
import logging
import math

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from gi_segmentation.errors import InputError

logger = logging.getLogger(__name__)


def resize_table(name: str, table: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate a table of positions.

    Args:
        name: Its name in the model's `state_dict`.
        table: Position embeddings, shape `(1, 1 + n * n, channels)`, with the class token first. Or relative position
            biases, shape `((2n - 1)**2 + 3, heads)`, with the three rows of the class token last.
        length: Number of rows of the result, with those of the class token.

    Returns:
        The table for the new size. The rows of the class token are unchanged.

    Raises:
        InputError: If the tensor is neither kind of table, or its positions form no square.
    """
    relative = name.endswith("relative_position_bias_table")
    if not relative and not name.endswith("position_embeddings"):
        raise InputError(f"--image_size: {name} depends on it and cannot be interpolated; leave the size as it is")
    rows = table if relative else table[0]
    # The class token has no position, so its rows are not interpolated.
    grid, extra = (rows[:-3], rows[-3:]) if relative else (rows[1:], rows[:1])
    old, new = math.isqrt(len(grid)), math.isqrt(length - len(extra))
    if old * old != len(grid) or new * new != length - len(extra):
        raise InputError(f"--image_size: {name} holds no square of positions; leave the size as it is")
    # These are the modes that `transformers` uses if an image does not have the model's own size.
    mode = "bicubic" if name.startswith("beit.embeddings") else "bilinear"
    # From rows `(old * old, channels)` to an image `(1, channels, old, old)`, and back.
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(new, new), mode=mode).permute(0, 2, 3, 1).reshape(new * new, -1)
    return torch.cat([resized, extra]) if relative else torch.cat([extra, resized])[None]


def resize_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Return a model for another input size. Its position tables are interpolated, and all other weights are the same.

    Args:
        model: A loaded model. It is not changed.
        image_size: Height and width of the new input in pixels.

    Raises:
        InputError: If a tensor depends on the input size in a way that cannot be interpolated.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    # A new model of this size says which shape each tensor must have. Its random weights are then replaced.
    resized = type(model)(config)
    tensors, wanted = model.state_dict(), resized.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            # Relative biases have two axes with the rows first; embeddings have a batch axis before the rows.
            rows = wanted[name].shape[0 if tensor.ndim == 2 else 1]
            tensors[name] = resize_table(name, tensor, rows)
            logger.warning("%s: interpolated from %s to %s", name, list(tensor.shape), list(tensors[name].shape))
    resized.load_state_dict(tensors)
    return resized
