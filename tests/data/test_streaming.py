"""Streamed slices are those of the dataset, each comes once an epoch, and each row group is read by one process."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from huggingface_hub import HfApi

from gi_segmentation.arguments import DataArguments
from gi_segmentation.data import sampling, streaming
from gi_segmentation.data.prepared import SOURCE_COLUMNS, PreparedSlices
from gi_segmentation.data.sampling import StreamingSampler
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from loopback_hub import Fault, LoopbackHub
from tests.support.launches import Launch, accelerate_commands
from tests.support.processes import ROOT, ROOT_ON_PATH, RunPython
from tests.support.training import arguments

# Reads the training slices of a dataset on a Hub with two worker processes, as a training does.
READ_FROM_HUB = """
import sys
import numpy
from torch.utils.data import DataLoader
from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.slices import load_slices, transform_splits
from gi_segmentation.models.loading import new_processor
data_args = DataArguments(dataset_name=sys.argv[1], streaming=True, slice_sampling="all", augmentation=False)
slices = load_slices(data_args)
train, _ = transform_splits(slices, slices, new_processor(64), ModelArguments(), data_args, seed=0)
batches = list(DataLoader(train, batch_size=5, num_workers=2))
for name in ("images", "organs"):
    numpy.save(f"{name}.npy", numpy.concatenate([batch[name].numpy() for batch in batches]))
"""


def load_index(dataset_dir: Path) -> DatasetDict:
    return load_slices(DataArguments(dataset_name=str(dataset_dir), streaming=True, slice_sampling="all"))


def test_streamed_rows_are_those_of_the_dataset(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only one group is kept, so groups are read again and again.
    monkeypatch.setattr(streaming, "KEPT_GROUPS", 1)
    index, loaded = load_index(dataset_dir), load_dataset(str(dataset_dir))
    for split in ("train", "validation"):
        assert index[split]["id"][:] == loaded[split]["id"][:]
        rows = streaming.StreamedRows(index[split], SOURCE_COLUMNS)
        for number in (0, 23, 12, 1):
            row, stored = rows[number], loaded[split].with_format(None)[number]
            assert row.keys() == set(SOURCE_COLUMNS) and row["segmentation"] == stored["segmentation"]
            pixels = load_png(row["image"]["bytes"])
            np.testing.assert_array_equal(pixels, np.array(stored["image"]))


def load_png(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data)))


def test_a_fold_of_a_streamed_dataset_has_its_slices_and_their_neighbours(dataset_dir: Path) -> None:
    flags = {"dataset_name": str(dataset_dir), "fold": "1"}
    streamed = load_slices(DataArguments(**flags, streaming=True, slice_sampling="all"))
    stored = load_slices(DataArguments(**flags, cache_slices=False))
    for split in ("train", "validation"):
        names = list(zip(stored[split]["scan"], stored[split]["slice"], strict=True))[::7]
        pairs = (PreparedSlices(one[split], 64, slice_context=2).read(names) for one in (streamed, stored))
        for (pixels, organs), (expected, bits) in zip(*pairs, strict=True):
            assert pixels.shape == (64, 64, 3)
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(organs, bits)


def order_of(groups: np.ndarray, lanes: int, epoch: int, seed: int = 0) -> list[int]:
    return list(StreamingSampler(groups, lanes, 4, seed, torch.tensor([epoch])))


@pytest.mark.parametrize("lanes", [1, 2, 6])
def test_an_epoch_has_each_slice_once_and_each_group_in_one_lane(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WINDOW_GROUPS", 3)
    # 36 groups of 8 slices, whose rows are not sorted by group.
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(36), 8))
    order = order_of(groups, lanes, epoch=0)
    assert sorted(order) == list(range(len(groups)))
    batches = groups[order].reshape(-1, 4)
    readers = [set(batches[lane::lanes].ravel().tolist()) for lane in range(lanes)]
    assert sum(map(len, readers)) == 36, "two processes read the same group"
    # A window of three groups has 24 slices, or 6 batches, and most of its batches have slices of several groups.
    windows = [
        set(batches[lane::lanes][start : start + 6].ravel())
        for lane in range(lanes)
        for start in range(0, 36 * 2 // lanes, 6)
    ]
    assert all(len(window) == 3 for window in windows)
    assert np.mean([len(set(batch)) for batch in batches]) > 1.8
    assert order_of(groups, lanes, epoch=0) == order != order_of(groups, lanes, epoch=1)
    assert order != order_of(groups, lanes, epoch=0, seed=1)


def test_few_groups_are_read_twice_whatever_their_sizes() -> None:
    # Scans of 144 slices have four groups of 32 and one of 16. The last batch is not whole.
    groups = np.repeat(np.arange(500), np.tile([32, 32, 32, 32, 16], 100))[:-3]
    batches = np.array_split(groups[order_of(groups, 8, epoch=0)], range(4, len(groups), 4))
    reads = sum(len(set(np.concatenate(batches[lane::8]))) for lane in range(8))
    # At each of the seven borders between lanes, a group may be cut. The last batch may be another process's.
    assert 500 <= reads <= 500 + 7 + 1


def test_groups_of_many_sizes_and_fewer_groups_than_lanes_lose_no_slice() -> None:
    for groups, lanes in ((np.repeat(np.arange(9), np.arange(1, 10)), 4), (np.zeros(5, dtype=int), 3)):
        assert sorted(order_of(groups, lanes, epoch=0)) == list(range(len(groups)))


def read_steps(records: Path) -> dict[int, list[tuple[int, ...]]]:
    """Return the slices of all processes, by step. A step that was repeated after a kill counts once."""
    steps: dict[int, set[tuple[int, ...]]] = {}
    for step, slices in map(json.loads, records.read_text().splitlines()):
        steps.setdefault(step, set()).update(map(tuple, slices))
    return {step: sorted(slices) for step, slices in steps.items()}


@pytest.mark.long
def test_two_processes_see_each_slice_once_an_epoch_and_go_on_at_their_place_after_a_kill(
    dataset_dir: Path, tmp_path: Path
) -> None:
    # 24 slices in batches of 4 from both processes are three steps. There are two epochs.
    flags = {"streaming": True, "dataloader_num_workers": 2, "max_steps": 6, "save_total_limit": 9}

    def run(name: str, last_step: int) -> dict[int, list[tuple[int, ...]]]:
        records = tmp_path / f"{name}.jsonl"
        words = [str(records), str(last_step), *arguments(dataset_dir, tmp_path / name, **flags)]
        program = ROOT / "tests" / "support" / "stream_once.py"
        with Launch(tmp_path / f"log {name}", accelerate_commands("multi_cpu", words, 2, program=program)) as launch:
            assert (launch.wait() == [0]) == (last_step == 0), launch.said()[-3000:]
        return read_steps(records)

    whole = run("whole", 0)
    epochs = [[whole[step] for step in range(first, first + 3)] for first in (0, 3)]
    for epoch in epochs:
        assert len({one for slices in epoch for one in slices}) == sum(map(len, epoch)) == 24
    assert epochs[0] != epochs[1]
    # The kill comes amid the second epoch.
    assert max(run("killed", 5)) < max(whole)
    assert run("killed", 0) == whole


def test_the_engine_of_datasets_still_loses_slices_at_a_resume() -> None:
    # If this fails, the reason why docs/design.md keeps our sampler is gone.
    def stream() -> IterableDataset:
        slices = Dataset.from_dict({"slice": range(320)}).to_iterable_dataset(num_shards=16)
        return slices.shuffle(seed=0, buffer_size=160)

    first = stream()
    seen = [row["slice"] for row, _ in zip(first, range(160), strict=False)]
    assert len(seen) == 160
    later = stream()
    later.load_state_dict(first.state_dict())
    assert len({*seen, *(row["slice"] for row in later)}) < 320


def test_a_dataset_on_a_hub_is_streamed_and_no_picture_is_kept(
    dataset_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("tester/gi_tract", repo_type="dataset", private=True)
    api.upload_folder(repo_id="tester/gi_tract", folder_path=dataset_dir, repo_type="dataset")
    # This fault does nothing. The server counts the requests that have it.
    hub.faults.set([Fault("GET", r"\.parquet", times=math.inf)])
    environment = {**hub.environment(), **ROOT_ON_PATH, "HF_HOME": str(tmp_path / "hf_home")}
    done = run_python(["-c", READ_FROM_HUB, "tester/gi_tract"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two files are indexed, and each of the two workers reads both row groups of the training split, with three
    # requests for a group.
    assert 12 < hub.faults.count < 20
    slices = load_slices(DataArguments(dataset_name=str(dataset_dir), cache_slices=False))["train"]
    names = list(zip(slices["scan"], slices["slice"], strict=True))
    pixels, organs = zip(*PreparedSlices(slices, 64).read(names), strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), np.stack(pixels))
    np.testing.assert_array_equal(np.load(tmp_path / "organs.npy"), np.stack(organs))
    kept = sum(path.stat().st_size for path in (tmp_path / "hf_home").rglob("*") if path.is_file())
    assert kept < 100_000, "the cache has more than the card"


def test_files_that_cannot_be_streamed_are_refused(dataset_dir: Path, tmp_path: Path) -> None:
    load_dataset(str(dataset_dir), split="train").remove_columns("image").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train.parquet: expected a column `image`.*dataset_builder build"):
        load_index(tmp_path)
