"""What other programs have written becomes a dataset with the same masks: label map, DICOM, `convert`, `build`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from dataset_builder.__main__ import main
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.rle import decode
from tests.support.dicom import edit, write_pixels
from tests.support.masks import label_map
from tests.support.round_trips import make_masks, make_volume
from tests.support.structures import ITKIMAGE2SEGIMAGE, PLASTIMATCH, write_with_dcmqi, write_with_plastimatch

KINDS = ("axial", "axial, all axes reversed", "sagittal, reversed, tilted by 12°", "voxels of 0.8 x 1.9 x 5 mm")
NAMES = ["Stomach", "Duodenum", "Liver"]
ORGANS = ("stomach", "duodenum", "liver")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(
            write_with_plastimatch,
            marks=pytest.mark.skipif(PLASTIMATCH is None, reason="plastimatch is not installed: apt-get install it"),
        ),
        pytest.param(
            write_with_dcmqi,
            marks=pytest.mark.skipif(ITKIMAGE2SEGIMAGE is None, reason="dcmqi is not installed: pip install dcmqi"),
        ),
    ],
)
def test_masks_of_a_dataset_are_those_of_the_label_maps(
    write: Callable[[Volume, np.ndarray, list[str], Path], Path], tmp_path: Path
) -> None:
    expected: dict[str, tuple[Volume, np.ndarray]] = {}
    for number, kind in enumerate(KINDS):
        folder, scratch = tmp_path / "in" / str(number), tmp_path / f"scratch-{number}"
        volume = make_volume(kind, folder)
        for path in volume.origin.paths:
            edit(path, PatientID=f"P{number}", PatientName=f"N{number}")
            write_pixels(path, number)
        labels = label_map(make_masks(volume))
        expected[f"P{number}"] = volume, labels
        scratch.mkdir()
        # Beside the slices, under a name that says nothing.
        shutil.copy(write(volume, labels, NAMES, scratch), folder / "IM")

    words = ["--input", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--num_proc", "1"]
    assert main(["convert", *words]) == 0
    words = ["--kaggle_dir", str(tmp_path / "out"), "--output_dir", str(tmp_path / "dataset")]
    assert main(["build", *words, "--num_folds", "2", "--num_proc", "1"]) == 0

    patients = json.loads((tmp_path / "out.key.json").read_text())["patients"]
    cases = {patient["case"]: expected[number] for number, patient in patients.items()}
    splits = load_dataset(str(tmp_path / "dataset"))
    rows = [row for split in splits.values() for row in split.remove_columns(["image", "annotation"])]
    assert {row["case"] for row in rows} == cases.keys()
    for row in rows:
        volume, labels = cases[row["case"]]
        plane = volume.to_training(labels)[row["slice"] - 1]
        assert row["slice_spacing"] == pytest.approx(volume.spacing_mm[0])
        assert tuple(row["segmentation"]) == ORGANS
        for number, organ in enumerate(ORGANS, start=1):
            mask = decode(row["segmentation"][organ], row["height"], row["width"])
            np.testing.assert_array_equal(mask, plane == number)
    assert len(rows) == sum(volume.training_shape[0] for volume, _ in cases.values())
