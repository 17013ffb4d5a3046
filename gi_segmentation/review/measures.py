"""Measure a scan and the masks of its organs.

All arrays are in the orientation of the training, see `formats.volumes`: slices from head to feet, rows from front
to back, columns from the patient's right to the left. The same numbers are taken from a scan that was predicted and
from the scans of the training, so that `review.triage` can compare them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gi_segmentation.postprocessing.components import CUBIC_MM_PER_ML, find_components

# Intensities are taken from at most this number of slices of a scan. More of them hardly change a percentile.
INTENSITY_SLICES = 36
# The percentiles of the scaled intensities that are compared. The ends say how much air and how much fat there is.
PERCENTILES = (5, 25, 50, 75, 95)
# The outermost tenth of a slice on each side, as a share of its height and width. On MR, most of it is air.
BORDER_SHARE = 0.1


@dataclass(frozen=True)
class OrganMeasures:
    """What is measured of the mask of one organ. A number that an empty mask does not have is NaN.

    Attributes:
        volume_ml: Volume in millilitres.
        extent_mm: Size of the box around the mask along slices, rows and columns.
        first_slice: Number of the first slice that shows the organ; 0 for an empty mask.
        last_slice: Number of the last one.
        slices: How many slices show the organ.
        pieces: Number of connected components.
        largest_share: Share of the volume that the largest component has, 0 to 1.
        end_share: Area on the first or on the last slice of the scan, the larger one, as a share of the largest area
            on any slice. Above 0, the scan ends within the organ.
        edge_share: Share of the mask that lies on the outermost pixels of the slices.
        back_mm: How far the middle of the organ lies behind the middle of the body.
        left_mm: How far it lies to the patient's left of the middle of the body.
        lower_mm: How far it lies below the middle of all organs.
        confidence: Mean probability of the organ over the voxels of its mask; NaN if no probabilities are known.
    """

    volume_ml: float
    extent_mm: tuple[float, float, float]
    first_slice: int
    last_slice: int
    slices: int
    pieces: int
    largest_share: float
    end_share: float
    edge_share: float
    back_mm: float
    left_mm: float
    lower_mm: float
    confidence: float


@dataclass(frozen=True)
class ScanMeasures:
    """What is measured of a scan.

    Attributes:
        shape: Number of slices, rows and columns. Slices that are missing between the first and the last count too.
        missing_slices: How many slices are missing.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        intensities: Numbers of the scaled intensities, see `measure_intensities`.
        organs: The measures by the name of the organ, in the order of the label set.
    """

    shape: tuple[int, int, int]
    missing_slices: int
    spacing_mm: tuple[float, float, float]
    intensities: Mapping[str, float]
    organs: Mapping[str, OrganMeasures]

    @property
    def field_mm(self) -> tuple[float, float, float]:
        """Length of the scan, and height and width of its slices, in millimetres."""
        length, height, width = (n * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))
        return length, height, width


def pick_intensity_slices(number: int) -> list[int]:
    """Choose the slices whose intensities are measured, evenly from the first to the last.

    Args:
        number: How many slices there are.

    Returns:
        Their positions.

    Example:
        >>> pick_intensity_slices(3), len(pick_intensity_slices(144))
        ([0, 1, 2], 36)
    """
    return np.unique(np.linspace(0, number - 1, min(number, INTENSITY_SLICES)).round().astype(int)).tolist()


def measure_intensities(scaled: np.ndarray) -> dict[str, float]:
    """Measure the intensities of a scan.

    Args:
        scaled: Slices from `scale_intensity`, float, shape `(slices, H, W)`.

    Returns:
        Percentiles of all pixels; `border`, the mean over the outermost tenth of the slices; and `roughness`, the mean
        difference of neighbouring pixels of a row, which is large if there is noise.

    Example:
        >>> measure_intensities(np.full((1, 10, 10), 0.5))["p50"]
        0.5
    """
    height, width = scaled.shape[1:]
    inner = np.zeros((height, width), dtype=bool)
    top, left = math.ceil(height * BORDER_SHARE), math.ceil(width * BORDER_SHARE)
    inner[top : height - top, left : width - left] = True
    # Every second row and column has the same percentiles, and takes a quarter of the time.
    values = np.percentile(scaled[:, ::2, ::2], PERCENTILES)
    return {
        **{f"p{percentile}": float(value) for percentile, value in zip(PERCENTILES, values, strict=True)},
        "border": float(scaled[:, ~inner].mean()),
        "roughness": float(np.abs(np.diff(scaled, axis=2)).mean()) if width > 1 else 0.0,
    }


def find_body_middle(scaled: np.ndarray) -> tuple[float, float]:
    """Return the row and the column of the middle of the body: the centre of mass of the intensities.

    Args:
        scaled: Slices from `scale_intensity`, float, shape `(slices, H, W)`.

    Example:
        >>> find_body_middle(np.array([[[0.0, 0.0, 0.5], [0.0, 0.0, 0.5]]]))
        (0.5, 2.0)
    """
    image = scaled.mean(axis=0, dtype=np.float64)
    # A constant scan that is black has no centre of mass. The middle of the slice is as good as any other place.
    image = image if image.sum() > 0 else np.ones_like(image)
    rows, columns = image.sum(axis=1), image.sum(axis=0)
    return (
        float(rows @ np.arange(len(rows)) / rows.sum()),
        float(columns @ np.arange(len(columns)) / columns.sum()),
    )


def measure_scan(
    masks: np.ndarray,
    scaled: np.ndarray,
    spacing_mm: tuple[float, float, float],
    numbers: Sequence[int],
    organs: Sequence[str],
    probabilities: np.ndarray | None = None,
) -> ScanMeasures:
    """Measure a scan.

    Args:
        masks: bool, shape `(organs, D, H, W)`.
        scaled: Slices from `scale_intensity`, float, shape `(slices, H, W)`. These need not be all slices of the scan.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`.
        organs: The names of the organs.
        probabilities: Probability of each organ, float, shape of the masks; None for outlines drawn by hand.

    Example:
        >>> masks = np.zeros((1, 2, 10, 10), dtype=bool)
        >>> masks[0, 1, 4:6, 4:8] = True
        >>> measured = measure_scan(masks, np.full((2, 10, 10), 0.5), (2.5, 10.0, 20.0), [1, 2], ["stomach"])
        >>> stomach = measured.organs["stomach"]
        >>> stomach.volume_ml, stomach.extent_mm, stomach.first_slice, stomach.end_share, stomach.left_mm
        (4.0, (2.5, 20.0, 80.0), 2, 1.0, 20.0)
    """
    places = np.asarray(numbers)
    depth = int(places[-1] - places[0]) + 1
    slice_middle, _, _ = voxel_middle(np.logical_or.reduce(masks), places)
    middle = (slice_middle, *find_body_middle(scaled))
    measured = {}
    for index, (organ, mask) in enumerate(zip(organs, masks, strict=True)):
        probability = None if probabilities is None else probabilities[index]
        measured[organ] = measure_organ(mask, probability, spacing_mm, places, middle)
    shape = (depth, masks.shape[2], masks.shape[3])
    return ScanMeasures(shape, depth - len(places), spacing_mm, measure_intensities(scaled), measured)


def voxel_middle(mask: np.ndarray, places: np.ndarray) -> tuple[float, float, float]:
    """Return the mean slice number, row and column of the voxels of a mask; NaN if it is empty."""
    if not mask.any():
        return math.nan, math.nan, math.nan
    counts = mask.sum(axis=(1, 2)), mask.sum(axis=(0, 2)), mask.sum(axis=(0, 1))
    axes = places, np.arange(mask.shape[1]), np.arange(mask.shape[2])
    slices, rows, columns = (float(axis @ count / count.sum()) for axis, count in zip(axes, counts, strict=True))
    return slices, rows, columns


def measure_organ(
    mask: np.ndarray,
    probability: np.ndarray | None,
    spacing_mm: tuple[float, float, float],
    places: np.ndarray,
    middle: tuple[float, float, float],
) -> OrganMeasures:
    """Measure the mask of one organ; `middle` has the slice, row and column of the middle, else as `measure_scan`."""
    if not mask.any():
        nan = math.nan
        return OrganMeasures(0.0, (0.0, 0.0, 0.0), 0, 0, 0, 0, nan, nan, nan, nan, nan, nan, nan)
    areas = mask.sum(axis=(1, 2))
    shown, rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    first, last = int(places[shown[0]]), int(places[shown[-1]])
    lengths = (last - first + 1, rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    lower, back, left = (
        (place - centre) * mm for place, centre, mm in zip(voxel_middle(mask, places), middle, spacing_mm, strict=True)
    )
    volumes_ml = find_components(mask, mask.astype(np.float32), spacing_mm, places.tolist()).volumes_ml
    outline = np.ones(mask.shape[1:], dtype=bool)
    outline[1:-1, 1:-1] = False
    extent = tuple(float(length * mm) for length, mm in zip(lengths, spacing_mm, strict=True))
    return OrganMeasures(
        volume_ml=float(areas.sum() * np.prod(spacing_mm) / CUBIC_MM_PER_ML),
        extent_mm=(extent[0], extent[1], extent[2]),
        first_slice=first,
        last_slice=last,
        slices=len(shown),
        pieces=len(volumes_ml),
        largest_share=float(volumes_ml.max() / volumes_ml.sum()),
        end_share=float(max(areas[0], areas[-1]) / areas.max()),
        edge_share=float(mask[:, outline].sum() / areas.sum()),
        back_mm=back,
        left_mm=left,
        lower_mm=lower,
        # Half precision would overflow in a sum, so the mean is taken in double precision.
        confidence=math.nan if probability is None else float(probability[mask].mean(dtype=np.float64)),
    )
