"""Find structure sets (RTSTRUCT) and segmentations (SEG) in DICOM files, and the scans that they were drawn on."""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.dicom.files import DicomSeries, read_dataset
from gi_segmentation.formats.dicom.header import hush_pydicom
from gi_segmentation.formats.dicom.kinds import read_text
from gi_segmentation.formats.dicom.read_contours import (
    choose_rois,
    describe_places,
    list_rois,
    read_contour_masks,
    read_contour_references,
)
from gi_segmentation.formats.dicom.read_segments import (
    choose_segments,
    own_volume,
    read_segment_masks,
    read_segment_references,
)
from gi_segmentation.formats.dicom.references import find_matches, find_volume
from gi_segmentation.formats.dicom.series import FoundSeries
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume

CONTOURS_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
# A segmentation with a bit or a fraction for each voxel and segment, and one as a label map.
SEGMENTS_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")


class FoundStructures(NamedTuple):
    """What was found in DICOM files.

    Attributes:
        structures: The structure sets and segmentations, sorted by their scans and their times. A scan may have
            several, see `formats.structures.choose_structures`.
        problems: Why others cannot be used, by their files.
        remarks: What was passed over, and why.
    """

    structures: list[StructureSet]
    problems: dict[Path, str]
    remarks: list[str]


def find_dicom_structures(
    paths: Iterable[Path],
    found: FoundSeries,
    interpolate: bool = False,
    alone: bool = False,
    predicted: bool = False,
) -> FoundStructures:
    """List the structure sets and segmentations in DICOM files. No mask is made.

    They are matched to scans by the identifiers that they name: images, series, frame of reference.

    Args:
        paths: The DICOM files, in any order. Those that are slices of scans are passed over.
        found: The scans, from `find_series`.
        interpolate: Whether slices between those with contours are filled. By default, they stay empty.
        alone: Whether a segmentation whose scan is not there is read on its own grid.
        predicted: Whether a structure set without any contour is read. A program that has found nothing writes one.
    """
    slices = {frame.path for volume in found.volumes for frame in volume.origin.frames}
    structures = FoundStructures([], {}, [])
    seen: dict[str, Path] = {}
    for path in sorted({*paths} - slices):
        try:
            with reading(path, "its structures cannot be read", "export it again"), hush_pydicom():
                dataset = read_structure_file(path)
                if dataset is None:
                    continue
                uid = read_text(dataset, "SOPInstanceUID") or str(path)
                if (original := seen.setdefault(uid, path)) != path:
                    structures.remarks.append(f"{path}: passed over: a copy of {original} (the same SOPInstanceUID)")
                elif read_text(dataset, "ApprovalStatus") == "REJECTED":
                    structures.remarks.append(f"{path}: passed over: somebody has rejected it (ApprovalStatus)")
                else:
                    is_contours = find_class(dataset) == CONTOURS_CLASS
                    one = (
                        open_contours(path, dataset, found, interpolate, predicted)
                        if is_contours
                        else open_segments(path, dataset, found, alone)
                    )
                    structures.structures.append(replace(one, notes=(*one.notes, *note_patient(dataset, one.volume))))
        except InputError as error:
            structures.problems[path] = str(error)
    structures.structures.sort(key=lambda one: (one.volume.name, one.created, one.paths))
    return structures


def note_patient(dataset: Any, volume: Volume) -> list[str]:
    """Return a note if a file names another patient than the scan that it was drawn on. The numbers are not shown."""
    number = read_text(dataset, "PatientID")
    # A segmentation on its own grid has no scan.
    own = volume.origin.frames[0].patient[0] if isinstance(volume.origin, DicomSeries) else ""
    return ["has another PatientID than its scan"] * bool(number and own and number != own)


def read_structure_file(path: Path) -> Any:
    """Read a structure set or a segmentation without its pixels; None if the file is something else."""
    try:
        dataset = read_dataset(path, stop_before_pixels=True)
    except InputError:
        # A file without a header is a problem of its series already.
        return None
    return dataset if find_class(dataset) in (CONTOURS_CLASS, *SEGMENTS_CLASSES) else None


def find_class(dataset: Any) -> str:
    """Return the UID of what a file holds; empty if it does not say."""
    return read_text(dataset, "SOPClassUID") or read_text(dataset.file_meta, "MediaStorageSOPClassUID")


def open_contours(path: Path, dataset: Any, found: FoundSeries, interpolate: bool, predicted: bool) -> StructureSet:
    """Open a structure set.

    Raises:
        InputError: If its scan is not there, or if it has no contours, and they may not be missing.
    """
    rois = list_rois(dataset)
    if not predicted and not any(roi.contours for roi in rois):
        raise InputError(f"{path}: has no closed contours in its {len(rois)} ROIs; export it again")
    volume, how = find_volume(read_contour_references(path, dataset, rois), found)
    names, empty, notes = choose_rois(rois, volume)
    notes += describe_places(path, [roi for roi in rois if roi.name in names], volume, interpolate)
    status = read_text(dataset, "ApprovalStatus")
    return StructureSet(
        volume,
        "rtstruct",
        (path,),
        tuple(names),
        partial(read_contour_masks, path, volume, interpolate),
        label=read_text(dataset, "StructureSetLabel") or read_text(dataset, "SeriesDescription"),
        created=find_time(dataset, ("StructureSet", "InstanceCreation", "Series")),
        approved=None if not status else status == "APPROVED",
        empty=tuple(empty),
        notes=(*how, *notes),
        reading="interpolated" * interpolate,
    )


def open_segments(path: Path, dataset: Any, found: FoundSeries, alone: bool) -> StructureSet:
    """Open a segmentation.

    Raises:
        InputError: If its scan is not there and it may not stand alone, or if its frames have no places.
    """
    references = read_segment_references(path, dataset)
    names, notes = choose_segments(dataset)
    if not names:
        raise InputError(f"{path}: names no segments; export it again")
    if alone and not find_matches(references, found.volumes)[0]:
        volume, how = own_volume(path, dataset, references), ["read on its own grid, without its scan"]
    else:
        volume, how = find_volume(references, found)
    return StructureSet(
        volume,
        "seg",
        (path,),
        tuple(names),
        partial(read_segment_masks, path, volume),
        label=read_text(dataset, "ContentLabel") or read_text(dataset, "SeriesDescription"),
        created=find_time(dataset, ("Content", "InstanceCreation", "Series")),
        notes=(*how, *notes),
    )


def find_time(dataset: Any, kinds: Iterable[str]) -> str:
    """Return the first date and time that a file has, as `YYYYMMDDHHMMSS`; empty if it has none.

    Args:
        dataset: The file.
        kinds: The beginnings of the names of the attributes, which end with `Date` and `Time`.
    """
    for kind in kinds:
        date = read_text(dataset, f"{kind}Date")
        if re.fullmatch(r"\d{8}", date, re.ASCII):
            # A time may have a fraction of a second, or lack the seconds.
            time = re.match(r"\d{0,6}", read_text(dataset, f"{kind}Time"), re.ASCII)
            return date + (time[0] if time else "").ljust(6, "0")
    return ""
