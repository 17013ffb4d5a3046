"""Write masks as contours in a DICOM structure set (RTSTRUCT), which planning systems read."""

import datetime
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation import __version__
from gi_segmentation.formats.algorithm import NAME, Algorithm
from gi_segmentation.formats.dicom.files import DicomSeries, Frame
from gi_segmentation.formats.dicom.header import (
    SeriesHeader,
    hush_pydicom,
    new_item,
    plain_text,
    read_series_header,
    set_attributes,
)
from gi_segmentation.formats.dicom.organs import DicomOrgan, describe_organs, series_title
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet

# A reference to the study as a whole. DICOM has retired the class, but structure sets still name it.
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
# Letters that a description may have (short text in the standard).
DESCRIPTION_LENGTH = 1024


def write_rtstruct(volume: Volume, masks: np.ndarray, path: Path, algorithm: Algorithm, labels: LabelSet) -> None:
    """Write a structure set with a region of interest (ROI) for each organ. An organ without a voxel has no contour.

    Args:
        volume: A DICOM series.
        masks: bool, shape `(organs, columns, rows, slices)`.
        path: File to write.
        algorithm: What made the masks.
        labels: The names of the organs, and their colours.
    """
    structure_set = build_structure_set(volume.origin, masks, algorithm, labels, read_series_header(volume.origin))
    with hush_pydicom():
        structure_set.save_as(path, enforce_file_format=True)


def build_structure_set(
    series: DicomSeries, masks: np.ndarray, algorithm: Algorithm, labels: LabelSet, header: SeriesHeader
) -> Any:
    """Return a structure set for a series.

    Args:
        series: The series.
        masks: As in `write_rtstruct`; for a trial, they may have fewer rows and columns than the series.
        algorithm: What made the masks.
        labels: As in `write_rtstruct`.
        header: From `read_series_header`.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    organs = describe_organs(labels, header.subject)
    dataset.update(header.subject)
    now = datetime.datetime.now()
    set_attributes(
        dataset,
        SOPClassUID=meta.MediaStorageSOPClassUID,
        SOPInstanceUID=meta.MediaStorageSOPInstanceUID,
        Modality="RTSTRUCT",
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=1,
        SeriesDescription=series_title(organs),
        OperatorsName="",
        Manufacturer=NAME,
        ManufacturerModelName=NAME,
        SoftwareVersions=__version__,
        StructureSetLabel=NAME,
        StructureSetDescription=plain_text(algorithm.describe(), DESCRIPTION_LENGTH),
        StructureSetDate=now.strftime("%Y%m%d"),
        StructureSetTime=now.strftime("%H%M%S"),
        FrameOfReferenceUID=series.frames[0].frame_of_reference_uid,
        PositionReferenceIndicator="",
        ReferencedFrameOfReferenceSequence=[reference_series(series)],
        StructureSetROISequence=[],
        ROIContourSequence=[],
        RTROIObservationsSequence=[],
        ApprovalStatus="UNAPPROVED",
    )
    for organ, mask in zip(organs, masks, strict=True):
        roi, contours, observation = describe_roi(organ, mask, series, algorithm)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(contours)
        dataset.RTROIObservationsSequence.append(observation)
    return dataset


def reference_series(series: DicomSeries) -> Any:
    """Return the item that names the frame of reference, the study, the series and all its files."""
    first = series.frames[0]
    files = dict.fromkeys((frame.class_uid, frame.instance_uid) for frame in series.frames)
    images = [new_item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for kind, uid in files]
    its_series = new_item(SeriesInstanceUID=first.series_uid, ContourImageSequence=images)
    study = new_item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=first.study_uid,
        RTReferencedSeriesSequence=[its_series],
    )
    return new_item(FrameOfReferenceUID=first.frame_of_reference_uid, RTReferencedStudySequence=[study])


def describe_roi(
    organ: DicomOrgan, mask: np.ndarray, series: DicomSeries, algorithm: Algorithm
) -> tuple[Any, Any, Any]:
    """Return the items of an organ: its name, its contours, and what it is.

    Args:
        organ: The organ.
        mask: bool, shape `(columns, rows, slices)`.
        series: The series.
        algorithm: What made the mask.
    """
    value, scheme, meaning = organ.code
    code = new_item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)
    organ.add_side(code)
    roi = new_item(
        ROINumber=organ.number,
        ReferencedFrameOfReferenceUID=series.frames[0].frame_of_reference_uid,
        ROIName=organ.name,
        ROIGenerationAlgorithm="AUTOMATIC",
        ROIGenerationDescription=algorithm.version,
    )
    contours = new_item(ReferencedROINumber=organ.number, ROIDisplayColor=list(organ.colour))
    if items := [
        describe_contour(points, frame)
        for frame, plane in zip(series.frames, mask.transpose(2, 1, 0), strict=True)
        for points in trace_contours(plane)
    ]:
        contours.ContourSequence = items
    observation = new_item(
        ObservationNumber=organ.number,
        ReferencedROINumber=organ.number,
        RTROIInterpretedType=organ.kind,
        ROIInterpreter="",
        RTROIIdentificationCodeSequence=[code],
    )
    return roi, contours, observation


def describe_contour(points: np.ndarray, frame: Frame) -> Any:
    """Return the item of a contour.

    Args:
        points: Column and row of each point, shape `(points, 2)`. The centre of the first pixel is (0, 0).
        frame: The slice.
    """
    height_mm, width_mm = frame.pixel_spacing
    # A step to the next column goes along a row, which is the first of the two directions.
    steps = np.reshape(frame.orientation, (2, 3)) * [[width_mm], [height_mm]]
    places = frame.position + points @ steps
    image = new_item(ReferencedSOPClassUID=frame.class_uid, ReferencedSOPInstanceUID=frame.instance_uid)
    if frame.number:
        image.ReferencedFrameNumber = frame.number
    return new_item(
        ContourImageSequence=[image],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(places),
        # A number may have 16 characters. Micrometres are exact enough.
        ContourData=[f"{value:.3f}" for value in places.ravel()],
    )


def trace_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the connected components of a mask, each as one contour. A keyhole connects a hole to the outside.

    A contour runs half-way between the centres of pixels inside and outside. So a program that asks which centres lie
    inside gets exactly the mask back. A single pixel becomes a diamond.

    DICOM also has contours that are combined by exclusive or. Few planning systems read them, and all read keyholes: a
    channel without a width, which the contour takes to the hole and back.

    Args:
        mask: bool, shape `(rows, columns)`.

    Returns:
        For each component, column and row of its points, shape `(points, 2)`. The first point is not repeated at the
        end.

    Source: DICOM PS3.3, C.8.8.6.3, https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_c.8.8.6.html

    Example:
        >>> [contour.tolist() for contour in trace_contours(np.array([[True]]))]
        [[[-0.5, 0.0], [0.0, -0.5], [0.5, 0.0], [0.0, 0.5]]]
    """
    # Imported here, because `--help` and input of other kinds do not need it. It comes with Matplotlib.
    import contourpy

    if not mask.any():
        return []
    # Only the box around the mask, with a border of background, so that each contour closes.
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1).astype(float)
    generator = contourpy.contour_generator(z=box, fill_type=contourpy.FillType.OuterOffset)
    # All values are 0 or 1. Inside is what lies above 0.5; the upper limit is never reached.
    filled: Any = generator.filled(0.5, 2.0)
    corner = np.array([columns[0] - 1, rows[0] - 1])
    contours = []
    for points, ends in zip(*filled, strict=True):
        # The first ring is the border of a component, and the others are its holes. A ring ends with its first point.
        border, *holes = [remove_middle_points(points[a : b - 1]) for a, b in pairwise(ends.tolist())]
        contours.append(cut_keyholes(border, holes) + corner)
    return contours


def remove_middle_points(ring: np.ndarray) -> np.ndarray:
    """Remove the points of a closed ring that lie on a straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def cut_keyholes(border: np.ndarray, holes: Sequence[np.ndarray]) -> np.ndarray:
    """Connect the holes of a component to its border, each where both are nearest.

    Args:
        border: Closed ring of points, shape `(points, 2)`.
        holes: Closed rings inside, which run the other way round.

    Returns:
        One closed ring.

    Example:
        >>> square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
        >>> cut_keyholes(square, [np.array([[1, 1], [1, 2], [2, 1]])]).tolist()
        [[0, 0], [1, 1], [1, 2], [2, 1], [1, 1], [0, 0], [4, 0], [4, 4], [0, 4]]
    """
    left = [(*find_nearest(border, hole), hole) for hole in holes]
    while left:
        # The nearest hole comes first, so that no channel runs through another hole.
        _, point, start, hole = left.pop(int(np.argmin([distance for distance, *_ in left])))
        at = int(np.flatnonzero((border == point).all(axis=1))[0])
        around = np.roll(hole, -start, axis=0)
        border = np.concatenate([border[: at + 1], around, around[:1], border[at:]])
        # The other holes may be nearer to this one than to the border.
        left = [
            (*min((distance, point, start), find_nearest(hole, other), key=lambda found: found[0]), other)
            for distance, point, start, other in left
        ]
    return border


def find_nearest(ring: np.ndarray, hole: np.ndarray) -> tuple[float, np.ndarray, int]:
    """Find where a hole is nearest to a ring.

    Returns:
        The squared distance, the point of the ring, and the index of the hole's point.
    """
    distances = np.square(ring[:, None] - hole[None]).sum(axis=2)
    at, start = np.unravel_index(distances.argmin(), distances.shape)
    return float(distances[at, start]), ring[at], int(start)
