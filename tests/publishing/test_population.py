"""Synthetic patients are known by the mark in each slice, in a folder, on a Hub, and while slices are streamed."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, load_dataset

from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.slices import load_slices
from gi_segmentation.data.streaming import load_index
from gi_segmentation.data.synthetic import MARK, is_synthetic
from gi_segmentation.formats.kaggle.images import is_whole_slice
from gi_segmentation.publishing.population import are_all_synthetic


def unmark(path: Path) -> None:
    """Write a slice anew, as another program would. Its pixels stay as they are."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), image)


def test_every_slice_of_a_phantom_has_the_mark_and_its_pixels_are_whole(kaggle_dir: Path) -> None:
    paths = list(kaggle_dir.rglob("*.png"))
    for path in paths[::12]:
        data, (width, height) = path.read_bytes(), map(int, path.stem.split("_")[2:4])
        assert is_synthetic(data) and is_whole_slice(data, width, height)
        plain = data.replace(MARK, b"")
        assert not is_synthetic(plain) and is_whole_slice(plain, width, height)


def test_one_real_slice_makes_the_whole_dataset_real(kaggle_copy: Path, tmp_path: Path) -> None:
    for expected in (True, False):
        if not expected:
            unmark(max(kaggle_copy.rglob("*.png")))
        folder = tmp_path / str(expected) / "gi_tract"
        assert build(kaggle_copy, folder, GiTractConfig(num_folds=2), num_proc=1).synthetic is expected
        card = (folder / "README.md").read_text()
        assert ("**No slice shows a real patient.**" in card) is expected
        assert ("**Keep it private.**" in card) is not expected
        assert ("competition-rules" in card) is not expected
        assert are_all_synthetic(load_dataset(str(folder))) is expected
        assert are_all_synthetic(load_index(str(folder), None)) is expected


@pytest.mark.parametrize("fold", [None, "0", "all"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_without_slices_changes_nothing(fold: str | None, streaming: bool, dataset_dir: Path) -> None:
    data_args = DataArguments(str(dataset_dir), fold=fold, streaming=streaming, slice_sampling="all", image_size=32)
    slices = load_slices(data_args)
    assert (len(slices["validation"]) == 0) is (fold == "all")
    assert are_all_synthetic(slices)


def test_an_image_without_bytes_has_no_mark(dataset_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset_dir, tmp_path / "gi_tract"))
    path = next((folder / "data").glob("train*"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["image"] = {"bytes": None, "path": "elsewhere.png"}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    assert are_all_synthetic(DatasetDict(load_dataset("parquet", data_files={"train": str(path)}))) is False
