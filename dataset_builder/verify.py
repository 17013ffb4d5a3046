"""Look at every file of a Kaggle folder once: collect its problems and count what it holds."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from gi_segmentation.data.kaggle import (
    KaggleDataError,
    Scan,
    SliceFile,
    SliceSizeError,
    check_segmentation,
    read_scans,
    read_slice,
    split_names,
)
from gi_segmentation.rle import decode
from gi_segmentation.schema import ORGANS

ENDLESS = 2**30  # pixels: more than any image's side, and its square fits 64 bits


@dataclass
class Inspection:
    """What a scan or a whole folder holds.

    Attributes:
        problems: One line each; empty where all is well.
        counts: `scans`, `slices`, `empty` (slices without any organ), `overlapping` (slices where organs overlap),
            `overlap_pixels`, and per organ the slices that show it.
    """

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Inspection") -> None:
        """Add what another inspection found."""
        self.problems += other.problems
        self.counts += other.counts


def inspect_slice(slice_file: SliceFile) -> tuple[SliceFile, list[str]]:
    """Read a slice's image.

    Returns:
        The slice, and its image's problems. If the image's size differs from the size in its name, nobody knows which
        of both its encodings belong to. The slice then gets an endless size, so that the encodings fit and the wrong
        name is the only problem reported.
    """
    try:
        read_slice(slice_file)
    except SliceSizeError as error:
        return slice_file._replace(height=ENDLESS, width=ENDLESS), error.problems
    except KaggleDataError as error:
        return slice_file, error.problems
    return slice_file, []


def inspect_scan(scan: Scan, csv_path: Path) -> Inspection:
    """Read every slice of a scan and check image and annotation."""
    found = Inspection(counts=Counter(scans=1, slices=len(scan.slices)))
    for slice_file in scan.slices:
        organs = scan.annotations[slice_file.id] if scan.annotations else {}
        slice_file, problems = inspect_slice(slice_file)
        if organs:  # else a test split, or a slice whose missing rows are reported with the CSV
            problems += check_segmentation(organs, slice_file, csv_path)
        found.problems += problems
        if not organs:
            continue
        shown = [organ for organ in ORGANS if organ in organs and organs[organ].rle.strip()]
        found.counts.update(shown or ["empty"])
        if len(shown) > 1 and not problems:
            masks = [decode(organs[organ].rle, slice_file.height, slice_file.width) for organ in shown]
            overlap = int(np.count_nonzero(np.sum(masks, axis=0) > 1))
            found.counts.update(overlap_pixels=overlap, overlapping=int(overlap > 0))
    return found


def inspect_scans(scans: list[Scan], csv_path: Path, num_proc: int | None, description: str) -> Inspection:
    """Inspect scans side by side, with a progress bar.

    Args:
        scans: The scans to read.
        csv_path: Where their annotations come from, for the messages.
        num_proc: Processes; None takes one per core.
        description: What the bar says.
    """
    total = Inspection()
    workers = min(num_proc or os.cpu_count() or 1, len(scans))
    slices = sum(len(scan.slices) for scan in scans)
    inspect = partial(inspect_scan, csv_path=csv_path)
    with tqdm(total=slices, desc=description, unit="slice") as bar, ProcessPoolExecutor(max(workers, 1)) as pool:
        for scan, found in zip(scans, pool.map(inspect, scans), strict=True):
            total.add(found)
            bar.update(len(scan.slices))
    return total


def verify(kaggle_dir: Path, num_proc: int | None = None) -> Inspection:
    """Find every problem of a Kaggle folder.

    Args:
        kaggle_dir: Folder with `train.csv`, `train/` and perhaps `test/`.
        num_proc: Processes; None takes one per core.

    Returns:
        All problems at once, and the counts of the annotated scans.
    """
    total = Inspection()
    for split in split_names(kaggle_dir):
        try:
            scans, problems = read_scans(kaggle_dir, split)
        except KaggleDataError as error:
            total.problems += error.problems
            continue
        found = inspect_scans(scans, kaggle_dir / "train.csv", num_proc, description=f"Checking {split}")
        found.problems[:0] = problems
        if split == "test":
            found.counts = Counter(test_slices=found.counts["slices"])
        total.add(found)
    return total
