"""Slices from the cache equal slices that are made at each visit, and the cache is made once."""

import resource
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import DatasetDict

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.prepared import PreparedSlices, cache_slices, view_values
from gi_segmentation.data.preprocessing import prepare_image, prepare_organs
from gi_segmentation.data.slices import find_dataset, load_slices, transform_splits
from gi_segmentation.data.transforms import attached_transform
from gi_segmentation.errors import InputError
from gi_segmentation.models.loading import new_processor
from tests.support.processes import RunPython

SIZE = 64


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test a cache of `datasets` of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(dataset_dir: Path, cache: bool = True, **settings: object) -> DatasetDict:
    name = str(dataset_dir)
    return load_slices(DataArguments(dataset_name=name, cache_slices=cache, **{"image_size": SIZE, **settings}))  # type: ignore[arg-type]


def cache_files(folder: Path) -> dict[Path, int]:
    """Return the files that `datasets` made by `map`, and their time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("cache-*.arrow")}


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
@pytest.mark.parametrize("slice_context", [0, 2])
def test_cached_examples_equal_those_without_a_cache(slice_context: int, label_mode: str, dataset_dir: Path) -> None:
    data_args = DataArguments(image_size=SIZE, slice_context=slice_context)
    splits = []
    for cache in (True, False):
        slices = load(dataset_dir, cache)
        assert ("pixels" in slices["train"].column_names) == cache
        model_args = ModelArguments(label_mode=label_mode)  # type: ignore[arg-type]
        splits.append(transform_splits(slices, slices, new_processor(SIZE), model_args, data_args, seed=0))
    for cached, plain in zip(*splits, strict=True):
        # Every fifth slice, the batches of a loader, and the last slices first.
        for rows in (list(range(0, len(plain), 5)), list(range(len(plain) - 1, len(plain) - 9, -1))):
            for left, right in zip(cached.__getitems__(rows), plain.__getitems__(rows), strict=True):
                assert left.keys() == right.keys()
                assert all(torch.equal(left[name], right[name]) for name in left)
                assert left["images"].shape == (SIZE, SIZE, 3 if slice_context else 1)


@pytest.mark.parametrize("cache", [True, False])
def test_one_wrong_bit_in_a_slice_of_the_dataset_is_an_error(dataset_dir: Path, cache: bool) -> None:
    from datasets import Image

    rows = load(dataset_dir, cache=False)["train"].select(range(2)).cast_column("image", Image(decode=False))

    def damage(row: dict) -> dict:
        data = bytearray(row["image"]["bytes"])
        # The checksum of the last chunk with pixels, which Pillow leaves out.
        data[-30] ^= 1
        return {"image": {"bytes": bytes(data), "path": None}}

    damaged = rows.map(damage, features=rows.features).cast_column("image", Image())
    with pytest.raises(InputError, match="not a whole PNG"):
        if cache:
            cache_slices(damaged, SIZE)
        else:
            list(PreparedSlices(damaged, SIZE).read([(rows[0]["scan"], rows[0]["slice"])]))


def test_the_neighbours_are_the_slices_of_the_same_scan(dataset_dir: Path) -> None:
    rows = load(dataset_dir)["train"]
    prepared = PreparedSlices(rows, SIZE, slice_context=1)
    by_id = {(row["scan"], row["slice"]): row for row in rows}
    scan = rows[0]["scan"]
    numbers = sorted(number for name, number in by_id if name == scan)
    for before, number, after in zip(numbers, numbers[1:], numbers[2:], strict=False):
        ((pixels, organs),) = prepared.read([(scan, number)])
        shown = [by_id[scan, which] for which in (before, number, after)]
        for channel, row in zip(pixels.transpose(2, 0, 1), shown, strict=True):
            np.testing.assert_array_equal(channel, prepare_image(np.array(row["image"]), SIZE))
        np.testing.assert_array_equal(organs, prepare_organs(shown[1], SIZE))


def test_values_are_views_of_a_column_in_any_order() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (7, 4, 4), dtype=np.uint16)
    whole = pa.array([value.tobytes() for value in values], pa.large_binary())
    # A slice of an array begins in the middle of its buffers; one of the pieces is empty.
    column = pa.chunked_array([whole.slice(5, 2), whole.slice(0, 0), whole.slice(2, 1), whole])
    views = list(view_values(column, np.uint16, (4, 4)))
    np.testing.assert_array_equal(views, values[[5, 6, 2, *range(7)]])
    # Equal rows share their memory, so nothing was copied.
    assert np.shares_memory(views[0], views[8]) and not np.shares_memory(views[0], views[1])


def test_examples_are_the_cached_pixels_and_augmented_ones_differ_from_epoch_to_epoch(dataset_dir: Path) -> None:
    slices = load(dataset_dir)
    data_args = DataArguments(image_size=SIZE)
    train, _ = transform_splits(slices, slices, new_processor(SIZE), ModelArguments(), data_args, seed=0)
    plain_args = DataArguments(image_size=SIZE, augmentation=False)
    plain, _ = transform_splits(slices, slices, new_processor(SIZE), ModelArguments(), plain_args, seed=0)
    rows = list(range(0, len(train), 3))
    for example, row in zip(plain.__getitems__(rows), slices["train"].select(rows), strict=True):
        pixels = prepare_image(np.array(row["image"]), SIZE)
        np.testing.assert_array_equal(example["images"][..., 0], pixels)
        np.testing.assert_array_equal(example["organs"], prepare_organs(row, SIZE))
    epochs = []
    for epoch in (0, 1, 0):
        attached_transform(train).epoch.fill_(epoch)
        # The order of the slices does not matter.
        order = rows[::-1] if epochs else rows
        examples = dict(zip(order, train.__getitems__(order), strict=True))
        assert all(example["images"].dtype == torch.uint16 for example in examples.values())
        epochs.append([examples[row]["images"].numpy().tobytes() for row in rows])
    assert epochs[0] == epochs[2]
    # One visit in 32 changes nothing in the image, and two visits may make the same change.
    assert sum(first != second for first, second in zip(*epochs[:2], strict=True)) > 0.8 * len(rows)


def test_all_folds_share_one_cache(dataset_dir: Path, own_cache: Path) -> None:
    load(dataset_dir)
    files = cache_files(own_cache)
    # A file for each split as it was built.
    assert len(files) == 2
    for fold in ("0", "1", "all"):
        load(dataset_dir, fold=fold)
    assert cache_files(own_cache) == files


def test_another_size_or_rule_makes_another_cache(
    dataset_dir: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = find_dataset(str(dataset_dir), None)["validation"]
    before = cache_slices(rows, SIZE)
    other = cache_slices(rows, SIZE // 2)
    assert len(cache_files(own_cache)) == 2
    assert len(before[0]["organs"]) == 4 * len(other[0]["organs"])
    # As if another version of the package had another rule.
    monkeypatch.setattr("inspect.getsource", lambda module: f"# {module.__name__}, changed")
    cache_slices(rows, SIZE)
    assert len(cache_files(own_cache)) == 3


def test_a_cache_of_another_size_is_not_used(dataset_dir: Path) -> None:
    rows = load(dataset_dir)["validation"]
    scan, number = rows[0]["scan"], rows[0]["slice"]
    ((pixels, organs),) = PreparedSlices(rows, 2 * SIZE).read([(scan, number)])
    assert (pixels.shape, organs.shape) == ((2 * SIZE, 2 * SIZE, 1), (2 * SIZE, 2 * SIZE))
    np.testing.assert_array_equal(pixels[..., 0], prepare_image(np.array(rows[0]["image"]), 2 * SIZE))


def test_slices_without_neighbours_are_refused(dataset_dir: Path) -> None:
    rows = load(dataset_dir)["train"]
    alone = rows.select(range(0, len(rows), 50))
    with pytest.raises(InputError, match="--slice_context 1: expected slices with neighbours"):
        PreparedSlices(alone, SIZE, slice_context=1)
    # A split without any slice, as with `--fold all`, needs no neighbours.
    PreparedSlices(rows.select([]), SIZE, slice_context=1)


FULL_DISK = """
import resource, sys
from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import exit_on_input_error
# The dataset is loaded first, so that only the cache meets the limit.
load_slices(DataArguments(dataset_name=sys.argv[1], cache_slices=False))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
with exit_on_input_error():
    load_slices(DataArguments(dataset_name=sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system cannot limit the size of files")
def test_a_full_disk_is_one_clear_error(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    ended = run_python(["-c", FULL_DISK, str(dataset_dir)], tmp_path, {"HF_DATASETS_CACHE": str(tmp_path)})
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "--cache_slices:" in last and "add --no_cache_slices" in last and "GB in the cache of datasets" in last
    assert not cache_files(tmp_path)
