"""Write the scans of a phantom as DICOM series in any orientation, for the demo, the samples of the app and the tests.

The patient of a series is named Phantom, so no real scan belongs in one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from gi_segmentation.data.synthetic import SOURCE, is_synthetic
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.images import read_file
from gi_segmentation.schema import SLICE_THICKNESS_MM

# From R, A, S, the axes of an affine, to L, P, S, those of DICOM.
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# The affine of slices in the orientation of the training, with the axes columns, rows, slices.
KAGGLE_AXES = np.diag([-1.0, -1.0, -1.0])


def read_scan(folder: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read the slices of one Kaggle scan.

    Args:
        folder: Any folder above them, of this scan alone.

    Returns:
        The voxels, uint16, shape `(columns, rows, slices)`, and the size of a voxel along these axes in millimetres.
    """
    slices, _ = find_slices(folder)
    voxels = np.stack([np.array(Image.open(one.path)) for one in slices])
    return voxels.transpose(2, 1, 0).astype(np.uint16), (*slices[0].pixel_spacing[::-1], SLICE_THICKNESS_MM)


def read_first_scan(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the first Kaggle scan below a folder.

    Returns:
        The voxels, uint16, shape `(columns, rows, slices)`, and the affine, from the index of a voxel to R, A, S.

    Raises:
        InputError: If there is no scan.
    """
    slices, _ = find_slices(folder)
    if not slices:
        raise InputError(f"{folder}: expected slices of a scan below it, found none")
    voxels, spacing = read_scan(slices[0].path.parent)
    affine = np.eye(4)
    affine[:3, :3] = KAGGLE_AXES * spacing
    return voxels, affine


def base_dataset(class_uid: str, description: str = "axial") -> FileDataset:
    """Return the attributes that all files of a series share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(class_uid)
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
    dataset.ImageComments = SOURCE
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "NONE", ""
    dataset.MRAcquisitionType, dataset.EchoTime, dataset.RepetitionTime, dataset.EchoTrainLength = "2D", 2, 4, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    return dataset


def numbers(values: Sequence[float]) -> list[str]:
    """Return decimal strings of at most 16 characters, which is the limit of DICOM.

    Example:
        >>> numbers([1.5, -1 / 3])
        ['1.500000000', '-0.333333333']
    """
    return [f"{value:.9f}"[:16] for value in values]


def plane(affine: np.ndarray, k: float) -> tuple[list[str], list[str], list[str], float]:
    """Return where a slice lies, in the words of DICOM.

    Args:
        affine: From the index of a voxel to R, A, S.
        k: Place of the slice along the axis of slices, in slices.

    Returns:
        Position, orientation and pixel spacing of the slice, and the distance of slices in millimetres.
    """
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
    values: Mapping[str, str] = MappingProxyType({}),
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
        values: More attributes of all files.

    Returns:
        The file of each slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = base_dataset(MRImageStorage, description)
    for name, value in values.items():
        setattr(dataset, name, value)
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


def write_scan_series(folder: Path, kaggle_dir: Path) -> list[Path]:
    """Write the first scan of a Kaggle folder as a DICOM series, and return its files. See `read_first_scan`."""
    voxels, affine = read_first_scan(kaggle_dir)
    slices, _ = find_slices(kaggle_dir)
    own = [one for one in slices if one.scan == slices[0].scan]
    # The scan of a patient must not say that it is synthetic.
    synthetic = all(is_synthetic(read_file(one.path)) for one in own)
    return write_series(folder, voxels, affine, values={} if synthetic else {"ImageComments": ""})
