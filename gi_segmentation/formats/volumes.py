"""A volume of any file format, its grid in the patient, and its slices as the model was trained on them.

All coordinates are millimetres along the patient's axes, as NIfTI has them: x grows to the
patient's right (R), y to the front (A, anterior) and z to the head (S, superior). DICOM counts x and y the other
way round.

The slices of Kaggle are axial. The slice numbers grow from head to feet, the rows from front to back, and the columns
from the patient's right to the left. The real slices of our test data show it: the liver is at the left of the image,
and the spine at the bottom. In all 22 annotated real scans, the stomach is right of the middle and comes before
the small bowel. A volume is brought to this orientation by swapping and flipping axes. No voxel is interpolated, so a
mask goes back to the volume's own grid without a loss.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.images import decode_image, read_file
from gi_segmentation.formats.kaggle.names import SliceFile
from gi_segmentation.schema import FieldOfView

# The patient axis (0: x, 1: y, 2: z) of slices, rows and columns in the training. All three run against it.
TRAINING_AXES = (2, 1, 0)
# The field of view of the four kinds of scans in Kaggle's data (from 234 x 234 to 360 x 310 pixels of 1.5 mm). The
# model sees each slice as a square of the same number of pixels. So the field of view decides how large an organ
# looks, and the size of a pixel does not matter.
FIELD_MM: FieldOfView = ((351.0, 465.0), (351.0, 540.0))
# Organs differ more than this in size, so a field that is so much larger or smaller is left as it is.
FIELD_TOLERANCE = 1.1
# Below this maximum, intensities are fractions. `scale_intensity` expects whole numbers of 8 to 16 bits.
FRACTIONS_BELOW = 256
MAX_INTENSITY = 65535
# A whole body at 1 mm has a quarter of it. A damaged or malicious header may promise more than the memory holds.
MAX_VOXELS = 2**30


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan as it lies on the disk. No voxel has been read.

    Attributes:
        name: Name of the scan, and of the files that are written for it.
        path: The file or folder that it comes from.
        shape: Number of voxels along its own axes (i, j, k). Those of a DICOM series are column, row and slice.
        affine: Turns the index (i, j, k, 1) of a voxel into its place (x, y, z, 1): float64, shape `(4, 4)`.
        read: Reads the intensities, float32, with the shape `shape`; None for slices of Kaggle's, which are
            read one by one.
        origin: What a writer needs to know of the source: the header of a NIfTI file, or a `DicomSeries`.
        note: A remark for the user.
        field_mm: The field of view of the slices that the model was trained on.

    Raises:
        InputError: If the affine is not that of a grid, or if the volume is too large.
    """

    name: str
    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray = field(repr=False)
    read: Callable[[], np.ndarray] | None = field(default=None, repr=False)
    origin: Any = field(default=None, repr=False)
    note: str = ""
    field_mm: FieldOfView = FIELD_MM

    def __post_init__(self) -> None:
        if not np.isfinite(self.affine).all() or abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise InputError(f"{self.path}: its affine is not that of a grid in space; convert it again")
        # `math.prod` counts with whole numbers of any size; a product of NumPy would overflow.
        if math.prod(self.shape) > MAX_VOXELS:
            shape = " x ".join(map(str, self.shape))
            raise InputError(
                f"{self.path}: expected at most {MAX_VOXELS} voxels, got {shape}; crop it, or copy it again"
            )

    @cached_property
    def directions(self) -> np.ndarray:
        """The unit vectors of the axes i, j and k, one per column: shape `(3, 3)`."""
        return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Which of the axes i, j and k are the slices, the rows and the columns of the training."""
        # Of all ways to name the axes, the one in which they point best along the patient's axes.
        return max(
            permutations(range(3)),
            key=lambda order: sum(abs(self.directions[TRAINING_AXES, order])),
        )

    @cached_property
    def flipped(self) -> tuple[int, ...]:
        """The axes (0: slices, 1: rows, 2: columns) that run against those of the training."""
        return tuple(int(axis) for axis in np.flatnonzero(self.directions[TRAINING_AXES, self.order] > 0))

    @cached_property
    def tilt_degrees(self) -> float:
        """The largest angle between an axis and the patient's axis that it is taken for."""
        cosine = abs(self.directions[TRAINING_AXES, self.order]).min()
        return float(np.degrees(np.arccos(min(cosine, 1.0))))

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Size of a voxel along slices, rows and columns."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        depth, height, width = (float(lengths[axis]) for axis in self.order)
        return depth, height, width

    @cached_property
    def training_shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns."""
        depth, height, width = (self.shape[axis] for axis in self.order)
        return depth, height, width

    @cached_property
    def window(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The window of each slice that the model sees: first row and column, and numbers of rows and columns.

        A field of view that is clearly smaller than in the training is padded, and a larger one is cropped around its
        middle.
        """
        starts, sizes = [], []
        for number, spacing, (smallest, largest) in zip(
            self.training_shape[1:], self.spacing_mm[1:], self.field_mm, strict=True
        ):
            extent, size = number * spacing, number
            if not smallest / FIELD_TOLERANCE <= extent <= largest * FIELD_TOLERANCE:
                size = max(round(np.clip(extent, smallest, largest) / spacing), 1)
            sizes.append(size)
            starts.append((number - sizes[-1]) // 2)
        return (starts[0], starts[1]), (sizes[0], sizes[1])

    def to_training(self, voxels: np.ndarray) -> np.ndarray:
        """Return a view of an array of the shape `shape` with the axes slices, rows and columns."""
        return np.flip(voxels.transpose(self.order), self.flipped)

    def to_native(self, voxels: np.ndarray) -> np.ndarray:
        """Return a view of an array with the axes slices, rows and columns on the volume's own grid."""
        return np.flip(voxels, self.flipped).transpose(tuple(np.argsort(self.order)))

    def describe(self) -> str:
        """Return a line for the user: size, spacing and orientation."""
        codes = "".join(("RL", "AP", "SI")[i][int(self.directions[i, j] < 0)] for j, i in enumerate(self.world_axes()))
        spacing = " x ".join(f"{length:.2f}" for length in self.spacing_mm)
        shape = " x ".join(map(str, self.training_shape))
        remarks = [f"{shape} slices x rows x columns of {spacing} mm", f"axes {codes}"]
        if self.tilt_degrees >= 1:
            remarks.append(f"tilted by {self.tilt_degrees:.0f} degrees")
        return ", ".join(remarks + [self.note] * bool(self.note))

    def world_axes(self) -> list[int]:
        """Return the patient's axis that each of i, j and k is taken for."""
        return [TRAINING_AXES[self.order.index(axis)] for axis in range(3)]


class VolumeSlice(NamedTuple):
    """An axial slice of a volume. It has the properties of a `SliceFile` that a prediction needs."""

    volume: Volume
    # From 1 on, from head to feet.
    number: int

    @property
    def scan(self) -> str:
        """Name of the volume."""
        return self.volume.name

    @property
    def path(self) -> Path:
        """File or folder of the volume."""
        return self.volume.path

    @property
    def height(self) -> int:
        """Number of rows that the model sees."""
        return self.volume.window[1][0]

    @property
    def width(self) -> int:
        """Number of columns that the model sees."""
        return self.volume.window[1][1]

    @property
    def pixel_spacing(self) -> tuple[float, float]:
        """Height and width of a pixel in millimetres."""
        return self.volume.spacing_mm[1:]

    @property
    def thickness_mm(self) -> float:
        """Distance between slices."""
        return self.volume.spacing_mm[0]

    def read_pixels(self) -> np.ndarray:
        """Read the intensities of the field that the model sees: float32, shape `(height, width)`."""
        return cut_window(read_intensities(self.volume)[self.number - 1], *self.volume.window)


Slice: TypeAlias = SliceFile | VolumeSlice


def read_pixels(slice_file: Slice) -> np.ndarray:
    """Read the raw intensities of a slice, shape `(height, width)`.

    Raises:
        InputError: If the file is damaged, or has another size than its name or header says.
    """
    if isinstance(slice_file, VolumeSlice):
        return slice_file.read_pixels()
    return decode_image(read_file(slice_file.path), slice_file.path, slice_file.width, slice_file.height)


def list_slices(volumes: list[Volume]) -> list[VolumeSlice]:
    """Return the slices of all volumes, from head to feet."""
    return [VolumeSlice(volume, number) for volume in volumes for number in range(1, volume.training_shape[0] + 1)]


@lru_cache(maxsize=1)
def read_intensities(volume: Volume) -> np.ndarray:
    """Read a volume as slices, rows and columns of intensities; see `to_intensities`.

    The last volume is kept, because its slices are asked for one by one.
    """
    return volume.to_training(to_intensities(read_voxels(volume)))


def read_voxels(volume: Volume) -> np.ndarray:
    """Read the voxels of a volume on its own grid: float32, shape `shape`.

    Raises:
        InputError: If they have another shape, or all have the same value.
    """
    assert volume.read is not None
    voxels = volume.read()
    if voxels.shape != volume.shape:
        raise InputError(f"{volume.path}: expected voxels of shape {volume.shape}, got {voxels.shape}; copy it again")
    if not np.isfinite(voxels).any():
        raise InputError(f"{volume.path}: has no finite intensity; convert it again")
    if np.nanmin(voxels) == np.nanmax(voxels):
        raise InputError(f"{volume.path}: has the same intensity everywhere; export it again")
    return voxels


def to_intensities(voxels: np.ndarray) -> np.ndarray:
    """Bring voxels to a range that `scale_intensity` can scale: air is about 0, and nothing is negative.

    Whole numbers from 0 on, as a scanner writes them, stay as they are.

    Args:
        voxels: float32. Values that are not finite count as air.

    Example:
        >>> to_intensities(np.array([0.0, 700.0, np.nan], dtype=np.float32)).tolist()
        [0.0, 700.0, 0.0]
        >>> to_intensities(np.array([-1.0, 0.0, 1.0], dtype=np.float32)).tolist()
        [0.0, 32767.5, 65535.0]
    """
    intensities, _, _ = rescale(voxels)
    return intensities


def to_whole_intensities(voxels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Bring voxels to whole numbers of 16 bits, with the scale of `to_intensities` or a multiple of it.

    Args:
        voxels: As in `to_intensities`.

    Returns:
        The numbers, uint16, and how they become the voxels: a voxel is `number * slope + intercept`. That is exact
        for whole numbers of at most 16 bits, and else to half a step of 1/65535 of the largest. Only what lies below
        air is lost.

    Example:
        >>> whole, slope, intercept = to_whole_intensities(np.array([0.0, 0.25, 1.0], dtype=np.float32))
        >>> whole.tolist(), round(slope * 65535, 6), intercept
        ([0, 16384, 65535], 1.0, 0.0)
        >>> to_whole_intensities(np.array([-1000.0, 40.0], dtype=np.float32))
        (array([   0, 1040], dtype=uint16), 1.0, -1000.0)
    """
    intensities, factor, air = rescale(voxels)
    largest = float(intensities.max())
    if largest > MAX_INTENSITY or not np.array_equal(intensities, np.rint(intensities)):
        # Other whole numbers stay as they are. Fractions use all of the 16 bits.
        intensities, factor = intensities * np.float32(MAX_INTENSITY / largest), factor * MAX_INTENSITY / largest
    whole = np.clip(np.rint(intensities), 0, MAX_INTENSITY).astype(np.uint16)
    return whole, 1 / factor, air


def rescale(voxels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Bring voxels to intensities, see `to_intensities`.

    Returns:
        The intensities, the factor that they have got, and the value of air, which was taken off before.
    """
    finite = np.isfinite(voxels)
    if not finite.all():
        voxels = np.where(finite, voxels, voxels[finite].min())
    factor, air = 1.0, 0.0
    # CT and standardised MR have negative air. A percentile, because interpolation leaves a few lower values at edges.
    if voxels.min() < 0:
        air = min(float(np.percentile(voxels, 1, method="lower")), 0.0)
        voxels = np.maximum(voxels - np.float32(air), 0)
    largest = voxels.max()
    if 0 < largest < FRACTIONS_BELOW:
        # The scale of a volume does not change a prediction, but `scale_intensity` takes a mean of less than 1 as 1.
        factor = float(MAX_INTENSITY / largest)
        voxels = voxels * (MAX_INTENSITY / largest)
    return voxels.astype(np.float32, copy=False), factor, air


def cut_window(planes: np.ndarray, start: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Cut a window out of planes. What lies outside of them is 0.

    Args:
        planes: Any shape that ends with rows and columns.
        start: First row and column of the window; negative before the first one of the planes.
        size: Rows and columns of the window.

    Example:
        >>> cut_window(np.array([[1, 2], [3, 4]]), (-1, 1), (3, 1)).ravel().tolist()
        [0, 2, 4]
    """
    window = np.zeros((*planes.shape[:-2], *size), dtype=planes.dtype)
    (top, left), (height, width) = start, size
    inside = planes[..., max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    first_row, first_column = max(-top, 0), max(-left, 0)
    window[..., first_row : first_row + inside.shape[-2], first_column : first_column + inside.shape[-1]] = inside
    return window


def make_training_affine(spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the affine of slices in the orientation of the training, whose first voxel lies at 0.

    Args:
        spacing_mm: Size of a voxel along slices, rows and columns.

    Example:
        >>> make_training_affine((3.0, 1.5, 2.0)).diagonal().tolist()
        [-2.0, -1.5, -3.0, 1.0]
    """
    # The axes of a NIfTI file are columns, rows and slices. All three run against x, y and z.
    return np.diag([*(-mm for mm in reversed(spacing_mm)), 1.0])


def kaggle_volume(slices: Sequence[Slice]) -> Volume:
    """Return the volume of the slices of one scan of Kaggle's.

    The file names have no position, so the first voxel lies at 0. Slices that are missing stay empty.

    Args:
        slices: Sorted by number.

    Raises:
        InputError: If they differ in size or spacing.
    """
    check_volumes(slices, "they become one volume; correct the file name")
    first, last = slices[0], slices[-1]
    (height_mm, width_mm), depth = first.pixel_spacing, last.number - first.number + 1
    affine = make_training_affine((first.thickness_mm, height_mm, width_mm))
    return Volume(first.scan, first.path.parent, (first.width, first.height, depth), affine)


def check_volumes(slices: Sequence[Slice], reason: str) -> None:
    """Check that the slices of each scan have one size and one spacing.

    Args:
        slices: The slices of any number of scans.
        reason: Why this is needed, and what to do; the end of the message.

    Raises:
        InputError: If they do not.
    """
    grids: dict[str, tuple[int, int, tuple[float, float]]] = {}
    for one in slices:
        grid = (one.height, one.width, one.pixel_spacing)
        if grids.setdefault(one.scan, grid) != grid:
            raise InputError(f"{one.path}: expected slices of one size and spacing in {one.scan}, because {reason}")


def native_grid(volume: Volume, predictions: Iterable[tuple[Slice, np.ndarray]]) -> np.ndarray:
    """Put the predictions of slices on the volume's own grid.

    Args:
        volume: The volume.
        predictions: Its slices, the first one first, and their masks or probabilities: shape
            `(organs, height, width)`, all of one type.

    Returns:
        The same type, shape `(organs, i, j, k)`. Slices that are missing are 0, and
        so are voxels that the model did not see.
    """
    predictions = list(predictions)
    (start, arrays) = predictions[0]
    stacked = np.zeros((len(arrays), *volume.training_shape), dtype=arrays.dtype)
    for one, arrays in predictions:
        stacked[:, one.number - start.number] = whole_field(one, arrays)
    return np.stack([volume.to_native(organ) for organ in stacked])


def whole_field(one: Slice, organs: np.ndarray) -> np.ndarray:
    """Return the masks or the probabilities of a slice with its whole field of view.

    Args:
        one: The slice.
        organs: What was predicted for the window that the model sees: shape `(organs, height, width)`.

    Returns:
        Shape `(organs, rows, columns)`. Pixels that the model did not see are 0.
    """
    if not isinstance(one, VolumeSlice):
        return organs
    (top, left), _ = one.volume.window
    return cut_window(organs, (-top, -left), one.volume.training_shape[1:])
