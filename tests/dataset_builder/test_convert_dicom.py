"""`convert`: DICOM series with structure sets and segmentations become a Kaggle folder."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dataset_builder.__main__ import main
from dataset_builder.series import KAGGLE_AXES, write_series
from dataset_builder.verify import verify
from gi_segmentation.data.synthetic import is_synthetic
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.kaggle.label_file import read_label_file
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from tests.support.converting import all_bytes, convert, find_name, read_scan
from tests.support.dicom import edit, read_series
from tests.support.masks import shapes
from tests.support.round_trips import ALGORITHM
from tests.support.volumes import ORIENTATIONS, store

SHAPE = (24, 20, 6)


def scan(folder: Path, patient: str, date: str, seed: int = 0, orientation: int = 0, slope: float = 1) -> Volume:
    """Write a series of a patient."""
    voxels = np.random.default_rng(seed).integers(0, 1200, SHAPE).astype(np.uint16)
    affine = np.eye(4)
    affine[:3, :3] = KAGGLE_AXES * [1.5, 1.25, 4]
    stored = store(voxels, affine, *ORIENTATIONS[orientation])
    paths = write_series(folder / "images", *stored, description="Abdomen Meier", slope=slope)
    for path in paths:
        edit(path, PatientID=patient, PatientName=f"Meier^{patient}", StudyDate=date)
    return read_series(paths)


def contours(volume: Volume, masks: np.ndarray, path: Path, names: tuple[str, ...], **values: object) -> Path:
    """Write a structure set whose ROIs have the given names."""
    write_rtstruct(volume, masks, path, ALGORITHM, LabelSet(names))
    edit(path, **values)
    return path


def test_contours_and_segments_come_over_voxel_by_voxel(tmp_path: Path) -> None:
    masks = {}
    for number, (orientation, slope) in enumerate([(0, 1.0), (35, 0.5)]):
        patient = f"P{number}x77"
        volume = scan(tmp_path / "in" / str(number), patient, "20240229", number, orientation, slope)
        drawn = shapes(volume.shape, number)
        names = ("Stomach", "Bowel_Large", "PTV 50")
        if number == 0:
            contours(volume, drawn, tmp_path / "in" / "RS.dcm", names)
        else:
            # A file for each organ, as many programs write them.
            for organ in range(3):
                write_dicom_seg(
                    volume,
                    drawn[organ : organ + 1],
                    tmp_path / "in" / f"s{organ}",
                    ALGORITHM,
                    LabelSet((names[organ],)),
                )
        masks[patient] = volume, drawn
    flags = ("--organs", "stomach=stom*;large_bowel=Colon,bowel_large")
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 0
    for patient, (volume, drawn) in masks.items():
        name = find_name(tmp_path / "out", patient)
        pixels, organs = read_scan(tmp_path / "out", name)
        assert list(organs) == ["stomach", "large_bowel"]
        for organ, mask in zip(organs, drawn, strict=False):
            assert np.array_equal(organs[organ], volume.to_training(mask))
        label_file = read_label_file(tmp_path / "out")
        assert label_file is not None and volume.read is not None
        facts = label_file.scans[name]
        assert facts.slice_spacing_mm == pytest.approx(volume.spacing_mm[0])
        restored = pixels * facts.rescale_slope + facts.rescale_intercept
        assert np.allclose(restored, volume.to_training(volume.read()), atol=0.01)
    # `series` says of itself that it is a phantom, and nothing more goes into the slices.
    assert all(is_synthetic(path.read_bytes()) for path in (tmp_path / "out").rglob("*.png"))
    assert verify(tmp_path / "out", 1).problems == []
    header = dcmread(next((tmp_path / "in" / "0" / "images").iterdir()))
    uids = (header.SeriesInstanceUID, header.StudyInstanceUID, header.FrameOfReferenceUID, header.SOPInstanceUID)
    written = all_bytes(tmp_path / "out").lower()
    words = ("meier", "P0x77", "20240229", "abdomen", "PTV", "1.2.826", *uids)
    assert not [word for word in words if word.lower().encode() in written]


def test_the_known_organs_of_the_newest_approved_plan_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (scan(tmp_path / "in" / day, "P1", f"2024010{day}", int(day)) for day in ("1", "2"))
    drawn = shapes(SHAPE)
    approved = contours(new, drawn, tmp_path / "in" / "a", ("STOMACH", "PTV", "Ring_1"), StructureSetDate="20240103")
    edit(approved, ApprovalStatus="APPROVED")
    contours(new, drawn[::-1], tmp_path / "in" / "b", ("Stomach", "PTV", "Couch"), StructureSetDate="20240105")
    contours(old, drawn[1:2], tmp_path / "in" / "c", ("Bowel_Small",))
    assert main(["convert", "--input", str(tmp_path / "in"), "--list", "--num_proc", "1"]) == 0
    listed = capsys.readouterr().out
    assert "1 patient, 2 scans" in listed and '--organs "small_bowel=Bowel_Small;stomach=STOMACH"' in listed
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "the newest approved one; left b" in shown and "left out: 2 structures" in shown and "Ring_1" in shown
    # The scans of a patient are numbered by the dates of their studies.
    (_, first), (_, second) = (read_scan(tmp_path / "out", f"case1_day{day}") for day in (0, 1))
    assert np.array_equal(first["small_bowel"], old.to_training(drawn[1]))
    assert np.array_equal(second["stomach"], new.to_training(drawn[0]))
    label_file = read_label_file(tmp_path / "out")
    assert label_file is not None and label_file.labels.names == ("small_bowel", "stomach")
    assert [label_file.scans[f"case1_day{day}"].unknown for day in (0, 1)] == [("stomach",), ("small_bowel",)]
    with pytest.raises(SystemExit):
        convert(tmp_path / "in", tmp_path / "out", "--structure_set", "typo")
    assert "--structure_set typo: fits to no label" in capsys.readouterr().err
    # The user may want the other one.
    assert convert(tmp_path / "in", tmp_path / "out", "--structure_set", "b") == 0
    assert np.array_equal(read_scan(tmp_path / "out", "case1_day1")[1]["stomach"], new.to_training(drawn[2]))


def test_a_bad_patient_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, lost, double = (scan(tmp_path / "in" / name, name, "20240101", seed) for seed, name in enumerate("glx"))
    drawn = shapes(SHAPE)
    contours(good, drawn[:1], tmp_path / "in" / "RS_good", ("Stomach",))
    path = contours(lost, drawn[:1], tmp_path / "in" / "RS_lost", ("Stomach",))
    contours(double, drawn[:2], tmp_path / "in" / "RS_double", ("Stomach", "Magen"))
    # A series that is not there.
    dataset = dcmread(path)
    for one in dataset.ROIContourSequence[0].ContourSequence:
        for image in one.ContourImageSequence:
            image.ReferencedSOPInstanceUID = generate_uid()
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    study.RTReferencedSeriesSequence[0].SeriesInstanceUID = generate_uid()
    dataset.save_as(path)
    # Two ROIs with one name.
    dataset = dcmread(tmp_path / "in" / "RS_double")
    dataset.StructureSetROISequence[1].ROIName = "Stomach"
    dataset.save_as(tmp_path / "in" / "RS_double")
    with pytest.raises(SystemExit):
        convert(tmp_path / "in", tmp_path / "out")
    shown = capsys.readouterr()
    assert "2 of 3 scans failed" in shown.err and "RS_lost: its series" in shown.err and "The output has" in shown.err
    assert shown.err.strip().count("\nerror: ") == 1
    name = find_name(tmp_path / "out", "g")
    assert np.array_equal(read_scan(tmp_path / "out", name)[1]["stomach"], good.to_training(drawn[0]))
    assert len(list((tmp_path / "out" / "train").iterdir())) == 1 and verify(tmp_path / "out", 1).problems == []


def test_one_number_for_all_patients_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Anna", "Otto"):
        volume = scan(tmp_path / "in" / name, "anonymous", "20240101")
        for path in volume.origin.paths:
            edit(path, PatientName=name)
        contours(volume, shapes(SHAPE)[:1], tmp_path / "in" / f"RS_{name}", ("Stomach",))
    note = "1 PatientID with several names: each is taken for one patient"
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert note in capsys.readouterr().out and len(list((tmp_path / "out" / "train").iterdir())) == 1
    assert convert(tmp_path / "in", tmp_path / "two", "--patients", "*") == 0
    assert note not in capsys.readouterr().out and len(list((tmp_path / "two" / "train").iterdir())) == 2


def test_contours_without_a_voxel_do_not_say_that_there_is_no_organ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, masks = scan(tmp_path / "in", "P1", "20240101"), np.zeros((2, *SHAPE), dtype=bool)
    masks[:, 5:9, 5:9, 2] = True
    path = contours(volume, masks, tmp_path / "in" / "RS", ("Stomach", "Duodenum"))
    dataset = dcmread(path)
    # A contour of half a millimetre between the centres of voxels.
    corner = (volume.affine @ [6.4, 6.4, 2, 1])[:3] * [-1, -1, 1]
    points = np.add([[0, 0, 0], [0.3, 0, 0], [0, 0.3, 0]], corner)
    (contour,) = dataset.ROIContourSequence[1].ContourSequence
    contour.ContourData, contour.NumberOfContourPoints = [f"{value:.3f}" for value in points.ravel()], 3
    dataset.save_as(path)
    organs = ("--organs", "stomach=stomach;duodenum=duodenum")
    assert convert(tmp_path / "in", tmp_path / "out", *organs) == 0
    assert "duodenum has no voxel in the structure set, so it counts as not drawn" in capsys.readouterr().out
    label_file = read_label_file(tmp_path / "out")
    assert label_file is not None and label_file.scans["case1_day0"].unknown == ("duodenum",)
    assert convert(tmp_path / "in", tmp_path / "out", *organs, "--missing", "empty") == 0
    assert not read_scan(tmp_path / "out", "case1_day0")[1]["duodenum"].any()
    # Then nobody knows where anything is.
    with pytest.raises(SystemExit):
        convert(tmp_path / "in", tmp_path / "out2", "--organs", "duodenum=duodenum")
    assert "none of its organs has a voxel" in capsys.readouterr().err
    assert not (tmp_path / "out2" / "train.csv").exists()


def test_corrections_say_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("Stomach", "Bowel_Large")
    for number in range(2):
        volume = scan(tmp_path / "in" / str(number), f"P{number}", "20240229", number)
        predicted = np.zeros((2, *SHAPE), dtype=bool)
        predicted[0, 4:10, 4:10, 1:5], predicted[1, 14:20, 4:10, 2:4] = True, True
        (tmp_path / "out").mkdir(exist_ok=True)
        # `predict` writes both.
        labels = LabelSet(("stomach", "large_bowel"))
        write_dicom_seg(volume, predicted, tmp_path / "out" / f"{number}.seg.dcm", ALGORITHM, labels)
        write_rtstruct(volume, predicted, tmp_path / "out" / f"{number}.rtstruct.dcm", ALGORITHM, labels)
        corrected = predicted.copy()
        if number:
            # Two columns of six pixels on one of four slices.
            corrected[0, 10:12, 4:10, 2] = True
        contours(volume, corrected, tmp_path / "in" / f"RS{number}.dcm", names)
    words = ("--organs", "stomach=Stomach;large_bowel=Bowel_Large", "--corrections", str(tmp_path / "out"))
    assert convert(tmp_path / "in", tmp_path / "own", *words) == 0
    rows = {line.split()[0]: line.split("|") for line in capsys.readouterr().out.splitlines() if line.count("|") == 6}
    # 144 of 144 and 144 of 156 voxels: a Dice of 1 and of 0.96. A voxel has 7.5 mm3.
    assert [cell.strip() for cell in rows["stomach"][1:]] == [
        *("2", "1", "0.980 (0.960)"),
        # The new border has eight pixels, of 1.375 mm in the mean: six at its end, and one more on each side.
        *("6 mm (11 mm)", "1 ml -> 1 ml (+4.2 %)", "1 of 8"),
    ]
    assert [cell.strip() for cell in rows["large_bowel"][1:4]] == ["2", "0", "1.000 (1.000)"]
