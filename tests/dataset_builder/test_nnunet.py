"""What nnU-Net reads has our scans, labels, spacing and folds. Its own check is run where it is installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from dataset_builder.__main__ import main
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom

nibabel = pytest.importorskip("nibabel")

ORGANS = ["stomach", "liver", "spleen", "large_bowel", "small_bowel"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of four scans with five organs, two of which are unknown in two scans, and its export."""
    folder = tmp_path_factory.mktemp("export")
    write_phantom(folder / "kaggle", 4, 1, 9, num_proc=1, num_labels=5, undrawn=("spleen", "liver"))
    text = json.loads((folder / "kaggle" / "labels.json").read_text())
    for facts in text["scans"].values():
        facts.update(rescale_slope=0.5, rescale_intercept=-1024.0)
    (folder / "kaggle" / "labels.json").write_text(json.dumps(text))
    build(folder / "kaggle", folder / "own", GiTractConfig(num_folds=4), num_proc=1)
    target = folder / "Dataset501_own"
    words = ["export", "--format", "nnunet", "--dataset_dir", str(folder / "own"), "--output_dir", str(target)]
    assert main(words) == 0
    return folder / "own", target


def test_images_and_labels_are_those_of_the_dataset(exported: tuple[Path, Path]) -> None:
    dataset, target = exported
    content = json.loads((target / "dataset.json").read_text())
    assert content["labels"] == {name: index for index, name in enumerate(["background", *ORGANS, "ignore"])}
    assert (content["numTraining"], content["file_ending"], content["channel_names"]) == (4, ".nii.gz", {"0": "MRI"})
    rows = [row for part in load_dataset(str(dataset)).values() for row in part]
    assert len(rows) == 36
    ignored = set()
    for row in rows:
        image = nibabel.load(target / "imagesTr" / f"{row['scan']}_0000.nii.gz")
        labels = nibabel.load(target / "labelsTr" / f"{row['scan']}.nii.gz")
        # The axes are columns, rows and slices, from the patient's right, front and head on.
        spacing = [row["pixel_spacing"][1], row["pixel_spacing"][0], row["slice_spacing"]]
        for file in (image, labels):
            np.testing.assert_allclose(file.affine, np.diag([*(-mm for mm in spacing), 1]))
        plane = np.asarray(image.dataobj)[:, :, row["slice"] - 1].T
        np.testing.assert_array_equal(plane, np.array(row["image"], dtype=np.float32) * 0.5 - 1024)
        found = np.asarray(labels.dataobj)[:, :, row["slice"] - 1].T
        expected = np.array(row["annotation"])
        if None in row["segmentation"].values():
            expected = np.where(expected == 0, len(ORGANS) + 1, expected)
            ignored.add(row["scan"])
        np.testing.assert_array_equal(found, expected)
    assert len(ignored) == 2


def test_the_folds_are_those_of_the_dataset(exported: tuple[Path, Path]) -> None:
    dataset, target = exported
    folds = {row["scan"]: row["fold"] for part in load_dataset(str(dataset)).values() for row in part}
    splits = json.loads((target / "splits_final.json").read_text())
    assert len(splits) == 4
    for fold, split in enumerate(splits):
        assert {folds[name] for name in split["val"]} == {fold}
        assert sorted(split["train"] + split["val"]) == sorted(folds)


def test_kaggles_organs_have_no_label_to_ignore(dataset_dir: Path, tmp_path: Path) -> None:
    words = ["export", "--format", "nnunet", "--channel", "MR", "--dataset_dir", str(dataset_dir), "--output_dir"]
    assert main([*words, str(tmp_path / "Dataset502_gi")]) == 0
    content = json.loads((tmp_path / "Dataset502_gi" / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "large_bowel": 1, "small_bowel": 2, "stomach": 3}
    image = nibabel.load(next((tmp_path / "Dataset502_gi" / "imagesTr").iterdir()))
    assert image.get_data_dtype() == np.uint16 and image.header.get_zooms()[2] == 3


def test_bad_input_is_one_line_and_writes_nothing(
    dataset_dir: Path, kaggle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Dataset503_full").mkdir()
    (tmp_path / "Dataset503_full" / "mine.txt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train-table.csv").write_text("a,b\n1,2\n")
    cases = [
        (dataset_dir, "gi_tract", "nnU-Net expects a name like Dataset501_Abdomen"),
        (dataset_dir, "Dataset503_full", "it exists and is not an empty folder"),
        (kaggle_dir, "Dataset504_a", "expected a built dataset; `python -m dataset_builder build"),
        (tmp_path / "nowhere", "Dataset504_a", "expected a built dataset"),
        (tmp_path / "other", "Dataset504_a", "expected a split `train` with a column `fold`"),
    ]
    for dataset, name, message in cases:
        words = ["--dataset_dir", str(dataset), "--output_dir", str(tmp_path / name)]
        with pytest.raises(SystemExit, match="1"):
            main(["export", "--format", "nnunet", *words])
        assert message.split("; ")[0] in capsys.readouterr().err, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Dataset503_full", "other"]


@pytest.mark.skipif(find_spec("nnunetv2") is None, reason="nnunetv2 is not installed")
def test_nnunet_accepts_it(exported: tuple[Path, Path]) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(exported[1]), num_processes=1)
