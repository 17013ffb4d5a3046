"""Run-length encoding (RLE) of masks, as in the competition's CSV.

An encoding is a text of pairs `start length start length ...`. Each pair is a run of pixels inside the mask. Pixels
are counted from 1, along the first row, then along the second row, and so on (row-major). In an image of 2 rows and 3
columns, the pixels have these numbers:

    1 2 3
    4 5 6

Here "2 3" is the run of pixels 2, 3 and 4. It continues from the end of the first row to the start of the second.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gi_segmentation.errors import InputError

# Python's `int` also accepts "1_0", "+3" and digits of other scripts, but in a CSV these are damage. 18 digits are
# more than any image needs, and the sum of two such numbers fits into 64 bits.
NUMBER = re.compile(r"[0-9]{1,18}")
NUMBERS = re.compile(rf"(?:{NUMBER.pattern}(?: |\Z))*")

# The runs of a mask: starts, counted from 0 and ascending, and lengths. Both are int64, with one element per run.
Runs = tuple[np.ndarray, np.ndarray]


class RleError(InputError):
    """An encoding that is not a mask of its image."""


def parse_runs(rle: str, num_pixels: int) -> Runs:
    """Read and check the runs of an encoding.

    Args:
        rle: The encoding; empty for an empty mask.
        num_pixels: Number of pixels of the image, height times width.

    Returns:
        Starts (counted from 0, ascending) and lengths, int64, one element per run.

    Raises:
        RleError: If a number is not a positive whole number or has no partner, if runs overlap, or if a run ends past
            the image.

    Example:
        >>> starts, lengths = parse_runs("3 2 7 1", num_pixels=9)
        >>> starts.tolist(), lengths.tolist()
        ([2, 6], [2, 1])
    """
    words = rle.split()
    # What other programs write for an empty mask, such as "nan" and "-1". It is not guessed what they mean.
    if len(words) == 1 and (words[0] == "0" or not NUMBER.fullmatch(words[0])):
        raise RleError(
            f"expected pairs of start and length with spaces between, or nothing for an empty mask, got "
            f"{words[0][:40]!r}"
        )
    # One match for the whole text takes a fifth of the time of a match for each word.
    text = " ".join(words)
    if not NUMBERS.fullmatch(text):
        wrong = next(word for word in words if not NUMBER.fullmatch(word))
        size = " of at most 18 digits" if wrong.isascii() and wrong.isdecimal() else ""
        raise RleError(f"expected whole positive numbers{size}, got {wrong[:40]!r}")
    if len(words) % 2:
        raise RleError(f"expected pairs of start and length, got an odd count of {len(words)} numbers")
    numbers = np.fromstring(text, dtype=np.int64, sep=" ")
    if numbers.size and numbers.min() < 1:
        raise RleError(f"expected starts (1-based) and lengths of at least 1, got {numbers.min()}")
    # Runs in any order describe the same mask. The checks below need them in ascending order.
    order = np.argsort(numbers[0::2], kind="stable")
    starts, lengths = numbers[0::2][order] - 1, numbers[1::2][order]
    ends = starts + lengths
    # The end is the first pixel after a run, counted from 0. A run may start there, but not before.
    overlapping = np.flatnonzero(ends[:-1] > starts[1:])
    if overlapping.size:
        first = overlapping[0]
        raise RleError(f"the runs at {starts[first] + 1} and {starts[first + 1] + 1} overlap")
    # As runs do not overlap, the last one has the greatest end.
    if ends.size and ends[-1] > num_pixels:
        raise RleError(f"a run ends at pixel {ends[-1]}, past the image's {num_pixels} pixels")
    return starts, lengths


def decode(rle: str, height: int, width: int) -> np.ndarray:
    """Turn an encoding into a mask.

    Args:
        rle: The encoding; empty for an empty mask.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Mask, bool, shape `(height, width)`.

    Raises:
        RleError: As `parse_runs`.

    Source: the competition's CSV. The text of the competition says that pixels are counted along the columns. But the
    masks fit the images only if pixels are counted along the rows.

    Example:
        >>> decode("2 3", height=2, width=3).astype(int)
        array([[0, 1, 1],
               [1, 0, 0]])
    """
    return fill_runs(parse_runs(rle, height * width), height * width).reshape(height, width)


def fill_runs(runs: Runs, num_pixels: int) -> np.ndarray:
    """Turn the runs of an image with `num_pixels` pixels into a mask, bool, shape `(num_pixels,)`.

    Example:
        >>> fill_runs((np.array([1]), np.array([2])), num_pixels=4)
        array([False,  True,  True, False])
    """
    # Gaps and runs take turns: the gap before the first run, the first run, the gap after it, and so on. The last gap
    # ends with the image. A gap may have no pixel.
    starts, lengths = runs
    borders = np.zeros(2 * starts.size + 2, dtype=np.int64)
    borders[1:-1:2], borders[2:-1:2], borders[-1] = starts, starts + lengths, num_pixels
    inside = np.arange(borders.size - 1) % 2 == 1
    return np.repeat(inside, borders[1:] - borders[:-1])


def count_overlap(masks: Sequence[Runs]) -> int:
    """Count the pixels that are in more than one of the masks of an image.

    Example:
        >>> count_overlap([parse_runs("1 4", 9), parse_runs("3 3 8 1", 9)])
        2
    """
    # Between two neighbouring edges of runs, all pixels are in equally many masks: one more from the start of a run,
    # and one less from its end.
    starts = np.concatenate([starts for starts, _ in masks])
    edges = np.concatenate([starts, *(starts + lengths for starts, lengths in masks)])
    order = np.argsort(edges)
    steps = np.where(order < starts.size, 1, -1)
    depth = np.cumsum(steps)
    return int(np.diff(edges[order])[depth[:-1] > 1].sum())


def encode(mask: np.ndarray) -> str:
    """Turn a mask into its encoding, with ascending starts and as few runs as possible.

    Args:
        mask: Mask, any dtype, shape `(height, width)`; pixels that are not 0 are inside.

    Returns:
        The encoding; empty for an empty mask.

    Example:
        >>> encode(np.array([[0, 1, 1], [1, 0, 0]]))
        '2 3'
    """
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of shape (height, width), got shape {mask.shape}")
    # One pixel of background before and after the image, so that every run has a start and an end.
    inside = np.zeros(mask.size + 2, dtype=np.int8)
    inside[1:-1] = mask.reshape(-1) != 0
    # A difference that is not 0 is an edge. Edges are a start and an end in turn.
    edges = np.flatnonzero(np.diff(inside))
    starts, ends = edges[0::2], edges[1::2]
    return " ".join(map(str, np.stack([starts + 1, ends - starts], axis=1).reshape(-1).tolist()))


def organ_masks(segmentation: Mapping[str, str | None], height: int, width: int) -> np.ndarray:
    """Decode the masks of a slice, which may overlap.

    Args:
        segmentation: The encoding of each organ, in the order of the dataset. The mask of an unknown organ (None) is
            empty.
        height: Height of the slice in pixels.
        width: Width of the slice in pixels.

    Returns:
        bool, shape `(organs, height, width)`.
    """
    return np.stack([decode(rle or "", height, width) for rle in segmentation.values()])


def find_unknown(encodings: Iterable[Mapping[str, str | None]]) -> set[str]:
    """Return the organs that are not known in a scan: one of its slices has no encoding, not even an empty one.

    Args:
        encodings: The encodings of the organs on each slice of the scan.

    Example:
        >>> find_unknown([{"liver": "1 3", "spleen": ""}, {"liver": None, "spleen": ""}])
        {'liver'}
    """
    return {organ for organs in encodings for organ, rle in organs.items() if rle is None}
