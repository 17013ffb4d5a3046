"""Score the scans of a split while their slices are predicted.

The common way keeps all predictions and scores them at the end. For the competition's 38,496 slices, the masks of its
three organs alone would take 8 GB, with one byte per pixel. Here a scan is scored when its last slice comes, and its
masks are dropped. Only a few numbers of each scan remain.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from datasets import Dataset

from gi_segmentation.data.dataset_scans import list_dataset_scans
from gi_segmentation.labels import find_labels
from gi_segmentation.memory import release_memory
from gi_segmentation.rle import find_unknown, organ_masks
from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.schema import scan_name
from gi_segmentation.scoring.clinical import compare_organs
from gi_segmentation.scoring.scans import ScanScore, compare_masks

# At most this many complete scans wait to be measured. So memory stays bounded if the model is faster than the scores.
MAX_WAITING = 2


class StreamingScorer:
    """Takes predicted slices one by one, and measures each scan when its last slice comes.

    Slices may come in any order. Masks of scans that are not complete are kept with eight pixels per byte. Scans are
    measured in a thread, while the model predicts the next ones.

    Args:
        dataset: The split. Its column `segmentation` is the truth, and names the organs.
        rules: How to measure the competition's distance.
        share: Index of this process and number of processes. Each process measures its own part of the scans.

    Raises:
        InputError: As `list_dataset_scans` and `find_labels`.
    """

    def __init__(
        self, dataset: Dataset, rules: CompetitionRules = DEFAULT_RULES, share: tuple[int, int] = (0, 1)
    ) -> None:
        # The truth of a scan is decoded when the scan is measured, and not before. Images are never read.
        self.annotations = dataset.with_format(None).select_columns(["segmentation"])
        self.organs = find_labels(dataset.features).names
        self.plans = list_dataset_scans(dataset)
        # Every process gets all slices of all processes, and ignores those of scans that are not its own. So each scan
        # is measured once, and the work is spread evenly.
        index, number = share
        self.own = set(list(self.plans)[index::number])
        self.rules = rules
        self.scans: dict[str, Future[ScanScore]] = {}
        # NumPy and SciPy let other threads run while they compute.
        self.thread = ThreadPoolExecutor(1)
        self.restart()

    def restart(self, clinical: bool = False, presets: bool = False) -> None:
        """Discard all slices that were added so far, and get ready for a new evaluation.

        Args:
            clinical: Whether to add the scores in millimetres. A scan with a gap between its slices gets none.
            presets: Whether to measure the distances of all presets. It takes three times as long.
        """
        # An evaluation that was interrupted may have left scans behind.
        for waiting in self.scans.values():
            waiting.cancel()
        self.clinical, self.presets = clinical, presets
        self.scans = {}
        self.preds: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        self.label_counts: dict[str, np.ndarray] = {}

    def add(self, slice_id: Sequence[int], packed: np.ndarray, label_counts: np.ndarray) -> None:
        """Add a predicted slice.

        Args:
            slice_id: Case, day and number of the slice.
            packed: Its predicted masks, from `pack_masks`: uint8, shape `(bytes,)`.
            label_counts: Counts of its labels, from `count_labels`: shape `(labels, 3)`.

        Raises:
            ValueError: If the split does not have the slice, or if it was added before.
            Exception: The error of an earlier scan whose scores failed.
        """
        case, day, number = (int(part) for part in slice_id)
        scan = scan_name(case, day)
        if scan not in self.plans or number not in self.plans[scan].rows:
            raise ValueError(f"expected slices of the split, but got {scan} slice {number}, which it does not have")
        if scan not in self.own:
            return
        # A split rarely divides evenly among processes, and some samplers repeat slices to fill the last batch. Such a
        # slice must not count twice.
        if scan in self.scans or number in self.preds[scan]:
            raise ValueError(f"expected each slice once, but {scan} slice {number} was added twice")
        self.preds[scan][number] = packed
        self.label_counts[scan] = self.label_counts.get(scan, 0) + label_counts
        if len(self.preds[scan]) == len(self.plans[scan].rows):
            slices = self.preds.pop(scan)
            self.scans[scan] = self.thread.submit(self.measure, scan, slices, self.label_counts.pop(scan))
            # The callback runs when the volumes of the scan are gone.
            self.scans[scan].add_done_callback(lambda _: release_memory())
            waiting = [measured for measured in self.scans.values() if not measured.done()]
            if len(waiting) > MAX_WAITING:
                waiting[0].result()

    def measure(self, scan: str, slices: dict[int, np.ndarray], label_counts: np.ndarray) -> ScanScore:
        """Measure a scan.

        Args:
            scan: Its name.
            slices: The packed masks of all its slices, by number.
            label_counts: The sum of the counts of its slices.
        """
        case, rows, (height, width), spacing_mm = self.plans[scan]
        numbers, shape = sorted(rows), (len(self.organs), height, width)
        encodings = self.annotations[[rows[number] for number in numbers]]["segmentation"]
        preds, target = np.empty((2, len(self.organs), len(rows), height, width), dtype=bool)
        for place, number in enumerate(numbers):
            # All slices of a batch have the bytes of the largest one. `count` leaves the padding out.
            preds[:, place] = np.unpackbits(slices[number], count=math.prod(shape)).view(bool).reshape(shape)
            target[:, place] = organ_masks(encodings[place], height, width)
        # Millimetres need the true distance between slices. A scan with a gap has no voxel size, see `DatasetScan`.
        clinical = compare_organs(preds, target, spacing_mm if self.clinical else None)
        unknown = find_unknown(encodings)
        return compare_masks(
            case, scan, self.organs, preds, target, self.rules, label_counts, clinical, unknown, self.presets
        )

    def take(self) -> list[ScanScore]:
        """Return the scores of this process's scans, and get ready for a new evaluation.

        Raises:
            ValueError: If slices are missing.
        """
        scans, missing = [measured.result() for measured in self.scans.values()], self.own - self.scans.keys()
        self.restart()
        if missing:
            first = next(scan for scan in self.plans if scan in missing)
            raise ValueError(
                f"expected all slices of the split, but {len(missing)} scans are incomplete, the first {first}"
            )
        return scans
