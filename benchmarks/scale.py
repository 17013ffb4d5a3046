"""How do time and memory of a streamed training grow with the number of slices? docs/scale.md reads on from here.

A dataset without pictures is written, with as many rows as wanted. Its encodings are as long as those of the
competition. Each step that touches all slices is then measured, and multiplied up to ten million slices.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import DatasetDict
from torch.utils.data import default_collate

from benchmarks.training import write_phantom_dataset
from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.dataset_scans import list_dataset_scans
from gi_segmentation.data.sampling import StreamingSampler
from gi_segmentation.data.slices import check_slice_names, load_slices, transform_splits
from gi_segmentation.data.streaming import load_index, number_groups
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import new_processor
from gi_segmentation.publishing.facts import count_sizes, count_split, fingerprint_dataset
from gi_segmentation.schema import SCAN_SLICES, dataset_features, scan_name, slice_name

MANY = 10_000_000
SLICES_PER_FILE, SLICES_PER_GROUP = 4000, 32
# Mean length of the three encodings of a slice, in the 3,168 slices of the competition that we have.
RLE_LENGTH = 665


def list_rows(first: int, number: int) -> Iterator[dict[str, Any]]:
    """Yield rows of whole scans, without pictures. Half of the slices show organs."""
    for index in range(first, first + number):
        case, place = divmod(index, SCAN_SLICES)
        scan = scan_name(case, 0)
        # A copy has 9 characters, and three organs have them on every second slice: `RLE_LENGTH` on average.
        rle = "12345 67 " * (2 * RLE_LENGTH // 27) if place % 2 else ""
        yield {
            "id": slice_name(scan, place), "image": None, "annotation": None,
            "segmentation": dict.fromkeys(GI_TRACT.names, rle.strip()), "case": case, "day": 0,
            "slice": place, "scan": scan,
            "fold": case % 5, "height": 266, "width": 266, "pixel_spacing": [1.5, 1.5],
        }  # fmt: skip


def write_rows(folder: Path, slices: int) -> None:
    """Write a training split of some slices and a validation split of two scans, as the builder writes them."""
    schema = dataset_features().arrow_schema
    (folder / "data").mkdir(parents=True)
    starts = range(0, slices, SLICES_PER_FILE)
    for number, start in enumerate(starts):
        table = pa.Table.from_pylist(list(list_rows(start, min(SLICES_PER_FILE, slices - start))), schema)
        path = folder / "data" / f"train-{number:05d}-of-{len(starts):05d}.parquet"
        pq.write_table(table, path, SLICES_PER_GROUP, compression="none", use_dictionary=False)
    rows = list(list_rows(SCAN_SLICES * (slices // SCAN_SLICES + 1), 2 * SCAN_SLICES))
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "data" / "validation-00000-of-00001.parquet")


def measure_steps(folder: Path, slices: int) -> None:
    """Print the time and the memory of each step, and both for `MANY` slices."""
    process = psutil.Process()

    def measure(name: str, step: Callable[[], Any]) -> Any:
        before, start = process.memory_info().rss, time.process_time()
        result = step()
        seconds = time.process_time() - start
        # Arrow and Python keep freed memory for a while.
        gc.collect()
        pa.default_memory_pool().release_unused()
        grown = process.memory_info().rss - before
        factor = MANY / slices
        print(f"| {name} | {seconds:.2f} | {grown / slices:.0f} | {seconds * factor / 60:.1f} | "
              f"{grown * factor / 1e9:.1f} |", flush=True)  # fmt: skip
        return result

    print(f"| step, {slices:,} slices | seconds | bytes a slice | minutes for {MANY:,} | GB |\n|---|---|---|---|---|")
    index: DatasetDict = measure("read the index (`load_index`)", lambda: load_index(str(folder), None))
    train = index["train"]
    measure("check the names of slices and scans", lambda: check_slice_names(train, "gi_tract"))
    # A training forgets the scans, the counts and the fingerprint's text, and keeps the rest.
    measure("list the scans (`list_dataset_scans`)", lambda: len(list_dataset_scans(train)))
    measure("count slices and sizes for `run.json`", lambda: (count_split(train), count_sizes(train)))
    measure("fingerprint of the dataset", lambda: fingerprint_dataset(index))
    data_args, processor = DataArguments(streaming=True, slice_sampling="all"), new_processor(288)
    arguments = index, index, processor, ModelArguments(), data_args, 0
    kept = measure("find neighbours, attach the transform", lambda: transform_splits(*arguments))
    groups = measure("number the row groups", lambda: number_groups(train))
    sampler = StreamingSampler(groups, 64, 4, 0, torch.zeros(1, dtype=torch.int64))
    measure("order of an epoch for 64 lanes", lambda: sum(1 for _ in sampler))
    del kept


def measure_streaming(folder: Path, image_size: int = 288, batch: int = 32) -> None:
    """Print how many slices one core streams, beside a training with a cache."""
    torch.set_num_threads(1)
    dataset_dir = write_phantom_dataset(folder, 4, days_per_case=1, slices_per_scan=SCAN_SLICES, num_folds=2)
    print("| slices | one core, slices/s |\n|---|---|")
    for streaming in (True, False):
        data_args = DataArguments(str(dataset_dir), streaming=streaming, slice_sampling="all", image_size=image_size)
        slices = load_slices(data_args)
        train, _ = transform_splits(slices, slices, new_processor(image_size), ModelArguments(), data_args, 0)
        order = np.random.default_rng(0).permutation(len(train)).tolist()
        if streaming:
            order = list(StreamingSampler(number_groups(train), 1, batch, 0, torch.zeros(1, dtype=torch.int64)))
        start = time.process_time()
        for first in range(0, len(order), batch):
            default_collate(train.__getitems__(order[first : first + batch]))
        speed = len(order) / (time.process_time() - start)
        print(f"| {'streamed' if streaming else 'from the cache'} | {speed:.0f} |", flush=True)


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--slices", type=int, default=200_000, help="number of rows without pictures")
    slices = parser.parse_args().slices
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch) / "rows", slices)
        measure_steps(Path(scratch) / "rows", slices)
        print()
        measure_streaming(Path(scratch) / "phantom")


if __name__ == "__main__":
    main()
