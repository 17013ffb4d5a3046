"""Structure sets as planning systems write them, and label maps turned into DICOM by programs of others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from dataset_builder.series import TO_LPS
from gi_segmentation.formats.volumes import Volume
from tests.support.dicom import item

PLASTIMATCH = shutil.which("plastimatch")
# The command of dcmqi that writes a segmentation. pip puts it beside Python.
ITKIMAGE2SEGIMAGE = shutil.which("itkimage2segimage", path=Path(sys.executable).parent)
SQUARE = np.array([[2.0, 3.0], [8.0, 3.0], [8.0, 9.0], [2.0, 9.0]])
CODE = {"CodeValue": "113343008", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Organ"}


def at(points: np.ndarray, place: float) -> np.ndarray:
    """Columns and rows of points, shape `(points, 2)`, with the slice they lie on: shape `(points, 3)`."""
    return np.column_stack([points, np.full(len(points), place)])


def describe_contour(points: np.ndarray, volume: Volume, kind: str) -> Dataset:
    """The item of a contour, from column, row and slice of its points: shape `(points, 3)`."""
    affine = TO_LPS @ volume.affine
    places = points @ affine[:3, :3].T + affine[:3, 3]
    contour = item(ContourGeometricType=kind, NumberOfContourPoints=len(points))
    contour.ContourData = [f"{value:.4f}" for value in places.ravel()]
    frames = volume.origin.frames
    index = min(max(round(float(points[:, 2].mean())), 0), len(frames) - 1)
    image = item(ReferencedSOPClassUID=frames[index].class_uid, ReferencedSOPInstanceUID=frames[index].instance_uid)
    contour.ContourImageSequence = [image]
    return contour


def write_structure_set(
    path: Path,
    volume: Volume,
    rois: Sequence[tuple[str, Sequence[np.ndarray]]],
    kind: str = "CLOSED_PLANAR",
    **values: str,
) -> Path:
    """Write contours with nothing but what the standard wants.

    Args:
        path: File to write.
        volume: The scan.
        rois: Name, and column, row and slice of the points of each contour: shape `(points, 3)`.
        kind: The type of all contours.
        values: More attributes.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    frames = volume.origin.frames
    uid = frames[0].frame_of_reference_uid
    images = [item(ReferencedSOPClassUID=one.class_uid, ReferencedSOPInstanceUID=one.instance_uid) for one in frames]
    series = item(SeriesInstanceUID=frames[0].series_uid, ContourImageSequence=images)
    study = item(ReferencedSOPInstanceUID=frames[0].study_uid, RTReferencedSeriesSequence=[series])
    dataset.ReferencedFrameOfReferenceSequence = [item(FrameOfReferenceUID=uid, RTReferencedStudySequence=[study])]
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.SeriesInstanceUID, dataset.StructureSetLabel = "RTSTRUCT", generate_uid(), "PLAN"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois, start=1):
        roi = item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=uid, ROIGenerationAlgorithm="MANUAL")
        drawn = item(ReferencedROINumber=number)
        if contours:
            drawn.ContourSequence = [describe_contour(points, volume, kind) for points in contours]
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def write_with_plastimatch(volume: Volume, labels: np.ndarray, names: Sequence[str], folder: Path) -> Path:
    """Turn a label map, shape `(i, j, k)`, into a structure set with plastimatch; it takes at most 32 labels.

    At the border of an image, it leaves contours open, so no label should reach it.
    """
    assert PLASTIMATCH is not None and len(names) <= 32
    series = folder / "plastimatch_series"
    series.mkdir()
    for path in volume.origin.paths:
        shutil.copy(path, series / path.name)
    # An image with a bit for each label.
    bits = np.zeros(volume.shape, dtype=np.uint32)
    for number in range(len(names)):
        bits |= (labels == number + 1).astype(np.uint32) << number
    nibabel.save(nibabel.Nifti1Image(bits, volume.affine), folder / "bits.nii.gz")
    (folder / "names.txt").write_text("".join(f"{number}|255\\0\\0|{name}\n" for number, name in enumerate(names)))
    words = ["--input-ss-img", folder / "bits.nii.gz", "--input-ss-list", folder / "names.txt"]
    words += ["--referenced-ct", series, "--output-dicom", folder / "plastimatch"]
    subprocess.run([PLASTIMATCH, "convert", *map(str, words)], check=True, capture_output=True)
    (path,) = (folder / "plastimatch").glob("rtss*")
    return path


def write_with_dcmqi(volume: Volume, labels: np.ndarray, names: Sequence[str], folder: Path) -> Path:
    """Turn a label map, shape `(i, j, k)`, into a segmentation with dcmqi."""
    assert ITKIMAGE2SEGIMAGE is not None
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), volume.affine), folder / "labels.nii.gz")
    segments: list[Mapping[str, object]] = [
        {
            "labelID": number,
            "SegmentLabel": name,
            "SegmentDescription": name,
            "SegmentAlgorithmType": "MANUAL",
            "SegmentedPropertyCategoryCodeSequence": CODE,
            "SegmentedPropertyTypeCodeSequence": CODE,
            "recommendedDisplayRGBValue": [255, 0, 0],
        }
        for number, name in enumerate(names, start=1)
    ]
    series = {"SeriesDescription": "S", "SeriesNumber": "3", "InstanceNumber": "1", "ContentCreatorName": "N"}
    (folder / "segments.json").write_text(json.dumps({**series, "segmentAttributes": [segments]}))
    path = folder / "dcmqi.dcm"
    words = ["--inputImageList", folder / "labels.nii.gz", "--inputMetadata", folder / "segments.json"]
    words += ["--inputDICOMList", ",".join(map(str, volume.origin.paths)), "--outputDICOM", path]
    subprocess.run([ITKIMAGE2SEGIMAGE, *map(str, words)], check=True, capture_output=True)
    return path
