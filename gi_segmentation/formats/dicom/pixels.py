"""Read the pixels of a DICOM series as real values."""

from itertools import groupby
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.dicom.files import DicomSeries, Frame, read_dataset


def read_dicom_voxels(series: DicomSeries) -> np.ndarray:
    """Read the pixels of a series: float32, shape `(columns, rows, slices)`.

    The values are those after the modality LUT or the rescale slope and intercept of each slice. Pixels that a scanner
    has filled up (padding) count as air: they get the lowest of all other values.

    Raises:
        InputError: If the pixels of a file cannot be decoded, or if all are padding.
    """
    rows, columns = series.frames[0].size
    voxels = np.empty((len(series.frames), rows, columns), dtype=np.float32)
    filled = np.zeros(voxels.shape, dtype=bool)
    # Sorted by file, because a file with many frames is decoded as a whole, and should be decoded once.
    placed = sorted(enumerate(series.frames), key=lambda place: (place[1].path, place[1].number))
    for path, group in groupby(placed, key=lambda place: place[1].path):
        with reading(path, "its pixels cannot be decoded", "export it uncompressed"):
            dataset = read_dataset(path)
            pixels = dataset.pixel_array.reshape(-1, rows, columns)
            for index, frame in group:
                stored = pixels[max(frame.number, 1) - 1]
                voxels[index] = rescale(stored, frame, dataset)
                filled[index] = find_padding(stored, dataset)
    if filled.all():
        raise InputError(f"{series.frames[0].path.parent}: all pixels of this series are padding; export it again")
    if filled.any():
        voxels[filled] = voxels[~filled].min()
    return voxels.transpose(2, 1, 0)


def find_padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Return which pixels are no part of the image, because the scanner has filled them up: bool, the same shape.

    Args:
        stored: The values as they are stored.
        dataset: The header of the file.

    Source: DICOM PS3.3, C.7.5.1.1.2, https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.5.html
    """
    values = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if values[0] is None:
        return np.zeros(stored.shape, dtype=bool)
    # Without the type of its values, a file does not say whether this one is signed.
    values = [int.from_bytes(value[:2], "little") if isinstance(value, bytes) else value for value in values]
    unused = stored.itemsize * 8 - int(dataset.get("BitsStored", stored.itemsize * 8))
    # Some programs write a negative value as the positive one with the same bits, or the other way round. The bits
    # that a pixel does not use have been removed from the pixels, so they are removed here.
    numbers = [np.int64(int(value)).astype(stored.dtype) for value in values if value is not None]
    found = [int(number << unused >> unused) for number in numbers]
    return (stored >= min(found)) & (stored <= max(found))


def rescale(pixels: np.ndarray, frame: Frame, dataset: Any) -> np.ndarray:
    """Return the values of a frame after its modality LUT, or its slope and intercept.

    Args:
        pixels: Its stored values.
        frame: The frame.
        dataset: The header of its file.
    """
    if frame.number == 0:
        return apply_scale(pixels, dataset)
    own = dataset.PerFrameFunctionalGroupsSequence[frame.number - 1]
    for group in (own, *(dataset.get("SharedFunctionalGroupsSequence") or ())):
        for transformation in group.get("PixelValueTransformationSequence") or ():
            return apply_scale(pixels, transformation)
    return pixels


def apply_scale(pixels: np.ndarray, item: Any) -> np.ndarray:
    """Return stored values after the modality LUT of an item, or its slope and intercept.

    The library passes over a slope without an intercept, and stumbles over an empty one.
    """
    from pydicom.pixels import apply_modality_lut

    if item.get("ModalityLUTSequence"):
        return apply_modality_lut(pixels, item)
    slope, intercept = item.get("RescaleSlope"), item.get("RescaleIntercept")
    if slope in (None, "") and intercept in (None, ""):
        return pixels
    scaled: np.ndarray = pixels * float(1 if slope in (None, "") else slope)
    return scaled + float(0 if intercept in (None, "") else intercept)
