"""Fill closed contours on a slice: a pixel is inside if its centre is.

The rule is even-odd: a centre is inside if a ray from it crosses the contours of its slice an odd number of times. So
a contour in another one is a hole, and one in the hole is an island. A keyhole works as well: the channel between the
border and the hole has no width, and a ray crosses its two sides at once.

A centre that lies on a contour counts as inside. Programs that trace contours through the centres of the outermost
pixels (OpenCV, and with it rt-utils and TotalSegmentator) rely on it: their contours give exactly their masks back.

Other libraries do not follow this rule. `cv2.fillPoly`, which dicomrttool uses, rounds each point of a contour to the
centre of a pixel, and counts all pixels that the line touches: its organs are half a pixel larger on each side.
"""

from collections.abc import Sequence

import numpy as np

# A point this near to a centre, in pixels, is on it. Planning systems write places with two decimals of a millimetre.
ON_CENTRE = 0.01
# The same for the place where a line crosses a row, which is computed with the errors of floating point.
ROUNDING = 1e-6


def fill_contours(contours: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill the contours of a slice.

    Args:
        contours: Column and row of the points of each, float64, shape `(points, 2)`. The centre of the first pixel is
            (0, 0). The last point is joined to the first one. Contours may lie outside of the slice.
        shape: Rows and columns of the slice.

    Returns:
        bool, shape `(rows, columns)`.

    Example:
        >>> triangle = np.array([[-0.5, -0.5], [2.9, -0.5], [-0.5, 2.9]])
        >>> fill_contours([triangle], (3, 3)).astype(int).tolist()
        [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    """
    starts, ends = join_edges(contours)
    rows, columns = shape
    flat = starts[:, 1] == ends[:, 1]
    edge, row = list_whole_numbers(starts[~flat, 1], ends[~flat, 1], rows)
    (start_x, start_y), (end_x, end_y) = starts[~flat][edge].T, ends[~flat][edge].T
    crossing = start_x + (row - start_y) * (end_x - start_x) / (end_y - start_y)
    nearest = np.rint(crossing)
    on_centre = np.abs(crossing - nearest) < ROUNDING
    # A ray from the left changes sides at the first centre that is not left of the crossing. An edge has its lower
    # end and not its upper one, so that a ray through a corner crosses one of the two edges there.
    counted = row < end_y
    first = np.where(on_centre, nearest, np.ceil(crossing)).clip(0, columns)
    places = row[counted] * (columns + 1) + first[counted].astype(np.int64)
    crossings = np.bincount(places, minlength=rows * (columns + 1)).reshape(rows, columns + 1)
    mask: np.ndarray = np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
    # Centres on a contour: on an edge along a row, and on all others.
    edge, column = list_whole_numbers(starts[flat, 0], ends[flat, 0], columns)
    row_of_flat = starts[flat, 1][edge]
    on_row = (row_of_flat == np.rint(row_of_flat)) & (row_of_flat >= 0) & (row_of_flat < rows)
    mask[row_of_flat[on_row].astype(np.int64), column[on_row]] = True
    on_centre &= (nearest >= 0) & (nearest < columns)
    mask[row[on_centre], nearest[on_centre].astype(np.int64)] = True
    return mask


def join_edges(contours: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper end of each edge, column and row: two arrays, shape `(edges, 2)`.

    Each edge runs to larger rows, and along a row to larger columns. So the two sides of a channel, which run against
    each other, cross a row at exactly the same number.
    """
    points = np.concatenate(contours)
    following = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours])
    points, following = (
        np.where(np.abs(some - np.rint(some)) < ON_CENTRE, np.rint(some), some) for some in (points, following)
    )
    same_row = points[:, 1] == following[:, 1]
    swapped = np.where(same_row, points[:, 0] > following[:, 0], points[:, 1] > following[:, 1])[:, None]
    return np.where(swapped, following, points), np.where(swapped, points, following)


def list_whole_numbers(first: np.ndarray, last: np.ndarray, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """List the whole numbers between pairs of numbers, those included, from 0 to below `stop`.

    Returns:
        The index of the pair, and the number: int64, one shape.

    Example:
        >>> [found.tolist() for found in list_whole_numbers(np.array([0.5, -3.0]), np.array([2.0, 0.0]), 9)]
        [[0, 0, 1], [1, 2, 0]]
    """
    low = np.ceil(first).clip(0, stop).astype(np.int64)
    high = np.floor(last).clip(-1, stop - 1).astype(np.int64)
    counts = (high - low + 1).clip(0)
    pair = np.repeat(np.arange(len(counts)), counts)
    # The place of each number in its own pair.
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return pair, low[pair] + place
