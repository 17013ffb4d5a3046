"""Synthetic MR series as DICOM files, in any orientation."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import PersonName

from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.volumes import Volume

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_series(paths: Iterable[Path]) -> Volume:
    """The only series of some files. No file has a problem."""
    (volume,), problems, remarks, _ = find_series(paths)
    assert not problems and not remarks
    return volume


def edit(path: Path, **values: object) -> None:
    """Change attributes of a file; None as a value empties one, and `...` removes it."""
    dataset = dcmread(path, force=True)
    for name, value in values.items():
        if value is ...:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def strip_preamble(path: Path, implicit: bool, meta: bool = False) -> None:
    """Write a file without the 128 bytes and the letters DICM, and without file meta information if not `meta`."""
    dataset = dcmread(path)
    bare = Dataset()
    bare.update(dataset)
    if meta:
        path.write_bytes(path.read_bytes()[132:])
    else:
        dcmwrite(path, bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False)


def leave_gaps(volume: Volume) -> Volume:
    """Write into the files of a series that its slices are 1 mm thick, so that there are gaps between them."""
    for path in volume.origin.paths:
        dataset = dcmread(path)
        dataset.SliceThickness = 1
        dataset.save_as(path)
    return read_series(volume.origin.paths)


def base_dataset(class_uid: str, affine: np.ndarray, description: str = "axial") -> FileDataset:
    """The attributes that all files of a series share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = class_uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = class_uid
    dataset.PatientName, dataset.PatientID = "Phantom^Case", "phantom"
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = generate_uid(), ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260102", "101112", "7"
    dataset.ReferringPhysicianName, dataset.AccessionNumber = "", ""
    dataset.ContentDate, dataset.ContentTime = "20260102", "101112"
    dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = "MR", 3, description
    dataset.PatientPosition = "HFS"
    dataset.Manufacturer, dataset.ManufacturerModelName = "Phantom", "Phantom"
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = "1", "1"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "NONE", ""
    dataset.MRAcquisitionType, dataset.EchoTime, dataset.RepetitionTime, dataset.EchoTrainLength = "2D", 2, 4, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    return dataset


def numbers(values: Sequence[float]) -> list[str]:
    """Decimal strings of at most 16 characters."""
    return [f"{value:.9f}"[:16] for value in values]


def plane(affine: np.ndarray, k: float) -> tuple[list[str], list[str], list[str], float]:
    """Position, orientation and pixel spacing of slice k of an affine (to R, A, S), and the distance of slices."""
    lps = TO_LPS @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / lengths
    position = lps @ [0, 0, k, 1]
    return (
        numbers(position[:3]),
        numbers([*directions[:, 0], *directions[:, 1]]),
        numbers([lengths[1], lengths[0]]),
        float(lengths[2]),
    )


def write_series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    places: Sequence[float] | None = None,
    slope: float = 1,
    intercept: float = 0,
    description: str = "axial",
) -> list[Path]:
    """Write a series with a file per slice. Neither file names nor instance numbers tell the order.

    Args:
        folder: Folder for the files.
        voxels: uint16, shape `(columns, rows, slices)`.
        affine: From the index of a voxel to R, A, S.
        places: Where each slice lies along the axis of slices, in slices; None: 0, 1, 2 and so on.
        slope: The rescale slope, and `intercept` the rescale intercept.
        intercept: See `slope`.
        description: Description of the series.

    Returns:
        The file of each slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = base_dataset(MRImageStorage, affine, description)
    order = np.random.default_rng(0).permutation(voxels.shape[2])
    paths = []
    for k in range(voxels.shape[2]):
        position, orientation, spacing, distance = plane(affine, places[k] if places else k)
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = position, orientation
        dataset.PixelSpacing, dataset.SliceThickness = spacing, f"{distance:.6f}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber = int(order[k]) + 1
        dataset.Rows, dataset.Columns = voxels.shape[1], voxels.shape[0]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = str(slope), str(intercept), "US"
        dataset.PixelData = np.ascontiguousarray(voxels[:, :, k].T).astype("<u2").tobytes()
        paths.append(folder / f"IM{order[k]:04d}")
        dataset.save_as(paths[-1])
    return paths


def write_with_uids(source: Path, folder: Path) -> list[Path]:
    """Copy a series whose identifiers were removed, and give it new ones."""
    folder.mkdir()
    paths = []
    for path in sorted(source.iterdir()):
        dataset = dcmread(path)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
        paths.append(folder / path.name)
        dataset.save_as(paths[-1])
    return paths


def item(**values: object) -> Dataset:
    """A dataset with some attributes."""
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def write_enhanced(path: Path, voxels: np.ndarray, affine: np.ndarray, slope: float = 1) -> Path:
    """Write all slices, uint16, shape `(columns, rows, slices)`, as the frames of one file, in a mixed order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = base_dataset(EnhancedMRImageStorage, affine)
    order = np.random.default_rng(1).permutation(voxels.shape[2])
    frames = []
    for k in order:
        position, orientation, spacing, distance = plane(affine, int(k))
        content = item(FrameContentSequence=DicomSequence([item(DimensionIndexValues=[1, int(k) + 1])]))
        content.PlanePositionSequence = DicomSequence([item(ImagePositionPatient=position)])
        content.PixelValueTransformationSequence = DicomSequence(
            [item(RescaleIntercept="0", RescaleSlope=str(slope * (1 + int(k))), RescaleType="US")]
        )
        frames.append(content)
    dataset.SharedFunctionalGroupsSequence = DicomSequence(
        [
            item(
                PlaneOrientationSequence=DicomSequence([item(ImageOrientationPatient=orientation)]),
                PixelMeasuresSequence=DicomSequence([item(PixelSpacing=spacing, SliceThickness=f"{distance:.6f}")]),
            )
        ]
    )
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.InstanceNumber, dataset.NumberOfFrames = 1, len(order)
    dataset.Rows, dataset.Columns = voxels.shape[1], voxels.shape[0]
    dataset.PixelData = np.ascontiguousarray(voxels[:, :, order].transpose(2, 1, 0)).astype("<u2").tobytes()
    dataset.save_as(path)
    return path


def set_bytes(path: Path, **values: bytes | None) -> None:
    """Write attributes with the very bytes of clinics, which pydicom would refuse or change; None removes one."""
    dataset = dcmread(path)
    marks = {}
    for number, (name, value) in enumerate(values.items()):
        if name in dataset:
            del dataset[name]
        if value is not None:
            # A mark of the same length, which a text of any kind may be.
            mark = chr(ord("a") + number) * (len(value) + len(value) % 2)
            vr = dictionary_VR(name)
            text = PersonName(mark) if vr == "PN" else mark
            dataset.add(DataElement(name, vr, text, already_converted=True))
            if value:
                marks[mark.encode()] = value.ljust(len(mark))
    with warnings.catch_warnings(action="ignore"):
        dataset.save_as(path)
    content = path.read_bytes()
    for mark, value in marks.items():
        assert content.count(mark) == 1
        content = content.replace(mark, value)
    path.write_bytes(content)
