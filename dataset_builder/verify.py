"""Read every file of a Kaggle folder once, collect all problems, and count scans, slices and organs."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from gi_segmentation.formats.kaggle.annotations import read_segmentation
from gi_segmentation.formats.kaggle.folder import KaggleScan, list_splits, read_kaggle_scans
from gi_segmentation.formats.kaggle.images import read_slice
from gi_segmentation.formats.kaggle.names import KaggleDataError, SliceFile
from gi_segmentation.processes import count_cores, process_pool
from gi_segmentation.rle import Runs, count_overlap


@dataclass
class Inspection:
    """The problems and counts of a scan or of a whole folder.

    Attributes:
        problems: One line for each problem.
        counts: `scans`, `slices`, `empty` (slices without any organ), `overlapping` (slices where organs overlap),
            `overlap_pixels` (pixels in more than one organ).
        shown: For each organ, the number of slices that show it.
    """

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Inspection") -> None:
        """Add the problems and counts of another inspection."""
        self.problems += other.problems
        self.counts += other.counts
        self.shown += other.shown


class CheckedSlice(NamedTuple):
    """What was read of a slice.

    Attributes:
        file: The slice.
        image: The bytes of its PNG; empty if the image has a problem.
        runs: The runs of each organ with a valid encoding; empty in the test split, and if the image has a problem.
    """

    file: SliceFile
    image: bytes
    runs: dict[str, Runs]


def check_slice(scan: KaggleScan, slice_file: SliceFile) -> tuple[CheckedSlice, list[str]]:
    """Read the image and the encodings of a slice.

    Args:
        scan: Its scan.
        slice_file: The slice.

    Returns:
        The slice, and its problems. The encodings of an image with a problem are not checked.
    """
    try:
        image = read_slice(slice_file)
    except KaggleDataError as error:
        # The encodings fit an image of one size, which is unknown while image and name disagree.
        return CheckedSlice(slice_file, b"", {}), error.problems
    # The test split has no annotations. If a training slice has no rows, that is reported with the problems of the
    # CSV, so there is nothing to add here.
    organs = scan.annotations[slice_file.id] if scan.annotations else {}
    runs, problems = read_segmentation(organs, slice_file, scan.csv_path, scan.drawn) if organs else ({}, [])
    return CheckedSlice(slice_file, image, runs), problems


def inspect_slices(scan: KaggleScan, slices: list[SliceFile]) -> tuple[Inspection, list[CheckedSlice]]:
    """Read slices of a scan, and check their images and annotations.

    Args:
        scan: The scan.
        slices: Some of its slices.

    Returns:
        Problems and counts of the slices, and what was read of them.
    """
    found = Inspection(counts=Counter(slices=len(slices)))
    read = []
    for slice_file in slices:
        organs = scan.annotations[slice_file.id] if scan.annotations else {}
        checked, problems = check_slice(scan, slice_file)
        read.append(checked)
        found.problems += problems
        if not organs:
            continue
        shown = [organ for organ in scan.drawn if organ in organs and organs[organ].rle.strip()]
        found.shown.update(shown)
        found.counts.update(empty=int(not shown))
        # Only a slice with several organs can have overlaps.
        if len(shown) > 1 and not problems:
            overlap = count_overlap([checked.runs[organ] for organ in shown])
            found.counts.update(overlap_pixels=overlap, overlapping=int(overlap > 0))
    return found, read


def inspect_scan(scan: KaggleScan) -> Inspection:
    """Inspect a scan, and keep only its problems and counts: a process sends them back, and never images."""
    found, _ = inspect_slices(scan, scan.slices)
    found.counts.update(scans=1)
    return found


def inspect_scans(scans: list[KaggleScan], num_proc: int | None, description: str) -> Inspection:
    """Inspect scans in several processes, with a progress bar.

    Args:
        scans: The scans to read.
        num_proc: Number of processes; None takes one per core.
        description: Text of the progress bar.

    Returns:
        The problems in the order of the scans, and the sum of all counts.
    """
    total = Inspection()
    workers = min(num_proc or count_cores(), len(scans))
    slices = sum(len(scan.slices) for scan in scans)
    with tqdm(total=slices, desc=description, unit="slice") as bar, process_pool(max(workers, 1)) as pool:
        # `map` gives the results in the order of the scans, so the list of problems is the same for any `num_proc`.
        for scan, found in zip(scans, pool.map(inspect_scan, scans), strict=True):
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
    for split in list_splits(kaggle_dir):
        try:
            scans, problems = read_kaggle_scans(kaggle_dir, split)
        except KaggleDataError as error:
            # Without the folder there is nothing to inspect.
            # A fault of `labels.json` is found with each split.
            total.problems += [problem for problem in error.problems if problem not in total.problems]
            continue
        found = inspect_scans(scans, num_proc, description=f"Checking {split}")
        # Problems of the CSV come before those of single slices.
        found.problems[:0] = problems
        if split == "test":
            found.counts = Counter(test_slices=found.counts["slices"])
        total.add(found)
    return total
