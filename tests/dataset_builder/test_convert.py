"""`convert`: NIfTI files with label maps become a Kaggle folder, voxel by voxel and without names."""

import gzip
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dataset_builder.__main__ import main
from dataset_builder.convert import writing
from dataset_builder.convert.key_file import read_key, updating_key
from dataset_builder.verify import verify
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.label_file import read_label_file
from gi_segmentation.formats.nifti import open_volume
from gi_segmentation.formats.volumes import to_intensities
from tests.support.converting import SHAPE, all_bytes, axial, convert, draw, find_name, nnunet, read_scan, write
from tests.support.volumes import ORIENTATIONS, rotation, store

# Patients of the tests. None of these words may be in the output.
SECRET = ("Meier", "Anna", "20240131", "Otto", "site7", "9.876")


@pytest.mark.parametrize("kind", ["axial", "sagittal", "reversed", "oblique", "one slice", "ct", "fractions"])
def test_intensities_and_masks_come_over_voxel_by_voxel(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    voxels, labels = draw(rng)
    affine = axial((0.9765625, 1.25, 6.0 if kind == "oblique" else 1.0))
    if kind == "one slice":
        voxels, labels = voxels[:, :, 2:3], labels[:, :, 2:3]
    elif kind == "ct":
        voxels = voxels - 1024
    elif kind == "fractions":
        voxels = voxels.astype(np.float32) / 1200
    elif kind == "oblique":
        affine[:3, :3] = rotation(rng, 25) @ affine[:3, :3]
    orientation = {"sagittal": ORIENTATIONS[35], "reversed": ORIENTATIONS[7]}.get(kind, ORIENTATIONS[0])
    image = write(tmp_path / "in" / "imagesTr" / "p_0000.nii.gz", *store(voxels, affine, *orientation))
    # The label map is stored in another order of axes, on the same grid.
    write(tmp_path / "in" / "labelsTr" / "p.nii.gz", *store(labels, affine, *ORIENTATIONS[20]))
    assert convert(tmp_path / "in", tmp_path / "out", "--label_names", "1=stomach,2=duodenum,3=liver") == 0

    volume = open_volume(image)
    assert volume.read is not None
    source, expected = volume.read(), volume.to_training(store(labels, affine, *orientation)[0])
    pixels, masks = read_scan(tmp_path / "out", "case1_day0")
    for value, organ in enumerate(("stomach", "duodenum", "liver"), start=1):
        assert np.array_equal(masks[organ], expected == value)
    label_file = read_label_file(tmp_path / "out")
    assert label_file is not None and label_file.labels.names == ("stomach", "duodenum", "liver")
    facts = label_file.scans["case1_day0"]
    # What a model sees is the same but for its scale, which does not matter.
    seen = volume.to_training(to_intensities(source))
    assert np.allclose(pixels / pixels.max(), seen / seen.max(), atol=1 / 65535)
    restored = pixels * facts.rescale_slope + facts.rescale_intercept
    air = np.percentile(source, 1, method="lower") if kind == "ct" else -np.inf
    assert np.allclose(restored, volume.to_training(np.maximum(source, air)), atol=facts.rescale_slope / 2 + 1e-6)
    assert np.isclose(facts.slice_spacing_mm, volume.spacing_mm[0], atol=1e-5)
    slices = find_slices(tmp_path / "out" / "train")[0]
    assert np.allclose(slices[0].pixel_spacing, volume.spacing_mm[1:], atol=1e-5)
    assert [one.number for one in slices] == list(range(1, volume.training_shape[0] + 1))


def arrange_decathlon(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "imagesTr" / "liver_1.nii.gz", voxels, axial())
    write(folder / "labelsTr" / "liver_1.nii.gz", labels.astype(np.float32), axial())
    names = {"0": "background", "1": "stomach", "2": "duodenum", "3": "liver"}
    (folder / "dataset.json").write_text(json.dumps({"labels": names, "modality": {"0": "MRI"}}))
    return ()


def arrange_totalsegmentator(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "s01" / "mri.nii.gz", voxels, axial())
    for value, name in enumerate(("stomach", "duodenum", "liver"), start=1):
        write(folder / "s01" / "segmentations" / f"{name}.nii.gz", (labels == value).astype(np.uint8), axial())
    return ("--organs", "stomach=stomach;duodenum=duodenum;liver=liver")


def arrange_pairs(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "P1" / "t2.nii.gz", voxels, axial())
    write(folder / "P1" / "t2_seg.nii.gz", labels, axial())
    (folder / "itksnap.label").write_text(
        '# a description\n0 0 0 0 0 0 0 "Clear Label"\n1 255 0 0 1 1 1 "stomach"\n2 0 255 0 1 1 1 "duodenum"\n'
        '3 0 0 255 1 1 1 "liver"\n'
    )
    return ("--images", "*/t2.nii.gz", "--labels", "*/t2_seg.nii.gz")


def arrange_masks(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "P1" / "t2.nii.gz", voxels, axial())
    for value, name in enumerate(("stomach", "duodenum", "liver"), start=1):
        write(folder / "P1" / "drawn" / f"{name}.nii.gz", (labels == value).astype(np.uint8), axial())
    return ("--images", "*/t2.nii.gz", "--labels", "*/drawn/*.nii.gz")


def arrange_side_by_side(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "P1" / "t2.nii.gz", voxels, axial())
    for value, name in enumerate(("stomach", "duodenum", "liver"), start=1):
        write(folder / "P1" / f"{name}.nii.gz", ((labels == value) * value).astype(np.uint8), axial())
    # This pattern fits to the scan, too.
    return ("--images", "*/t2.nii.gz", "--labels", "*/*.nii.gz")


def arrange_bids(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    write(folder / "sub-01" / "ses-02" / "anat" / "sub-01_ses-02_T2w.nii.gz", voxels, axial())
    # Another scan of the session, on another grid.
    write(folder / "sub-01" / "ses-02" / "anat" / "sub-01_ses-02_T1w.nii.gz", voxels, axial((1, 1, 3)))
    derived = folder / "derivatives" / "manual"
    anat = derived / "sub-01" / "ses-02" / "anat"
    write(anat / "sub-01_ses-02_space-orig_dseg.nii.gz", np.where(labels == 3, 0, labels).astype(np.uint8), axial())
    write(anat / "sub-01_ses-02_label-liver_mask.nii.gz", (labels == 3).astype(np.uint8), axial())
    (derived / "dseg.tsv").write_text("index\tname\n1\tstomach\n2\tduodenum\n")
    return ()


@pytest.mark.parametrize(
    "arrange",
    [arrange_decathlon, arrange_totalsegmentator, arrange_pairs, arrange_masks, arrange_side_by_side, arrange_bids],
)
def test_each_arrangement_gives_the_same_masks(arrange: Callable[..., tuple[str, ...]], tmp_path: Path) -> None:
    voxels, labels = draw(np.random.default_rng(1))
    assert convert(tmp_path / "in", tmp_path / "out", *arrange(tmp_path / "in", voxels, labels)) == 0
    pixels, masks = read_scan(tmp_path / "out", "case1_day0")
    volume = open_volume(next((tmp_path / "in").rglob("*.nii.gz")))
    assert np.array_equal(pixels, volume.to_training(voxels))
    assert set(masks) == {"stomach", "duodenum", "liver"}
    for value, organ in enumerate(("stomach", "duodenum", "liver"), start=1):
        assert np.array_equal(masks[organ], volume.to_training(labels == value)), organ


@pytest.mark.parametrize("arrange", [arrange_decathlon, arrange_bids])
def test_the_names_of_the_user_win(arrange: Callable[..., object], tmp_path: Path) -> None:
    voxels, labels = draw(np.random.default_rng(1))
    arrange(tmp_path / "in", voxels, labels)
    assert convert(tmp_path / "in", tmp_path / "out", "--label_names", "1=rectum,2=spleen") == 0
    _, masks = read_scan(tmp_path / "out", "case1_day0")
    # A file of one structure has its name.
    assert set(masks) == {"rectum", "spleen", "label_3" if arrange is arrange_decathlon else "liver"}
    assert masks["rectum"].sum() == (labels == 1).sum()


def test_a_label_map_is_no_mask_of_one_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrange_pairs(tmp_path / "in", *draw(np.random.default_rng(1)))
    flags = ("--images", "*/t2.nii.gz", "--labels", "*/t2_*.nii.gz")
    line = run_wrong(capsys, tmp_path / "in", tmp_path / "out", *flags)
    assert "t2_seg.nii.gz: has the labels 1, 2, 3, but its name is that of one structure" in line
    assert "The output has the others" not in line and not (tmp_path / "out").exists()


def test_no_name_of_the_input_is_in_the_output(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    cases = {name: draw(rng) for name in ("Meier_Anna_20240131", "Otto_site7_20240131")}
    folder = nnunet(tmp_path / "site7" / "Meier", cases)
    assert convert(folder, tmp_path / "out") == 0
    written = all_bytes(tmp_path / "out").lower()
    assert b"stomach" in written and b"case2_day0_slice_0006" in written
    assert not [word for word in SECRET if word.lower().encode() in written]
    key = Path(f"{tmp_path / 'out'}.key.json")
    assert "Meier_Anna" in key.read_text() and key.stat().st_mode & 0o777 == 0o600
    assert verify(tmp_path / "out", 1).problems == []


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    cases = {f"p{number}": draw(rng) for number in range(3)}
    folder, out = nnunet(tmp_path / "in", cases), tmp_path / "out"
    written: list[str] = []
    limit = 2
    write_scan = writing.write_scan

    def stop(task: writing.ScanTask, made_of: str, scan_folder: Path) -> object:
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(task.name)
        return write_scan(task, made_of, scan_folder)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_scan", stop)
        with pytest.raises(SystemExit):
            convert(folder, out)
        assert not (out / "train.csv").exists() and not (out / "labels.json").exists()
        key = Path(f"{out}.key.json").read_bytes()
        written.clear()
        assert convert(folder, out) == 0
    # The two scans of the first run were kept, and so are all numbers.
    assert len(written) == 1 and Path(f"{out}.key.json").read_bytes() == key
    first = all_bytes(out)
    assert convert(folder, out) == 0
    assert all_bytes(out) == first
    # A new patient gets a new number, and the others keep theirs.
    nnunet(folder, {"p3": draw(rng)})
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_scan", stop)
        limit = len(written)
        with pytest.raises(SystemExit):
            convert(folder, out)
        # Without its index, nobody takes the folder for a complete one.
        assert not (out / "train.csv").exists() and not (out / "labels.json").exists()
    assert convert(folder, out) == 0
    assert find_name(out, "p3") == "case4_day0" and all(find_name(out, f"p{one}") in str(first) for one in range(3))
    # A label map that was corrected is converted again.
    corrected = np.zeros(SHAPE, dtype=np.uint8)
    corrected[3:5, 3:5, 3:5] = 2
    write(folder / "labelsTr" / "p1.nii.gz", corrected, axial())
    assert convert(folder, out) == 0
    _, masks = read_scan(out, find_name(out, "p1"))
    assert masks["duodenum"].sum() == 8 and masks["stomach"].sum() == 0
    # So is a scan of which somebody has removed a slice.
    whole = all_bytes(out)
    next(out.rglob("slice_0002*.png")).unlink()
    assert convert(folder, out) == 0
    assert all_bytes(out) == whole


def test_days_of_a_patient_are_counted_in_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for session in ("ses-10", "ses-9"):
        voxels, labels = draw(rng)
        anat = tmp_path / "in" / "sub-7" / session / "anat"
        write(anat / f"sub-7_{session}_T2w.nii.gz", voxels + 1000 * (session == "ses-10"), axial())
        write(anat / f"sub-7_{session}_label-liver_mask.nii.gz", (labels == 3).astype(np.uint8), axial())
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    first, second = (read_scan(tmp_path / "out", f"case1_day{day}")[0] for day in (0, 1))
    assert first.min() < 1000 <= second.min()


def test_an_organ_that_is_not_drawn_is_unknown(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for patient, names in (("s1", ("stomach", "colon")), ("s2", ("stomach", "spleen"))):
        voxels, labels = draw(rng)
        write(tmp_path / "in" / patient / "mri.nii.gz", voxels, axial())
        for value, name in enumerate(names, start=1):
            write(tmp_path / "in" / patient / "segmentations" / f"{name}.nii.gz", labels * (labels == value), axial())
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    label_file = read_label_file(tmp_path / "out")
    # A spelling that is known has the name that is usual here.
    assert label_file is not None and set(label_file.labels.names) == {"stomach", "large_bowel", "spleen"}
    assert label_file.scans[find_name(tmp_path / "out", "s1")].unknown == ("spleen",)
    assert set(read_scan(tmp_path / "out", find_name(tmp_path / "out", "s2"))[1]) == {"stomach", "spleen"}
    assert convert(tmp_path / "in", tmp_path / "out", "--missing", "empty") == 0
    label_file = read_label_file(tmp_path / "out")
    assert label_file is not None and not any(facts.unknown for facts in label_file.scans.values())
    assert not read_scan(tmp_path / "out", find_name(tmp_path / "out", "s2"))[1]["large_bowel"].any()


def test_the_list_gives_the_mapping_to_paste(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voxels, labels = draw(np.random.default_rng(6))
    names = {"background": 0, "Colon": 1, "Tumour, left": 2, "bowel": [1, 2], "ignore": 3}
    folder = nnunet(tmp_path / "in", {"p1": (voxels, labels), "p2": (voxels, labels)}, names)
    write(folder / "imagesTr" / "p3_0000.nii.gz", voxels, axial())
    assert main(["convert", "--input", str(folder), "--list", "--num_proc", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 patients, 2 scans" in out and "imagesTr/p3_0000.nii.gz" in out
    millilitres = (labels == 1).sum() * 1.5 * 1.25 * 3 / 1000
    assert re.search(
        rf"Colon +\| 2 +\| {millilitres:.1f} - {millilitres:.1f} - {millilitres:.1f} +\| large_bowel", out
    )
    organs = re.search(r'--organs "(.*)"', out.splitlines()[-1])
    assert organs and organs[1] == "large_bowel=Colon;Tumour_ left=Tumour? left;bowel=bowel"
    assert convert(folder, tmp_path / "out", "--organs", organs[1]) == 0
    _, masks = read_scan(tmp_path / "out", "case1_day0")
    assert np.array_equal(masks["bowel"], masks["large_bowel"] | masks["Tumour_ left"])
    assert not (tmp_path / "in.key.json").exists()


def run_wrong(capsys: pytest.CaptureFixture[str], folder: Path, output_dir: Path, *flags: str) -> str:
    """Run a command that must fail, and return its error, which has one line."""
    with pytest.raises(SystemExit):
        convert(folder, output_dir, *flags)
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    return line


BAD_FLAGS = {
    "liver": 'expected "stomach=',
    ";": 'expected "stomach=',
    "background=liver": "'background' is no organ",
    "liver=liver;Liver=stomach": "differ in case only",
    "liver=l*;organ=*r": "'liver' is liver and organ",
    "heart=heart": "none of its patterns fits",
    "both=*": "fits to stomach, duodenum, liver; write the name of both, or of all its parts",
}


@pytest.mark.parametrize("organs", BAD_FLAGS)
def test_a_mapping_that_cannot_be_used_is_one_line(
    organs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nnunet(tmp_path / "in", {"p1": draw(np.random.default_rng(7))})
    assert BAD_FLAGS[organs] in run_wrong(capsys, folder, tmp_path / "out", "--organs", organs)
    assert list(tmp_path.iterdir()) == [folder]


def other_grid(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "labelsTr" / "bad.nii.gz", labels, axial((1.5, 1.25, 3.5)))


def fewer_slices(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "labelsTr" / "bad.nii.gz", labels[:, :, 1:], axial())


def probabilities(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "labelsTr" / "bad.nii.gz", labels.astype(np.float32) / 2, axial())


def negative(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "labelsTr" / "bad.nii.gz", -labels.astype(np.int16), axial())


def unnamed(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "labelsTr" / "bad.nii.gz", labels * 2, axial())


def cut(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    path = folder / "labelsTr" / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])


def change_a_voxel(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    # Without compression, any byte can be read. Only the checksum at the end tells.
    path = folder / "imagesTr" / "bad_0000.nii.gz"
    data = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    data[-100] ^= 1
    path.write_bytes(data)


def no_scan(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    (folder / "imagesTr" / "bad_0000.nii.gz").unlink()


def flat(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "imagesTr" / "bad_0000.nii.gz", np.zeros_like(voxels), axial())


def several_volumes(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> None:
    write(folder / "imagesTr" / "bad_0000.nii.gz", np.stack([voxels, voxels], axis=-1), axial())


BAD_SCANS = {
    other_grid: "lies on another grid than",
    fewer_slices: "12 x 10 x 5 voxels of 1.5 x 1.25 x 3 mm, and the scan 12 x 10 x 6 voxels",
    probabilities: "expected whole numbers, as a label map has, got 1.5",
    negative: "expected labels from 0 to",
    unnamed: "has the labels 4, 6, for which dataset.json has no name",
    cut: "bad.nii.gz: not a whole NIfTI file",
    change_a_voxel: "bad_0000.nii.gz: its voxels cannot be read (CRC check failed",
    no_scan: "expected its scan bad in imagesTr, got nothing",
    flat: "has the same intensity everywhere",
    several_volumes: "expected one volume of real numbers",
}


@pytest.mark.parametrize("spoil", BAD_SCANS)
def test_a_bad_scan_is_one_line_and_the_others_are_converted(
    spoil: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = (draw(np.random.default_rng(seed)) for seed in (8, 9))
    folder = nnunet(tmp_path / "in", {"bad": bad, "good": good})
    spoil(folder, *bad)
    line = run_wrong(capsys, folder, tmp_path / "out")
    assert BAD_SCANS[spoil] in line and "1 of 2 scans failed" in line
    assert verify(tmp_path / "out", 1).problems == [] and len(list((tmp_path / "out").glob("train/*/*"))) == 1
    _, masks = read_scan(tmp_path / "out", find_name(tmp_path / "out", "good"))
    assert masks["stomach"].sum() == (good[1] == 1).sum()


BAD_LABELS = {
    "a name twice": ({"0": "background", "1": "liver", "2": "liver"}, "'liver' is there twice (1 and 2)"),
    "case only": ({"background": 0, "Liver": 1, "liver": 2, "mass": 3}, "'Liver' and 'liver' could both be"),
    "a value twice": ({"background": 0, "liver": 1, "stomach": 1}, "the value 1 is 'liver' and 'stomach'"),
    "an organ at 0": ({"liver": 0, "stomach": 1}, "'liver' has the value 0, which is the background"),
    "background at 1": ({"stomach": 2, "background": 1}, "'background' has the value 1, and the background is 0"),
    "no label": ({"background": 0}, "has no name of a label"),
    "200 labels": ({f"L{value}": value for value in range(200)}, "199 structures would become labels"),
    "no number": ({"liver": "one"}, "expected labels like"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_names_of_labels_are_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, expected = BAD_LABELS[kind]
    folder = nnunet(tmp_path / "in", {"p1": draw(np.random.default_rng(10))}, labels)
    assert expected in run_wrong(capsys, folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]
    if kind == "case only":
        assert convert(folder, tmp_path / "out", "--organs", "liver=liver") == 0
        _, masks = read_scan(tmp_path / "out", "case1_day0")
        assert masks["liver"].sum() == (draw(np.random.default_rng(10))[1] == 2).sum()
    if kind == "200 labels":
        assert convert(folder, tmp_path / "out", "--organs", "liver=L3;lung=l1,L2") == 0
        _, masks = read_scan(tmp_path / "out", "case1_day0")
        assert set(masks) == {"liver", "lung"} and masks["lung"].any()


def test_nothing_is_written_over_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(11)
    folder, out = nnunet(tmp_path / "in", {"p1": draw(rng)}), tmp_path / "out"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "got a.txt in it" in run_wrong(capsys, folder, tmp_path / "notes")
    assert "lies in the output" in run_wrong(capsys, folder, out, "--key_file", str(out / "key.json"))
    (tmp_path / "empty").mkdir()
    assert "no DICOM and no NIfTI files" in run_wrong(capsys, tmp_path / "empty", out)
    write(tmp_path / "loose" / "a.nii.gz", draw(rng)[0], axial())
    assert "pair them by --images and --labels" in run_wrong(capsys, tmp_path / "loose", out)
    assert not out.exists()
    assert convert(folder, out) == 0
    assert "only one patient" in capsys.readouterr().out
    # Another input would leave scans there that nobody has asked for.
    other = nnunet(tmp_path / "other", {"p2": draw(rng)})
    key = Path(f"{out}.key.json")
    before, numbers = all_bytes(out), key.read_bytes()
    assert "has case1_day0, which is not in this --input" in run_wrong(capsys, other, out)
    assert all_bytes(out) == before and key.read_bytes() == numbers
    key.write_text("{}")
    assert "not a key file" in run_wrong(capsys, folder, tmp_path / "new", "--key_file", str(key))
    assert not (tmp_path / "new").exists()


def test_real_label_maps_come_over_voxel_by_voxel(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "totalsegmentator"
    if not source.is_dir():
        pytest.skip(f"no volumes of TotalSegmentator in {source}")
    for orientation, names in ((20, ("example_mr_sm", "example_seg_mr")), (35, ("example_ct_sm", "example_seg"))):
        for name, ending in zip(names, ("t2", "t2_seg"), strict=True):
            image = nibabel.load(source / f"{name}.nii.gz")
            stored = store(np.asanyarray(image.dataobj), image.affine, *ORIENTATIONS[orientation])
            write(tmp_path / "in" / names[0] / f"{ending}.nii.gz", *stored)
    pair = ("--images", "*/t2.nii.gz", "--labels", "*/t2_seg.nii.gz", "--organs", "liver=label_5;spleen=label_1")
    assert convert(tmp_path / "in", tmp_path / "out", *pair) == 0
    for path in sorted((tmp_path / "in").iterdir()):
        volume = open_volume(path / "t2.nii.gz")
        labels = volume.to_training(np.asanyarray(nibabel.load(path / "t2_seg.nii.gz").dataobj))
        _, masks = read_scan(tmp_path / "out", find_name(tmp_path / "out", path.name))
        assert np.array_equal(masks["liver"], labels == 5) and np.array_equal(masks["spleen"], labels == 1)


def test_two_commands_share_a_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file = tmp_path / "key.json"

    def number(patient: str) -> None:
        with updating_key(key_file) as key:
            # Long enough for the other one to read the file, if it did not wait.
            time.sleep(0.2)
            key.add({patient: ["scan"]})

    with ThreadPoolExecutor() as pool:
        list(pool.map(number, ["A", "B", "C"]))
    assert sorted(read_key(key_file).cases.values()) == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [key_file]
    monkeypatch.setattr("dataset_builder.convert.key_file.WAIT_S", 0.1)
    with updating_key(key_file), pytest.raises(InputError, match=r"key\.json: another process writes to it"):
        number("D")
