"""The contours of a structure set enclose the predicted voxels and no other, with holes, islands and single pixels."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from dataset_builder.series import TO_LPS, read_first_scan, write_series
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.rtstruct import trace_contours, write_rtstruct
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from tests.support.dicom import read_series, write_enhanced
from tests.support.masks import check_dicom, shapes
from tests.support.models import save_model
from tests.support.volumes import ORIENTATIONS, prediction_words, rotation, store

ALGORITHM = Algorithm({"name/model": "c0ffee" * 6 + "beef"})
SHAPE = (31, 26, 7)


def winding_numbers(contour: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often a closed contour runs around each point: the crossings of a ray to the right, by their direction.

    The ray lies a little above the centres of the pixels, where no contour has a corner.
    """
    start, end = contour, np.roll(contour, -1, axis=0)
    x, y = points[:, 0], points[:, 1] + 1e-7
    rising = (start[None, :, 1] <= y[:, None]) & (end[None, :, 1] > y[:, None])
    falling = (end[None, :, 1] <= y[:, None]) & (start[None, :, 1] > y[:, None])
    height = np.where(end[:, 1] == start[:, 1], 1, end[:, 1] - start[:, 1])
    cross = start[None, :, 0] + (y[:, None] - start[None, :, 1]) / height * (end - start)[None, :, 0]
    return ((rising * 1 - falling * 1) * (cross > x[:, None])).sum(axis=1)


def fill_contours(contours: list[np.ndarray], shape: tuple[int, int], even_odd: bool) -> np.ndarray:
    """The pixels whose centres lie inside, by either rule that programs use."""
    inside = np.zeros(shape, dtype=bool)
    for contour in contours:
        # Only the pixels in the box around the contour.
        (left, top), (right, bottom) = (
            np.floor(contour.min(axis=0)).astype(int),
            np.ceil(contour.max(axis=0)).astype(int),
        )
        rows, columns = (axis.ravel() for axis in np.mgrid[max(top, 0) : bottom + 1, max(left, 0) : right + 1])
        kept = (rows < shape[0]) & (columns < shape[1])
        rows, columns = rows[kept], columns[kept]
        numbers = winding_numbers(contour, np.stack([columns, rows], axis=1).astype(float))
        inside[rows, columns] |= numbers % 2 == 1 if even_odd else numbers != 0
    return inside


class TestContours:
    @pytest.mark.parametrize("even_odd", [True, False])
    def test_random_masks_come_back_to_the_pixel(self, even_odd: bool) -> None:
        rng = np.random.default_rng(0)
        masks = [
            plane for seed in range(3) for organ in shapes((24, 17, 4), seed) for plane in organ.transpose(2, 0, 1)
        ]
        masks += [rng.random((9, 11)) < share for share in (0.1, 0.3, 0.5, 0.7, 0.9) for _ in range(10)]
        masks += [np.ones((4, 5), dtype=bool), np.eye(5, dtype=bool), np.eye(1, 7, dtype=bool)]
        for mask in masks:
            np.testing.assert_array_equal(fill_contours(trace_contours(mask), mask.shape, even_odd), mask)

    def test_an_empty_mask_has_no_contour(self) -> None:
        assert trace_contours(np.zeros((3, 4), dtype=bool)) == []

    def test_each_piece_is_one_contour(self) -> None:
        mask = np.zeros((20, 20), dtype=bool)
        mask[1:10, 1:10], mask[3:5, 3:5], mask[6:8, 3:8], mask[12:15, 12:15] = True, False, False, True
        ring, square = trace_contours(mask)
        # The first has two holes: the outline and both holes are one contour, which starts and ends at the outline.
        assert len(square) == 8 and len(ring) == 8 + 8 + 8 + 4
        # Shoelace: the two holes are taken off. A corner that sticks out loses an eighth of a pixel, one that goes in
        # gains as much: 81 - 4 - 10 pixels, less 4 corners, plus 8 corners of the holes.
        x, y = ring.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        assert area == pytest.approx(81 - 4 - 10 - 4 / 8 + 8 / 8)

    def test_straight_edges_have_no_middle_points(self) -> None:
        (contour,) = trace_contours(np.ones((30, 40), dtype=bool))
        assert len(contour) == 8


def make_volume(folder: Path, number: int, degrees: float, enhanced: bool) -> Volume:
    affine = np.diag([-1.5, -1.4, -3.0, 1.0])
    affine[:3, :3] = rotation(np.random.default_rng(number), degrees) @ affine[:3, :3]
    affine[:3, 3] = 55.5, -20, 130
    stored, affine = store(np.zeros(SHAPE, dtype=np.uint16), affine, *ORIENTATIONS[number])
    paths = [write_enhanced(folder / "file", stored, affine)] if enhanced else write_series(folder, stored, affine)
    volume = read_series(paths)
    return volume


def read_masks(path: Path, volume: Volume) -> np.ndarray:
    """Fill the contours of a structure set, by their places in the patient alone: bool, shape `(organs, i, j, k)`."""
    masks = np.zeros((3, *volume.shape), dtype=bool)
    to_index = np.linalg.inv(TO_LPS @ volume.affine)
    for roi in pydicom.dcmread(path).ROIContourSequence:
        for contour in roi.get("ContourSequence", ()):
            places = np.reshape(np.array(contour.ContourData, dtype=float), (-1, 3))
            assert len(places) == contour.NumberOfContourPoints
            index = places @ to_index[:3, :3].T + to_index[:3, 3]
            k = round(index[0, 2])
            np.testing.assert_allclose(index[:, 2], k, atol=1e-3)
            (image,) = contour.ContourImageSequence
            frame = volume.origin.frames[k]
            assert image.ReferencedSOPInstanceUID == frame.instance_uid
            assert image.get("ReferencedFrameNumber", 0) == frame.number
            plane = fill_contours([index[:, :2]], (volume.shape[1], volume.shape[0]), even_odd=True)
            masks[roi.ReferencedROINumber - 1, :, :, k] |= plane.T
    return masks


class TestFile:
    @pytest.mark.parametrize(
        ("number", "degrees", "enhanced"), [(0, 0, False), (7, 15, True), (13, 5, False), (31, 0, True)]
    )
    def test_the_masks_come_back_to_the_voxel(
        self, number: int, degrees: float, enhanced: bool, tmp_path: Path
    ) -> None:
        volume = make_volume(tmp_path, number, degrees, enhanced)
        masks = shapes(volume.shape)
        masks[0] = number == 13 and masks[0]
        write_rtstruct(volume, masks, tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        np.testing.assert_array_equal(read_masks(tmp_path / "out.dcm", volume), masks)
        check_dicom(tmp_path / "out.dcm")

    def test_it_names_the_series_the_organs_and_the_model(self, tmp_path: Path) -> None:
        volume = make_volume(tmp_path, 0, 0, enhanced=False)
        write_rtstruct(volume, shapes(volume.shape), tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        dataset, source = pydicom.dcmread(tmp_path / "out.dcm"), pydicom.dcmread(volume.origin.frames[0].path)
        for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert dataset[name].value == source[name].value
        (reference,) = dataset.ReferencedFrameOfReferenceSequence
        assert reference.FrameOfReferenceUID == source.FrameOfReferenceUID
        (series,) = reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        named = [one.ReferencedSOPInstanceUID for one in series.ContourImageSequence]
        assert sorted(named) == sorted(frame.instance_uid for frame in volume.origin.frames)
        assert [roi.ROIName for roi in dataset.StructureSetROISequence] == list(GI_TRACT.names)
        assert [list(roi.ROIDisplayColor) for roi in dataset.ROIContourSequence] == [
            list(one) for one in GI_TRACT.colours
        ]
        codes = [one.RTROIIdentificationCodeSequence[0].CodeValue for one in dataset.RTROIObservationsSequence]
        assert codes == ["14742008", "30315005", "69695003"]
        assert "name/model (c0ffee" in dataset.StructureSetDescription
        assert dataset.ApprovalStatus == "UNAPPROVED"

    def test_letters_of_other_alphabets_survive(self, tmp_path: Path) -> None:
        volume = make_volume(tmp_path, 0, 0, enhanced=False)
        path = volume.origin.frames[0].path
        dataset = pydicom.dcmread(path)
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 192", "Müller^Žofie"
        dataset.save_as(path)
        write_rtstruct(volume, shapes(volume.shape), tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        assert pydicom.dcmread(tmp_path / "out.dcm").PatientName == "Müller^Žofie"


def test_predict_writes_both_files_of_a_planning_system(small_kaggle_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0)
    voxels, affine = read_first_scan(small_kaggle_dir / "train")
    # The middle of the slices has all organs, and fewer of the thousand contours of a model that knows nothing.
    write_series(tmp_path / "in", voxels[80:160, 90:160], affine)
    formats = ("dicom-seg", "rtstruct", "nifti")
    written = main(prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", *formats))
    segmentation, structures, label_map = written
    check_dicom(segmentation)
    check_dicom(structures)
    volume = read_series((tmp_path / "in").iterdir())
    labels = np.asarray(nibabel.load(label_map).dataobj)
    masks = np.stack([labels == number for number in (1, 2, 3)])
    differing = read_masks(structures, volume) != masks
    assert masks.any(axis=(1, 2, 3)).all() and not differing.any()
