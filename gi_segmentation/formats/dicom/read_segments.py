"""Read a DICOM segmentation (SEG), and put its segments on the grid of a scan."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, list_some, reading
from gi_segmentation.formats.dicom.files import Frame, check_codec, read_dataset, read_frame
from gi_segmentation.formats.dicom.geometry import TO_RAS, find_normal, is_parallel
from gi_segmentation.formats.dicom.header import hush_pydicom
from gi_segmentation.formats.dicom.kinds import read_text
from gi_segmentation.formats.dicom.references import References
from gi_segmentation.formats.structures import empty_masks
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.schema import SLICE_THICKNESS_MM

# The share of the largest value from which on a voxel of a fractional segmentation is inside.
INSIDE = 0.5
# How far a voxel of a segmentation may lie from one of the scan, in voxels. Places are often rounded to 0.1 mm.
GRID_TOLERANCE = 0.2
# How much two distances of slices may differ, as a share.
SAME_DISTANCE = 0.1
# Positions along a normal that are nearer to each other than this, in millimetres, are one.
SAME_PLACE_MM = 0.01


def name_segments(dataset: Any) -> dict[int, str]:
    """Return the names of the segments by their numbers. A name may be there several times."""
    names = {}
    for item in dataset.get("SegmentSequence") or ():
        codes = item.get("SegmentedPropertyTypeCodeSequence") or ()
        meaning = next((read_text(code, "CodeMeaning") for code in codes), "")
        number = int(item.SegmentNumber)
        names[number] = read_text(item, "SegmentLabel") or meaning or f"segment {number}"
    # The background of a label map may be listed, too.
    return {number: name for number, name in names.items() if number > 0}


def choose_segments(dataset: Any) -> tuple[list[str], list[str]]:
    """Return the names of the segments, each once, and notes."""
    counts = Counter(name_segments(dataset).values())
    notes = []
    if doubled := [name for name, count in counts.items() if count > 1]:
        notes.append(f"several segments of one name: {list_some(doubled, 10)}")
    if read_text(dataset, "SegmentationType") == "FRACTIONAL":
        notes.append(f"fractions; a voxel is inside from {INSIDE:g} of the largest value on")
    return list(counts), notes


def read_segment_references(path: Path, dataset: Any) -> References:
    """Return what a segmentation names."""
    series = list(dataset.get("ReferencedSeriesSequence") or ())
    groups = [
        *(dataset.get("SharedFunctionalGroupsSequence") or ()),
        *(dataset.get("PerFrameFunctionalGroupsSequence") or ()),
    ]
    derivations = [item for group in groups for item in group.get("DerivationImageSequence") or ()]
    return References(
        path,
        frozenset(read_text(one, "SeriesInstanceUID") for one in series) - {""},
        list_images(derivations, "SourceImageSequence"),
        list_images(series, "ReferencedInstanceSequence") | list_images([dataset], "SourceImageSequence"),
        read_text(dataset, "FrameOfReferenceUID"),
    )


def list_images(items: Iterable[Any], sequence: str) -> frozenset[str]:
    """Return the UIDs of the images that a sequence of items names."""
    images = (image for item in items for image in item.get(sequence) or ())
    return frozenset(read_text(image, "ReferencedSOPInstanceUID") for image in images) - {""}


def list_frames(path: Path, dataset: Any) -> list[Frame]:
    """Return the places of the frames of a segmentation, in its order.

    Raises:
        InputError: If they do not lie in a patient.
    """
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    count = int(dataset.get("NumberOfFrames") or 1)
    if len(groups) != count:
        raise InputError(f"{path}: has {count} frames, and describes {len(groups)} of them; export it again")
    return [read_frame(path, number, dataset, [own, *shared]) for number, own in enumerate(groups, start=1)]


def find_segment(dataset: Any, number: int) -> int:
    """Return the segment that a frame belongs to. The frames of a label map belong to all."""
    own = dataset.PerFrameFunctionalGroupsSequence[number - 1]
    for group in (own, *(dataset.get("SharedFunctionalGroupsSequence") or ())):
        for item in group.get("SegmentIdentificationSequence") or ():
            return int(item.ReferencedSegmentNumber)
    raise InputError(f"frame {number} does not say which segment it belongs to")


def read_segment_masks(path: Path, volume: Volume, names: Sequence[str]) -> np.ndarray:
    """Put segments on the grid of a scan, voxel by voxel. Slices without a frame are empty.

    The frames are placed by their positions one by one. Highdicom makes a volume of the frames first. It refuses them
    if their distances differ because positions were rounded to 0.1 mm, as scanners do, and it may refuse a single
    frame whose file does not state the distance of slices.

    Args:
        path: The segmentation.
        volume: The scan. The axes of the segmentation may be swapped or flipped against its axes.
        names: The names of the segments.

    Returns:
        bool, shape `(names, i, j, k)`.

    Raises:
        InputError: If the file is damaged, if a frame does not lie on the grid, or if two segments have one name.
    """
    with reading(path, "its segments cannot be read", "export it again"), hush_pydicom():
        dataset = read_dataset(path)
        check_codec(path, dataset)
        numbers = [find_number(path, dataset, name) for name in names]
        masks = empty_masks(len(names), volume.shape)
        frames = list_frames(path, dataset)
        check_distance(path, dataset, frames, volume)
        is_label_map = read_text(dataset, "SegmentationType") == "LABELMAP"
        threshold = INSIDE * find_largest(dataset)
        for frame, plane in zip(frames, read_planes(dataset), strict=True):
            segment = 0 if is_label_map else find_segment(dataset, frame.number)
            for mask, number in zip(masks, numbers, strict=True):
                if is_label_map or segment == number:
                    inside = plane == number if is_label_map else plane >= threshold
                    if inside.any():
                        place_frame(inside, frame, volume, mask)
    return masks


def find_number(path: Path, dataset: Any, name: str) -> int:
    """Return the number of a segment.

    Raises:
        InputError: If there are several or none of this name.
    """
    numbers = [number for number, one in name_segments(dataset).items() if one == name]
    if len(numbers) != 1:
        raise InputError(f"{path}: expected one segment with the name {name!r}, got {len(numbers)}; rename or delete")
    return numbers[0]


def find_largest(dataset: Any) -> int:
    """Return the value that means a voxel is wholly inside."""
    if read_text(dataset, "SegmentationType") == "FRACTIONAL":
        return int(dataset.MaximumFractionalValue)
    return 1


def read_planes(dataset: Any) -> Iterable[np.ndarray]:
    """Yield the stored values of each frame, shape `(rows, columns)`. Only one frame is unpacked at a time."""
    from pydicom.pixels import iter_pixels

    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if dataset.BitsAllocated == 1 and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        # A frame may begin within a byte. `iter_pixels` of pydicom 3.0 loses the bits before the first whole one then.
        packed, size = np.frombuffer(dataset.PixelData, dtype=np.uint8), rows * columns
        for start in range(0, int(dataset.get("NumberOfFrames") or 1) * size, size):
            bits = np.unpackbits(packed[start // 8 : -(-(start + size) // 8)], bitorder="little")
            yield bits[start % 8 : start % 8 + size].reshape(rows, columns)
    else:
        # The values of a label map are numbers of segments, also if the file has a colour for each of them.
        for plane in iter_pixels(dataset, raw=True):
            yield plane.reshape(rows, columns)


def steps_of_frame(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Return the step to the next column and that to the next row, in millimetres on DICOM's axes."""
    along_row, along_column = np.reshape(frame.orientation, (2, 3))
    height_mm, width_mm = frame.pixel_spacing
    return along_row * width_mm, along_column * height_mm


def place_frame(plane: np.ndarray, frame: Frame, volume: Volume, mask: np.ndarray) -> None:
    """Add a frame to a mask.

    Args:
        plane: bool, shape `(rows, columns)`.
        frame: Its place.
        volume: The scan.
        mask: bool, shape `(i, j, k)`. It is changed in place.

    Raises:
        InputError: If the pixels of the frame are no voxels of the scan.
    """
    to_index = np.linalg.inv(volume.affine) @ TO_RAS
    start = to_index[:3, :3] @ frame.position + to_index[:3, 3]
    steps = [to_index[:3, :3] @ step for step in steps_of_frame(frame)]
    rows, columns = np.nonzero(plane)
    # The corners of what is inside. Between them, the error is smaller.
    corners = [(row, column) for row in (rows.min(), rows.max()) for column in (columns.min(), columns.max())]
    # On the grid of the scan, each step goes to the next voxel along one axis, forwards or backwards.
    axes = [int(np.abs(step).argmax()) for step in steps]
    whole = [np.sign(step[axis]) * np.eye(3)[axis] for step, axis in zip(steps, axes, strict=True)]
    first = np.rint(start)
    errors = [
        np.abs(start - first + column * (steps[0] - whole[0]) + row * (steps[1] - whole[1])).max()
        for row, column in corners
    ]
    if axes[0] == axes[1] or max(errors) > GRID_TOLERANCE:
        raise InputError(
            f"{frame.path}: lies on another grid than its scan {volume.name}; export it on the voxels of the scan"
        )
    indices = (first[:, None] + whole[0][:, None] * columns + whole[1][:, None] * rows).astype(np.int64)
    if (indices < 0).any() or (indices >= np.array(volume.shape)[:, None]).any():
        raise InputError(f"{frame.path}: has voxels outside its scan {volume.name}; export both of them together")
    mask[tuple(indices)] = True


def check_distance(path: Path, dataset: Any, frames: Sequence[Frame], volume: Volume) -> None:
    """Check that the frames have the distance of the scan's voxels.

    Frames on each second slice of a scan fit to its voxels one by one. They are a coarser grid, and would leave
    stripes, if their file states this distance. If it does not, or states another one, the slices between have no
    frame because they are empty. Some programs state a distance of 1 mm for a single slice.

    Raises:
        InputError: If not.
    """
    stated, between = find_stated_distance(dataset), measure_distances(frames)
    normal = find_normal(frames[0])
    length = 1 / np.abs(np.linalg.inv(volume.affine)[:3, :3] @ TO_RAS[:3, :3] @ normal).max()
    if stated is None or not len(between) or abs(stated / length - 1) <= SAME_DISTANCE:
        return
    if abs(between.min() - stated) <= SAME_DISTANCE * stated:
        raise InputError(
            f"{path}: has slices {stated:g} mm apart, but its scan {volume.name} has {length:g} mm, so it lies on "
            f"another grid; export it on the voxels of the scan"
        )


def measure_distances(frames: Sequence[Frame]) -> np.ndarray:
    """Return the distances between frames along their normal, from each place to the next one, in millimetres."""
    along = np.sort([np.dot(frame.position, find_normal(frames[0])) for frame in frames])
    distances: np.ndarray = np.diff(along)
    return distances[distances > SAME_PLACE_MM]


def find_stated_distance(dataset: Any) -> float | None:
    """Return the distance of the slices as a segmentation states it; None if it does not."""
    for group in dataset.get("SharedFunctionalGroupsSequence") or ():
        for item in group.get("PixelMeasuresSequence") or ():
            if item.get("SpacingBetweenSlices"):
                return abs(float(item.SpacingBetweenSlices))
    return None


def own_volume(path: Path, dataset: Any, references: References) -> Volume:
    """Return the grid of a segmentation as a volume without intensities, for one whose scan is not there.

    The grid reaches from the first to the last frame. Slices beyond them are not known.

    Args:
        path: The segmentation.
        dataset: Its header.
        references: What it names. The volume is named by the series, so that it is called as the scan is.

    Raises:
        InputError: If its frames do not fill a grid.
    """
    frames = list_frames(path, dataset)
    first = frames[0]
    if not all(is_parallel(frame, first) for frame in frames):
        raise InputError(f"{path}: its frames are not parallel; export it again")
    normal = find_normal(first)
    along = np.array([np.dot(frame.position, normal) for frame in frames])
    between = measure_distances(frames)
    # Without a stated distance, the smallest one between two frames is the best guess.
    guess = float(between.min()) if len(between) else first.thickness_mm or SLICE_THICKNESS_MM
    step = find_stated_distance(dataset) or guess
    places = (along - along.min()) / step
    if np.abs(places - np.rint(places)).max() > GRID_TOLERANCE:
        raise InputError(f"{path}: its frames do not lie {step:g} mm apart, so they fill no grid; add its scan")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = steps_of_frame(first)
    affine[:3, 2], affine[:3, 3] = normal * step, frames[int(along.argmin())].position
    shape = (int(dataset.Columns), int(dataset.Rows), round(float(places.max())) + 1)
    name = min(references.series) if len(references.series) == 1 else first.series_uid
    return Volume(name, path, shape, TO_RAS @ affine, note="the grid of a segmentation, without its scan")
