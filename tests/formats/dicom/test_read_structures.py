"""Contours and segments come back as the masks that they were made of, on the scan that they name and on no other."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import highdicom
import nibabel
import numpy as np
import pytest
from highdicom.seg import SegmentationTypeValues
from matplotlib.path import Path as Polygon
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes

from dataset_builder.series import TO_LPS, write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.fill_contours import fill_contours
from gi_segmentation.formats.dicom.read_structures import FoundStructures, find_dicom_structures
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.dicom.series import FoundSeries, find_series
from gi_segmentation.formats.structures import StructureSet, choose_structures
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from tests.support.dicom import edit, read_series
from tests.support.masks import label_map
from tests.support.round_trips import ALGORITHM, make_masks, make_volume, on_grid
from tests.support.structures import (
    ITKIMAGE2SEGIMAGE,
    PLASTIMATCH,
    SQUARE,
    at,
    write_structure_set,
    write_with_dcmqi,
    write_with_plastimatch,
)

# Of `round_trips.KINDS`, those that differ most.
KINDS = (
    "axial, from feet to head",
    "sagittal, reversed, tilted by 12°",
    "voxels of 0.8 x 1.9 x 5 mm",
    "one slice",
    "one file, coronal, tilted by 12°",
)
BOX = (slice(2, 9), slice(3, 10))


def find(paths: list[Path], *volumes: Volume, alone: bool = False, interpolate: bool = False) -> FoundStructures:
    """The structures in some files, for volumes."""
    return find_dicom_structures(paths, FoundSeries([*volumes], {}, [], {}), interpolate, alone)


def find_one(path: Path, *volumes: Volume, interpolate: bool = False) -> StructureSet:
    """The structures in a file without a problem."""
    found = find([path], *volumes, interpolate=interpolate)
    assert not found.problems and not found.remarks
    (one,) = found.structures
    return one


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """An axial series of 31 x 26 x 7 voxels."""
    return make_volume("axial", tmp_path_factory.mktemp("axial") / "series")


class TestRoundTrips:
    @pytest.mark.parametrize("kind", KINDS)
    def test_masks_come_back_to_the_voxel(self, kind: str, tmp_path: Path) -> None:
        volume = make_volume(kind, tmp_path / "series")
        masks = make_masks(volume)
        # The names of files say nothing.
        write_dicom_seg(volume, masks, tmp_path / "7", ALGORITHM, GI_TRACT)
        write_rtstruct(volume, masks, tmp_path / "IM8.dcm", ALGORITHM, GI_TRACT)

        found = find([*volume.origin.paths, tmp_path / "7", tmp_path / "IM8.dcm"], volume)

        assert not found.problems
        assert {one.kind: one.approved for one in found.structures} == {"seg": None, "rtstruct": False}
        for one in found.structures:
            assert one.volume is volume
            # In another order, and not all of them.
            np.testing.assert_array_equal(one.read(["stomach", "large_bowel"]), masks[[2, 0]])

    @pytest.mark.skipif(PLASTIMATCH is None, reason="plastimatch is not installed: apt-get install plastimatch")
    @pytest.mark.parametrize("kind", ["axial, all axes reversed", "sagittal, reversed, tilted by 12°"])
    def test_contours_of_plastimatch(self, kind: str, tmp_path: Path) -> None:
        volume = make_volume(kind, tmp_path / "series")
        labels = label_map(make_masks(volume))
        one = find_one(write_with_plastimatch(volume, labels, ["a", "b", "c"], tmp_path), volume)
        np.testing.assert_array_equal(one.read(["a", "b", "c"]), [labels == number for number in (1, 2, 3)])

    @pytest.mark.skipif(ITKIMAGE2SEGIMAGE is None, reason="dcmqi is not installed: pip install dcmqi")
    @pytest.mark.parametrize("kind", ["axial, all axes reversed", "one slice"])
    def test_segments_of_dcmqi(self, kind: str, tmp_path: Path) -> None:
        volume = make_volume(kind, tmp_path / "series")
        labels = label_map(make_masks(volume))
        one = find_one(write_with_dcmqi(volume, labels, ["a", "b", "c"], tmp_path), volume)
        np.testing.assert_array_equal(one.read(["a", "b", "c"]), [labels == number for number in (1, 2, 3)])

    @pytest.mark.skipif(PLASTIMATCH is None, reason="plastimatch is not installed: apt-get install plastimatch")
    @pytest.mark.skipif(ITKIMAGE2SEGIMAGE is None, reason="dcmqi is not installed: pip install dcmqi")
    def test_a_real_mr(self, test_data: Path, tmp_path: Path) -> None:
        image, found = (
            nibabel.load(test_data / "totalsegmentator" / f"example_{name}.nii.gz") for name in ("mr_sm", "seg_mr")
        )
        voxels = np.asarray(image.dataobj)
        volume = read_series(
            write_series(tmp_path / "series", (voxels - voxels.min()).astype(np.uint16), image.affine)
        )
        ids = np.unique(found.dataobj)[1:]
        masks = np.stack([on_grid(volume, np.asarray(found.dataobj) == number, found.affine) for number in ids])
        labels, names = (masks * np.arange(1, len(ids) + 1)[:, None, None, None]).max(axis=0), [*map(str, ids)]
        contours = find_one(write_with_plastimatch(volume, labels, names, tmp_path), volume)
        segments = find_one(write_with_dcmqi(volume, labels, names, tmp_path), volume)
        np.testing.assert_array_equal(segments.read(names), masks)
        np.testing.assert_array_equal(contours.read(names), masks)


class TestFillContours:
    def test_a_centre_is_inside_or_not(self) -> None:
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[0:30, 0:40]
        centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
        for _ in range(20):
            # Stars reach beyond the slice. They do not cross themselves, so that all rules agree.
            angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
            points = [20, 15] + rng.uniform(3, 22, (40, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            expected = Polygon(points, closed=False).contains_points(centres).reshape(rows.shape)
            np.testing.assert_array_equal(fill_contours([points], (30, 40)), expected)

    def test_contours_through_the_centres_of_border_pixels_give_their_mask_back(self, volume: Volume) -> None:
        # As rt-utils and TotalSegmentator write them; a hole is a contour through the pixels around it.
        for mask in make_masks(volume)[0].transpose(2, 1, 0):
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            points = [contour[:, 0].astype(float) for contour in contours]
            np.testing.assert_array_equal(fill_contours(points, mask.shape), mask)

    def test_a_keyhole_is_a_hole(self) -> None:
        # The channel runs to the hole and back by other points.
        ring = np.array([[0, 0], [5, 5.0], [5, 8], [8, 8], [8, 5], [5, 5], [2, 2], [0, 0], [0, 13], [13, 13], [13, 0]])
        mask = fill_contours([ring - 0.4], (13, 13))
        expected = np.ones((13, 13), dtype=bool)
        expected[5:8, 5:8] = False
        np.testing.assert_array_equal(mask, expected)


class TestContours:
    def test_what_is_no_contour_is_named(self, volume: Volume, tmp_path: Path) -> None:
        rois = [("Stomach", [at(SQUARE, 2), at(SQUARE + 0.3, 2), at(SQUARE, 2)]), ("Duodenum", []), ("POI", [SQUARE])]
        rois[2] = ("POI", [at(SQUARE[:1], 3)])
        path = write_structure_set(tmp_path / "a", volume, rois, StructureSetDate="20260102", StructureSetTime="0304")
        dataset = dcmread(path)
        dataset.ROIContourSequence[2].ContourSequence[0].ContourGeometricType = "POINT"
        # The contour between two equal ones: it makes a hole, and a copy does not undo a contour.
        dataset.ROIContourSequence[0].ContourSequence[1].ContourData = [
            *describe(volume, at(np.array([[4.2, 5.2], [6.2, 5.2], [6.2, 7.2], [4.2, 7.2]]), 2))
        ]
        dataset.save_as(path)
        one = find_one(path, volume)

        assert (one.names, one.empty, one.created) == (("Stomach",), ("Duodenum",), "20260102030400")
        assert "without contours: Duodenum" in one.notes
        assert any("POI (1 POINT)" in note for note in one.notes)
        expected = np.zeros(volume.shape, dtype=bool)
        expected[2:9, 3:10, 2], expected[5:7, 6:8, 2] = True, False
        stomach, duodenum = one.read(["Stomach", "Duodenum"])
        np.testing.assert_array_equal(stomach, expected)
        assert not duodenum.any()

    def test_slices_between_are_filled_on_demand(self, volume: Volume, tmp_path: Path) -> None:
        contours = [at(SQUARE, 1), at(SQUARE + np.array([4, 0]), 5)]
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", contours)])
        plain, filled = find_one(path, volume), find_one(path, volume, interpolate=True)
        assert plain.notes == ("Stomach: 3 slices between its contours have none",)
        assert not filled.notes
        assert plain.read(["Stomach"]).any(axis=(0, 1, 2)).tolist() == [False, True, False, False, False, True, False]
        mask = filled.read(["Stomach"])[0]
        # Half-way, the square lies half-way.
        assert mask[:, 6, 3].nonzero()[0].tolist() == list(range(4, 11))
        assert mask.any(axis=(0, 1)).tolist() == [False, True, True, True, True, True, False]

    @pytest.mark.parametrize(
        ("contours", "message"),
        [
            ([at(SQUARE, 2), at(SQUARE, 3.5)], "between slices: at 3.50"),
            # Drawn on a scan whose slices are 1 mm apart.
            ([at(SQUARE, place / 3) for place in range(4)], "between slices: at 0.00 and 0.33"),
            ([at(SQUARE, 7)], "outside the volume: 1.0 slices beyond"),
            ([at(SQUARE + 100, 2)], "beside the images"),
            ([at(SQUARE, 0)[:, [2, 1, 0]]], "another plane"),
        ],
    )
    def test_contours_that_lie_on_no_slice(
        self, contours: list[np.ndarray], message: str, volume: Volume, tmp_path: Path
    ) -> None:
        rois = [("Stomach", contours), ("Liver", [at(SQUARE, 2)])]
        one = find_one(write_structure_set(tmp_path / "a", volume, rois), volume)
        with pytest.raises(InputError, match=f"'Stomach' .*{message}"):
            one.read(["Liver", "Stomach"])
        # What nobody asks for stops nothing.
        assert one.read(["Liver"])[0, *BOX, 2].all()

    def test_a_contour_beside_its_slice_is_moved_to_it(self, volume: Volume, tmp_path: Path) -> None:
        one = find_one(write_structure_set(tmp_path / "a", volume, [("Liver", [at(SQUARE, 2.3)])]), volume)
        assert one.notes == ("contours lie up to 0.3 slices beside their slices, and were moved to them",)
        assert one.read(["Liver"])[0, *BOX, 2].all()

    def test_two_rois_of_one_name(self, volume: Volume, tmp_path: Path) -> None:
        rois = [(name, [at(SQUARE, 2)]) for name in ("Stomach", "Stomach", "Liver")]
        # A second one that is empty does no harm.
        rois.append(("Liver", []))
        one = find_one(write_structure_set(tmp_path / "a", volume, rois), volume)
        assert one.names == ("Stomach", "Liver") and one.notes == ("several ROIs of one name: Stomach",)
        with pytest.raises(InputError, match="has 2 ROIs with the name 'Stomach'"):
            one.read(["Stomach"])
        assert one.read(["Liver"])[0, *BOX, 2].all()

    def test_points_that_are_no_numbers(self, volume: Volume, tmp_path: Path) -> None:
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", [at(SQUARE, 2)])])
        dataset = dcmread(path)
        dataset.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "3", "4"]
        dataset.save_as(path)
        with pytest.raises(InputError, match="'Stomach' has a contour whose points are not three numbers each"):
            find_one(path, volume).read(["Stomach"])


def describe(volume: Volume, points: np.ndarray) -> list[str]:
    """The places of points of column, row and slice, as DICOM writes them."""
    affine = TO_LPS @ volume.affine
    return [f"{value:.4f}" for value in (points @ affine[:3, :3].T + affine[:3, 3]).ravel()]


def write_segmentation(
    path: Path, volume: Volume, masks: np.ndarray, kind: SegmentationTypeValues, change: Callable = lambda one: one
) -> Path:
    """Write masks with highdicom, shape `(i, j, k, segments)`, after a change of their grid."""
    description = [
        highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Organ, codes.SCT.Organ, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, name in enumerate(("A", "B"), start=1)
    ]
    frames = volume.origin.frames
    grid = highdicom.Volume(
        masks,
        TO_LPS @ volume.affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=frames[0].frame_of_reference_uid,
        channels={"SegmentNumber": [1, 2]},
    )
    # The frames are slices of the scan.
    grid = change(grid.permute_spatial_axes([2, 1, 0]))
    segmentation = highdicom.seg.Segmentation(
        [dcmread(frame.path) for frame in frames], grid, kind, description, "1.2.3", 1, "1.2.3.4", 1,
        "Maker", "Model", "1", "1", max_fractional_value=200,
    )  # fmt: skip
    segmentation.save_as(path)
    return path


class TestSegments:
    @pytest.mark.parametrize(
        "change",
        [
            lambda grid: grid.flip_spatial([0, 2]),
            # Its frames are sagittal, and its columns run to the head.
            lambda grid: grid.permute_spatial_axes([2, 0, 1]).flip_spatial([1]),
            # Smaller than the scan.
            lambda grid: grid[1:-1, 3:, 1:-2],
        ],
    )
    def test_the_same_voxels_in_another_order(self, change: Callable, volume: Volume, tmp_path: Path) -> None:
        masks = np.zeros((*volume.shape, 2), dtype=np.uint8)
        masks[2:9, 3:10, 1:4, 0], masks[5:20, 6:15, 5, 1], masks[4, 4, 2, 1] = 1, 1, 1
        path = write_segmentation(tmp_path / "a", volume, masks, SegmentationTypeValues.BINARY, change)
        np.testing.assert_array_equal(find_one(path, volume).read(["B", "A"]), masks[..., ::-1].transpose(3, 0, 1, 2))

    def test_fractions_from_half_on(self, volume: Volume, tmp_path: Path) -> None:
        masks = np.zeros((*volume.shape, 2), dtype=np.float32)
        masks[2, 2, 2:5, 0] = 0.49, 0.5, 1
        path = write_segmentation(tmp_path / "a", volume, masks, SegmentationTypeValues.FRACTIONAL)
        one = find_one(path, volume)
        assert np.argwhere(one.read(["A"])[0]).tolist() == [[2, 2, 3], [2, 2, 4]]
        assert one.notes == ("fractions; a voxel is inside from 0.5 of the largest value on",)

    def test_a_label_map(self, volume: Volume, tmp_path: Path) -> None:
        masks = np.zeros((*volume.shape, 2), dtype=np.uint8)
        masks[2:9, 3:10, 1:4, 0], masks[5:20, 12:15, 5, 1] = 1, 1
        path = write_segmentation(tmp_path / "a", volume, masks, SegmentationTypeValues.LABELMAP)
        np.testing.assert_array_equal(find_one(path, volume).read(["A", "B"]), masks.transpose(3, 0, 1, 2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda position, number: [position[0] + 0.5, *position[1:]], "lies on another grid than its scan"),
            (lambda position, number: [*position[:2], position[2] + 3 * number], "slices 6 mm apart, but its scan"),
            (lambda position, number: [*position[:2], position[2] + 60], "has voxels outside its scan"),
        ],
    )
    def test_another_grid(self, change: Callable, message: str, volume: Volume, tmp_path: Path) -> None:
        masks = np.zeros((*volume.shape, 2), dtype=np.uint8)
        masks[2:9, 3:10, 1:4] = 1
        path = write_segmentation(tmp_path / "a", volume, masks, SegmentationTypeValues.BINARY)
        dataset = dcmread(path)
        groups = dataset.PerFrameFunctionalGroupsSequence
        lowest = min(group.PlanePositionSequence[0].ImagePositionPatient[2] for group in groups)
        for group in groups:
            (place,) = group.PlanePositionSequence
            position = [*map(float, place.ImagePositionPatient)]
            place.ImagePositionPatient = change(position, round((position[2] - float(lowest)) / 3))
        if "apart" in message:
            measures: Dataset = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            measures.SpacingBetweenSlices = 6
        dataset.save_as(path)
        with pytest.raises(InputError, match=message):
            find_one(path, volume).read(["A"])

    def test_without_its_scan(self, volume: Volume, tmp_path: Path) -> None:
        masks = make_masks(volume)
        write_dicom_seg(volume, masks, tmp_path / "a", ALGORITHM, GI_TRACT)
        assert "is not there" in find([tmp_path / "a"]).problems[tmp_path / "a"]
        (one,) = find([tmp_path / "a"], alone=True).structures
        assert one.volume.name == volume.name and one.notes == ("read on its own grid, without its scan",)
        (read,) = one.read(["small_bowel"])
        np.testing.assert_array_equal(on_grid(volume, read, one.volume.affine), masks[1])


class TestReferences:
    def test_the_scan_that_is_named(self, volume: Volume, tmp_path: Path) -> None:
        """Two series of one study lie at the same place. The contours are those of the one that they name."""
        copies = []
        for number, path in enumerate(volume.origin.paths):
            copies.append(tmp_path / f"{number}.dcm")
            copies[-1].write_bytes(path.read_bytes())
            edit(copies[-1], SeriesInstanceUID="1.2.3", SOPInstanceUID=f"1.2.3.{number}", SeriesNumber=4)
        other = read_series(copies)
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", [at(SQUARE, 2)])])
        assert find_one(path, other, volume).volume is volume
        # Its own scan is not there, though the other one has the same frame of reference.
        assert f"its series {volume.name} is not there" in find([path], other).problems[path]

        dataset = dcmread(path)
        del dataset.ROIContourSequence[0].ContourSequence[0].ContourImageSequence
        del dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
        dataset.save_as(path)
        assert find_one(path, other).notes[0].startswith("names no series, and was taken to the only scan")
        assert "fits to 2 scans" in find([path], other, volume).problems[path]
        edit(path, ReferencedFrameOfReferenceSequence=[])
        dataset = dcmread(path)
        dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.9"
        dataset.save_as(path)
        assert "no scan has its frame of reference" in find([path], other).problems[path]

    def test_another_frame_of_reference(self, volume: Volume, tmp_path: Path) -> None:
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", [at(SQUARE, 2)])])
        dataset = dcmread(path)
        dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.9"
        dataset.save_as(path)
        assert "has the frame of reference 1.9" in find([path], volume).problems[path]

    def test_another_patient_is_named(self, volume: Volume, tmp_path: Path) -> None:
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", [at(SQUARE, 2)])])
        note = "has another PatientID than its scan"
        assert note not in find_one(path, volume).notes
        dataset = dcmread(path)
        dataset.PatientID = "somebody"
        dataset.save_as(path)
        assert note in find_one(path, volume).notes

    def test_a_series_with_a_problem(self, volume: Volume, tmp_path: Path) -> None:
        path = write_structure_set(tmp_path / "a", volume, [("Stomach", [at(SQUARE, 2)])])
        paths = volume.origin.paths
        series = find_series([*paths[:3], *paths[4:]])
        assert not series.volumes
        found = find_dicom_structures([path, *paths], series)
        assert re.search("its series .* is no scan: .* 1 slices are missing", found.problems[path])


class TestChoice:
    def test_the_newest_approved_one_or_what_the_user_says(self, volume: Volume, tmp_path: Path) -> None:
        sets = {
            "old": ("20260101", "APPROVED"),
            "newer": ("20260102", "APPROVED"),
            "draft": ("20260103", "UNAPPROVED"),
        }
        rois = [("Stomach", [at(SQUARE, 2)])]
        paths = [
            write_structure_set(
                tmp_path / name, volume, rois, StructureSetLabel=name, StructureSetDate=date, ApprovalStatus=status
            )
            for name, (date, status) in sets.items()
        ]
        write_structure_set(tmp_path / "bad", volume, rois, StructureSetDate="20260104", ApprovalStatus="REJECTED")
        (tmp_path / "zcopy").write_bytes(paths[0].read_bytes())
        found = find([*paths, tmp_path / "bad", tmp_path / "zcopy"], volume)
        assert len(found.structures) == 3
        assert "somebody has rejected it" in found.remarks[0]
        assert f"{tmp_path / 'zcopy'}: passed over: a copy of {paths[0]}" in found.remarks[1]

        choice = choose_structures(found.structures)
        assert [one.label for one in choice.structures] == ["newer"]
        (remark,) = choice.remarks
        assert "taken newer ('newer', 20260102000000, approved), the newest approved one; left" in remark
        assert [one.label for one in choose_structures(found.structures, ["DRAFT"]).structures] == ["draft"]
        with pytest.raises(InputError, match="nothing: no structure set has this"):
            choose_structures(found.structures, ["nothing"])
        same = [found.structures[0], replace(found.structures[0], label="copy")]
        choice = choose_structures(same)
        assert not choice.structures and "2 structure sets of one time" in choice.problems[volume.name]
        # Files of one name, from two folders.
        same = [replace(same[0], paths=(tmp_path / folder / "RS.dcm",)) for folder in ("monday", "friday")]
        assert "of one time, monday/RS.dcm, friday/RS.dcm;" in choose_structures(same).problems[volume.name]
        assert choose_structures(same, ["friday/RS"]).structures == same[1:]
