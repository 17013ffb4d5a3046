"""Run-length encoding as in the competition's CSV: 1-based starts, pixels counted along the rows."""

import re

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.schema import ORGANS

# What Python's int takes beyond this ("1_0", "+3", other scripts' digits) is a damaged file, not a number; 18 digits
# are more than any image needs, and the sum of two such numbers still fits 64 bits.
NUMBER = re.compile(r"[0-9]{1,18}")


class RleError(InputError):
    """A run-length encoding that does not describe a mask of its image."""


def parse_runs(rle: str, num_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read and check the runs of an encoding.

    Args:
        rle: Pairs `start length start length ...`, starts 1-based; empty for an empty mask.
        num_pixels: Pixels of the image, height times width.

    Returns:
        Starts (0-based, ascending) and lengths, int64, one entry per run.

    Raises:
        RleError: If the numbers are odd in count, not whole positive numbers, overlap or end past the image.

    Example:
        >>> starts, lengths = parse_runs("3 2 7 1", num_pixels=9)
        >>> starts.tolist(), lengths.tolist()
        ([2, 6], [2, 1])
    """
    words = rle.split()
    if len(words) % 2:
        raise RleError(f"expected pairs of start and length, got an odd count of {len(words)} numbers")
    if not all(map(NUMBER.fullmatch, words)):
        wrong = next(word for word in words if not NUMBER.fullmatch(word))
        raise RleError(f"expected whole positive numbers, got {wrong[:40]!r}")
    numbers = np.array(words, dtype=np.int64)
    if numbers.size and numbers.min() < 1:
        raise RleError(f"expected starts (1-based) and lengths of at least 1, got {numbers.min()}")
    order = np.argsort(numbers[0::2], kind="stable")
    starts, lengths = numbers[0::2][order] - 1, numbers[1::2][order]
    ends = starts + lengths
    overlapping = np.flatnonzero(ends[:-1] > starts[1:])
    if overlapping.size:
        first = overlapping[0]
        raise RleError(f"the runs at {starts[first] + 1} and {starts[first + 1] + 1} overlap")
    if ends.size and ends[-1] > num_pixels:
        raise RleError(f"a run ends at pixel {ends[-1]}, past the image's {num_pixels} pixels")
    return starts, lengths


def decode(rle: str, height: int, width: int) -> np.ndarray:
    """Turn an encoding into a mask.

    Args:
        rle: Pairs `start length ...`, 1-based, row-major; empty for an empty mask.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Mask, bool, shape `(height, width)`.

    Raises:
        RleError: As `parse_runs`.

    Source: the competition's CSV. Its text says column-major; the masks fit the images only row-major.

    Example:
        >>> decode("2 3", height=2, width=3).astype(int)
        array([[0, 1, 1],
               [1, 0, 0]])
    """
    starts, lengths = parse_runs(rle, height * width)
    steps = np.zeros(height * width + 1, dtype=np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool).reshape(height, width)


def encode(mask: np.ndarray) -> str:
    """Turn a mask into its encoding, the shortest with ascending starts.

    Args:
        mask: Mask, any dtype, shape `(height, width)`; nonzero is inside.

    Returns:
        Pairs `start length ...`, 1-based, row-major; empty for an empty mask.

    Example:
        >>> encode(np.array([[0, 1, 1], [1, 0, 0]]))
        '2 3'
    """
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of shape (height, width), got shape {mask.shape}")
    inside = np.zeros(mask.size + 2, dtype=np.int8)
    inside[1:-1] = mask.reshape(-1) != 0
    edges = np.flatnonzero(np.diff(inside))
    starts, ends = edges[0::2], edges[1::2]
    return " ".join(map(str, np.stack([starts + 1, ends - starts], axis=1).reshape(-1).tolist()))


def organ_masks(segmentation: dict[str, str], height: int, width: int) -> np.ndarray:
    """The exact masks of a slice, overlaps kept: bool, shape `(organs, height, width)`."""
    return np.stack([decode(segmentation[organ], height, width) for organ in ORGANS])
