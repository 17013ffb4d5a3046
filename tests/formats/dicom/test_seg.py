"""A DICOM segmentation has the masks to the voxel, names its series and its model, and follows the standard."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from dataset_builder.series import KAGGLE_AXES, TO_LPS, read_scan, write_series
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from tests.support.dicom import read_series, write_enhanced
from tests.support.masks import check_dicom, shapes
from tests.support.models import MAX_TIES, save_model
from tests.support.volumes import ORIENTATIONS, predict_kaggle, prediction_words, rotation, store

SHAPE = (15, 14, 5)
ALGORITHM = Algorithm({"name/model": "c0ffee" * 6 + "beef", "name/other": "f" * 40})


def make_volume(folder: Path, number: int, enhanced: bool, shape: tuple[int, ...] = SHAPE) -> Volume:
    """A tilted series in one of the 48 orientations."""
    affine = np.diag([-1.5, -1.4, -3.0, 1.0])
    affine[:3, :3] = rotation(np.random.default_rng(number), 15) @ affine[:3, :3]
    stored, affine = store(np.zeros(shape, dtype=np.uint16), affine, *ORIENTATIONS[number])
    paths = [write_enhanced(folder / "file", stored, affine)] if enhanced else write_series(folder, stored, affine)
    volume = read_series(paths)
    return volume


def places(masks: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    """The places of the voxels of a mask in millimetres, rounded."""
    points = np.argwhere(masks) @ affine[:3, :3].T + affine[:3, 3]
    return set(map(tuple, np.round(points, 1).tolist()))


def places_of(found: highdicom.Volume, organ: int) -> set[tuple[float, ...]]:
    """The places of the voxels of an organ in a volume that highdicom has read."""
    return places(found.array[..., organ] > 0, found.affine)


class TestFile:
    @pytest.mark.parametrize("enhanced", [False, True])
    @pytest.mark.parametrize("number", [0, 7, 13, 22, 31, 47])
    def test_the_masks_come_back_to_the_voxel(self, number: int, enhanced: bool, tmp_path: Path) -> None:
        volume = make_volume(tmp_path, number, enhanced)
        masks = shapes(volume.shape)
        assert (masks.sum(axis=0) > 1).any(), "no organs overlap"
        path = tmp_path / "out.dcm"
        write_dicom_seg(volume, masks, path, ALGORITHM, GI_TRACT)
        segmentation = highdicom.seg.segread(path)
        frames = volume.origin.frames
        if enhanced:
            read = segmentation.get_pixels_by_source_frame(
                frames[0].instance_uid, [frame.number for frame in frames], assert_missing_frames_are_empty=True
            )
        else:
            read = segmentation.get_pixels_by_source_instance(
                [frame.instance_uid for frame in frames], assert_missing_frames_are_empty=True
            )
        np.testing.assert_array_equal(read.transpose(3, 2, 1, 0), masks)
        # The same by geometry alone: highdicom's volume has the axes slices, rows and columns, on DICOM's axes.
        found = segmentation.get_volume()
        for organ in range(3):
            expected = places(masks[organ], TO_LPS @ volume.affine)
            assert places(found.array[..., organ] > 0, found.affine) == expected

    @pytest.mark.parametrize("enhanced", [False, True])
    @pytest.mark.parametrize("depth", [1, 5])
    @pytest.mark.parametrize("empty", [False, True])
    def test_it_follows_the_standard(self, empty: bool, depth: int, enhanced: bool, tmp_path: Path) -> None:
        volume = make_volume(tmp_path, 0, enhanced, (15, 14, depth))
        masks = shapes(volume.shape) & (not empty)
        write_dicom_seg(volume, masks, tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        assert highdicom.seg.segread(tmp_path / "out.dcm").number_of_segments == 3
        check_dicom(tmp_path / "out.dcm")

    def test_it_names_the_series_the_organs_and_the_model(self, tmp_path: Path) -> None:
        volume = make_volume(tmp_path, 0, enhanced=False)
        write_dicom_seg(volume, shapes(volume.shape), tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        segmentation = highdicom.seg.segread(tmp_path / "out.dcm")
        source = pydicom.dcmread(volume.origin.frames[0].path)
        for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert segmentation[name].value == source[name].value
        assert segmentation.SeriesInstanceUID != source.SeriesInstanceUID
        (series,) = segmentation.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        named = {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence}
        assert named == {frame.instance_uid for frame in volume.origin.frames}
        for number, organ in enumerate(GI_TRACT.names, start=1):
            description = segmentation.get_segment_description(number)
            assert description.segment_label == organ
            assert description.segmented_property_type.value == {1: "14742008", 2: "30315005", 3: "69695003"}[number]
            colour = highdicom.color.CIELabColor.from_dicom_value(description.RecommendedDisplayCIELabValue).to_rgb()
            assert np.abs(np.subtract(colour, GI_TRACT.palette[number])).max() <= 1
            (identification,) = description.SegmentationAlgorithmIdentificationSequence
            assert identification.AlgorithmName == "gi-segmentation"
            assert "c0ffee" * 6 in identification.AlgorithmVersion and len(identification.AlgorithmVersion) <= 64
            assert (
                "name/model" in identification.AlgorithmParameters and "f" * 40 in identification.AlgorithmParameters
            )


class TestGrid:
    def test_rounded_positions_become_equal_distances(self, tmp_path: Path) -> None:
        affine = np.diag([-1.5, -1.4, 1.25, 1.0])
        # Millimetres 0, 1.3, 2.5, 3.8 and 5.
        rounded = [0, 1.3 / 1.25, 2, 3.8 / 1.25, 4]
        volume = read_series(write_series(tmp_path / "in", np.zeros(SHAPE, np.uint16), affine, rounded))
        masks = shapes(volume.shape)
        write_dicom_seg(volume, masks, tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        # highdicom refuses a volume whose distances differ.
        found = highdicom.seg.segread(tmp_path / "out.dcm").get_volume()
        for organ in range(3):
            assert places_of(found, organ) == places(masks[organ], TO_LPS @ volume.affine)

    def test_a_segmentation_names_the_frames_of_several_files(self, tmp_path: Path) -> None:
        voxels, affine = np.zeros((15, 14, 3), np.uint16), np.diag([-1.5, -1.4, 3.0, 1.0])
        above = affine.copy()
        above[2, 3] = 9
        paths = [write_enhanced(tmp_path / "in" / name, voxels, grid) for name, grid in (("a", affine), ("b", above))]
        first, second = map(pydicom.dcmread, paths)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            second[name].value = first[name].value
        second.save_as(paths[1])
        volume = read_series(paths)
        masks = np.zeros((3, *volume.shape), dtype=bool)
        masks[0, 3:9, 4:8, 1:5] = True
        write_dicom_seg(volume, masks, tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        segmentation = highdicom.seg.segread(tmp_path / "out.dcm")
        found = segmentation.get_volume()
        assert places_of(found, 0) == places(masks[0], TO_LPS @ volume.affine)
        uids = {first.SOPInstanceUID, second.SOPInstanceUID}
        (series,) = segmentation.ReferencedSeriesSequence
        named = [one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence]
        assert len(named) == 2 and set(named) == uids
        frames = {frame.position[2]: (frame.instance_uid, frame.number) for frame in volume.origin.frames}
        for group in segmentation.PerFrameFunctionalGroupsSequence:
            (source,) = group.DerivationImageSequence[0].SourceImageSequence
            place = group.PlanePositionSequence[0].ImagePositionPatient[2]
            assert (source.ReferencedSOPInstanceUID, source.ReferencedFrameNumber) == frames[place]
        check_dicom(tmp_path / "out.dcm")


def test_predict_writes_a_segmentation_per_series(small_kaggle_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0)
    scans = sorted((small_kaggle_dir / "train").glob("case*/case*_day*"))
    truths = {}
    for scan in scans:
        voxels, spacing = read_scan(scan)
        affine = np.eye(4)
        affine[:3, :3] = KAGGLE_AXES * spacing
        first = write_series(tmp_path / "in" / scan.name, voxels, affine)[0]
        truths[pydicom.dcmread(first).SeriesInstanceUID] = predict_kaggle(
            model, scan, tmp_path / scan.name, voxels.shape
        )
    written = main(prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", "dicom-seg"))
    assert {path.name.removesuffix(".seg.dcm") for path in written} == set(truths)
    for path in written:
        segmentation = highdicom.seg.segread(path)
        truth = truths[path.name.removesuffix(".seg.dcm")]
        (series,) = segmentation.ReferencedSeriesSequence
        uids = [one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence]
        volume = read_series([p for p in (tmp_path / "in").rglob("IM*") if pydicom.dcmread(p).SOPInstanceUID in uids])
        read = segmentation.get_pixels_by_source_instance(
            [frame.instance_uid for frame in volume.origin.frames],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
        assert np.mean(volume.to_training(read.transpose(2, 1, 0)) != truth.transpose(2, 1, 0)) <= MAX_TIES
        assert len(np.unique(read)) == 4
        description = segmentation.get_segment_description(1)
        (identification,) = description.SegmentationAlgorithmIdentificationSequence
        assert str(model) in identification.AlgorithmParameters and "sha256 " in identification.AlgorithmVersion
        check_dicom(path)
