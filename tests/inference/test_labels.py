"""A checkpoint predicts its own labels, in the field of view that it was trained on, into files of every format."""

import csv
import json
import re
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest

from dataset_builder.phantom import write_phantom
from dataset_builder.series import read_first_scan, write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.formats.volumes import FIELD_MM
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import find_common_field, load_members
from gi_segmentation.inference.outputs import file_word
from gi_segmentation.inference.scans import predict_scans
from gi_segmentation.labels import LabelSet
from gi_segmentation.predict import main
from gi_segmentation.review.predicted_scan import PredictedScan
from tests.support.masks import check_dicom
from tests.support.models import MAX_TIES, change_config, save_model
from tests.support.volumes import prediction_words

LABELS = LabelSet(("stomach", "Lung (left)", "duodenum", "tumour 2", "Wirbelkörper"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", "segformer", seed=0, labels=LABELS)


@pytest.fixture(scope="module")
def own_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of own data: other labels, and slices 2 mm apart."""
    folder = tmp_path_factory.mktemp("own")
    write_phantom(
        folder, num_cases=1, days_per_case=1, slices_per_scan=6, num_proc=1, num_labels=5, slice_spacing_mm=2
    )
    return folder


def test_a_series_gets_files_with_the_labels_of_the_model(model: Path, own_dir: Path, tmp_path: Path) -> None:
    voxels, affine = read_first_scan(own_dir / "train")
    write_series(tmp_path / "in", voxels[::3, ::3], affine @ np.diag([3, 3, 1, 1]))
    words = prediction_words(model, tmp_path / "in", tmp_path / "out", "--probabilities", "--test_time_flips")
    written = main([*words, "--format", "nifti", "dicom-seg", "rtstruct", "report"])
    (name,) = {path.name.removesuffix(".seg.dcm") for path in written if path.name.endswith(".seg.dcm")}
    ends = ["nii.gz", "seg.dcm", "rtstruct.dcm", "report.json", "report.html"]
    # Spaces, brackets and letters of other alphabets stay out of file names.
    ends += [f"{file_word(organ)}.probability.nii.gz" for organ in LABELS.names]
    assert {path.name for path in written} == {f"{name}.{end}" for end in ends}
    assert all(path.is_file() and re.fullmatch(r"[\w.-]+", path.name, re.ASCII) for path in written)

    labels = np.asarray(nibabel.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)
    masks = labels == np.arange(1, 6)[:, None, None, None]
    assert masks.any(axis=(1, 2, 3)).sum() > 2
    segmentation = highdicom.seg.segread(tmp_path / "out" / f"{name}.seg.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sorted((tmp_path / "in").iterdir())]
    read = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert read.any(axis=(0, 1, 2)).tolist() == masks.any(axis=(1, 2, 3)).tolist()
    assert read.sum() == masks.sum()
    structures = pydicom.dcmread(tmp_path / "out" / f"{name}.rtstruct.dcm")
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == list(LABELS.names)
    for end in ("seg.dcm", "rtstruct.dcm"):
        check_dicom(tmp_path / "out" / f"{name}.{end}")
    report = json.loads((tmp_path / "out" / f"{name}.report.json").read_text(encoding="utf-8"))
    assert list(report["organs"]) == list(LABELS.names)
    page = (tmp_path / "out" / f"{name}.report.html").read_text(encoding="utf-8")
    assert all(organ in page for organ in LABELS.names)


def test_a_folder_of_own_data_gets_a_submission(model: Path, own_dir: Path, tmp_path: Path) -> None:
    words = prediction_words(model, own_dir / "train", tmp_path / "out", "--format", "kaggle", "nifti")
    submission, label_map = main(words)
    with submission.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(LABELS.names) * 6
    # The file names do not say how far apart the slices are.
    assert nibabel.load(label_map).header.get_zooms()[2] == 2


def test_neighbours_of_own_data_are_as_far_away_as_in_other_files(own_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0, slice_context=2, labels=LABELS)
    voxels, affine = read_first_scan(own_dir / "train")
    # That function takes 3 mm for the distance of the slices.
    nibabel.save(nibabel.Nifti1Image(voxels, affine @ np.diag([1, 1, 2 / 3, 1])), tmp_path / "a.nii")
    masks = []
    for source in (own_dir / "train", tmp_path / "a.nii"):
        (written,) = main(prediction_words(model, source, tmp_path / source.stem, "--format", "nifti"))
        masks.append(np.asarray(nibabel.load(written).dataobj))
    assert len(np.unique(masks[0])) > 2 and np.mean(masks[0] != masks[1]) <= MAX_TIES


def test_the_members_of_an_ensemble_need_the_same_labels(model: Path, own_dir: Path, tmp_path: Path) -> None:
    words = prediction_words(model, own_dir / "train", tmp_path / "out")
    swapped = LabelSet((*LABELS.names[1:], LABELS.names[0]))
    for labels, label_mode, expected in (
        (swapped, "multiclass", r"with the same labels in one order, got .*: background, stomach, .*; .*tumour 2"),
        (LABELS, "multilabel", "of one label mode, got .*: background, stomach, .*: stomach, Lung"),
    ):
        other = save_model(tmp_path / label_mode, "segformer", 0, label_mode, labels=labels)
        with pytest.raises(InputError, match=f"^--model: expected checkpoints {expected}"):
            main([*words[:2], str(other), *words[2:]])
    assert not (tmp_path / "out").exists()


class TestFieldOfView:
    def write(self, path: Path) -> Path:
        affine = np.diag([-5.0, -4.0, -3.0, 1.0])
        voxels = np.random.default_rng(0).integers(1, 900, (40, 50, 3)).astype(np.uint16)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        return path

    def test_a_scan_is_cropped_or_padded_to_that_of_the_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # 200 mm x 200 mm: less than the slices of Kaggle, and more than one of these models has seen.
        source = self.write(tmp_path / "a.nii")
        sizes, fields = {}, {"kaggle": None, "small": [[90, 100], [110, 120]], "usual": [[150, 250], [150, 250]]}
        for name, field in fields.items():
            folder = save_model(tmp_path / name, "segformer", seed=0, labels=LABELS)
            change_config(folder, field_mm=field)
            members = load_members([str(folder)], None, Computation("cpu"))
            ((_, predicted),) = predict_scans(members, find_scans(source).scans, PredictionSettings(num_workers=0))
            assert isinstance(predicted, PredictedScan)
            sizes[name] = predicted.slice_masks[0].shape[1:]
            # The masks lie on the grid of the file anyway.
            assert predicted.masks.shape == (5, 40, 50, 3)
        # Rows of 4 mm, and columns of 5 mm.
        assert sizes == {"kaggle": (88, 70), "small": (25, 24), "usual": (50, 40)}

        main(prediction_words(tmp_path / "small", source, tmp_path / "out", "--list"))
        assert "padded or cropped to 25 x 24 pixels" in capsys.readouterr().out
        main(prediction_words(tmp_path / "small", source, tmp_path / "out", "--format", "nifti"))
        line = "field of view of the training: 90 to 100 mm high, 110 to 120 mm wide; cropped or padded to it: a"
        assert line in capsys.readouterr().out
        # With another field of view, a folder would have masks of two kinds.
        change_config(tmp_path / "small", field_mm=[[90, 100], [110, 130]])
        with pytest.raises(InputError, match=r"other settings: field_mm was .* and is now"):
            main(prediction_words(tmp_path / "small", source, tmp_path / "out", "--format", "nifti"))

    def test_an_ensemble_takes_what_any_member_has_seen(self, tmp_path: Path) -> None:
        folders = [save_model(tmp_path / str(seed), "segformer", seed) for seed in range(3)]
        for folder, field in zip(folders, ([[90, 100], [110, 120]], [[95, 130], [100, 115]], None), strict=True):
            change_config(folder, field_mm=field)
        members = load_members([str(folder) for folder in folders], None, Computation("cpu"))
        assert find_common_field(members[:2]) == ((90, 130), (100, 120))
        assert find_common_field(members[2:]) == FIELD_MM

    def test_another_form_is_one_line(self, tmp_path: Path) -> None:
        folder = change_config(save_model(tmp_path / "model", "segformer", seed=0), field_mm=[[3, 1], [1, 2]])
        words = prediction_words(folder, self.write(tmp_path / "a.nii"), tmp_path / "out")
        with pytest.raises(InputError, match=r"model: config\.json: expected .*as field_mm, but got \[\[3, 1\]"):
            main(words)
        assert not (tmp_path / "out").exists()
