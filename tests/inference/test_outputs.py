"""What cannot be written is found before the prediction, something else stands for it, and a fault costs one scan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dataset_builder.series import write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.inputs import InputScan, find_scans
from gi_segmentation.inference import batches, outputs
from gi_segmentation.inference.arguments import FORMAT_NAMES
from gi_segmentation.inference.outputs import FORMATS, OutputPlan, plan_outputs
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from tests.support.masks import find_dicom_errors
from tests.support.models import save_model
from tests.support.volumes import prediction_words

SHAPE = (26, 24, 4)
UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "segformer", seed=0)


def write_scan(folder: Path, shear: float = 0, removed: tuple[str, ...] = (), **values: str) -> InputScan:
    """Write a series and return it. Each slice lies `shear` mm farther back than the one below it."""
    affine = np.diag([-15.0, -15.0, 4.0, 1.0])
    affine[1, 2] = -shear
    voxels = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.uint16)
    for path in write_series(folder, voxels, affine):
        dataset = pydicom.dcmread(path)
        for name in removed:
            del dataset[name]
        for name, value in values.items():
            setattr(dataset, name, value)
        dataset.save_as(path)
    (scan,) = find_scans(folder).scans
    return scan


def test_each_format_of_the_command_line_is_in_the_table() -> None:
    assert tuple(name for name, one in FORMATS.items() if not one.comes_with) == FORMAT_NAMES


class TestPlan:
    def test_a_good_series_gets_all(self, tmp_path: Path) -> None:
        scan = write_scan(tmp_path)
        wanted = ("nifti", "dicom-seg", "rtstruct", "report")
        plan = plan_outputs(scan, wanted)
        assert set(plan.formats) == set(wanted) and plan.refused == {} and plan.remarks == ()
        assert plan_outputs(scan, ["report"]) == OutputPlan(("report",), {})

    def test_a_series_without_uids_gets_a_label_map(self, tmp_path: Path) -> None:
        scan = write_scan(tmp_path / "scan", removed=UIDS)
        plan = plan_outputs(scan, ["nifti", "dicom-seg", "rtstruct", "report"])
        assert plan.formats == ("nifti", "report") and plan.refused.keys() == {"dicom-seg", "rtstruct"}
        for reason in plan.refused.values():
            # A folder may have the name of a patient.
            assert "has no SOPInstanceUID, which contours have to name" in reason and str(tmp_path) not in reason
        with pytest.raises(InputError, match=r"no dicom-seg and no rtstruct can be written: .*--format nifti"):
            plan_outputs(scan, ["dicom-seg", "rtstruct", "report"])

    def test_the_slices_of_a_tilted_gantry_get_contours(self, tmp_path: Path) -> None:
        scan = write_scan(tmp_path, shear=3)
        for wanted in (["dicom-seg"], ["dicom-seg", "rtstruct"]):
            plan = plan_outputs(scan, wanted)
            assert plan.formats == ("rtstruct",) and list(plan.refused) == ["dicom-seg"]
            assert "shifted by 9.0 mm" in plan.refused["dicom-seg"]
        # Less than half a pixel from the first to the last slice.
        assert not plan_outputs(write_scan(tmp_path / "other", shear=2), ["dicom-seg"]).refused

    def test_what_a_library_refuses_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scan = write_scan(tmp_path)

        def refuse(*_: object) -> None:
            raise ValueError

        monkeypatch.setattr(outputs, "build_dicom_seg", refuse)
        plan = plan_outputs(scan, ["dicom-seg", "report"])
        assert plan.formats == ("rtstruct", "report")
        # An error without a text has a name and a place.
        assert plan.refused["dicom-seg"].startswith("unexpected ValueError in test_outputs.py, line ")
        assert plan.refused["dicom-seg"].endswith("; please report it")


def test_contours_stand_for_a_segmentation(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_scan(tmp_path / "in" / "tilted", shear=3, PatientSex="X").name
    good = write_scan(tmp_path / "in" / "good").name
    words = prediction_words(model, tmp_path / "in", tmp_path / "out")
    listed = main([*words, "--list"])
    printed = capsys.readouterr().out
    assert f"{name}: no dicom-seg can be written: its slices are shifted by 9.0 mm" in printed
    assert f"{name}: PatientSex is not a valid value and was left empty" in printed
    # Without --format, a series gets what can be written.
    assert sorted(main(words)) == sorted(listed)
    ends = (".rtstruct.dcm", ".report.json", ".report.html")
    expected = {name + end for end in ends} | {good + end for end in (*ends, ".seg.dcm")}
    assert {path.name for path in listed} == expected
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == expected
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(name) and "| partly |" in line for line in lines)
    assert any(line.startswith(f"{name}: no dicom-seg was written: its slices are shifted") for line in lines)
    assert f"{name}: PatientSex is not a valid value and was left empty" in lines
    report = json.loads((tmp_path / "out" / f"{name}.report.json").read_text())
    assert report["files"]["rtstruct"] == {"names": [f"{name}.rtstruct.dcm"], "reason": ""}
    assert report["files"]["dicom-seg"]["names"] == [] and "tilted gantry" in report["files"]["dicom-seg"]["reason"]
    assert report["remarks"] == ["PatientSex is not a valid value and was left empty"]
    page = (tmp_path / "out" / f"{name}.report.html").read_text()
    assert "No dicom-seg was written: its slices are shifted" in page and "PatientSex is not a valid" in page

    # What was asked for and cannot be written is an error, although the contours are there.
    words = prediction_words(model, tmp_path / "in", tmp_path / "asked", "--format", "dicom-seg")
    with pytest.raises(InputError, match=rf"^1 of 2 scans lack a file: {name} has no dicom-seg; the table says why\."):
        main(words)
    written = {path.name for path in (tmp_path / "asked").glob("[!.]*")}
    assert written == {f"{name}.rtstruct.dcm", f"{good}.seg.dcm"}


def test_no_scan_that_can_be_written_ends_before_the_model_is_loaded(tmp_path: Path) -> None:
    write_scan(tmp_path / "in", removed=UIDS)
    with pytest.raises(InputError, match=r"no dicom-seg and no rtstruct can be written: .*has no SOPInstanceUID"):
        main(prediction_words(tmp_path / "no model", tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["read", "write", "record"])
def test_a_fault_costs_one_scan(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [write_scan(tmp_path / "in" / letter).name for letter in "abc"]
    module, function = {
        "read": (batches, "read_pixels"),
        "write": (outputs, "write_label_map"),
        "record": (outputs, "write_rtstruct"),
    }[place]
    original = getattr(module, function)

    def stumble(first: Any, *others: Any) -> Any:
        volume = getattr(first, "volume", first)
        if volume.name == names[0]:
            raise KeyError("frame")
        return original(first, *others)

    monkeypatch.setattr(module, function, stumble)
    words = prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", "nifti", "rtstruct")
    with pytest.raises(
        InputError, match=f"^1 of 3 scans {'failed' if place == 'read' else 'lack a file'}: {names[0]}"
    ):
        main(words)
    printed = capsys.readouterr()
    assert "unexpected KeyError in test_outputs.py, line " in printed.out + printed.err
    ends = {"read": [], "write": [".rtstruct.dcm"], "record": [".nii.gz"]}[place]
    expected = {name + end for name in names[1:] for end in (".nii.gz", ".rtstruct.dcm")} | {
        names[0] + e for e in ends
    }
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == expected
    assert not list((tmp_path / "out").rglob("*.partial*"))
    # After a repair, the same command completes this scan and passes over the others.
    monkeypatch.undo()
    assert len(main(words)) == 6
    statuses = [line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines() if " | " in line][1:]
    assert sorted(statuses) == ["done", "skipped", "skipped"]


@pytest.mark.parametrize("empty", [True, False])
def test_points_and_references_are_what_planning_systems_take(empty: bool, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "in", shear=3)
    masks = np.zeros((3, *SHAPE), dtype=bool)
    # The finest pattern of a slice, and an organ that was not found.
    masks[0, ::2, ::2] = masks[1, :, :, 2] = not empty
    write_rtstruct(scan.volume, masks, tmp_path / "out.dcm", Algorithm({"a": "b"}), GI_TRACT)
    dataset = pydicom.dcmread(tmp_path / "out.dcm")
    source = {pydicom.dcmread(path).SOPInstanceUID for path in (tmp_path / "in").iterdir()}
    assert (dataset.StudyDate, dataset.ApprovalStatus) == ("20260102", "UNAPPROVED")
    assert [roi.ROINumber for roi in dataset.StructureSetROISequence] == [1, 2, 3]
    # An organ without a voxel has no sequence: some programs refuse one without items.
    assert ["ContourSequence" in roi for roi in dataset.ROIContourSequence] == [not empty, not empty, False]
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", ()):
            assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID in source
            assert len(contour.ContourData) == 3 * contour.NumberOfContourPoints
            assert len("\\".join(map(str, contour.ContourData))) < 2**16
    assert find_dicom_errors(tmp_path / "out.dcm") == []
