"""NIfTI files of any orientation get the masks of the same slices in Kaggle's layout, on their own grid."""

import gzip
import struct
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dataset_builder.series import KAGGLE_AXES, read_scan
from gi_segmentation.errors import InputError
from gi_segmentation.formats.beside import find_label_maps
from gi_segmentation.formats.label_names import read_description
from gi_segmentation.formats.nifti import farthest_mm, open_volume, write_label_map, write_probabilities
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.predict import main
from tests.support.models import MAX_TIES, save_model
from tests.support.volumes import predict_kaggle, prediction_words, rotation, store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With neighbours as channels, the order of the slices matters.
    return save_model(tmp_path_factory.mktemp("model"), "segformer", seed=0, slice_context=1)


@pytest.fixture(scope="module")
def scan(small_kaggle_dir: Path) -> Path:
    return sorted((small_kaggle_dir / "train").glob("case*/case*_day*"))[0]


@pytest.fixture(scope="module")
def truth(model: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the Kaggle path predicts: uint8, shape `(columns, rows, slices)`."""
    voxels, _ = read_scan(scan)
    return predict_kaggle(model, scan, tmp_path_factory.mktemp("kaggle"), voxels.shape)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def scan_affine(spacing: tuple[float, float, float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = KAGGLE_AXES * spacing
    affine[:3, 3] = 120, -30, 800
    return affine


def message(folder: Path, output_dir: Path, *flags: str) -> str:
    with pytest.raises(InputError) as caught:
        main(prediction_words(Path("nowhere"), folder, output_dir, *flags))
    assert not output_dir.exists() and "\n" not in str(caught.value)
    return str(caught.value)


class TestPrediction:
    @pytest.mark.parametrize(
        ("order", "flipped"),
        [((0, 1, 2), ()), ((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (1,)), ((1, 2, 0), (0, 2)), ((2, 1, 0), (0,))],
        ids=["as Kaggle", "RAS", "sagittal", "coronal", "slices first"],
    )
    def test_the_masks_equal_those_of_the_kaggle_path(
        self,
        order: tuple[int, ...],
        flipped: tuple[int, ...],
        model: Path,
        scan: Path,
        truth: np.ndarray,
        tmp_path: Path,
    ) -> None:
        voxels, spacing = read_scan(scan)
        stored, affine = store(voxels, scan_affine(spacing), order, flipped)
        path = write_nifti(tmp_path / "in" / "mr.nii.gz", stored, affine)
        (written,) = main(prediction_words(model, path, tmp_path / "out", "--format", "nifti"))
        image = nibabel.load(written)
        assert written == tmp_path / "out" / "mr.nii.gz" and image.shape == stored.shape
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, nibabel.load(path).affine)
        labels, expected = np.asarray(image.dataobj), store(truth, np.eye(4), order, flipped)[0]
        assert set(np.unique(expected)) == {0, 1, 2, 3}
        assert np.count_nonzero(labels != expected) <= MAX_TIES * expected.size

    def test_workers_and_several_files_give_the_same(
        self, model: Path, scan: Path, truth: np.ndarray, tmp_path: Path
    ) -> None:
        voxels, spacing = read_scan(scan)
        for name in ("a.nii", "b.nii.gz"):
            write_nifti(tmp_path / "in" / name, voxels, scan_affine(spacing))
        words = prediction_words(model, tmp_path / "in", tmp_path / "out")
        written = main([*words, "--num_workers", "2", "--batch_size", "2", "--format", "nifti"])
        assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
        assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["a.nii.gz", "b.nii.gz"]
        for path in written:
            differing = np.count_nonzero(np.asarray(nibabel.load(path).dataobj) != truth)
            assert differing <= MAX_TIES * truth.size

    def test_a_scale_of_the_intensities_changes_nothing(
        self, model: Path, scan: Path, truth: np.ndarray, tmp_path: Path
    ) -> None:
        voxels, spacing = read_scan(scan)
        path = write_nifti(tmp_path / "in.nii", voxels / np.float32(voxels.max()), scan_affine(spacing))
        (written,) = main(prediction_words(model, path, tmp_path / "out", "--format", "nifti"))
        # The fractions are rounded, so a few pixels more than ties may differ.
        assert np.mean(np.asarray(nibabel.load(written).dataobj) != truth) < 1e-4

    def test_thin_slices_have_neighbours_at_the_distance_of_the_training(
        self, model: Path, scan: Path, truth: np.ndarray, tmp_path: Path
    ) -> None:
        voxels, (width, height, depth) = read_scan(scan)
        thin = np.repeat(voxels, 3, axis=2)
        path = write_nifti(tmp_path / "in.nii", thin, scan_affine((width, height, depth / 3)))
        (written,) = main(prediction_words(model, path, tmp_path / "out", "--format", "nifti"))
        labels = np.asarray(nibabel.load(written).dataobj)
        # The middle slice of each three sees the slices above and below it, as the thick slice does.
        assert np.count_nonzero(labels[:, :, 4] != truth[:, :, 1]) <= MAX_TIES * truth[:, :, 1].size

    def test_a_file_with_a_fourth_axis_keeps_its_shape(self, model: Path, scan: Path, tmp_path: Path) -> None:
        voxels, spacing = read_scan(scan)
        for name, array in (("one_time", voxels[..., None]), ("one_slice", voxels[:, :, 0])):
            path = write_nifti(tmp_path / f"{name}.nii", array, scan_affine(spacing))
            (written,) = main(prediction_words(model, path, tmp_path / name, "--format", "nifti"))
            assert nibabel.load(written).shape == array.shape

    def test_kaggle_slices_become_label_maps_in_the_same_pass(
        self, model: Path, small_kaggle_dir: Path, scan: Path, truth: np.ndarray, tmp_path: Path
    ) -> None:
        (alone,) = main(prediction_words(model, small_kaggle_dir, tmp_path / "alone"))
        written = main(prediction_words(model, small_kaggle_dir, tmp_path / "both", "--format", "nifti", "kaggle"))
        assert written[0].name == "submission.csv" and len(written) == 3
        assert written[0].read_bytes() == alone.read_bytes()
        image = nibabel.load(tmp_path / "both" / f"{scan.name}.nii.gz")
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "I")
        np.testing.assert_allclose(image.header.get_zooms(), read_scan(scan)[1])
        assert np.count_nonzero(np.asarray(image.dataobj) != truth) <= MAX_TIES * truth.size

    def test_missing_slices_of_kaggle_stay_empty(self, model: Path, kaggle_copy: Path, tmp_path: Path) -> None:
        paths = sorted(kaggle_copy.rglob("case*/scans"))
        sorted(paths[0].iterdir())[1].unlink()
        main(prediction_words(model, paths[0], tmp_path / "out", "--format", "nifti"))
        labels = np.asarray(nibabel.load(tmp_path / "out" / f"{paths[0].parent.name}.nii.gz").dataobj)
        assert [bool(labels[:, :, k].any()) for k in range(3)] == [True, False, True]


class TestList:
    def test_it_says_what_would_be_done_without_a_model(
        self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        voxels, spacing = read_scan(scan)
        write_nifti(tmp_path / "in" / "mr.nii.gz", voxels[:100], scan_affine(spacing))
        main(prediction_words(Path("nowhere"), tmp_path / "in", tmp_path / "out", "--list"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"mr: 3 x {voxels.shape[1]} x 100 slices x rows x columns of 3.00 x 1.")
        assert "axes LPI, padded or cropped to" in lines[0]
        assert lines[1] == f"would write {tmp_path / 'out' / 'mr.nii.gz'}" and not (tmp_path / "out").exists()

    def test_it_lists_slices_of_kaggle_too(
        self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(prediction_words(Path("nowhere"), scan, tmp_path, "--list", "--format", "nifti"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{scan.name}: 3 x ") and lines[0].endswith("axes LPI") and len(lines) == 2


class TestErrors:
    def test_files_that_cannot_be_used_are_named(self, scan: Path, tmp_path: Path) -> None:
        voxels, spacing = read_scan(scan)
        affine, out = scan_affine(spacing), tmp_path / "out"
        several = write_nifti(tmp_path / "several.nii", np.stack([voxels, voxels], axis=-1), affine)
        assert "several.nii: expected one volume of real numbers, got uint16 of shape" in message(several, out)
        colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
        assert "expected one volume" in message(write_nifti(tmp_path / "rgb.nii", colours, affine), out)
        image = nibabel.Nifti1Image(voxels, affine)
        image.header["sform_code"] = image.header["qform_code"] = 0
        nibabel.save(image, tmp_path / "nowhere.nii")
        # nibabel itself sets a code; the two fields lie at byte 252 of the header.
        data = bytearray((tmp_path / "nowhere.nii").read_bytes())
        data[252:256] = bytes(4)
        (tmp_path / "nowhere.nii").write_bytes(data)
        assert "does not say where left and right are" in message(tmp_path / "nowhere.nii", out)
        (tmp_path / "text.nii").write_text("no volume")
        assert "text.nii: not a whole NIfTI file" in message(tmp_path / "text.nii", out)
        image = nibabel.Nifti1Image(voxels, affine)
        image.header.set_xyzt_units("micron")
        nibabel.save(image, tmp_path / "small.nii")
        assert "expected millimetres, got micron" in message(tmp_path / "small.nii", out)

    @pytest.mark.parametrize("num_workers", ["0", "2"])
    def test_a_file_that_was_cut_off_leaves_nothing(
        self, num_workers: str, model: Path, scan: Path, tmp_path: Path
    ) -> None:
        voxels, spacing = read_scan(scan)
        write_nifti(tmp_path / "in" / "a.nii", voxels, scan_affine(spacing))
        whole = gzip.compress((tmp_path / "in" / "a.nii").read_bytes())
        (tmp_path / "in" / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
        words = prediction_words(
            model, tmp_path / "in", tmp_path / "out", "--num_workers", num_workers, "--format", "nifti"
        )
        with pytest.raises(InputError, match=r"b\.nii\.gz: its voxels cannot be read"):
            main(words)
        assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["a.nii.gz"]

    def test_names_and_kinds_must_be_clear(self, scan: Path, tmp_path: Path) -> None:
        voxels, spacing = read_scan(scan)
        out = tmp_path / "out"
        for name in ("in/a/mr.nii", "in/a/mr.nii.gz"):
            write_nifti(tmp_path / name, voxels, scan_affine(spacing))
        assert "two scans with the name a/mr" in message(tmp_path / "in", out)
        (tmp_path / "in" / "slice_0001_266_266_1.50_1.50.png").write_bytes(b"")
        assert "has files of several kinds, kaggle (" in message(tmp_path / "in", out)
        text = message(tmp_path / "in" / "a" / "mr.nii", out, "--format", "kaggle")
        assert text == "--format kaggle: cannot be written for nifti input; choose from nifti, report"
        (tmp_path / "notes.txt").write_text("")
        assert "no slices; expected" in message(tmp_path / "notes.txt", out)

    def test_a_missing_package_is_named(self, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        voxels, spacing = read_scan(scan)
        path = write_nifti(tmp_path / "mr.nii", voxels, scan_affine(spacing))
        monkeypatch.setitem(sys.modules, "nibabel", None)
        assert message(path, tmp_path / "out") == (
            f"{path}: needs nibabel, which is not installed; run `pip install -e .[clinic]`"
        )
        main(prediction_words(Path("nowhere"), scan, tmp_path / "out", "--list"))
        text = message(scan, tmp_path / "out", "--format", "nifti")
        assert text.endswith("needs nibabel, which is not installed; run `pip install -e .[clinic]`")


def test_slices_of_kaggle_need_none_of_the_packages(
    model: Path, scan: Path, truth: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nibabel", "pydicom", "highdicom"):
        # An import of this name now fails, as if the package were not installed.
        monkeypatch.setitem(sys.modules, name, None)
    np.testing.assert_array_equal(predict_kaggle(model, scan, tmp_path, truth.shape), truth)


def test_a_real_mr_is_predicted_on_its_own_grid(model: Path, test_data: Path, tmp_path: Path) -> None:
    source = test_data / "totalsegmentator" / "example_mr_sm.nii.gz"
    (written,) = main(prediction_words(model, source, tmp_path, "--format", "nifti"))
    image, original = nibabel.load(written), nibabel.load(source)
    assert image.shape == original.shape and np.asarray(image.dataobj).any()
    np.testing.assert_array_equal(image.affine, original.affine)


SHAPE = (20, 16, 9)


def write_grid(path: Path, affine: np.ndarray, qform: int, sform: int) -> Path:
    """Write a file with a grid in its qform, its sform or both; a code of 0 leaves one out."""
    image = nibabel.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_qform(affine, qform)
    image.header.set_sform(affine, sform)
    nibabel.save(nibabel.Nifti1Image(image.dataobj, None, image.header), path)
    header = nibabel.load(path).header
    assert (header["qform_code"], header["sform_code"]) == (qform, sform)
    return path


def make_affine(name: str) -> np.ndarray:
    """An affine of a kind. The shear of the last two moves the outer slices by 0.05 and by 5 mm."""
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])
    affine[:3, 3] = 120, -80, 900
    if name == "flipped":
        affine[0, 0] = 1.5
    if name == "unequal":
        affine[:3, :3] = np.diag([0.7, 2.1, -6.0])
    if name in ("oblique", "rounded"):
        affine[:3, :3] = rotation(np.random.default_rng(0), 25) * (1.5, 1.2, 3.0)
    affine[:3, 2] += affine[:3, 1] * {"rounded": 0.004, "sheared": 0.5}.get(name, 0)
    return affine


class TestGrid:
    @pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (1, 2), (4, 4)])
    @pytest.mark.parametrize("name", ["axial", "flipped", "unequal", "oblique", "rounded"])
    def test_qform_and_sform_of_a_label_map_are_one_place(
        self, name: str, codes: tuple[int, int], tmp_path: Path
    ) -> None:
        source = write_grid(tmp_path / "mr.nii", make_affine(name), *codes)
        original, volume = nibabel.load(source).affine, open_volume(source)
        write_label_map(volume, np.zeros((3, *SHAPE), dtype=bool), tmp_path / "labels.nii.gz", GI_TRACT)
        write_probabilities(volume, np.zeros(SHAPE), "stomach", tmp_path / "probability.nii.gz")
        for path in (tmp_path / "labels.nii.gz", tmp_path / "probability.nii.gz"):
            header = nibabel.load(path).header
            assert header["qform_code"] == header["sform_code"] == (codes[1] or codes[0])
            assert header.get_xyzt_units()[0] == "mm"
            # What ITK takes for the sizes of voxels.
            np.testing.assert_allclose(header["pixdim"][1:4], np.linalg.norm(original[:3, :3], axis=0), rtol=1e-4)
            assert farthest_mm(header.get_qform(), header.get_sform(), SHAPE) < 0.01
            moved = farthest_mm(header.get_sform(), original, SHAPE)
            assert moved < (0.06 if name == "rounded" else 1e-4)
        assert ("angles made right" in volume.note) == (name == "rounded" and codes[1] > 0)

    def test_a_grid_without_right_angles_is_neither_read_nor_written(self, tmp_path: Path) -> None:
        affine = make_affine("sheared")
        for codes, text in (((0, 1), "its axes are not at right angles"), ((1, 1), "its qform and its sform")):
            with pytest.raises(InputError, match=rf"mr\.nii: {text}"):
                open_volume(write_grid(tmp_path / "mr.nii", affine, *codes))
        series = Volume("tilted", tmp_path / "series", SHAPE, affine)
        with pytest.raises(InputError, match=r"series: its axes .* --format rtstruct"):
            write_label_map(series, np.zeros((3, *SHAPE), dtype=bool), tmp_path / "labels.nii.gz", GI_TRACT)
        assert not (tmp_path / "labels.nii.gz").exists()

    @pytest.mark.parametrize(
        ("codes", "form", "place", "values", "text"),
        [
            ((1, 1), "f", 280, [-1.5], "place it up to 57 mm apart (axes RPS and LPS)"),
            ((1, 2), "f", 292, [122.0], "its qform and its sform place it up to 2 mm apart"),
            ((1, 1), "f", 256, [np.nan], "its qform is no rotation"),
            ((1, 0), "f", 256, [1.0, 1.0, 1.0], "w2 should be positive"),
            ((0, 1), "f", 80, [-1.5], "expected sizes of voxels above 0, got -1.5 x 1.5 x 3 mm"),
            ((1, 0), "f", 84, [0.0], "expected sizes of voxels above 0, got 1.5 x 0 x 3 mm"),
            ((0, 1), "f", 80, [3.0], "has voxels of 1.5 x 1.5 x 3 mm by its sform, and of 3 x 1.5 x 3 mm by its"),
            ((1, 1), "h", 254, [9], "expected codes from 0 to 5 of qform and sform, got 1 and 9"),
            ((1, 1), "h", 252, [0, 0], "does not say where left and right are"),
            ((1, 1), "B", 123, [1], "expected millimetres, got meter"),
            ((1, 1), "B", 123, [3], "expected millimetres, got micron"),
            ((1, 1), "B", 123, [7], "not a whole NIfTI file"),
            ((1, 1), "h", 42, [-20], "expected one volume of real numbers"),
            ((1, 1), "h", 70, [128], "expected one volume of real numbers"),
            ((1, 1), "h", 70, [32], "expected one volume of real numbers"),
        ],
    )
    def test_a_header_that_readers_take_differently_is_refused(
        self, codes: tuple[int, int], form: str, place: int, values: list[float], text: str, tmp_path: Path
    ) -> None:
        path = write_grid(tmp_path / "mr.nii", make_affine("axial" if place != 280 else "flipped"), *codes)
        data = bytearray(path.read_bytes())
        struct.pack_into(f"<{len(values)}{form}", data, place, *values)
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            open_volume(path)
        assert text in str(caught.value) and str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("form", "place", "value"), [("f", 76, 0), ("B", 123, 0), ("f", 112, np.nan), ("f", 112, 0), ("h", 252, 0)]
    )
    def test_a_header_that_all_readers_take_alike_is_read(
        self, form: str, place: int, value: float, tmp_path: Path
    ) -> None:
        path = write_grid(tmp_path / "mr.nii", make_affine("axial"), 1, 1)
        expected, data = nibabel.load(path).get_fdata(), bytearray(path.read_bytes())
        struct.pack_into(f"<{form}", data, place, value)
        path.write_bytes(data)
        volume = open_volume(path)
        assert volume.read is not None
        np.testing.assert_allclose(volume.affine, make_affine("axial"))
        np.testing.assert_array_equal(volume.read(), expected)

    def test_versions_and_pairs_of_files_are_read_and_analyze_is_not(self, tmp_path: Path) -> None:
        voxels, affine = np.arange(60, dtype=np.int16).reshape(5, 4, 3), make_affine("axial")
        nibabel.save(nibabel.Nifti2Image(voxels, affine), tmp_path / "two.nii")
        nibabel.save(nibabel.Nifti1Pair(voxels, affine), tmp_path / "pair.img")
        nibabel.save(nibabel.Nifti1Pair(voxels, affine), tmp_path / "packed.img.gz")
        for name, files in (("two.nii", 1), ("pair.hdr", 2), ("packed.hdr.gz", 2)):
            volume = open_volume(tmp_path / name)
            assert volume.read is not None and len(volume.origin.paths) == files
            np.testing.assert_array_equal(volume.read(), voxels)
        (tmp_path / "pair.img").unlink()
        with pytest.raises(InputError, match=r"pair\.hdr: its voxels are in pair\.img, which is not there"):
            open_volume(tmp_path / "pair.hdr")
        for kind in (nibabel.AnalyzeImage, nibabel.Spm99AnalyzeImage):
            nibabel.save(kind(voxels, affine), tmp_path / "old.img")
            with pytest.raises(InputError, match=r"old\.hdr: expected NIfTI, got Analyze, which does not say where"):
                open_volume(tmp_path / "old.hdr")


def test_nothing_of_a_header_but_the_grid_goes_into_a_label_map(tmp_path: Path) -> None:
    secret = b"Erika^Mustermann"
    image = nibabel.load(write_grid(tmp_path / "mr.nii", make_affine("axial"), 1, 1))
    for field in ("db_name", "descrip", "aux_file", "intent_name"):
        image.header[field] = secret
    for code in (2, 4, 6, 44):
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, secret))
    nibabel.save(image, tmp_path / "named.nii")
    volume = open_volume(tmp_path / "named.nii")
    write_label_map(volume, np.zeros((3, *SHAPE), dtype=bool), tmp_path / "labels.nii", GI_TRACT)
    write_probabilities(volume, np.zeros(SHAPE), "stomach", tmp_path / "probability.nii")
    assert secret in (tmp_path / "named.nii").read_bytes()
    for name, start in (("labels", b"1 large_bowel"), ("probability", b"probability of stomach")):
        data = (tmp_path / f"{name}.nii").read_bytes()
        assert secret not in data and not nibabel.load(tmp_path / f"{name}.nii").header.extensions
        assert data[148:].startswith(start) and not any(data[4:40])


@pytest.mark.parametrize("number", [1, 12])
def test_a_label_map_has_the_names_of_its_ids(number: int, tmp_path: Path) -> None:
    labels = LabelSet(tuple(f"Muskel für {index}" for index in range(number)))
    volume = open_volume(write_nifti(tmp_path / "a.nii", np.zeros(SHAPE, np.int16), scan_affine((1.5, 1.5, 3.0))))
    masks = np.zeros((number, *SHAPE), dtype=bool)
    for index, mask in enumerate(masks):
        # The last organ of two is on top.
        mask[:, index:] = True
    write_label_map(volume, masks, tmp_path / "out.nii.gz", labels)
    image = nibabel.load(tmp_path / "out.nii.gz")
    expected = np.minimum(np.arange(SHAPE[1]) + 1, number)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[0, :, 0], expected)
    text = ", ".join(f"{label} {organ}" for label, organ in enumerate(labels.names, start=1))
    # What does not fit into the header is in an extension. A letter is whole or not there.
    described = bytes(image.header["descrip"]).rstrip(b"\0").decode()
    assert text.startswith(described) and (described == text) == (number == 1)
    assert [one.get_content() for one in image.header.extensions] == [text.encode()] * (number > 1)
    assert read_description(tmp_path / "out.nii.gz") == {name: (k,) for k, name in enumerate(labels.names, start=1)}
    # Beside a scan, it is no scan.
    assert find_label_maps([tmp_path / "a.nii", tmp_path / "out.nii.gz"], tmp_path) == [tmp_path / "out.nii.gz"]
