"""Files in a folder become the right scans: nothing is lost, nothing is mixed, and what is not certain is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from dataset_builder.series import plane, write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.files import begins_with_attributes, check_uids, is_dicom
from gi_segmentation.formats.dicom.series import FoundSeries, find_series
from gi_segmentation.formats.inputs import find_scans
from tests.support.dicom import edit, item, strip_preamble, write_enhanced
from tests.support.volumes import rotation

VOXELS = np.random.default_rng(0).integers(0, 3000, (6, 5, 8)).astype(np.uint16)
AFFINE = np.diag([-1.5, -1.4, -3.0, 1.0])


def write_slices(folder: Path, **values: object) -> list[Path]:
    """A series of eight slices, from head to feet, with some attributes in all files."""
    paths = write_series(folder, VOXELS, AFFINE)
    if values:
        for path in paths:
            edit(path, **values)
    return paths


def find(folder: Path) -> FoundSeries:
    """What is in a folder."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for path in files:
        kinds[path.is_file() and is_dicom(path)].append(path)
    return find_series(kinds[True], kinds[False])


def find_problem(folder: Path) -> str:
    """The problem of the only series in a folder."""
    volumes, problems, remarks, _ = find(folder)
    assert not volumes and not remarks and len(problems) == 1
    (text,) = problems.values()
    assert "\n" not in text
    return text


def read_slices(found: FoundSeries) -> dict[str, np.ndarray]:
    """The voxels of each scan. None has a problem."""
    assert not found.problems
    return {volume.name: volume.read() for volume in found.volumes}  # type: ignore[misc]


def swap_last(folder: Path, change: Callable[[Path], object], name: str = "") -> Path:
    """Write a series, and change its last slice."""
    path = write_slices(folder)[-1]
    if name:
        path = path.rename(folder / name)
    change(path)
    return path


class TestLostSlices:
    @pytest.mark.parametrize(
        ("name", "change", "expected"),
        [
            ("", lambda path: path.write_bytes(b""), "an empty file; it may be a slice of this series"),
            ("", lambda path: path.write_bytes(bytes(100)), "not a DICOM file, or cut; it may be a slice"),
            ("", lambda path: path.write_bytes(bytes(5000)), "not a DICOM file, or cut; it may be a slice"),
            ("last.dcm", lambda path: path.write_text("<html>404</html>"), "not a DICOM file, or cut"),
            ("last.IMA", lambda path: path.write_bytes(b""), "an empty file"),
            ("x1.dcm.part", lambda path: path.write_bytes(path.read_bytes()[:90]), "not a DICOM file, or cut"),
            ("x", lambda path: path.write_bytes(b""), "an empty file"),
            ("", lambda path: (path.unlink(), path.symlink_to("/nowhere/file")), "a broken link; it may be a slice"),
            ("", lambda path: (path.unlink(), path.symlink_to(path.name)), "a broken link; it may be a slice"),
            ("", lambda path: path.write_bytes(path.read_bytes()[:-1]), "it ends within its pixels: 59 of 60 bytes"),
            ("", lambda path: path.write_bytes(path.read_bytes()[:-60]), "it ends within its pixels: 0 of 60 bytes"),
            ("", lambda path: path.write_bytes(path.read_bytes()[:-72]), "it ends before its pixels"),
            ("", lambda path: path.write_bytes(path.read_bytes()[:600]), ": "),
            ("", lambda path: path.write_bytes(path.read_bytes()[:200]), "it ends before its pixels"),
            ("", lambda path: edit(path, PixelData=bytes(40)), "expected 60 bytes of pixels, got 40"),
        ],
    )
    def test_a_damaged_slice_fails_its_series_by_name(
        self, name: str, change: Callable[[Path], object], expected: str, tmp_path: Path
    ) -> None:
        path = swap_last(tmp_path / "in" / "bad", change, name)
        good = write_slices(tmp_path / "in" / "good")
        (volume,), problems, *_ = find(tmp_path / "in")
        assert volume.origin.paths == good[::-1]
        uid = pydicom.dcmread(
            next(one for one in path.parent.iterdir() if one.is_file() and one != path)
        ).SeriesInstanceUID
        assert list(problems) == [uid]
        assert problems[uid].startswith(f"{path}: ") and expected in problems[uid]

    def test_other_files_beside_a_series_are_no_slices(self, tmp_path: Path) -> None:
        write_slices(tmp_path)
        for name in (
            "README.txt",
            "viewer.exe",
            "autorun.inf",
            "report.pdf",
            "README",
            "VERSION",
            "Thumbs.db",
            "x.xml",
        ):
            (tmp_path / name).write_bytes(b"" if name in ("VERSION", "autorun.inf") else b"MZ\0\1 a program")
        (tmp_path / "notes").write_text("a text")
        (tmp_path / "IM0001.dcm.part").write_bytes(b"")
        shutil.copy(tmp_path / "IM0001", tmp_path / "IM0001.dcm")
        (volume,), problems, *_ = find(tmp_path)
        assert not problems and volume.shape == (6, 5, 8)

    def test_a_damaged_file_without_a_series_is_named_alone(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a.dcm").write_bytes(b"")
        volumes, problems, *_ = find(tmp_path)
        assert not volumes and list(problems) == ["x/a.dcm"]
        with pytest.raises(InputError, match=r"a\.dcm: an empty file"):
            find_scans(tmp_path)

    def test_a_folder_per_file_counts_as_one(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path)):
            (tmp_path / f"d{number}").mkdir()
            path.rename(tmp_path / f"d{number}" / "image.dcm")
        assert read_slices(find(tmp_path)).popitem()[1].shape == (6, 5, 8)
        (tmp_path / "d7" / "image.dcm").write_bytes(b"")
        assert "d7/image.dcm: an empty file" in find_problem(tmp_path)

    @pytest.mark.parametrize("only_some", [False, True])
    @pytest.mark.parametrize(("implicit", "meta"), [(True, False), (False, False), (False, True)])
    def test_files_without_preamble_are_read(
        self, implicit: bool, meta: bool, only_some: bool, tmp_path: Path
    ) -> None:
        for path in write_slices(tmp_path)[6 * only_some :]:
            strip_preamble(path, implicit, meta)
            assert path.read_bytes()[128:132] != b"DICM"
        (voxels,) = read_slices(find(tmp_path)).values()
        np.testing.assert_array_equal(voxels, VOXELS[:, :, ::-1])

    def test_content_tells_a_file_without_preamble(self) -> None:
        assert not any(
            map(begins_with_attributes, (b"", bytes(64), b"MZ" * 40, b"\x89PNG\r\n\x1a\n" * 9, b"\x08\0" * 40))
        )
        assert begins_with_attributes(bytes.fromhex("02000000 554c0400 c0000000 02000100 4f42"))
        # The bytes of a number may have the other order.
        assert begins_with_attributes(bytes.fromhex("00080005 4353000a") + b"ISO_IR 100" + bytes(8))


class TestMixtures:
    """Each series has slices of two kinds."""

    @pytest.mark.parametrize(
        ("first", "second", "what"),
        [
            ({"EchoTime": 2}, {"EchoTime": 80}, "EchoTime"),
            ({"EchoNumbers": 1}, {"EchoNumbers": 2}, "EchoNumber"),
            ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}, "TemporalPosition"),
            ({"DiffusionBValue": 50.0}, {"DiffusionBValue": 800.0}, "DiffusionBValue"),
            ({"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, "ImageType"),
            ({"ImageType": ["DERIVED", "PRIMARY", "W"]}, {"ImageType": ["DERIVED", "PRIMARY", "F"]}, "ImageType"),
            ({"InversionTime": 100}, {"InversionTime": 900}, "InversionTime"),
            ({"FlipAngle": 5}, {"FlipAngle": 15}, "FlipAngle"),
            ({"SequenceName": "*ep_b50"}, {"SequenceName": "*ep_b800"}, "SequenceName"),
            ({"TriggerTime": 20}, {"TriggerTime": 340}, "TriggerTime"),
            ({"SeriesNumber": 3}, {"SeriesNumber": 4}, "SeriesNumber"),
            ({"SeriesDescription": "a"}, {"SeriesDescription": "b"}, "SeriesDescription"),
            ({"ContrastBolusAgent": ""}, {"ContrastBolusAgent": "Gd"}, "ContrastBolusAgent"),
            ({"PatientID": "A"}, {"PatientID": "B"}, "patient"),
            ({"PatientName": "A"}, {"PatientName": "B"}, "patient"),
            ({"FrameOfReferenceUID": "1.2"}, {"FrameOfReferenceUID": "1.3"}, "frame of reference"),
            (
                {"MRAcquisitionType": "3D", "AcquisitionTime": "101010"},
                {"AcquisitionTime": "101050"},
                "AcquisitionTime",
            ),
        ],
    )
    def test_kinds_that_complement_each_other_are_refused_and_whole_ones_are_split(
        self, first: dict[str, object], second: dict[str, object], what: str, tmp_path: Path
    ) -> None:
        series = write_slices(tmp_path / "interleaved")
        for number, path in enumerate(series):
            edit(path, **(first | (second if number % 2 else {})))
        problem = find_problem(tmp_path / "interleaved")
        assert f"another {what}" in problem and "mixes 4 slices of" in problem
        # Both kinds of each slice are there.
        whole = write_slices(tmp_path / "whole", **first)
        (tmp_path / "whole" / "more").mkdir()
        for path in whole:
            copy = Path(shutil.copy(path, tmp_path / "whole" / "more"))
            edit(
                copy,
                SOPInstanceUID=generate_uid(),
                PixelData=pydicom.dcmread(copy).pixel_array[::-1, ::-1].tobytes(),
                **second,
            )
        found = read_slices(find(tmp_path / "whole"))
        uid = pydicom.dcmread(whole[0]).SeriesInstanceUID
        assert len(found) == 2 and all(name.startswith(f"{uid}_") and name.isascii() for name in found)
        assert any(np.array_equal(voxels, VOXELS[:, :, ::-1]) for voxels in found.values())
        assert any(np.array_equal(voxels, VOXELS[::-1, ::-1, ::-1]) for voxels in found.values())

    def test_names_tell_the_kind(self, tmp_path: Path) -> None:
        for number, echo in enumerate((2.3, 4.6)):
            for path in write_slices(tmp_path / str(number)):
                edit(
                    path,
                    EchoTime=echo,
                    EchoNumbers=number + 1,
                    SeriesInstanceUID="1.2.3",
                    StudyInstanceUID="1.2",
                    FrameOfReferenceUID="1.4",
                )
        assert list(read_slices(find(tmp_path))) == ["1.2.3_EchoTime-2.3", "1.2.3_EchoTime-4.6"]
        for path in (tmp_path / "0").iterdir():
            edit(path, EchoTime=4.6, EchoNumbers=2, ImageType=["DERIVED", "PRIMARY", "DIXON", "WATER"])
        for path in (tmp_path / "1").iterdir():
            edit(path, ImageType=["DERIVED", "PRIMARY", "DIXON", "../FAT"])
        assert list(read_slices(find(tmp_path))) == ["1.2.3_ImageType-FAT", "1.2.3_ImageType-WATER"]
        next((tmp_path / "1").iterdir()).unlink()
        (volume,), problems, *_ = find(tmp_path)
        assert volume.name.endswith("WATER") and "has slices at 7 of 8 places" in problems["1.2.3_ImageType-FAT"]

    def test_times_at_the_same_places_are_split(self, tmp_path: Path) -> None:
        for number in range(3):
            for path in write_slices(tmp_path / str(number)):
                edit(
                    path,
                    AcquisitionNumber=number,
                    InstanceNumber=pydicom.dcmread(path).InstanceNumber + 8 * number,
                    SeriesInstanceUID="1.2.3",
                    StudyInstanceUID="1.2",
                    FrameOfReferenceUID="1.4",
                )
        assert list(read_slices(find(tmp_path))) == [f"1.2.3_AcquisitionNumber-{number}" for number in range(3)]

    def test_directions_of_diffusion_are_split(self, tmp_path: Path) -> None:
        for number in range(3):
            for path in write_slices(tmp_path / str(number)):
                edit(
                    path,
                    DiffusionGradientOrientation=np.eye(3)[number].tolist(),
                    InstanceNumber=pydicom.dcmread(path).InstanceNumber + 8 * number,
                    SeriesInstanceUID="1.2.3",
                    StudyInstanceUID="1.2",
                    FrameOfReferenceUID="1.4",
                )
        names = [f"1.2.3_GradientDirection-{words}" for words in ("0-0-1", "0-1-0", "1-0-0")]
        assert list(read_slices(find(tmp_path))) == names

    def test_slices_of_one_volume_may_differ_in_times(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path)):
            edit(
                path,
                AcquisitionNumber=number % 2 + 1,
                AcquisitionTime=f"1010{number:02}",
                TriggerTime=number * 7,
                ContentTime=f"1011{number:02}",
                EchoTime=2.3 + 1e-7 * number,
            )
        (volume,), problems, *_ = find(tmp_path)
        assert not problems and volume.shape == (6, 5, 8) and "slices of 2 acquisitions" in volume.note

    def test_frames_of_several_kinds_in_one_file_are_split(self, tmp_path: Path) -> None:
        path = write_enhanced(tmp_path / "file", np.repeat(VOXELS, 2, axis=2), AFFINE)
        dataset = pydicom.dcmread(path)
        for group in dataset.PerFrameFunctionalGroupsSequence:
            k = group.FrameContentSequence[0].DimensionIndexValues[1] - 1
            position, *_ = plane(AFFINE, k // 2)
            group.PlanePositionSequence[0].ImagePositionPatient = position
            group.MREchoSequence = [item(EffectiveEchoTime=(2.0, 80.0)[k % 2])]
            group.PixelValueTransformationSequence[0].RescaleSlope = str(k % 2 + 1)
        dataset.save_as(path)
        found = read_slices(find(tmp_path))
        names = [f"{dataset.SeriesInstanceUID}_EchoTime-{echo}" for echo in (2, 80)]
        np.testing.assert_array_equal(found[names[0]], VOXELS[:, :, ::-1])
        np.testing.assert_array_equal(found[names[1]], VOXELS[:, :, ::-1] * 2.0)


class TestPatients:
    def test_two_patients_with_one_series_uid_are_two_scans(self, tmp_path: Path) -> None:
        for patient, study in (("A", "1.1"), ("B", "1.2")):
            for path in write_slices(tmp_path / patient):
                edit(
                    path,
                    PatientID=patient,
                    StudyInstanceUID=study,
                    SeriesInstanceUID="1.2.3",
                    FrameOfReferenceUID="1.5",
                )
        # B lies above A, so both together would fit a grid.
        for path in (tmp_path / "B").iterdir():
            x, y, z = pydicom.dcmread(path).ImagePositionPatient
            edit(path, ImagePositionPatient=[x, y, float(z) + 24])
        found = read_slices(find(tmp_path))
        assert {name: voxels.shape for name, voxels in found.items()} == {
            "1.2.3_study-1": (6, 5, 8),
            "1.2.3_study-2": (6, 5, 8),
        }

    def test_without_uids_a_folder_is_a_series(self, tmp_path: Path) -> None:
        removed = dict.fromkeys(
            ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"), ...
        )
        for folder in ("A/T2", "B/T2", "B/T1", "C/x:y"):
            write_slices(tmp_path / folder, PatientID=..., PatientName=..., **removed)
        found = read_slices(find(tmp_path))
        assert list(found) == ["A_T2", "T1", "B_T2", "x_y"]
        for voxels in found.values():
            np.testing.assert_array_equal(voxels, VOXELS[:, :, ::-1])

    def test_two_patients_in_a_folder_without_uids_are_split(self, tmp_path: Path) -> None:
        removed = dict.fromkeys(
            ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"), ...
        )
        for patient in ("A", "B"):
            for path in write_slices(tmp_path / patient, PatientID=patient, **removed):
                (tmp_path / "in").mkdir(exist_ok=True)
                path.rename(tmp_path / "in" / f"{patient}{path.name}")
        assert list(read_slices(find(tmp_path))) == ["in_patient-1", "in_patient-2"]

    @pytest.mark.parametrize("patient", [{}, {"PatientBirthDate": "19500101"}, {"StudyDate": "20260203"}])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_two_scans_that_fit_together_without_uids_are_no_scan(
        self, patient: dict[str, str], interleaved: bool, tmp_path: Path
    ) -> None:
        removed = dict.fromkeys(("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"), ...)
        for number, path in enumerate(write_slices(tmp_path, PatientID="", PatientName="", **removed)):
            edit(path, **patient if (number % 2 if interleaved else number > 3) else {})
        if patient:
            text = find_problem(tmp_path)
            assert "PatientBirthDate) than" in text or "StudyDate than" in text
            assert "1950" not in text and "202602" not in text
        else:
            assert len(find(tmp_path).volumes) == 1

    def test_pieces_with_another_study_are_refused(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path)):
            edit(path, StudyInstanceUID=f"1.2.{number // 4}")
        assert "has another StudyInstanceUID or StudyDate than" in find_problem(tmp_path)

    def test_one_name_may_be_written_in_several_ways(self, tmp_path: Path) -> None:
        names = ["Ph^A", "Ph^A^^^", "PH^A", "ph^a^", "Ph^A==", "Ph^A", "Ph^A ", "Ph^A"]
        for path, name in zip(write_slices(tmp_path), names, strict=True):
            edit(path, PatientName=name)
        (volume,), problems, *_ = find(tmp_path)
        assert volume.shape == (6, 5, 8) and not problems

    def test_numbers_that_start_anew_in_each_folder_tell_series_apart(self, tmp_path: Path) -> None:
        for folder in ("A", "B"):
            for path in write_slices(tmp_path / folder):
                edit(path, SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2", FrameOfReferenceUID="1.4")
        for path in (tmp_path / "B").iterdir():
            x, y, z = pydicom.dcmread(path).ImagePositionPatient
            edit(path, ImagePositionPatient=[x, y, float(z) + 24])
        assert "another folder, with the same numbers of slices" in find_problem(tmp_path)
        for path in (tmp_path / "B").iterdir():
            edit(path, InstanceNumber=pydicom.dcmread(path).InstanceNumber + 8)
        assert read_slices(find(tmp_path)).popitem()[1].shape == (6, 5, 16)

    def test_numbers_that_occur_twice_in_a_folder_are_refused(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path)):
            edit(path, InstanceNumber=number % 4 + 1)
        assert "each number of a slice occurs 2 times" in find_problem(tmp_path)
        for path in tmp_path.iterdir():
            edit(path, InstanceNumber=1)
        assert read_slices(find(tmp_path)).popitem()[1].shape == (6, 5, 8)


class TestUids:
    @pytest.mark.parametrize("first", [0, 6])
    def test_slices_with_one_uid_are_all_read_and_cannot_be_referred_to(self, first: int, tmp_path: Path) -> None:
        for path in write_slices(tmp_path)[first:]:
            edit(path, SOPInstanceUID="1.2.3.4")
        found = find(tmp_path)
        (voxels,) = read_slices(found).values()
        np.testing.assert_array_equal(voxels, VOXELS[:, :, ::-1])
        with pytest.raises(InputError, match=r"has the SOPInstanceUID of .*, which is another slice.*--format nifti"):
            check_uids(found.volumes[0].origin)

    @pytest.mark.parametrize("uid", [None, "1.2.3.4"])
    def test_a_copy_counts_once_whatever_its_uid_is(self, uid: str | None, tmp_path: Path) -> None:
        paths = write_slices(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        for number, path in enumerate((tmp_path / "b").iterdir()):
            if uid:
                edit(path, SOPInstanceUID=f"{uid}.{number}")
        (volume,), problems, *_ = find(tmp_path)
        assert not problems and "8 copies passed over" in volume.note
        assert volume.origin.paths == paths[::-1]

    def test_another_image_at_one_place_is_no_copy(self, tmp_path: Path) -> None:
        paths = write_slices(tmp_path)
        copy = Path(shutil.copy(paths[2], tmp_path / "copy"))
        edit(copy, PixelData=bytes(60))
        assert "several slices at" in find_problem(tmp_path)

    def test_slices_with_a_series_uid_each_are_one_scan(self, tmp_path: Path) -> None:
        for path in write_slices(tmp_path / "in" / "T2"):
            edit(path, SeriesInstanceUID=generate_uid())
        found = find(tmp_path)
        assert "each of its 8 slices has a SeriesInstanceUID of its own" in found.volumes[0].note
        np.testing.assert_array_equal(read_slices(found)["T2"], VOXELS[:, :, ::-1])
        with pytest.raises(InputError, match="has another SeriesInstanceUID than"):
            check_uids(found.volumes[0].origin)

    @pytest.mark.parametrize(
        "uids",
        [
            ("StudyInstanceUID",),
            ("FrameOfReferenceUID",),
            ("StudyInstanceUID", "FrameOfReferenceUID"),
            ("gap",),
            ("PatientID",),
        ],
    )
    def test_slices_with_uids_of_their_own_that_are_no_scan_are_refused_together(
        self, uids: tuple[str, ...], tmp_path: Path
    ) -> None:
        paths = write_slices(tmp_path / "T2")
        for path in paths:
            edit(
                path,
                SeriesInstanceUID=generate_uid(),
                **({} if uids == ("gap",) else {name: generate_uid() for name in uids}),
            )
        if uids == ("gap",):
            paths[3].unlink()
        volumes, problems, *_ = find(tmp_path)
        assert (
            not volumes and list(problems) == ["T2"] and "each with a SeriesInstanceUID of its own" in problems["T2"]
        )

    @pytest.mark.parametrize("number", [1, 4])
    def test_pieces_with_another_series_uid_are_refused(self, number: int, tmp_path: Path) -> None:
        paths = write_slices(tmp_path)
        for path in paths[:number]:
            edit(path, SeriesInstanceUID="1.2.3")
        volumes, problems, *_ = find(tmp_path)
        assert not volumes and len(problems) == 2
        assert all("both may be pieces of one series" in problem for problem in problems.values())
        for path in paths[:number]:
            edit(path, SeriesNumber=9)
        assert len(find(tmp_path).volumes) == 2

    def test_a_folder_for_each_series_hides_no_pieces(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path / "all")):
            for name, key in (("pieces", number // 4), ("slices", number)):
                folder = tmp_path / name / str(key)
                folder.mkdir(parents=True, exist_ok=True)
                edit(Path(shutil.copy(path, folder)), SeriesInstanceUID=f"1.2.{key}")
        found = find(tmp_path / "pieces")
        assert not found.volumes and all("may be pieces of one series" in text for text in found.problems.values())
        ((name, voxels),) = read_slices(find(tmp_path / "slices")).items()
        np.testing.assert_array_equal(voxels, VOXELS[:, :, ::-1])
        assert name == "slices"
        shutil.rmtree(tmp_path / "slices" / "3")
        assert "7 slices, each with a SeriesInstanceUID of its own" in find_problem(tmp_path / "slices")

    def test_single_slices_of_several_patients_are_scans(self, tmp_path: Path) -> None:
        for number, path in enumerate(write_slices(tmp_path, ImagePositionPatient=[0, 0, 0])):
            edit(path, PatientID=str(number), SeriesInstanceUID=f"1.2.{number}")
        assert len(read_slices(find(tmp_path))) == 8

    def test_a_uid_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        write_slices(tmp_path, SeriesInstanceUID="1." + "2" * 70)
        assert {text.partition(": ")[2] for text in find(tmp_path).problems.values()} == {
            "expected at most 64 letters as SeriesInstanceUID, got 72; export it again"
        }


class TestLocalizers:
    def test_slices_in_three_directions_are_passed_over(self, tmp_path: Path) -> None:
        axes = (np.eye(3), np.eye(3)[[1, 2, 0]], np.eye(3)[[2, 0, 1]])
        for number, turn in enumerate(axes):
            affine = np.eye(4)
            affine[:3, :3] = turn @ AFFINE[:3, :3]
            for path in write_series(tmp_path / str(number), VOXELS, affine):
                edit(path, SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2", FrameOfReferenceUID="1.4")
        volumes, problems, remarks, _ = find(tmp_path)
        assert not volumes and not problems
        assert remarks == [
            "1.2.3: passed over: a localizer (MR 3 axial): its 24 slices lie in 3 directions at right angles"
        ]
        with pytest.raises(InputError, match=r"none is a slice of an MR series.*a localizer"):
            find_scans(tmp_path)

    @pytest.mark.parametrize(
        "description", ["loc", "LOC_3PL", "Scout haste", "survey", "AAHead_Scout", "3-plane localiser"]
    )
    def test_few_slices_with_the_name_of_a_localizer_are_passed_over(self, description: str, tmp_path: Path) -> None:
        write_slices(tmp_path / "scout", SeriesDescription=description)
        write_slices(tmp_path / "block", SeriesDescription="t2 block local")
        (volume,), problems, remarks, _ = find(tmp_path)
        assert not problems and len(remarks) == 1 and "block" in volume.note

    def test_whole_stacks_in_two_directions_are_two_scans(self, tmp_path: Path) -> None:
        voxels = np.repeat(VOXELS, 2, axis=2)
        for number, turn in enumerate((np.eye(3), np.eye(3)[[1, 2, 0]])):
            affine = np.eye(4)
            affine[:3, :3] = turn @ AFFINE[:3, :3]
            for path in write_series(tmp_path / str(number), voxels, affine):
                edit(path, SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2", FrameOfReferenceUID="1.4")
        assert sorted(read_slices(find(tmp_path))) == ["1.2.3_axial", "1.2.3_coronal"]

    def test_one_file_of_a_series_says_so(self, tmp_path: Path) -> None:
        path = write_slices(tmp_path)[2]
        scans = find_scans(path)
        assert len(scans.scans[0].slices) == 1 and "one slice alone" in scans.scans[0].volume.note
        assert f"{path.name} is 1 of 8 files of its series; name the folder" in scans.left_out[0]


def test_places_rounded_to_a_decimal_are_equal_distances(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (spacing, degrees) in enumerate([(1.25, 0), (3.0, 12), (0.55, 30), (1.2, 7)]):
        affine = np.eye(4)
        affine[:3, :3] = rotation(rng, degrees) @ np.diag([-1.5, -1.4, -spacing])
        voxels = np.repeat(VOXELS, 2, axis=2)
        paths = write_series(tmp_path / str(number), voxels, affine)
        for path in paths:
            edit(path, ImagePositionPatient=[f"{value:.1f}" for value in pydicom.dcmread(path).ImagePositionPatient])
        (volume,), problems, *_ = find(tmp_path / str(number))
        assert not problems and volume.spacing_mm[0] == pytest.approx(spacing, abs=0.01)
        paths[7].unlink()
        assert "1 slices are missing" in find_problem(tmp_path / str(number))


def test_distances_that_really_change_are_refused(tmp_path: Path) -> None:
    # 1.2 mm in one half and 1.3 mm in the other one, all with one decimal.
    places = [0, 1, 2, 3, 4, 5.0833333, 6.1666667, 7.25]
    affine = np.diag([-1.5, -1.4, -1.2, 1.0])
    for path in write_series(tmp_path, VOXELS, affine, places=places):
        edit(path, ImagePositionPatient=[f"{value:.1f}" for value in pydicom.dcmread(path).ImagePositionPatient])
    assert "the distance changes" in find_problem(tmp_path)


def test_a_tilted_gantry_is_named_and_its_affine_is_sheared(tmp_path: Path) -> None:
    affine = np.diag([-1.5, -1.4, 3.0, 1.0])
    paths = write_series(tmp_path, VOXELS, affine)
    for path in paths:
        x, y, z = map(float, pydicom.dcmread(path).ImagePositionPatient)
        edit(path, ImagePositionPatient=[x, y + z * np.tan(np.radians(15)), z])
    (volume,), *_ = find(tmp_path)
    assert "sheared by 15.0 degrees (a tilted gantry)" in volume.note
    np.testing.assert_allclose(volume.affine[:3, 2], [0, -3 * np.tan(np.radians(15)), 3], atol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, :2], affine[:3, :2], atol=1e-6)
