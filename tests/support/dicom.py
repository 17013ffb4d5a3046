"""Synthetic MR series as DICOM files, in any orientation."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import EnhancedMRImageStorage, generate_uid
from pydicom.valuerep import PersonName

from dataset_builder.series import base_dataset, plane
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.volumes import Volume


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


def write_pixels(path: Path, seed: int) -> None:
    """Fill a slice with random values."""
    dataset = dcmread(path)
    values = np.random.default_rng(seed).integers(1, 900, (dataset.Rows, dataset.Columns))
    dataset.PixelData = values.astype("<u2").tobytes()
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
    dataset = base_dataset(EnhancedMRImageStorage)
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
