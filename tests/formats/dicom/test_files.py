"""DICOM series in any file order and orientation become the same slices as Kaggle's; what is no volume is refused."""

import re
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import JPEGLosslessSV1

from dataset_builder.series import KAGGLE_AXES, read_first_scan, read_scan, write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.inputs import describe_scan, find_scans
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import load_members
from gi_segmentation.inference.prediction import predict_files
from gi_segmentation.predict import main
from tests.support.dicom import edit, item, read_series, write_enhanced, write_with_uids
from tests.support.masks import check_dicom
from tests.support.models import MAX_TIES, save_model
from tests.support.volumes import ORIENTATIONS, predict_kaggle, prediction_words, rotation, store

VOXELS = np.random.default_rng(0).integers(0, 3000, (7, 6, 5)).astype(np.uint16)
AFFINE = np.diag([-1.5, -1.4, -3.0, 1.0])
AFFINE[:3, 3] = 10.25, -20.5, 30.125


def read(paths: list[Path]) -> tuple[Volume, np.ndarray]:
    """The only series of some files, and its voxels as slices, rows and columns."""
    volume = read_series(paths)
    assert volume.read is not None
    return volume, volume.to_training(volume.read())


def message(paths: list[Path]) -> str:
    volumes, problems, *_ = find_series(paths)
    assert not volumes and len(problems) == 1
    (text,) = problems.values()
    assert "\n" not in text
    return text


class TestGeometry:
    @pytest.mark.parametrize("enhanced", [False, True])
    @pytest.mark.parametrize("degrees", [0, 20])
    def test_every_orientation_gives_the_same_slices_at_the_same_places(
        self, degrees: float, enhanced: bool, tmp_path: Path
    ) -> None:
        # These 10 of 48 ways contain sagittal and coronal series, reversed ones, and negative direction cosines.
        rng = np.random.default_rng(3)
        for number, (order, flipped) in enumerate(ORIENTATIONS[::5]):
            tilted = AFFINE.copy()
            tilted[:3, :3] = rotation(rng, degrees) @ tilted[:3, :3]
            stored, affine = store(VOXELS, tilted, order, flipped)
            folder = tmp_path / str(number)
            paths = (
                [write_enhanced(folder / "file", stored, affine)] if enhanced else write_series(folder, stored, affine)
            )
            volume, slices = read(paths)
            # In the enhanced file, each slice has a slope of its own: its number in the file.
            slopes = np.arange(1, stored.shape[2] + 1) if enhanced else 1
            expected = store((stored * slopes).astype(float), np.eye(4), tuple(np.argsort(order)), ())[0]
            expected = np.flip(expected, [order[axis] for axis in flipped]).transpose(2, 1, 0)
            np.testing.assert_array_equal(slices, expected)
            assert volume.spacing_mm == pytest.approx((3, 1.4, 1.5))
            # Each voxel lies where it was: its value is its place in a volume that numbers the voxels.
            corner = volume.affine @ [0, 0, 0, 1]
            found = np.linalg.solve(tilted, corner)[:3]
            assert np.allclose(found, np.round(found), atol=1e-5)
            value = volume.read()[0, 0, 0]  # type: ignore[misc]
            k = np.linalg.solve(affine, corner)[2]
            x, y, z = np.round(found).astype(int)
            assert value == VOXELS[x, y, z] * (round(k) + 1 if enhanced else 1)

    def test_one_slice_is_as_thick_as_it_says(self, tmp_path: Path) -> None:
        volume, slices = read(write_series(tmp_path, VOXELS[:, :, :1], AFFINE))
        assert slices.shape == (1, 6, 7) and volume.spacing_mm == pytest.approx((3, 1.4, 1.5))
        edit(volume.path, SliceThickness=None)
        assert read_series([volume.path]).spacing_mm[0] == 3

    def test_series_and_patients_are_kept_apart(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path / "a", VOXELS, AFFINE)
        paths += write_series(tmp_path / "b", VOXELS[:, :, :3], AFFINE)
        # Copies, files without an image and localizers are passed over.
        paths.append(Path(shutil.copy(paths[0], tmp_path / "copy")))
        scout = write_series(tmp_path / "scout", VOXELS, AFFINE)[0]
        edit(scout, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        report = write_series(tmp_path / "report", VOXELS, AFFINE)[0]
        edit(report, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
        volumes, problems, *_ = find_series([*paths, scout, report][::-1])
        assert not problems
        assert sorted(volume.shape for volume in volumes) == [(7, 6, 3), (7, 6, 5)]
        assert all(volume.name == volume.origin.frames[0].series_uid for volume in volumes)

    def test_a_series_that_is_no_volume_is_refused(self, tmp_path: Path) -> None:
        gap = write_series(tmp_path / "gap", VOXELS, AFFINE, places=[0, 1, 2, 4, 5])
        assert "expected slices 3.00 mm apart, but got 6.00 mm after" in message(gap)
        assert "1 slices are missing" in message(gap)
        uneven = write_series(tmp_path / "uneven", VOXELS, AFFINE, places=[0, 1, 2.2, 3.2, 4.2])
        assert "got 3.60 mm after" in message(uneven) and "the distance changes" in message(uneven)
        echoes = write_series(tmp_path / "echoes", VOXELS, AFFINE, places=[0, 0, 1, 1, 2])
        assert "several slices at (-10.25, 20.5, " in message(echoes)
        size = write_series(tmp_path / "size", VOXELS, AFFINE)
        edit(size[2], PixelSpacing=["1.4", "1.6"])
        assert "expected 6 x 7 pixels of 1.4 x 1.5 mm" in message(size)
        tilted = write_series(tmp_path / "tilted", VOXELS, AFFINE)
        edit(tilted[2], ImageOrientationPatient=["1", "0", "0", "0", "0.96", "0.28"])
        assert "not parallel to" in message(tilted)
        shifted = write_series(tmp_path / "shifted", VOXELS, AFFINE)
        position = [float(value) for value in pydicom.dcmread(shifted[2]).ImagePositionPatient]
        edit(shifted[2], ImagePositionPatient=[f"{position[0] + 2:g}", *(f"{value:g}" for value in position[1:])])
        assert "do not lie in one line" in message(shifted)
        frames = write_series(tmp_path / "frames", VOXELS, AFFINE)
        edit(frames[2], FrameOfReferenceUID="1.2.3")
        assert "another frame of reference" in message(frames)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"ImagePositionPatient": None}, "has no valid ImagePositionPatient"),
            ({"PixelSpacing": []}, "has no valid PixelSpacing"),
            ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, "not at right angles"),
            ({"SeriesInstanceUID": "1/../../2"}, "expected digits and dots as SeriesInstanceUID, got '1/../../2'"),
            ({"Rows": None}, "its header cannot be read"),
            ({"PhotometricInterpretation": "MONOCHROME1"}, "expected grey values with white as the highest"),
        ],
    )
    def test_a_header_without_a_place_is_refused(
        self, values: dict[str, object], expected: str, tmp_path: Path
    ) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        edit(path, **values)
        assert message([path]).startswith(f"{path}: ") and expected in message([path])


class TestIntensities:
    def test_slope_and_intercept_of_each_slice_are_applied(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE, slope=2, intercept=-7)
        edit(paths[1], RescaleSlope="0.5")
        _, slices = read(paths)
        expected = VOXELS.transpose(2, 1, 0) * np.array([2, 0.5, 2, 2, 2])[:, None, None] - 7
        np.testing.assert_allclose(slices, expected)

    def test_a_modality_lut_is_applied(self, tmp_path: Path) -> None:
        voxels = np.arange(24, dtype=np.uint16).reshape(6, 4, 1)
        (path,) = write_series(tmp_path, voxels, AFFINE)
        dataset = pydicom.dcmread(path)
        del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType
        table = np.arange(24)[::-1] ** 2
        lut = item(LUTDescriptor=[24, 0, 16], ModalityLUTType="US", LUTData=table.tolist())
        lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
        dataset.ModalityLUTSequence = DicomSequence([lut])
        dataset.save_as(path)
        _, slices = read([path])
        np.testing.assert_array_equal(slices[0], table[voxels[:, :, 0].T])
        assert apply_modality_lut(dataset.pixel_array, dataset)[0, 1] == table[4]

    def test_pixels_that_cannot_be_read_are_named(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, VOXELS, AFFINE)
        paths[3].write_bytes(paths[3].read_bytes()[:-30])
        # It is found before a model runs.
        expected = "its pixels cannot be decoded (it ends within its pixels: 54 of 84 bytes are there)"
        assert message(paths).startswith(f"{paths[3]}: {expected}")


class TestPrediction:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_model(tmp_path_factory.mktemp("model"), "segformer", seed=0, slice_context=1)

    @pytest.mark.parametrize(
        ("order", "flipped", "enhanced"), [((0, 1, 2), (2,), False), ((2, 0, 1), (1,), False), ((0, 1, 2), (), True)]
    )
    def test_the_masks_equal_those_of_the_kaggle_path(
        self,
        order: tuple[int, ...],
        flipped: tuple[int, ...],
        enhanced: bool,
        model: Path,
        small_kaggle_dir: Path,
        tmp_path: Path,
    ) -> None:
        scan = sorted((small_kaggle_dir / "train").glob("case*/case*_day*"))[0]
        voxels, spacing = read_scan(scan)
        truth = predict_kaggle(model, scan, tmp_path / "kaggle", voxels.shape)
        affine = np.eye(4)
        affine[:3, :3] = KAGGLE_AXES * spacing
        stored, stored_affine = store(voxels, affine, order, flipped)
        if enhanced:
            write_enhanced(tmp_path / "in" / "file", (stored // np.arange(1, 4)).astype(np.uint16), stored_affine)
        else:
            write_series(tmp_path / "in", stored, stored_affine)
        (written,) = main(prediction_words(model, tmp_path / "in", tmp_path / "out", "--format", "nifti"))
        image = nibabel.as_closest_canonical(nibabel.load(written))
        # Canonical axes run to R, A and S, against those of Kaggle.
        labels = np.asarray(image.dataobj)[::-1, ::-1, ::-1]
        # In the enhanced file, the intensities were rounded.
        limit = 0.01 if enhanced else MAX_TIES
        assert labels.shape == truth.shape and np.mean(labels != truth) <= limit
        assert len(np.unique(labels)) == 4

    def test_a_missing_package_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (path,) = write_series(tmp_path / "in", VOXELS[:, :, :1], AFFINE)
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(
            InputError, match=r"needs pydicom, which is not installed; run `pip install -e .\[clinic\]`"
        ):
            find_scans(tmp_path / "in")
        assert path.is_file()

    def test_one_bad_series_stops_no_other(self, model: Path, small_kaggle_dir: Path, tmp_path: Path) -> None:
        voxels, affine = read_first_scan(small_kaggle_dir / "train")
        folder = tmp_path / "in"
        good = write_series(folder / "good", voxels, affine, description="\x1b[2J<script>alert(1)</script>")
        for path in good:
            edit(path, PatientName="<b>Doe</b>^&amp;")
        shuffled = np.random.default_rng(0).permutation(np.repeat(voxels, 2, axis=2))
        paths = {name: write_series(folder / name, shuffled, affine) for name in ("gap", "twice", "codec", "noise")}
        paths["gap"][2].unlink()
        edit(paths["twice"][1], ImagePositionPatient=pydicom.dcmread(paths["twice"][0]).ImagePositionPatient)
        for path in paths["codec"]:
            dataset = pydicom.dcmread(path)
            dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
            dataset["PixelData"].is_undefined_length = True
            dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
            dataset.save_as(path)
        (folder / "noise" / "garbage").write_bytes(bytes(128) + b"DICM" + bytes(range(256)) * 4)
        (folder / "noise" / "notes").write_text("no DICOM file")
        (folder / "link").symlink_to(folder / "nowhere")
        constant = write_series(folder / "constant", np.full((8, 8, 3), 5, np.uint16), affine)
        uids = {pydicom.dcmread(files[-1]).SeriesInstanceUID: name for name, files in paths.items()}
        uids[pydicom.dcmread(constant[0]).SeriesInstanceUID] = "constant"
        scans = find_scans(folder)
        assert all(describe_scan(scan).isprintable() for scan in scans.scans)
        members = load_members([str(model)], None, Computation("cpu"))
        results = predict_files(
            members, scans.scans, ["dicom-seg", "rtstruct"], tmp_path / "out", PredictionSettings()
        )
        messages = {uids.get(result.name, result.name): result.message for result in results}
        (uid,) = messages.keys() - {"gap", "twice", "codec", "noise", "constant"}
        assert messages.pop(uid) == ""
        for path in (tmp_path / "out").glob(f"{uid}*"):
            assert pydicom.dcmread(path).PatientName == "<b>Doe</b>^&amp;"
        assert len(list((tmp_path / "out").glob("*.dcm"))) == 2
        for name, text in {
            "gap": "slices are missing",
            "twice": "several slices at",
            "codec": r"compressed \(JPEG Lossless.*install with pip .*pylibjpeg-libjpeg",
            "noise": "garbage: not a whole DICOM file",
            "constant": "has the same intensity everywhere",
        }.items():
            assert re.search(text, messages[name]) and "\n" not in messages[name]

    def test_a_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        (path,) = write_series(tmp_path, VOXELS[:, :, :1], AFFINE)
        edit(path, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
        with pytest.raises(InputError, match="none is a slice of an MR series"):
            find_scans(tmp_path)


@pytest.mark.parametrize("format_", ["nifti", "dicom-seg", "rtstruct"])
def test_a_real_series_without_uids_becomes_a_nifti_file_only(format_: str, test_data: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0)
    words = prediction_words(model, test_data / "totalsegmentator" / "example_ct_dicom", tmp_path / "out")
    if format_ != "nifti":
        with pytest.raises(InputError, match=r"has no SOPClassUID, which contours have to name; .*--format nifti"):
            main([*words, "--format", format_])
        return
    (written,) = main([*words, "--format", format_])
    reference = nibabel.load(test_data / "totalsegmentator" / "example_seg_dicom.nii.gz")
    assert written.name == "example_ct_dicom.nii.gz"
    canonical, expected = (nibabel.as_closest_canonical(image) for image in (nibabel.load(written), reference))
    assert canonical.shape == expected.shape
    np.testing.assert_allclose(canonical.affine, expected.affine, atol=0.01)


@pytest.fixture
def real_series(test_data: Path, tmp_path: Path) -> Path:
    """The real series. The public files have no identifiers."""
    write_with_uids(test_data / "totalsegmentator" / "example_ct_dicom", tmp_path / "series")
    return tmp_path / "series"


@pytest.mark.long
def test_a_real_series_becomes_files_of_a_planning_system(real_series: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0)
    words = prediction_words(model, real_series, tmp_path / "out", "--format", "dicom-seg", "rtstruct")
    segmentation, structures = main(words)
    assert pydicom.dcmread(segmentation).FrameOfReferenceUID == "1.2.5"
    check_dicom(segmentation)
    check_dicom(structures)


def test_a_real_series_has_the_grid_of_its_label_map(real_series: Path, test_data: Path) -> None:
    volume, slices = read(list(real_series.iterdir()))
    folder = test_data / "totalsegmentator"
    reference = nibabel.load(folder / "example_seg_dicom.nii.gz")
    labels = np.asarray(reference.dataobj)
    assert volume.shape == labels.shape and "trained on MR" in volume.describe()
    other = Volume("labels", folder, labels.shape, reference.affine)
    np.testing.assert_allclose(
        volume.affine
        @ [*(length - 1 if flip else 0 for length, flip in zip(labels.shape, (0, 1, 0), strict=True)), 1],
        reference.affine @ [0, 0, 0, 1],
        atol=0.01,
    )
    # Every organ of the label map is soft tissue, or fluid, in the right place.
    values = slices[other.to_training(labels) == 5]
    assert values.size == 0 or -200 < np.median(values) < 300
    assert slices.min() < -900 and slices[other.to_training(labels) > 0].mean() > -200
