"""Write masks as a DICOM segmentation (SEG)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation import __version__
from gi_segmentation.errors import InputError
from gi_segmentation.formats.algorithm import NAME, Algorithm
from gi_segmentation.formats.dicom.files import DicomSeries, Frame
from gi_segmentation.formats.dicom.header import SeriesHeader, hush_pydicom, new_item, plain_text, read_series_header
from gi_segmentation.formats.dicom.organs import (
    STANDARD_SCHEME,
    TARGET_KINDS,
    DicomOrgan,
    describe_organs,
    series_title,
)
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from gi_segmentation.schema import SLICE_THICKNESS_MM

# What highdicom requires of each slice, besides its position. The patient and the study are copied afterwards.
NOT_NEEDED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
# The class of a file with one slice. Highdicom gets each frame as such a file.
SINGLE_FRAME = "1.2.840.10008.5.1.4.1.1.4"
# Highdicom reads a volume only if its slices have equal distances. Some scanners round positions to 0.1 mm.
EQUAL_DISTANCES_MM = 1e-3


def write_dicom_seg(volume: Volume, masks: np.ndarray, path: Path, algorithm: Algorithm, labels: LabelSet) -> None:
    """Write a segmentation with a segment per organ. It refers to the series, and shares its frame of reference.

    Args:
        volume: A DICOM series.
        masks: bool, shape `(organs, columns, rows, slices)`. Organs may overlap.
        path: File to write.
        algorithm: What made the masks.
        labels: The names of the organs, and their colours.
    """
    segmentation = build_dicom_seg(volume.origin, masks, algorithm, labels, read_series_header(volume.origin))
    with hush_pydicom():
        segmentation.save_as(path)


def build_dicom_seg(
    series: DicomSeries, masks: np.ndarray, algorithm: Algorithm, labels: LabelSet, header: SeriesHeader
) -> Any:
    """Return a segmentation for a series.

    Args:
        series: The series.
        masks: As in `write_dicom_seg`; for a trial, they may have fewer rows and columns than the series.
        algorithm: What made the masks.
        labels: As in `write_dicom_seg`.
        header: From `read_series_header`.

    Raises:
        InputError: If the series is sheared.
    """
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    identification = highdicom.AlgorithmIdentificationSequence(
        NAME,
        codes.DCM.ArtificialIntelligence,
        algorithm.version,
        parameters={plain_text(name, 200): plain_text(commit, 200) for name, commit in algorithm.commits.items()},
    )
    organs = describe_organs(labels, header.subject)
    title = series_title(organs)
    segments = [
        highdicom.seg.SegmentDescription(
            organ.number,
            organ.name,
            find_category(organ),
            highdicom.sr.CodedConcept(*organ.code),
            highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            identification,
            display_color=highdicom.color.CIELabColor.from_rgb(*organ.colour),
        )
        for organ in organs
    ]
    for organ, segment in zip(organs, segments, strict=True):
        organ.add_side(segment.SegmentedPropertyTypeCodeSequence[0])
    check_shear(series)
    columns, rows = masks.shape[1:3]
    segmentation = highdicom.seg.Segmentation(
        describe_sources(series, (rows, columns), header),
        masks.transpose(3, 2, 1, 0).astype(np.uint8),
        highdicom.seg.SegmentationTypeValues.BINARY,
        segments,
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=NAME,
        software_versions=__version__,
        # The attribute is mandatory, and a program has no serial number.
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=title,
        series_description=title,
    )
    refer_to_frames(segmentation, series.frames)
    segmentation.update(header.subject)
    return segmentation


def find_category(organ: DicomOrgan) -> Any:
    """Return the code of what kind of structure an organ is (CID 7150 of the standard)."""
    from pydicom.sr.codedict import codes

    # A target volume is drawn for a treatment, and is no part of the body.
    if organ.kind in TARGET_KINDS:
        return codes.SCT.SpatialAndRelationalConcept
    return codes.SCT.Organ if organ.code[1] == STANDARD_SCHEME else codes.SCT.AnatomicalStructure


def equidistant_places(series: DicomSeries) -> np.ndarray:
    """Return the places of slices at equal distances between the first and the last one: mm, shape `(slices, 3)`."""
    first, last = (np.array(series.frames[index].position) for index in (0, -1))
    return np.linspace(first, last, len(series.frames))


def check_shear(series: DicomSeries) -> None:
    """Check that the slices of a series lie above each other, as they do unless the gantry of the scanner was tilted.

    A segmentation has the place of each slice. But programs that make a grid of it (dcmqi, ITK) take the slices to lie
    above each other, and so they place a sheared one elsewhere.

    Raises:
        InputError: If a slice would be moved by more than half a pixel.
    """
    first = series.frames[0]
    way = equidistant_places(series)[-1] - first.position
    normal = np.cross(*np.reshape(first.orientation, (2, 3)))
    beside_mm = float(np.linalg.norm(way - normal * (way @ normal)))
    if beside_mm > min(first.pixel_spacing) / 2:
        raise InputError(
            f"its slices are shifted by {beside_mm:.1f} mm from the first to the last one (a tilted gantry), and "
            f"programs place such a segmentation differently; use the RTSTRUCT"
        )


def describe_sources(series: DicomSeries, size: tuple[int, int], header: SeriesHeader) -> list[Any]:
    """Describe each slice of a series as a file of its own, with nothing but its place.

    Highdicom copies what it finds in the header of a file, and stops at what it does not expect. It also takes only
    one file with several frames, and all of its frames.

    Args:
        series: The series.
        size: Rows and columns of the masks.
        header: From `read_series_header`.

    Returns:
        A header for each slice. Its SOPInstanceUID is the index of the slice.
    """
    from pydicom.valuerep import format_number_as_ds as decimal

    first: Frame = series.frames[0]
    places, equal = np.array([frame.position for frame in series.frames]), equidistant_places(series)
    if np.abs(places - equal).max() > EQUAL_DISTANCES_MM:
        places = equal
    thickness_mm = header.thickness_mm
    if thickness_mm is None:
        thickness_mm = SLICE_THICKNESS_MM if len(equal) == 1 else float(np.linalg.norm(equal[1] - equal[0]))
    shared = new_item(
        **dict.fromkeys(NOT_NEEDED, ""),
        SOPClassUID=SINGLE_FRAME,
        StudyInstanceUID=first.study_uid,
        SeriesInstanceUID=first.series_uid,
        FrameOfReferenceUID=first.frame_of_reference_uid,
        PositionReferenceIndicator="",
        Rows=size[0],
        Columns=size[1],
        ImageOrientationPatient=[decimal(value) for value in first.orientation],
        PixelSpacing=[decimal(value) for value in first.pixel_spacing],
        SliceThickness=decimal(thickness_mm),
    )
    shared.update(header.compression)
    sources = []
    for index, place in enumerate(places):
        source = new_item(SOPInstanceUID=str(index), ImagePositionPatient=[decimal(float(value)) for value in place])
        source.update(shared)
        sources.append(source)
    return sources


def refer_to_frames(segmentation: Any, frames: Sequence[Frame]) -> None:
    """Replace the references to the slices of `describe_sources` by those to their files and frames."""
    # The segments share the references to a slice, so each is replaced once.
    sources = {
        id(source): source
        for group in segmentation.PerFrameFunctionalGroupsSequence
        for derivation in group.DerivationImageSequence
        for source in derivation.SourceImageSequence
    }
    for source in sources.values():
        frame = frames[int(source.ReferencedSOPInstanceUID)]
        source.ReferencedSOPClassUID = frame.class_uid
        source.ReferencedSOPInstanceUID = frame.instance_uid
        if frame.number:
            source.ReferencedFrameNumber = frame.number
    # As a whole, the segmentation names each file once.
    files = dict.fromkeys((frame.class_uid, frame.instance_uid) for frame in frames)
    images = [new_item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for kind, uid in files]
    segmentation.SourceImageSequence = images
    (series,) = segmentation.ReferencedSeriesSequence
    series.ReferencedInstanceSequence = images
