"""Read the contours of a DICOM structure set (RTSTRUCT), and make masks of them on the grid of their scan."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gi_segmentation.errors import InputError, list_some, reading
from gi_segmentation.formats.dicom.files import read_dataset
from gi_segmentation.formats.dicom.fill_contours import fill_contours
from gi_segmentation.formats.dicom.geometry import TO_RAS
from gi_segmentation.formats.dicom.header import hush_pydicom, read_bytes
from gi_segmentation.formats.dicom.kinds import read_text
from gi_segmentation.formats.dicom.references import References, frame_of_reference
from gi_segmentation.formats.structures import empty_masks
from gi_segmentation.formats.volumes import Volume

# How a file says that contours are closed, and lie in a plane each. Both kinds are filled by the same rule: contours
# of the first kind that lie in each other are meant as holes, though the standard wants keyholes there.
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# How far a contour may lie from its slice, in slices. Places are often rounded, sometimes to whole millimetres. A
# contour half-way between two slices could be on either.
MAX_DISTANCE = 0.45
# From here on, the distance is worth a note. Contours that differ more from each other lie on two planes.
SAME_PLANE = 0.2
# The points of a contour may differ by this much, in slices, because the directions of slices are rounded, too.
MAX_THICKNESS = 0.5


class Roi(NamedTuple):
    """A region of interest.

    Attributes:
        name: Its name.
        contours: The items of its closed contours.
        others: The number of its other contours, by their types, for example POINT.
        frame_of_reference_uid: The coordinate system of its contours; empty if it does not say.
    """

    name: str
    contours: list[Any]
    others: Mapping[str, int]
    frame_of_reference_uid: str


def list_rois(dataset: Any) -> list[Roi]:
    """List the regions of interest of a structure set, in its order. A name may be there several times."""
    contours = {
        int(item.ReferencedROINumber): list(item.get("ContourSequence") or ())
        for item in dataset.get("ROIContourSequence") or ()
    }
    rois = []
    for item in dataset.get("StructureSetROISequence") or ():
        # Some programs write an item without a point for a slice where nothing was drawn.
        own = [contour for contour in contours.get(int(item.ROINumber), []) if read_bytes(contour, "ContourData")]
        kinds = [read_text(contour, "ContourGeometricType") for contour in own]
        closed = [contour for contour, kind in zip(own, kinds, strict=True) if kind in CLOSED]
        others = Counter(kind or "unknown" for kind in kinds if kind not in CLOSED)
        uid = read_text(item, "ReferencedFrameOfReferenceUID")
        rois.append(Roi(read_text(item, "ROIName"), closed, others, uid))
    return rois


def read_contour_references(path: Path, dataset: Any, rois: Sequence[Roi]) -> References:
    """Return what a structure set names."""
    frames = list(dataset.get("ReferencedFrameOfReferenceSequence") or ())
    studies = [study for frame in frames for study in frame.get("RTReferencedStudySequence") or ()]
    series = [one for study in studies for one in study.get("RTReferencedSeriesSequence") or ()]
    contours = [contour for roi in rois for contour in roi.contours]
    uids = {roi.frame_of_reference_uid for roi in rois if roi.contours}
    uids = uids or {read_text(frame, "FrameOfReferenceUID") for frame in frames}
    uids = uids - {""} or {read_text(dataset, "FrameOfReferenceUID")}
    return References(
        path,
        frozenset(read_text(one, "SeriesInstanceUID") for one in series) - {""},
        list_images(contours),
        list_images(series),
        # With several, none is that of the whole file. Each ROI is compared by itself then.
        uids.pop() if len(uids) == 1 else "",
    )


def list_images(items: Iterable[Any]) -> frozenset[str]:
    """Return the UIDs of the images that items name."""
    images = (image for item in items for image in item.get("ContourImageSequence") or ())
    return frozenset(read_text(image, "ReferencedSOPInstanceUID") for image in images) - {""}


def choose_rois(rois: Sequence[Roi], volume: Volume) -> tuple[list[str], list[str], list[str]]:
    """Tell which regions of interest can be read on a scan.

    Returns:
        The names of those with contours, the names of those without one, and notes.
    """
    uid = frame_of_reference(volume)
    elsewhere = [roi for roi in rois if uid and roi.frame_of_reference_uid not in ("", uid)]
    here = [roi for roi in rois if roi not in elsewhere]
    drawn = list(dict.fromkeys(roi.name for roi in here if roi.contours))
    left = [roi for roi in here if not roi.contours and roi.name not in drawn]
    notes = []
    if empty := list(dict.fromkeys(roi.name for roi in left if not roi.others)):
        notes.append(f"without contours: {list_some(empty, 10)}")
    if others := [f"{roi.name} ({count} {kind})" for roi in here for kind, count in sorted(roi.others.items())]:
        notes.append(f"left out, because they are no closed contours in a plane: {list_some(others, 10)}")
    if elsewhere:
        notes.append(f"in another frame of reference: {list_some([roi.name for roi in elsewhere], 10)}")
    counts = Counter(roi.name for roi in here if roi.contours)
    if doubled := [name for name in drawn if counts[name] > 1]:
        notes.append(f"several ROIs of one name: {list_some(doubled, 10)}")
    return drawn, empty, notes


def describe_places(path: Path, rois: Sequence[Roi], volume: Volume, interpolate: bool) -> list[str]:
    """Return notes about contours that lie beside slices, and about slices without one between others.

    Args:
        path: The structure set.
        rois: Its regions of interest.
        volume: The scan.
        interpolate: Whether slices between those with contours are filled.
    """
    notes, farthest = [], 0.0
    for roi in rois:
        # The first point of a contour tells its slice. One that is damaged is a problem when the masks are read.
        with suppress(InputError):
            places = [to_indices(read_points(path, roi.name, contour, 1), volume)[0, 2] for contour in roi.contours]
            slices = sorted({round(place) for place in places})
            farthest = max([farthest, *(abs(place - round(place)) for place in places)])
            skipped = sum(after - before - 1 for before, after in pairwise(slices))
            if skipped and not interpolate:
                notes.append(f"{roi.name}: {skipped} slices between its contours have none")
    if farthest > SAME_PLANE:
        notes.append(f"contours lie up to {farthest:.1f} slices beside their slices, and were moved to them")
    return notes


def read_contour_masks(path: Path, volume: Volume, interpolate: bool, names: Sequence[str]) -> np.ndarray:
    """Make masks of regions of interest.

    Args:
        path: The structure set.
        volume: The scan that it was drawn on.
        interpolate: Whether slices between those with contours are filled, see `fill_skipped`.
        names: The names of the regions of interest.

    Returns:
        bool, shape `(names, columns, rows, slices)`.

    Raises:
        InputError: If the file is damaged, if contours do not lie on slices of the scan, or if two regions of interest
            have one name.
    """
    with reading(path, "its contours cannot be read", "export it again"), hush_pydicom():
        rois = list_rois(read_dataset(path))
        uid = frame_of_reference(volume)
        masks = empty_masks(len(names), volume.shape)
        for mask, name in zip(masks, names, strict=True):
            own = [roi for roi in rois if roi.name == name and (not uid or roi.frame_of_reference_uid in ("", uid))]
            drawn = [roi for roi in own if roi.contours]
            if not own:
                raise InputError(f"{path}: has no ROI {name!r}; the file was changed, so start again")
            if len(drawn) > 1:
                raise InputError(f"{path}: has {len(drawn)} ROIs with the name {name!r}; rename or delete one")
            for roi in drawn:
                fill_roi(path, roi, volume, mask)
                if interpolate:
                    fill_skipped(mask, volume)
    return masks


def fill_roi(path: Path, roi: Roi, volume: Volume, mask: np.ndarray) -> None:
    """Fill the contours of a region of interest.

    Args:
        path: The structure set.
        roi: The region of interest.
        volume: The scan.
        mask: bool, shape `(columns, rows, slices)`, all False. It is filled in place.
    """
    columns, rows, _ = volume.shape
    slices: dict[int, dict[bytes, np.ndarray]] = defaultdict(dict)
    heights: dict[int, float] = {}
    for contour in roi.contours:
        points = read_points(path, roi.name, contour)
        indices = to_indices(points, volume)
        index = find_slice(path, roi.name, indices, volume)
        height = float(indices[:, 2].mean())
        if abs(heights.setdefault(index, height) - height) > SAME_PLANE:
            raise InputError(
                f"{path}: {roi.name!r} has contours between slices: at {heights[index]:.2f} and {height:.2f}, where "
                f"slices have whole numbers; export it with the scan that it was drawn on"
            )
        # A contour that is there twice would remove itself, so it counts once.
        slices[index].setdefault(points.tobytes(), indices[:, :2])
    planes = {index: list(contours.values()) for index, contours in slices.items()}
    everything = np.concatenate([points for contours in planes.values() for points in contours])
    if (everything.max(axis=0) < -0.5).any() or (everything.min(axis=0) > np.array([columns, rows]) - 0.5).any():
        raise InputError(f"{path}: {roi.name!r} has its contours beside the images; export it with its own scan")
    for index, contours in planes.items():
        # Only the box around the contours.
        points = np.concatenate(contours)
        low = np.floor(points.min(axis=0)).clip(0, (columns, rows)).astype(int)
        high = np.ceil(points.max(axis=0) + 1).clip(low, (columns, rows)).astype(int)
        width, height = (high - low).tolist()
        filled = fill_contours([contour - low for contour in contours], (height, width))
        mask[low[0] : high[0], low[1] : high[1], index] = filled.T


def read_points(path: Path, name: str, contour: Any, count: int | None = None) -> np.ndarray:
    """Return the points of a contour in millimetres on DICOM's axes: shape `(points, 3)`.

    Args:
        path: The structure set, for a message.
        name: The name of the region of interest, for a message.
        contour: The item of the contour.
        count: The number of points to return; None: all.

    Raises:
        InputError: If they are no points.
    """
    # The text of a contour at once. The library would make a number with its text of each coordinate, which takes
    # twenty times as long.
    text = read_bytes(contour, "ContourData") or b""
    words = text.split(b"\\", -1 if count is None else 3 * count)[: None if count is None else 3 * count]
    try:
        values = np.array(words).astype(np.float64)
    except ValueError:
        values = np.array([np.nan])
    if len(values) % 3 or not np.isfinite(values).all():
        raise InputError(f"{path}: {name!r} has a contour whose points are not three numbers each; export it again")
    return values.reshape(-1, 3)


def to_indices(points: np.ndarray, volume: Volume) -> np.ndarray:
    """Return the places of points on the grid of a scan: column, row and slice, shape `(points, 3)`."""
    to_index = np.linalg.inv(volume.affine) @ TO_RAS
    return points @ to_index[:3, :3].T + to_index[:3, 3]


def find_slice(path: Path, name: str, indices: np.ndarray, volume: Volume) -> int:
    """Return the slice that a contour lies on.

    Args:
        path: The structure set, for a message.
        name: The name of the region of interest, for a message.
        indices: Column, row and slice of its points.
        volume: The scan.

    Raises:
        InputError: If it lies on none.
    """
    places = indices[:, 2]
    middle = float(places.mean())
    index = round(middle)
    contour = f"{path}: {name!r} has a contour"
    if places.max() - places.min() > MAX_THICKNESS:
        raise InputError(
            f"{contour} through {places.max() - places.min():.1f} slices, so it was drawn on another plane than that "
            f"of the slices; export the contours on the planes of the scan"
        )
    if not -MAX_DISTANCE <= middle <= volume.shape[2] - 1 + MAX_DISTANCE:
        raise InputError(
            f"{contour} outside the volume: {max(-middle, middle - volume.shape[2] + 1):.1f} slices beyond its last "
            f"one; add the slices that are missing, or export the contours with their own scan"
        )
    if abs(middle - index) > MAX_DISTANCE:
        raise InputError(
            f"{contour} between slices: at {middle:.2f}, where slices have whole numbers; export it with the scan "
            f"that it was drawn on"
        )
    return index


def fill_skipped(mask: np.ndarray, volume: Volume) -> None:
    """Fill the slices between those with contours.

    On both of these, each pixel has a distance to the border, positive inside and negative outside. Between them, a
    pixel is inside if its distance, taken linearly between the two, is positive (shape-based interpolation).

    Args:
        mask: bool, shape `(columns, rows, slices)`. It is filled in place.
        volume: The scan, for the size of its pixels.

    Source: Raya, S. P. and Udupa, J. K.: Shape-based interpolation of multidimensional objects, IEEE Transactions on
        Medical Imaging 9 (1990), pages 32 to 42.
    """
    from scipy.ndimage import distance_transform_edt

    spacing = np.linalg.norm(volume.affine[:3, :2], axis=0)
    drawn = np.flatnonzero(mask.any(axis=(0, 1)))

    def signed_distance(index: int) -> np.ndarray:
        plane = mask[:, :, index]
        inside = distance_transform_edt(plane, sampling=spacing)
        outside = distance_transform_edt(~plane, sampling=spacing)
        distance: np.ndarray = inside - outside
        return distance

    for before, after in pairwise(drawn.tolist()):
        if after - before > 1:
            first, last = signed_distance(before), signed_distance(after)
            for index in range(before + 1, after):
                share = (index - before) / (after - before)
                mask[:, :, index] = (1 - share) * first + share * last > 0
