"""Read MR series from DICOM files: one file per slice, or one file with all frames (enhanced).

Places are turned from DICOM's axes (x to the left, y to the back) to those of `inference.volumes`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gi_segmentation.errors import InputError, reading
from gi_segmentation.inference.volumes import Volume
from gi_segmentation.schema import SLICE_THICKNESS_MM

# The files that hold a scan: MR and CT, with one frame, with many (enhanced), or with many by a conversion (legacy).
# All other files, such as structure sets, segmentations and reports, are passed over.
SCAN_CLASSES = frozenset(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "2.2", "4", "4.1", "4.4"))
# Positions are stored with a few decimals. Directions are numbers of at most 1.
STEP_TOLERANCE_MM = 0.1
DIRECTION_TOLERANCE = 1e-3
# What each organ is called by SNOMED CT, as (code, scheme, meaning).
ORGAN_CODES = {
    "large_bowel": ("14742008", "SCT", "Large intestine"),
    "small_bowel": ("30315005", "SCT", "Small intestine"),
    "stomach": ("69695003", "SCT", "Stomach"),
}
# From DICOM's axes to those of `inference.volumes`, and back.
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Frame(NamedTuple):
    """A slice of a series.

    Attributes:
        path: Its file.
        number: Number of the frame in its file, from 1 on; 0 for a file with a single slice.
        instance_uid: Identifies the file. This UID and the next four are empty if they were removed.
        class_uid: Kind of the file.
        series_uid: Identifies the series.
        study_uid: Identifies the study.
        frame_of_reference_uid: Identifies the coordinate system.
        position: Centre of the first pixel in millimetres, on DICOM's axes.
        orientation: Direction of a row, then of a column, on DICOM's axes.
        pixel_spacing: Height and width of a pixel in millimetres.
        size: Number of rows and columns.
        thickness_mm: Distance of slices, or their thickness, as the file states it; None if it does not.
        description: Modality, number and description of the series.
    """

    path: Path
    number: int
    instance_uid: str
    class_uid: str
    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]
    size: tuple[int, int]
    thickness_mm: float | None
    description: str


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """The frames of a series, sorted along their normal."""

    frames: tuple[Frame, ...]

    @property
    def paths(self) -> list[Path]:
        """The files of the series, each once."""
        return list(dict.fromkeys(frame.path for frame in self.frames))


def is_dicom(path: Path) -> bool:
    """Tell by its first bytes whether a file is a DICOM file. The name does not matter."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        # It may be a slice. Whoever reads it gets the reason.
        return True


def find_series(paths: Iterable[Path]) -> tuple[list[Volume], dict[str, str]]:
    """List the series of DICOM files in any order. No pixel is read.

    Localizers and files of other kinds are passed over.

    Returns:
        The volumes, and the problems of the series that are no volume, by their names. A damaged file may belong to
        any series, so it has a problem of its own, under its own name.
    """
    by_series: dict[str, dict[tuple[str, int], Frame]] = defaultdict(dict)
    problems: dict[str, str] = {}
    for path in paths:
        name = f"{path.parent.name}/{path.name}"
        try:
            # The library reads an attribute when it is asked for it, so each step can meet a damaged one.
            with reading(path, "its header cannot be read", "export it again"):
                header = read_dataset(path, stop_before_pixels=True)
                if not is_scan(path, header):
                    continue
                name = series_name(path, header)
                for frame in read_frames(path, header):
                    # A copy of a file has the same UID, and counts once.
                    by_series[name].setdefault((frame.instance_uid or str(path), frame.number), frame)
        except InputError as error:
            problems.setdefault(name, str(error))
    volumes = []
    # A series with a file that cannot be used lacks a slice.
    for name in sorted(by_series.keys() - problems.keys()):
        try:
            volumes.append(build_volume(name, list(by_series[name].values())))
        except InputError as error:
            problems[name] = str(error)
    return volumes, problems


def is_scan(path: Path, header: Any) -> bool:
    """Tell whether a file holds slices of a scan.

    Raises:
        InputError: If the file does not say what it holds.
    """
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if not kind and "Modality" not in header:
        raise InputError(f"{path}: not a whole DICOM file (no SOPClassUID and no Modality); export it again")
    # A program that removes the patient's data may have removed the kind of the file, too.
    known = str(kind) in SCAN_CLASSES if kind else header.get("Modality") in ("MR", "CT") and "Rows" in header
    return known and "LOCALIZER" not in (header.get("ImageType") or ())


def series_name(path: Path, header: Any) -> str:
    """Return the UID of the series of a file. Without a UID, a folder is a series, and has the name of the folder.

    Raises:
        InputError: If the UID is none.
    """
    uid = str(header.get("SeriesInstanceUID") or "")
    # The output files are named by it, so a file that somebody made up must not lead to another folder.
    if uid and not re.fullmatch(r"[0-9.]+", uid, re.ASCII):
        raise InputError(f"{path}: expected digits and dots as SeriesInstanceUID, got {uid!r:.80}; export it again")
    return uid or path.resolve().parent.name


def check_uids(series: DicomSeries) -> None:
    """Check that a segmentation or a structure set can refer to a series.

    Raises:
        InputError: If a file has no UID.
    """
    for frame in series.frames:
        uids = {
            "SOPClassUID": frame.class_uid,
            "SOPInstanceUID": frame.instance_uid,
            "SeriesInstanceUID": frame.series_uid,
            "StudyInstanceUID": frame.study_uid,
            "FrameOfReferenceUID": frame.frame_of_reference_uid,
        }
        if missing := [name for name, uid in uids.items() if not uid]:
            raise InputError(
                f"{frame.path}: has no {missing[0]}, which contours have to name; export it with its UIDs, or choose "
                f"--format nifti"
            )


def read_frames(path: Path, header: Any) -> list[Frame]:
    """Read the header of a file: one frame, or several of an enhanced file.

    Raises:
        InputError: If the file lacks what a volume needs, or if its pixels cannot be decoded here.
    """
    if (colours := header.get("PhotometricInterpretation")) != "MONOCHROME2":
        raise InputError(f"{path}: expected grey values with white as the highest (MONOCHROME2), got {colours}")
    check_codec(path, header)
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [read_frame(path, 0, header, [header])]
    shared = list(header.get("SharedFunctionalGroupsSequence", ()))
    return [
        read_frame(path, number, header, [own, *shared])
        for number, own in enumerate(header.PerFrameFunctionalGroupsSequence, start=1)
    ]


def check_codec(path: Path, header: Any) -> None:
    """Check that the pixels of a file are not compressed, or that a package can decode them.

    Raises:
        InputError: If there is no such package. The message names those that can.
    """
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    with reading(path, "its pixels are stored in an unknown way", "export it uncompressed"):
        decoder = get_decoder(syntax)
    if not decoder.is_available:
        # Lines like `pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-openjpeg>=2.0`.
        packages = " or ".join(line.partition("requires ")[2] for line in decoder.missing_dependencies)
        raise InputError(
            f"{path}: its pixels are compressed ({syntax.name}), and no package here decodes them; "
            f"install with pip {packages}, or export it uncompressed"
        )


def read_frame(path: Path, number: int, dataset: Any, groups: Sequence[Any]) -> Frame:
    """Read one frame.

    Args:
        path: The file.
        number: Number of the frame; 0 for a file with a single slice.
        dataset: The header.
        groups: Where to look for the place of the frame: the header itself, or the functional groups.
    """

    def find(sequence: str, name: str) -> Any:
        for group in groups:
            for item in (group, *(group.get(sequence) or ())):
                if item.get(name) is not None:
                    return item[name].value
        return None

    position = find("PlanePositionSequence", "ImagePositionPatient")
    orientation = find("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = find("PixelMeasuresSequence", "PixelSpacing")
    needed = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation, "PixelSpacing": spacing}
    for (name, value), length in zip(needed.items(), (3, 6, 2), strict=True):
        if value is None or len(value) != length:
            raise InputError(f"{path}: has no valid {name}, so its place in the patient is not known; export it again")
    thickness = find("PixelMeasuresSequence", "SpacingBetweenSlices") or find(
        "PixelMeasuresSequence", "SliceThickness"
    )
    return Frame(
        path=path,
        number=number,
        instance_uid=str(dataset.get("SOPInstanceUID") or ""),
        class_uid=str(dataset.get("SOPClassUID") or ""),
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        study_uid=str(dataset.get("StudyInstanceUID") or ""),
        frame_of_reference_uid=str(dataset.get("FrameOfReferenceUID") or ""),
        position=tuple(map(float, position)),
        orientation=tuple(map(float, orientation)),
        pixel_spacing=tuple(map(float, spacing)),
        size=(int(dataset.Rows), int(dataset.Columns)),
        thickness_mm=abs(float(thickness)) if thickness else None,
        description=describe_series(dataset),
    )


def describe_series(header: Any) -> str:
    """Return modality, number and description of the series of a file, without control characters."""
    words = (str(header.get(name) or "") for name in ("Modality", "SeriesNumber", "SeriesDescription"))
    # They go to the terminal, and a sequence of control characters could do there what it wants.
    return " ".join("".join(filter(str.isprintable, word)) for word in words if word)


def read_dataset(path: Path, stop_before_pixels: bool = False) -> Any:
    """Read a DICOM file.

    Raises:
        InputError: If it is damaged.
    """
    import pydicom

    with reading(path, "not a whole DICOM file", "export it again"):
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)


def build_volume(name: str, frames: list[Frame]) -> Volume:
    """Sort the frames of a series along their normal, and make a volume of them.

    Args:
        name: Name of the volume.
        frames: The frames, in any order.

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
        check_steps(first, positions, normal)
    series = DicomSeries(tuple(frames))
    source = first.path if len(series.paths) == 1 else first.path.parent
    note = first.description
    if not note.startswith("MR"):
        note += " (the models were trained on MR)"
    shape = (first.size[1], first.size[0], len(frames))
    return Volume(name, source, shape, TO_RAS @ affine, partial(read_voxels, series), series, note)


def check_planes(frames: list[Frame]) -> list[Frame]:
    """Return the frames of a series sorted along their normal, if they are parallel and have one grid.

    Raises:
        InputError: If not.
    """
    first = frames[0]
    directions = np.reshape(first.orientation, (2, 3))
    if np.abs(directions @ directions.T - np.eye(2)).max() > DIRECTION_TOLERANCE:
        raise InputError(f"{first.path}: its rows and columns are not at right angles; export it again")
    for frame in frames:
        if np.abs(np.subtract(frame.orientation, first.orientation)).max() > DIRECTION_TOLERANCE:
            raise InputError(f"{frame.path}: not parallel to {first.path} of the same series; export one stack alone")
        grid, expected = ((*one.size, *one.pixel_spacing) for one in (frame, first))
        if not np.allclose(grid, expected, rtol=1e-3):
            raise InputError(
                f"{frame.path}: expected {expected[0]} x {expected[1]} pixels of {expected[2]:g} x {expected[3]:g} mm "
                f"as in {first.path} of the same series, got {grid[0]} x {grid[1]} of {grid[2]:g} x {grid[3]:g} mm"
            )
        if frame.frame_of_reference_uid != first.frame_of_reference_uid:
            raise InputError(f"{frame.path}: has another frame of reference than {first.path} of the same series")
    normal = np.cross(*directions)
    # Not by the number of the instance: some scanners number from the feet, some from the head, and some not at all.
    return sorted(frames, key=lambda frame: float(np.dot(frame.position, normal)))


def check_steps(first: Frame, positions: np.ndarray, normal: np.ndarray) -> None:
    """Check that sorted slices have equal distances.

    Args:
        first: The first slice, for the message.
        positions: Shape `(slices, 3)`.
        normal: The direction in which they are sorted.

    Raises:
        InputError: If not.
    """
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
    tolerance = min(STEP_TOLERANCE_MM, 0.05 * usual)
    if (odd := np.flatnonzero(np.abs(distances - usual) > tolerance)).size:
        x, y, z = positions[odd[0]]
        missing = round(distances[odd[0]] / usual) - 1
        what = f"{missing} slices are missing" if missing > 0 else "the distance changes"
        raise InputError(
            f"{where}: expected slices {usual:.2f} mm apart, but got {distances[odd[0]]:.2f} mm after "
            f"({x:g}, {y:g}, {z:g}) mm: {what}; export the whole series"
        )
    if np.abs(steps - np.median(steps, axis=0)).max() > STEP_TOLERANCE_MM:
        raise InputError(f"{where}: its slices do not lie in one line; export one stack alone")


def read_voxels(series: DicomSeries) -> np.ndarray:
    """Read the pixels of a series: float32, shape `(columns, rows, slices)`.

    The values are those after the modality LUT or the rescale slope and intercept of each slice.

    Raises:
        InputError: If the pixels of a file cannot be decoded.
    """
    rows, columns = series.frames[0].size
    voxels = np.empty((len(series.frames), rows, columns), dtype=np.float32)
    placed = sorted(enumerate(series.frames), key=lambda place: (place[1].path, place[1].number))
    for path, group in groupby(placed, key=lambda place: place[1].path):
        with reading(path, "its pixels cannot be decoded", "export it uncompressed"):
            dataset = read_dataset(path)
            pixels = dataset.pixel_array.reshape(-1, rows, columns)
            for index, frame in group:
                voxels[index] = rescale(pixels[max(frame.number, 1) - 1], frame, dataset)
    return voxels.transpose(2, 1, 0)


def rescale(pixels: np.ndarray, frame: Frame, dataset: Any) -> np.ndarray:
    """Return the values of a frame after its modality LUT, or its slope and intercept.

    Args:
        pixels: Its stored values.
        frame: The frame.
        dataset: The header of its file.
    """
    from pydicom.pixels import apply_modality_lut

    if frame.number == 0:
        return apply_modality_lut(pixels, dataset)
    own = dataset.PerFrameFunctionalGroupsSequence[frame.number - 1]
    for group in (own, *dataset.get("SharedFunctionalGroupsSequence", ())):
        for transformation in group.get("PixelValueTransformationSequence", ()):
            return apply_modality_lut(pixels, transformation)
    return pixels
