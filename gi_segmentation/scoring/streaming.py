"""Scores of a split's scans while their slices are predicted; neither logits nor masks pile up."""

import ctypes
import math
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from gi_segmentation.data.slices import plan_scans
from gi_segmentation.rle import organ_masks
from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.schema import ORGANS, scan_name
from gi_segmentation.scoring.clinical import measure_organs
from gi_segmentation.scoring.scans import ScanScore, measure_scan


def release_memory() -> None:
    """Give free memory back to the system; on Linux with glibc only.

    glibc keeps freed memory in pieces for later use. Volumes of many sizes break it into more and more pieces, and the
    process grows with every scan.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class StreamingScorer:
    """Scores the scans of a split while their slices are predicted, each as soon as it is whole.

    Slices may come in any order. The masks of a scan are kept until its last slice comes, eight pixels a byte. Then
    the scan is scored and its masks are dropped, so memory does not grow with the number of scans.

    Args:
        dataset: The split; its `segmentation` is the truth.
        rules: Of the competition's distance.
        share: Which process this is, and of how many: each scores scans of its own.

    Raises:
        InputError: As `plan_scans`.
    """

    def __init__(
        self, dataset: Dataset, rules: CompetitionRules = DEFAULT_RULES, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.outlines = dataset.with_format(None).select_columns(["segmentation"])
        self.plans = plan_scans(dataset)
        index, number = share
        self.own = set(list(self.plans)[index::number])
        self.rules = rules
        self.restart()

    def restart(self, clinical: bool = False) -> None:
        """Discard all slices that were added so far, and get ready for a new evaluation.

        Args:
            clinical: Whether to add the scores in millimetres. A scan with a gap between its slices gets none.
        """
        self.clinical = clinical
        self.scans: dict[str, ScanScore] = {}
        self.preds: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        self.label_counts: dict[str, np.ndarray] = {}

    def add(self, slice_id: Sequence[int], packed: np.ndarray, label_counts: np.ndarray) -> None:
        """Add a slice.

        Args:
            slice_id: Case, day and number.
            packed: Its predicted masks, from `pack_masks`.
            label_counts: From `count_labels`, shape `(labels, 3)`.

        Raises:
            ValueError: If the split has no such slice, or it came before.
        """
        case, day, number = (int(part) for part in slice_id)
        scan = scan_name(case, day)
        if scan not in self.plans or number not in self.plans[scan].rows:
            raise ValueError(f"expected slices of the split, but got {scan} slice {number}")
        if scan not in self.own:
            return
        if scan in self.scans or number in self.preds[scan]:
            raise ValueError(f"expected each slice once, but {scan} slice {number} came again")
        self.preds[scan][number] = packed
        self.label_counts[scan] = self.label_counts.get(scan, 0) + label_counts
        if len(self.preds[scan]) == len(self.plans[scan].rows):
            self.scans[scan] = self.measure(scan)
            del self.preds[scan]
            release_memory()

    def measure(self, scan: str) -> ScanScore:
        """Score a scan whose slices are all there."""
        case, rows, (height, width), spacing_mm = self.plans[scan]
        numbers, shape = sorted(rows), (len(ORGANS), height, width)
        outlines = self.outlines[[rows[number] for number in numbers]]["segmentation"]
        preds, target = np.empty((2, len(ORGANS), len(rows), height, width), dtype=bool)
        for place, number in enumerate(numbers):
            preds[:, place] = np.unpackbits(self.preds[scan][number], count=math.prod(shape)).reshape(shape)
            target[:, place] = organ_masks(outlines[place], height, width)
        clinical = measure_organs(preds, target, spacing_mm if self.clinical else None)
        return measure_scan(case, scan, preds, target, self.rules, self.label_counts[scan], clinical)

    def take(self) -> list[ScanScore]:
        """This process's scans; then start anew.

        Raises:
            ValueError: If slices are missing.
        """
        scans, missing = list(self.scans.values()), self.own - self.scans.keys()
        self.restart()
        if missing:
            first = next(scan for scan in self.plans if scan in missing)
            raise ValueError(f"slices of {len(missing)} scans have not come, the first {first}")
        return scans
