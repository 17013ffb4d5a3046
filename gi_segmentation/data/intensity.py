"""The scale of intensities, in NumPy alone: from a raw slice to numbers of 0 to 1, and to 16 bits and back."""

import numpy as np

# The value of a prepared pixel with the intensity 1.
MAX_PIXEL = 65535


def scale_intensity(image: np.ndarray) -> np.ndarray:
    """Scale a raw slice x to 0 to 1 by its own mean, as x / (x + mean), so that nothing is clipped.

    MR intensities have no unit, and each scan has its own range. The maximum is not a good scale: one bright arm or
    coil raises it, and the organs become dark. The mean hardly changes with such a spot. A pixel as bright as the mean
    gets the value 0.5, and brighter pixels approach 1.

    Args:
        image: Raw intensities, shape `(height, width)`.

    Returns:
        float32, same shape, at least 0 and below 1. A black slice is 0 everywhere.

    Example:
        >>> scale_intensity(np.array([[0, 500, 1500, 0]], dtype=np.uint16))
        array([[0.  , 0.5 , 0.75, 0.  ]], dtype=float32)
    """
    # A mean of at least 1 prevents 0 / 0 in a black slice. In all other slices the mean is far above 1, and then a
    # factor on all pixels changes nothing. So a training on converted slices (`formats.volumes.to_whole_intensities`)
    # and a prediction of the file from which they come (`to_intensities`) see the same: both take the same air off,
    # and differ by a factor and by the rounding to 16 bits only.
    scaled = image.astype(np.float32)
    return scaled / (scaled + np.float32(max(image.mean(), 1)))


def to_pixels(intensity: np.ndarray) -> np.ndarray:
    """Round intensities, float32 in 0 to 1, to prepared pixels: uint16, same shape."""
    # 16 bits need half the memory of float32. The rounding changes an intensity by less than 0.00001.
    pixels = intensity * np.float32(MAX_PIXEL)
    return np.rint(pixels, out=pixels).astype(np.uint16)


def to_intensity(pixels: np.ndarray) -> np.ndarray:
    """Turn prepared pixels, uint16, into intensities: float32 in 0 to 1, same shape."""
    return np.multiply(pixels, np.float32(1 / MAX_PIXEL), dtype=np.float32)
