"""`score` of label maps, segmentations and structure sets: the same masks have the same scores in every format."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from dataset_builder.series import write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.nifti import write_label_map
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.rle import encode
from gi_segmentation.rules import DEFAULT_RULES
from gi_segmentation.score import main
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import compare_masks
from tests.support.dicom import edit, read_series
from tests.support.volumes import ORIENTATIONS, store

# Columns, rows and slices.
SHAPE = (24, 20, 6)
SPACING_MM = (1.5, 1.25, 4.0)
AFFINE = np.diag([*(-side for side in SPACING_MM), 1.0])
ORGANS = GI_TRACT.names
ALGORITHM = Algorithm({"name/model": "c0ffee" * 6 + "beef"})


def make_masks(seed: int = 0, moved: int = 0) -> np.ndarray:
    """Three boxes that do not overlap, moved by some columns: bool, shape `(organs, *SHAPE)`."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((3, *SHAPE), dtype=bool)
    for organ, first in enumerate((1, 8, 15)):
        height, depth = rng.integers(4, 12), rng.integers(2, 5)
        masks[organ, first + moved : first + 5 + moved, 3 : 3 + height, 1 : 1 + depth] = True
    return masks


def write_labels(path: Path, masks: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a label map as any other tool would, without names of labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(masks.shape[1:], dtype=np.uint8)
    for label, mask in enumerate(masks, start=1):
        labels[mask] = label
    image = nibabel.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def make_series(folder: Path, patient: str = "phantom") -> Volume:
    """Write an empty series of a patient."""
    paths = write_series(folder, np.zeros(SHAPE, dtype=np.uint16), AFFINE)
    for path in paths:
        edit(path, PatientID=patient)
    return read_series(paths)


def write_table(
    path: Path, masks: np.ndarray, column: str, scan: str = "case1_day0", labels: LabelSet = GI_TRACT
) -> Path:
    """Write a CSV with the sizes of slices and pixels; None in place of a mask: no rows."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(["id", "class", column, "width", "height", "spacing_x", "spacing_y"])
        for k in range(SHAPE[2]):
            for organ, mask in zip(labels.names, masks, strict=True):
                size = [*SHAPE[:2], *SPACING_MM[:2]]
                writer.writerow([f"{scan}_slice_{k + 1:04d}", organ, encode(mask[:, :, k].T), *size])
    return path


def score(truth: Path, submissions: Sequence[Path], *flags: str) -> dict[str, float]:
    words = [word for path in submissions for word in ("--submission", str(path))]
    return main(["--truth", str(truth), *words, "--num_proc", "1", *flags])


def test_one_prediction_has_one_dice_in_all_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume, true, predicted = make_series(tmp_path / "images"), make_masks(), make_masks(moved=1)
    names = ("csv", "nifti", "seg", "rtstruct")
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        folder.mkdir()
    facts = {"case1_day0": {"slice_spacing_mm": SPACING_MM[2], "rescale_slope": 1, "rescale_intercept": 0}}
    (folders["csv"] / "labels.json").write_text(json.dumps({"labels": ORGANS, "scans": facts}))
    # The axis of slices of a series may run from feet to head. A CSV begins at the head.
    slices = np.stack([volume.to_training(mask).transpose(2, 1, 0) for mask in predicted])
    write_table(folders["csv"] / "submission.csv", slices, "predicted")
    write_label_map(volume, predicted, folders["nifti"] / "some.nii.gz", GI_TRACT)
    write_dicom_seg(volume, predicted, folders["seg"] / "seg.dcm", ALGORITHM, GI_TRACT)
    write_rtstruct(volume, predicted, folders["rtstruct"] / "rt.dcm", ALGORITHM, GI_TRACT)
    expected = compare_masks(1, "a", ORGANS, predicted, true).volume_dice
    for truth in (tmp_path / "nifti_truth", tmp_path / "seg_truth"):
        truth.mkdir()
    write_label_map(volume, true, tmp_path / "nifti_truth" / "other.nii.gz", GI_TRACT)
    write_dicom_seg(volume, true, tmp_path / "seg_truth" / "seg.dcm", ALGORITHM, GI_TRACT)
    for truth in ("nifti_truth", "seg_truth"):
        output = tmp_path / f"{truth}.csv"
        flags = ("--images", str(tmp_path / "images"), "--output", str(output), "--clinical")
        score(tmp_path / truth, list(folders.values()), *flags)
        table = pd.read_csv(output).set_index(["submission", "organ"])
        for name in names:
            found = [table.loc[(str(folders[name]), organ), "volume_dice"] for organ in ORGANS]
            assert found == pytest.approx(expected, abs=0.01 if name == "rtstruct" else 0), name
            # Each organ was moved by a column of 1.5 mm.
            assert table.loc[(str(folders[name]), "stomach"), "hausdorff_mm"] == pytest.approx(1.5, abs=0.01)
    shown = capsys.readouterr().out
    assert "taken for the same scan, because each side has one" in shown and "1 scan of 1 patient" in shown


def test_two_tools_are_compared_over_the_same_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans: dict[str, list[object]] = {"a": [], "b": []}
    for case in range(1, 7):
        true = make_masks(case)
        write_labels(tmp_path / "truth" / "labelsTr" / f"case{case}_day0.nii.gz", true)
        # Images beside the label maps are no label maps.
        write_labels(tmp_path / "truth" / "imagesTr" / f"case{case}_day0_0000.nii.gz", true)
        for tool, moved in (("a", 1), ("b", 2 + case % 2)):
            predicted = make_masks(case, moved)
            write_labels(tmp_path / tool / f"case{case}_day0.nii.gz", predicted)
            # The orientation of the training: slices, rows and columns.
            order = [masks.transpose(0, 3, 2, 1) for masks in (predicted, true)]
            scans[tool].append(compare_masks(f"case{case}", f"case{case}_day0", ORGANS, *order))
    names = {organ: label for label, organ in enumerate(ORGANS, start=1)}
    for folder in ("truth", "a"):
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **names}}))
    # The third way to name labels.
    labels = ",".join(f"{label}={organ}" for organ, label in names.items())
    scores = score(tmp_path / "truth", [tmp_path / "a", tmp_path / "b"], "--label_names", labels)
    expected = find_intervals(scans["b"], DEFAULT_RULES, baseline=scans["a"])["dice"]  # type: ignore[arg-type]
    assert expected is not None and expected[1] < 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'b'} compared with {tmp_path / 'a'} over the same patients:" in shown
    assert f"[{expected[0]:+.4f}, {expected[1]:+.4f}]" in shown
    assert "6 scans of 6 patients" in shown and 0.7 < scores["dice"] < 0.9


@pytest.mark.parametrize("number", [5, 22, 47])
def test_another_orientation_is_no_other_grid(number: int, tmp_path: Path) -> None:
    write_labels(tmp_path / "truth" / "case1_day0.nii.gz", make_masks())
    stored = [store(mask, AFFINE, *ORIENTATIONS[number]) for mask in make_masks()]
    write_labels(tmp_path / "tool" / "case1_day0.nii.gz", np.stack([mask for mask, _ in stored]), stored[0][1])
    assert set(score(tmp_path / "truth", [tmp_path / "tool"]).values()) == {1.0}


def test_another_grid_is_refused(tmp_path: Path) -> None:
    masks, moved = make_masks(), AFFINE.copy()
    moved[0, 3] = 0.7
    truth = write_labels(tmp_path / "truth" / "case1_day0.nii.gz", masks)
    for name, found, affine in (("moved", masks, moved), ("cropped", masks[:, :, :, :5], AFFINE)):
        path = write_labels(tmp_path / name / "case1_day0.nii.gz", found, affine)
        with pytest.raises(InputError, match=f"{path}: lies on another grid than {truth}"):
            score(truth.parent, [path.parent])
    table = write_table(tmp_path / "train.csv", masks, "segmentation")
    write_labels(tmp_path / "coarse" / "case1_day0.nii.gz", masks, AFFINE * [2, 2, 1, 1])
    with pytest.raises(InputError, match=r"train\.csv: case1_day0 lies on another grid than"):
        score(table, [tmp_path / "coarse"], "--label_names", "1=large_bowel,2=small_bowel,3=stomach")


def test_what_only_one_side_has_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = LabelSet(("Magen", "Spleen", "tumour"))
    for case in (1, 2, 3):
        volume = Volume(f"P{case}", tmp_path, SHAPE, AFFINE)
        for side, own in (("truth", labels), ("tool", LabelSet(("stomach", "spleen", "liver")))):
            (tmp_path / side).mkdir(exist_ok=True)
            name = f"P{case + (side == 'tool')}"
            write_label_map(volume, make_masks(), tmp_path / side / f"{name}.nii.gz", own)
    sides = tmp_path / "truth", [tmp_path / "tool"]
    flags = ("--organs", "stomach=stomach,Magen;spleen=spleen;liver=liver;mass=tumour")
    with pytest.raises(InputError, match=r"tool: lacks 1 scan \(P1\) of the truth; predict them"):
        score(*sides, *flags)
    left_out = score(*sides, *flags, "--missing_scans", "leave_out")
    shown = capsys.readouterr().out
    assert left_out["dice"] == 1 and left_out.keys() >= {"dice_stomach", "dice_spleen"}
    assert "dice_liver" not in left_out and "dice_mass" not in left_out
    for line in (
        f"{tmp_path / 'tool'}: left out, because the truth lacks them: 1 scan (P4)",
        f"{tmp_path / 'truth'}: left out, because not all sides have them: mass",
        f"{tmp_path / 'tool'}: left out, because not all sides have them: liver",
        "2 scans (P2, P3) counted as a patient each",
    ):
        assert line in shown
    empty = score(*sides, *flags, "--missing_scans", "empty")
    assert empty["dice_volume_stomach"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match=r"no organ is there on all sides: .*truth has .*and .*tool has .*--organs"):
        score(*sides, "--organs", "mass=tumour", "--missing_scans", "empty")


def test_organs_that_nobody_drew_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # TotalSegmentator writes a file for each structure. One was not drawn on the second scan.
    for case, organs in ((1, ("stomach", "spleen")), (2, ("stomach",))):
        for organ, mask in zip(organs, make_masks(), strict=False):
            write_labels(tmp_path / "truth" / f"s{case}" / "segmentations" / f"{organ}.nii.gz", mask[None])
        write_labels(tmp_path / "truth" / f"s{case}" / "mri.nii.gz", make_masks())
        write_labels(tmp_path / "tool" / f"s{case}.nii.gz", make_masks(moved=case))
    scores = score(tmp_path / "truth", [tmp_path / "tool"], "--label_names", "1=stomach,2=spleen,3=liver")
    assert scores["dice_stomach"] == pytest.approx((8 / 10 + 6 / 10) / 2) and scores["dice_spleen"] == pytest.approx(
        0.8
    )
    shown = capsys.readouterr().out
    assert "spleen is known in 1 of 2 scans of the truth, and scored there" in shown
    assert "dice_spleen (known in 1 of 2 scans)" in shown


def test_a_prediction_without_any_voxel_needs_names(tmp_path: Path) -> None:
    truth = write_labels(tmp_path / "t" / "a.nii.gz", make_masks())
    write_label_map(Volume("a", tmp_path, SHAPE, AFFINE), make_masks(), truth, GI_TRACT)
    write_labels(tmp_path / "tool" / "a.nii.gz", np.zeros_like(make_masks()))
    with pytest.raises(InputError, match=r"t has large_bowel, .* and .*tool has none; .* by --label_names"):
        score(tmp_path / "t", [tmp_path / "tool"])
    names = ",".join(f"{label}={organ}" for label, organ in enumerate(ORGANS, start=1))
    assert score(tmp_path / "t", [tmp_path / "tool"], "--label_names", names)["dice_volume"] == 0


def test_names_of_bids(tmp_path: Path) -> None:
    # A table is for all label maps below it. Masks of one structure have its name.
    for case in ("sub-1", "sub-2"):
        folder = Path(case) / "anat"
        write_labels(tmp_path / "truth" / folder / f"{case}_desc-manual_dseg.nii.gz", make_masks())
        for organ, mask in zip(("liver", "spleen"), make_masks(moved=1), strict=False):
            write_labels(tmp_path / "tool" / folder / f"{case}_label-{organ}_mask.nii.gz", mask[None])
    (tmp_path / "truth" / "dseg.tsv").write_text("index\tname\n1\tliver\n2\tspleen\n3\tkidney\n")
    scores = score(tmp_path / "truth", [tmp_path / "tool"])
    assert [scores["dice_liver"], scores["dice_spleen"]] == pytest.approx([0.8, 0.8]) and "dice_kidney" not in scores
    write_labels(tmp_path / "tool" / "sub-1" / "anat" / "sub-1_dseg.nii.gz", make_masks())
    with pytest.raises(InputError, match=r"is of the scan sub-1, too; leave one label map for each scan"):
        score(tmp_path / "truth", [tmp_path / "tool"])


def test_segmentations_without_their_series(tmp_path: Path) -> None:
    # Without empty frames, the two files of a scan reach from another first to another last slice.
    for patient in ("one", "two"):
        volume = make_series(tmp_path / "images" / patient, patient)
        for side, places in (("truth", slice(0, 4)), ("tool", slice(2, 6))):
            masks = np.zeros((3, *SHAPE), dtype=bool)
            masks[0, 3:9, 3:9, places] = True
            (tmp_path / side).mkdir(exist_ok=True)
            write_dicom_seg(volume, masks, tmp_path / side / f"{patient}.dcm", ALGORITHM, GI_TRACT)
    sides = tmp_path / "truth", [tmp_path / "tool"]
    output = ("--output", str(tmp_path / "scores.csv"), "--clinical")
    alone = score(*sides, *output)
    table = pd.read_csv(tmp_path / "scores.csv")
    assert alone["dice_volume_large_bowel"] == 0.5 and alone["dice_large_bowel"] == pytest.approx(2 / 6)
    assert {*table["hausdorff_mm"].dropna()} == {0.0, 8.0} and {*table["case"]} == {"patient1", "patient2"}
    with_series = score(*sides, *output, "--images", str(tmp_path / "images"))
    assert with_series["hausdorff_mm_large_bowel"] == alone["hausdorff_mm_large_bowel"] == 8
    assert with_series["dice"] == alone["dice"]


def test_contours_of_a_program_that_has_found_nothing(tmp_path: Path) -> None:
    volume = make_series(tmp_path / "images")
    for side, masks in (("truth", make_masks()), ("tool", np.zeros((3, *SHAPE), dtype=bool))):
        (tmp_path / side).mkdir()
        write_rtstruct(volume, masks, tmp_path / side / "rt.dcm", ALGORITHM, GI_TRACT)
    sides = tmp_path / "truth", tmp_path / "tool"
    images = ("--images", str(tmp_path / "images"))
    assert score(sides[0], [sides[1]], *images)["dice"] == 0
    with pytest.raises(InputError, match=r"rt.dcm: has no closed contours in its 3 ROIs"):
        score(sides[1], [sides[0]], *images)
    with pytest.raises(InputError, match=r"rt.dcm: its series .* is not there"):
        score(*sides[:1], [sides[1]])


def test_a_table_of_own_data_has_its_labels_and_its_unknown_organs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, masks = LabelSet(("duodenum", "liver")), make_masks()[:2]
    scans = {
        f"case{case}_day0": {"slice_spacing_mm": 5.0, "rescale_slope": 1, "rescale_intercept": 0} for case in (1, 2)
    }
    scans["case2_day0"]["unknown"] = ["liver"]  # type: ignore[assignment]
    (tmp_path / "labels.json").write_text(json.dumps({"labels": labels.names, "scans": scans}))
    for scan in scans:
        known = labels if scan == "case1_day0" else LabelSet(("duodenum",))
        write_table(tmp_path / "train.csv", masks[: len(known)], "segmentation", scan, known)
        write_table(tmp_path / "submission.csv", make_masks(moved=1)[:2], "predicted", scan, labels)
    scores = score(tmp_path, [tmp_path / "submission.csv"], "--clinical")
    assert scores["dice_liver"] == pytest.approx(0.8) and scores["dice_duodenum"] == pytest.approx(0.8)
    volume_ml = masks[0].sum() * 1.5 * 1.25 * 5 / 1000
    assert scores["volume_target_ml_duodenum"] == pytest.approx(volume_ml)
    shown = capsys.readouterr().out
    assert "dice_liver (known in 1 of 2 scans)" in shown and "| scans where it is known | 2 of 2 | 1 of 2 |" in shown
    with pytest.raises(InputError, match="--organs: is for label maps and DICOM"):
        score(tmp_path, [tmp_path / "submission.csv"], "--organs", "liver=liver")
