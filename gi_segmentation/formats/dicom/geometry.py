"""Make a volume of the frames of a scan: sort them along their normal, and check that they fill a grid.

Places are turned from DICOM's axes (x to the left, y to the back) to those of `formats.volumes`.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.files import ROUNDING_TOLERANCE, DicomSeries, Frame
from gi_segmentation.formats.dicom.pixels import read_dicom_voxels
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.schema import SLICE_THICKNESS_MM

# Positions are stored with a few decimals. Directions are numbers of at most 1.
STEP_TOLERANCE_MM = 0.1
DIRECTION_TOLERANCE = 1e-3
# Slices are shifted against each other by more than this if the gantry was tilted.
SHEAR_DEGREES = 0.5
# From DICOM's axes to those of `formats.volumes`, and back.
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Values of ImageType for images that a program has made of others, as the maximum along a ray (MIP).
PROJECTIONS = ("PROJECTION IMAGE", "MIP", "MINIP", "MNIP", "MAX_IP", "MIN_IP")


def build_volume(name: str, frames: list[Frame], remarks: Sequence[str] = ()) -> Volume:
    """Sort the frames of a series along their normal, and make a volume of them.

    Args:
        name: Name of the volume.
        frames: The frames, in any order.
        remarks: What the user should know of how they were found.

    Raises:
        InputError: If they do not fill a grid.
    """
    frames = check_planes(frames)
    first = frames[0]
    positions = np.array([frame.position for frame in frames])
    directions = np.reshape(first.orientation, (2, 3))
    normal = np.cross(*directions)
    height_mm, width_mm = first.pixel_spacing
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = directions[0] * width_mm, directions[1] * height_mm, positions[0]
    if len(frames) == 1:
        affine[:3, 2] = normal * (first.thickness_mm or SLICE_THICKNESS_MM)
    else:
        affine[:3, 2] = (positions[-1] - positions[0]) / (len(frames) - 1)
        check_steps(frames, positions, normal)
    series = DicomSeries(tuple(frames))
    source = first.path if len(series.paths) == 1 else first.path.parent
    note = ", ".join([*describe_frames(frames), *describe_shear(affine[:3, 2], normal), *remarks])
    shape = (first.size[1], first.size[0], len(frames))
    return Volume(name, source, shape, TO_RAS @ affine, partial(read_dicom_voxels, series), series, note)


def describe_frames(frames: Sequence[Frame]) -> Iterable[str]:
    """Yield the description of a series, and what is unusual about its slices."""
    first = frames[0]
    description = first.description
    yield description if description.startswith("MR") else f"{description} (the models were trained on MR)"
    image_type = first.kind.get("ImageType", "").split("\\")
    if found := [word for word in PROJECTIONS if word in image_type]:
        yield f"a projection ({found[0]}), where organs of several slices overlap"
    elif image_type[0] == "DERIVED":
        yield "derived from other images"
    acquisitions = {frame.kind.get("AcquisitionNumber", "") for frame in frames}
    if 1 < len(acquisitions) <= len(frames) / 2:
        yield f"slices of {len(acquisitions)} acquisitions"
    if len(frames) == 1:
        yield "one slice alone"


def describe_shear(step: np.ndarray, normal: np.ndarray) -> Iterable[str]:
    """Yield a remark if slices do not lie above each other.

    Args:
        step: From a slice to the next one.
        normal: The direction in which they would lie above each other.
    """
    cosine = float(np.dot(step, normal) / np.linalg.norm(step))
    degrees = float(np.degrees(np.arccos(min(cosine, 1.0))))
    if degrees > SHEAR_DEGREES:
        yield f"sheared by {degrees:.1f} degrees (a tilted gantry)"


def find_normal(frame: Frame) -> np.ndarray:
    """Return the direction at right angles to a slice: shape `(3,)`."""
    return np.cross(*np.reshape(frame.orientation, (2, 3)))


def is_parallel(frame: Frame, other: Frame) -> bool:
    """Tell whether two slices have the same directions of rows and columns."""
    return bool(np.abs(np.subtract(frame.orientation, other.orientation)).max() <= DIRECTION_TOLERANCE)


def sort_frames(frames: Iterable[Frame]) -> list[Frame]:
    """Sort parallel frames along their normal."""
    frames = list(frames)
    normal = find_normal(frames[0])
    # Not by the number of the instance: some scanners number from the feet, some from the head, and some not at all.
    return sorted(frames, key=lambda frame: float(np.dot(frame.position, normal)))


def check_planes(frames: list[Frame]) -> list[Frame]:
    """Return the frames of a series sorted along their normal, if they are parallel and have one grid.

    Raises:
        InputError: If not.
    """
    first = frames[0]
    directions = np.reshape(first.orientation, (2, 3))
    # `not <=` and not `>`, because every comparison with NaN is false.
    if not np.abs(directions @ directions.T - np.eye(2)).max() <= DIRECTION_TOLERANCE:
        raise InputError(f"{first.path}: its rows and columns are not at right angles; export it again")
    for frame in frames:
        if not np.isfinite(frame.position).all():
            raise InputError(f"{frame.path}: expected numbers as position, got {frame.position}; export it again")
        if not is_parallel(frame, first):
            raise InputError(f"{frame.path}: not parallel to {first.path} of the same series; export one stack alone")
        grid, expected = ((*one.size, *one.pixel_spacing) for one in (frame, first))
        if not np.allclose(grid, expected, rtol=1e-3):
            raise InputError(
                f"{frame.path}: expected {expected[0]} x {expected[1]} pixels of {expected[2]:g} x {expected[3]:g} mm "
                f"as in {first.path} of the same series, got {grid[0]} x {grid[1]} of {grid[2]:g} x {grid[3]:g} mm"
            )
    return sort_frames(frames)


def check_steps(frames: Sequence[Frame], positions: np.ndarray, normal: np.ndarray) -> None:
    """Check that sorted slices have equal distances.

    Args:
        frames: The sorted slices.
        positions: Where they lie: shape `(slices, 3)`.
        normal: The direction in which they are sorted.

    Raises:
        InputError: If not.
    """
    first = frames[0]
    where = f"{first.path.parent}: series {first.series_uid or 'without a UID'}"
    steps = np.diff(positions, axis=0)
    distances = steps @ normal
    usual = float(np.median(distances))
    if (same := np.flatnonzero(distances < DIRECTION_TOLERANCE)).size:
        x, y, z = positions[same[0]]
        raise InputError(
            f"{where} has several slices at ({x:g}, {y:g}, {z:g}) mm, for example of several echoes or times; "
            f"export one of them alone"
        )
    if len(frames) < 3 or is_rounded_line(positions, min(frame.rounding_mm for frame in frames)):
        return
    tolerance = min(STEP_TOLERANCE_MM, 0.05 * usual)
    # The message is about the distance that differs most from the usual one.
    worst = int(np.abs(distances - usual).argmax())
    if abs(distances[worst] - usual) > tolerance:
        x, y, z = positions[worst]
        missing = round(distances[worst] / usual) - 1
        what = f"{missing} slices are missing" if missing > 0 else "the distance changes"
        raise InputError(
            f"{where}: expected slices {usual:.2f} mm apart, but got {distances[worst]:.2f} mm after "
            f"({x:g}, {y:g}, {z:g}) mm: {what}; export the whole series"
        )
    if np.abs(steps - np.median(steps, axis=0)).max() > STEP_TOLERANCE_MM:
        raise InputError(f"{where}: its slices do not lie in one line; export one stack alone")


def is_rounded_line(positions: np.ndarray, rounding_mm: float) -> bool:
    """Tell whether positions lie on a line at equal distances, and were rounded then.

    Args:
        positions: Sorted, in millimetres: shape `(slices, 3)`.
        rounding_mm: Their last decimal.

    Example:
        >>> is_rounded_line(np.array([[0, 0, 0], [0, 0, 1.2], [0, 0, 2.5], [0, 0, 3.7], [0, 0, 5]]), 0.1)
        True
        >>> is_rounded_line(np.array([[0, 0, 0], [0, 0, 1.2], [0, 0, 2.4], [0, 0, 3.7], [0, 0, 5.1]]), 0.1)
        False
    """
    lowest, highest = np.full(3, -np.inf), np.full(3, np.inf)
    # Rounding moves each position by half a decimal at most, so each pair of slices leaves a range for the step.
    for apart in range(1, len(positions)):
        step = (positions[apart:] - positions[:-apart]) / apart
        beside_mm = (rounding_mm + ROUNDING_TOLERANCE) / apart
        lowest = np.maximum(lowest, step.max(axis=0) - beside_mm)
        highest = np.minimum(highest, step.min(axis=0) + beside_mm)
    return bool((lowest <= highest).all())
