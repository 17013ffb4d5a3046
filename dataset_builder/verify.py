"""Read every file of a Kaggle folder once, collect all problems, and count scans, slices and organs."""

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

# A height and width in pixels that no encoding can leave. The square of this number still fits into 64 bits.
ENDLESS = 2**30


@dataclass
class Inspection:
    """The problems and counts of a scan or of a whole folder.

    Attributes:
        problems: One line for each problem.
        counts: `scans`, `slices`, `empty` (slices without any organ), `overlapping` (slices where organs overlap),
            `overlap_pixels` (pixels in more than one organ), and for each organ the number of slices that show it.
    """

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Inspection") -> None:
        """Add the problems and counts of another inspection."""
        self.problems += other.problems
        self.counts += other.counts


def inspect_slice(slice_file: SliceFile) -> tuple[SliceFile, list[str]]:
    """Read a slice's image.

    Returns:
        The slice, and the problems of its image. If the image has another size than its name says, the slice gets the
        size `ENDLESS`.
    """
    try:
        read_slice(slice_file)
    except SliceSizeError as error:
        # Nobody knows which of the two sizes is the one that the encodings were made for. With an endless size they
        # always fit, so the wrong name is the only problem that is reported.
        return slice_file._replace(height=ENDLESS, width=ENDLESS), error.problems
    except KaggleDataError as error:
        return slice_file, error.problems
    return slice_file, []


def inspect_scan(scan: Scan, csv_path: Path) -> Inspection:
    """Read every slice of a scan, and check its image and its annotation."""
    found = Inspection(counts=Counter(scans=1, slices=len(scan.slices)))
    for slice_file in scan.slices:
        organs = scan.annotations[slice_file.id] if scan.annotations else {}
        slice_file, problems = inspect_slice(slice_file)
        # The test split has no annotations. If a training slice has no rows, that is reported with the problems of the
        # CSV, so there is nothing to add here.
        if organs:
            problems += check_segmentation(organs, slice_file, csv_path)
        found.problems += problems
        if not organs:
            continue
        shown = [organ for organ in ORGANS if organ in organs and organs[organ].rle.strip()]
        found.counts.update(shown or ["empty"])
        # Only valid encodings can be decoded, and a mask of endless size would not fit into memory. Only a slice with
        # several organs can have overlaps.
        if len(shown) > 1 and not problems:
            masks = [decode(organs[organ].rle, slice_file.height, slice_file.width) for organ in shown]
            overlap = int(np.count_nonzero(np.sum(masks, axis=0) > 1))
            found.counts.update(overlap_pixels=overlap, overlapping=int(overlap > 0))
    return found


def inspect_scans(scans: list[Scan], csv_path: Path, num_proc: int | None, description: str) -> Inspection:
    """Inspect scans in several processes, with a progress bar.

    Args:
        scans: The scans to read.
        csv_path: The file of their annotations, which the messages name.
        num_proc: Number of processes; None takes one per core.
        description: Text of the progress bar.

    Returns:
        The problems in the order of the scans, and the sum of all counts.
    """
    total = Inspection()
    workers = min(num_proc or os.cpu_count() or 1, len(scans))
    slices = sum(len(scan.slices) for scan in scans)
    # A process gets whole scans and sends back short texts and counts. It never sends images.
    inspect = partial(inspect_scan, csv_path=csv_path)
    with tqdm(total=slices, desc=description, unit="slice") as bar, ProcessPoolExecutor(max(workers, 1)) as pool:
        # `map` gives the results in the order of the scans, so the list of problems is the same for any `num_proc`.
        for scan, found in zip(scans, pool.map(inspect, scans), strict=True):
            total.add(found)
            bar.update(len(scan.slices))
    return total


def verify(kaggle_dir: Path, num_proc: int | None = None) -> Inspection:
    """Find every problem of a Kaggle folder.

    Args:
        kaggle_dir: Folder with `train.csv`, `train/` and perhaps `test/`.
        num_proc: Number of processes; None takes one per core.

    Returns:
        All problems, and the counts of the annotated scans. The slices of the test split are in `test_slices`.
    """
    total = Inspection()
    for split in split_names(kaggle_dir):
        try:
            scans, problems = read_scans(kaggle_dir, split)
        except KaggleDataError as error:
            # Without the folder there is nothing to inspect.
            total.problems += error.problems
            continue
        found = inspect_scans(scans, kaggle_dir / "train.csv", num_proc, description=f"Checking {split}")
        # Problems of the CSV come before those of single slices.
        found.problems[:0] = problems
        if split == "test":
            found.counts = Counter(test_slices=found.counts["slices"])
        total.add(found)
    return total
