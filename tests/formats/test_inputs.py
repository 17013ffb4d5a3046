"""Everything that lies in an input becomes a scan, or is named; nothing is passed over in silence."""

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from dataset_builder.series import KAGGLE_AXES, write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import InputScans, find_scans
from gi_segmentation.inference.outputs import choose_formats, leave_out, list_outputs
from tests.support.volumes import prediction_words

SHAPE = (24, 20, 5)
AFFINE = np.eye(4)
AFFINE[:3, :3] = KAGGLE_AXES * (1.5, 1.5, 3)
LABELS = np.zeros(SHAPE, dtype=np.uint8)
LABELS[3:9, 3:9], LABELS[12:20, 5:9] = 1, 3


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.uint16)


def write_nifti(path: Path, voxels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(noise() if voxels is None else voxels, AFFINE), path)
    return path


def names(scans: InputScans) -> list[str]:
    return [scan.name for scan in scans.scans]


def outputs(scans: InputScans, *wanted: str) -> list[str]:
    return [path.as_posix() for path in list_outputs(scans, choose_formats(scans, wanted or None))]


def test_outputs_keep_the_folders_below_the_input(tmp_path: Path) -> None:
    for name in ("sub-01/T2.nii.gz", "sub-02/T2.nii.gz", "sub-02/ses-1/anat/sub-02_T2w.nii", "a.b.nii.gz"):
        write_nifti(tmp_path / name)
    expected = ["a.b", "sub-01/T2", "sub-02/T2", "sub-02/ses-1/anat/sub-02_T2w"]
    scans = find_scans(tmp_path)
    assert names(scans) == expected and not scans.left_out
    assert outputs(scans, "nifti") == [f"{name}.nii.gz" for name in expected]
    # The name does not depend on what else is there.
    shutil.rmtree(tmp_path / "sub-01")
    assert names(find_scans(tmp_path)) == [expected[0], *expected[2:]]
    assert names(find_scans(tmp_path / "sub-02" / "T2.nii.gz")) == ["T2"]


def test_links_are_followed_and_what_is_here_twice_is_named(tmp_path: Path) -> None:
    write_nifti(tmp_path / "store" / "T2.nii.gz")
    write_nifti(tmp_path / "in" / "p1" / "T2.nii.gz")
    (tmp_path / "in" / "p1" / "._T2.nii.gz").write_bytes(b"\0\5\x16\7")
    (tmp_path / "in" / "p2").symlink_to("../store")
    (tmp_path / "in" / "p3").symlink_to("p1")
    (tmp_path / "in" / "p4").mkdir()
    (tmp_path / "in" / "p4" / "T2.nii.gz").symlink_to("../p1/T2.nii.gz")
    (tmp_path / "in" / "p4" / "circle").symlink_to("..")
    (tmp_path / "in" / "p5.nii.gz").symlink_to("nowhere")
    scans = find_scans(tmp_path / "in")
    assert names(scans) == ["p1/T2", "p2/T2", "p4/T2", "p5"] and "No such file" in scans.scans[-1].problem
    assert scans.left_out == ["left out: 1 repeated link: p3; its folder is here under another name"]


@pytest.mark.parametrize(
    ("name", "voxels"),
    [
        ("X_seg.nii.gz", LABELS),
        ("X-label.nii", LABELS.astype(np.float32)),
        ("X_liver.nii.gz", LABELS),
        ("labelsTr/X.nii.gz", LABELS),
        ("sub-1/anat/sub-1_desc-brain_mask.nii.gz", LABELS > 0),
        (
            "sub-1/anat/sub-1_dseg.nii.gz",
            np.kron(np.arange(120).reshape(6, 20, 1), np.ones((4, 1, 5))).astype(np.int16),
        ),
        ("X_seg_empty.nii.gz", np.zeros(SHAPE, np.uint8)),
        ("X_prob.nii.gz", np.random.default_rng(0).random(SHAPE).astype(np.float32)),
    ],
)
def test_a_label_map_is_no_scan(name: str, voxels: np.ndarray, tmp_path: Path) -> None:
    voxels = voxels.astype(np.uint8) if voxels.dtype == bool else voxels
    write_nifti(tmp_path / "X.nii.gz")
    path = write_nifti(tmp_path / name, voxels)
    # Many label maps have no place.
    if name.endswith(".nii"):
        data = bytearray(path.read_bytes())
        data[252:256] = bytes(4)
        path.write_bytes(data)
    scans = find_scans(tmp_path)
    assert names(scans) == ["X"] and scans.left_out == [f"left out: 1 label map: {name}"]
    if "X_liver" not in name and "labelsTr" not in name:
        with pytest.raises(InputError, match="left out: 1 label map: "):
            find_scans(path)


@pytest.mark.parametrize("name", ["X_seg", "masked_T2", "labelsTr/Y", "X_2", "segments/T2", "prob"])
def test_a_scan_with_the_name_of_a_label_map_is_a_scan(name: str, tmp_path: Path) -> None:
    write_nifti(tmp_path / "X.nii.gz")
    write_nifti(tmp_path / f"{name}.nii.gz")
    scans = find_scans(tmp_path)
    assert set(names(scans)) == {"X", name} and not scans.left_out


def test_a_mask_of_any_name_beside_a_scan_is_no_scan(tmp_path: Path) -> None:
    write_nifti(tmp_path / "mri.nii.gz")
    for name in ("liver.nii.gz", "colon.nii"):
        write_nifti(tmp_path / name, LABELS)
    # One value, another size, and no scan beside it: whoever predicts them gets to know.
    write_nifti(tmp_path / "constant.nii.gz", np.ones(SHAPE, np.int16))
    write_nifti(tmp_path / "small.nii.gz", LABELS[:, :, :3])
    write_nifti(tmp_path / "alone" / "liver.nii.gz", LABELS)
    scans = find_scans(tmp_path)
    assert set(names(scans)) == {"mri", "constant", "small", "alone/liver"}
    assert scans.left_out == ["left out: 2 label maps: colon.nii, liver.nii.gz"]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_name_that_lies_about_packing_is_named(name: str, tmp_path: Path) -> None:
    other = "a.nii.gz" if name == "a.nii" else "a.nii"
    write_nifti(tmp_path / other).rename(tmp_path / name)
    with pytest.raises(InputError, match=f"rename it to {re.escape(other)}$"):
        find_scans(tmp_path)


def test_own_label_maps_are_no_scans(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(LABELS, AFFINE)
    image.header["descrip"] = b"1 large_bowel, 2 small_bowel, 3 stomach"
    nibabel.save(image, tmp_path / "patient.nii.gz")
    with pytest.raises(InputError, match=r"left out: 1 label map: patient\.nii\.gz"):
        find_scans(tmp_path)


def write_packed(path: Path) -> None:
    for one in write_series(path.parent / "series", noise(), AFFINE):
        (path.parent / f"{one.name}.dcm.gz").write_bytes(gzip.compress(one.read_bytes()))
    shutil.rmtree(path.parent / "series")


def write_pair(path: Path) -> None:
    nibabel.save(nibabel.AnalyzeImage(noise().astype(np.int16), AFFINE), path)


FORMATS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("a.nrrd", "NRRD", Path.touch),
    ("a.mha", "MetaImage", Path.touch),
    ("a.MHD", "MetaImage", Path.touch),
    ("a.mnc", "MINC", Path.touch),
    ("a.mgz", "MGH", Path.touch),
    ("a.nii.bz2", "packed NIfTI", Path.touch),
    ("a.img", "without the header", Path.touch),
    ("a.dcm.gz", "packed DICOM", write_packed),
    ("old.img", "Analyze, which does not say where left and right are", write_pair),
]


@pytest.mark.parametrize(("name", "what", "write"), FORMATS)
def test_a_format_that_is_not_read_is_named(
    name: str, what: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / name)
    with pytest.raises(InputError) as caught:
        find_scans(folder)
    assert what in str(caught.value) and "\n" not in str(caught.value) and "more scans" not in str(caught.value)
    # Beside a scan, it is one that failed.
    write_nifti(folder / "mr.nii")
    scans = find_scans(folder)
    (problem,) = [scan.problem for scan in scans.scans if scan.problem]
    assert what in problem and outputs(scans, "nifti") == ["mr.nii.gz"]


def test_files_of_other_programs_are_none_of_these_formats(tmp_path: Path) -> None:
    write_nifti(tmp_path / "mr.nii")
    for name in ("envi.hdr", "recovery.par", "table.csv", "notes", "m.raw", "readme.txt", "x.json"):
        (tmp_path / name).write_text("some text that is longer than a header of DICOM, " * 20)
    with gzip.open(tmp_path / "table.csv.gz", "wb") as file:
        file.write(bytes(1000))
    scans = find_scans(tmp_path)
    assert names(scans) == ["mr"] and not scans.left_out
    (tmp_path / "Segmentation.seg.nrrd").touch()
    (tmp_path / "other.tar.gz").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert find_scans(tmp_path).left_out == [
        "left out: 1 named label map: Segmentation.seg.nrrd",
        "left out: 1 archive: other.tar.gz; unpack or name as --input what has scans",
        "left out: 1 broken link: link; mend what is a scan",
    ]


class TestMixed:
    @pytest.fixture
    def study(self, tmp_path: Path) -> dict[str, str]:
        """The UIDs of three series by their descriptions. A NIfTI file and a viewer with pictures lie beside them."""
        for name in ("t2 axial", "t1 vibe", "T2 coronal"):
            write_series(tmp_path / name, noise(), AFFINE, description=name)
        for name in ("logo.png", "slice.png", "a.jpg"):
            (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        write_nifti(tmp_path / "VIEWER" / "t2.nii.gz")
        folders = [folder for folder in tmp_path.iterdir() if " " in folder.name]
        return {one.name: str(pydicom.dcmread(next(one.iterdir())).SeriesInstanceUID) for one in folders}

    def test_pictures_are_named_and_each_kind_has_its_formats(self, study: dict[str, str], tmp_path: Path) -> None:
        scans = find_scans(tmp_path)
        assert set(names(scans)) == {*study.values(), "VIEWER/t2"}
        assert scans.left_out == ["left out: 3 pictures: a.jpg, logo.png, slice.png"]
        endings = {name.rpartition(".")[2] for name in outputs(scans) if not name.startswith("VIEWER")}
        assert endings == {"dcm", "json", "html"} and "VIEWER/t2.nii.gz" in outputs(scans)
        some = leave_out(scans, choose_formats(scans, ["dicom-seg"]))
        assert set(names(some)) == {*study.values()}
        assert some.left_out[-1] == "left out: no dicom-seg can be written for VIEWER/t2"
        with pytest.raises(InputError, match="--format kaggle: cannot be written for dicom and nifti input; choose"):
            choose_formats(scans, ["kaggle"])

    @pytest.mark.parametrize(
        ("chosen", "expected"),
        [
            (["t2"], {"t2 axial", "T2 coronal", "VIEWER/t2"}),
            (["vibe", "viewer"], {"t1 vibe", "VIEWER/t2"}),
            (["UID"], {"t1 vibe"}),
        ],
    )
    def test_scans_are_chosen_by_uid_name_or_description(
        self, chosen: list[str], expected: set[str], study: dict[str, str], tmp_path: Path
    ) -> None:
        # A file of another series that is broken does no harm.
        (tmp_path / "broken.nii").write_bytes(b"x")
        bad = sorted((tmp_path / "T2 coronal").iterdir())[0]
        bad.write_bytes(bad.read_bytes()[:-9])
        texts = [study["t1 vibe"] if text == "UID" else text for text in chosen]
        scans = find_scans(tmp_path, None, texts)
        assert set(names(scans)) == {study.get(name, name) for name in expected}
        # A series that was meant and cannot be used is not forgotten.
        assert {scan.name for scan in scans.scans if scan.problem} == (
            {study["T2 coronal"]} if "T2 coronal" in expected else set()
        )
        assert scans.left_out[-1].startswith(f"left out by --series: {5 - len(expected)} scan")

    def test_a_choice_that_fits_nothing_names_all_scans(self, study: dict[str, str], tmp_path: Path) -> None:
        for text in ("dwi", study["t1 vibe"][:-1]):
            with pytest.raises(InputError, match=rf"--series {text}: no scan .*\(MR 3 t1 vibe\).*, VIEWER/t2$"):
                find_scans(tmp_path, None, ["t2", text])

    def test_slices_of_kaggle_beside_them_are_refused(self, study: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "slice_0001_266_266_1.50_1.50.png").touch()
        with pytest.raises(InputError, match="has files of several kinds, kaggle"):
            find_scans(tmp_path)


def test_series_is_a_flag_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gi_segmentation.predict import main

    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "in" / f"{name}.nii")
    main(prediction_words(Path("nowhere"), tmp_path / "in", tmp_path / "out", "--list", "--series", "b", "C"))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines[:2]] == ["b: ", "c: "] and lines[2] == "left out by --series: 1 scan: a"
