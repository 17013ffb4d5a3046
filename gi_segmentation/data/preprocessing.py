"""Prepare a slice for a model: intensity, size, neighbours, organ bits.

A raw slice x of 16 bits becomes a model input in four steps:

    scale        x / (x + mean of x)                  float32, 0 to 1
    resize       bilinear, to (image_size, image_size)
    round        to whole multiples of 1 / 65535      uint16
    normalise    (x - mean) / standard deviation      mean and deviation per channel, from the image processor

The first three steps prepare a slice. Their result depends on the slice alone, so a training keeps it in a cache
(`data.prepared`). The augmentation comes before the last step, and its result is rounded too. The last step is done
for whole batches, on the device of the model, so that only one channel of 16 bits is copied to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from gi_segmentation.data.intensity import scale_intensity, to_pixels
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import SLICE_THICKNESS_MM

T = TypeVar("T")


def find_channels(
    scan: Mapping[int, T], number: int, slice_context: int, thickness_mm: float = SLICE_THICKNESS_MM
) -> list[T]:
    """Find the slices that the channels of a model's input show: a slice alone, or between its two neighbours.

    The neighbours are as far away as in the training, where slices are 3 mm apart. Elsewhere, as many slices are
    passed over as make this distance. At the end of a scan, or at a gap, the farthest slice within that distance is
    used. This can be the slice itself.

    Args:
        scan: The slices of a scan, in any form, by their numbers.
        number: One of the numbers.
        slice_context: Distance to the neighbours, in slices of the training; 0: the slice is shown alone.
        thickness_mm: Distance between the slices of the scan.

    Returns:
        The slice; or the slice before it, the slice and the slice after it.

    Example:
        >>> find_channels({1: "a", 2: "b", 3: "c", 6: "f"}, number=2, slice_context=2)
        ['a', 'b', 'c']
        >>> find_channels({n: n for n in range(1, 10)}, number=5, slice_context=1, thickness_mm=1.0)
        [2, 5, 8]
    """
    if not slice_context:
        return [scan[number]]
    farthest = max(1, round(slice_context * SLICE_THICKNESS_MM / thickness_mm))
    # From far to near. The distance 0 is the slice itself, so both searches find something.
    distances = range(farthest, -1, -1)
    before = next(number - distance for distance in distances if number - distance in scan)
    after = next(number + distance for distance in distances if number + distance in scan)
    return [scan[before], scan[number], scan[after]]


def stack_channels(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stack one or three images, shape `(S, S)`, to the channels of an input, shape `(S, S, 1 or 3)`."""
    # `merge` does what `numpy.stack` does on the last axis, four times as fast.
    return cv2.merge(images) if len(images) > 1 else images[0][..., None]


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a scaled slice to a square by bilinear interpolation.

    Args:
        image: float32, shape `(height, width)`.
        image_size: Height and width of the result.

    Returns:
        float32, shape `(image_size, image_size)`.
    """
    # With antialiasing, a smaller image averages all pixels that it covers. Without it, most of them would be skipped.
    # The code on the model card resizes in the same way, so that its masks are those of this project.
    tensor = torch.from_numpy(image)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="bilinear", antialias=True)[0, 0].numpy()


def prepare_image(raw: np.ndarray, image_size: int) -> np.ndarray:
    """Scale, resize and round a raw slice.

    Args:
        raw: Raw intensities, shape `(height, width)`.
        image_size: Height and width of the result.

    Returns:
        uint16, shape `(image_size, image_size)`; `MAX_PIXEL` stands for an intensity of 1.
    """
    return to_pixels(resize_image(scale_intensity(raw), image_size))


def pack_organs(masks: np.ndarray) -> np.ndarray:
    """Pack the masks of a slice into one number per pixel. Organ k is bit k.

    A byte holds eight organs. With more organs, a pixel has up to four bytes, like the channels of a picture. So
    OpenCV can turn and stretch the bits of any number of organs.

    Args:
        masks: bool, shape `(organs, height, width)`.

    Returns:
        Organ bits, uint8, shape `(height, width)`; with more than 8 organs `(height, width, bytes)`.

    Example:
        >>> pack_organs(np.array([[[True, False]], [[False, False]], [[True, True]]]))
        array([[5, 4]], dtype=uint8)
        >>> pack_organs(np.ones((9, 1, 1), dtype=bool))
        array([[[255,   1]]], dtype=uint8)
    """
    bits = np.packbits(masks, axis=0, bitorder="little")
    return bits[0] if len(bits) == 1 else cv2.merge(list(bits))


def bits_shape(organs: int, image_size: int) -> tuple[int, ...]:
    """Return the shape of the organ bits of a square slice, see `pack_organs`.

    Example:
        >>> bits_shape(8, 288), bits_shape(9, 288)
        ((288, 288), (288, 288, 2))
    """
    square, num_bytes = (image_size, image_size), -(-organs // 8)
    return square if num_bytes == 1 else (*square, num_bytes)


def resize_organs(bits: np.ndarray, image_size: int) -> np.ndarray:
    """Resize organ bits to a square. Each pixel takes the bits of the nearest pixel.

    Args:
        bits: uint8, shape `(height, width)` or `(height, width, bytes)`.
        image_size: Height and width of the result.

    Returns:
        uint8, shape `(image_size, image_size)` or `(image_size, image_size, bytes)`.
    """
    # `nearest-exact` compares the centres of pixels, as `resize_image` does. PyTorch's older mode `nearest` compares
    # their corners, and would shift the labels against the image by up to half a pixel.
    planes = torch.from_numpy(np.atleast_3d(bits)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(image_size, image_size), mode="nearest-exact")[0].numpy()
    return resized[0] if bits.ndim == 2 else cv2.merge(list(resized))


def prepare_organs(row: dict[str, Any], image_size: int) -> np.ndarray:
    """Decode the annotations of a row, and resize them: organ bits as in `resize_organs`."""
    return resize_organs(pack_organs(organ_masks(row["segmentation"], row["height"], row["width"])), image_size)
