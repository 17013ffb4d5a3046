"""The `compute_metrics` of the Trainer. It scores each scan as soon as its last slice is predicted."""

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EvalPrediction

from gi_segmentation.rules import DEFAULT_PRESET, PRESETS, Preset
from gi_segmentation.scoring.scans import ScanScore, score_scans
from gi_segmentation.scoring.streaming import StreamingScorer


class ComputeMetrics:
    """The `compute_metrics` of the Trainer, for `batch_eval_metrics`.

    It is called after each batch and collects the slices. After the last batch it returns the scores.

    Args:
        dataset: The validation split.
        preset: How to read the competition's metric.
        share: As in `StreamingScorer`.

    Attributes:
        scorer: Collects the slices and scores the scans.
        scans: The scores of all scans, from all processes; empty before the first evaluation ends.
        watched: Case, day and number of slices whose masks are kept for a picture.
        watched_masks: The packed masks of these slices, from the last evaluation that has predicted them.
    """

    def __init__(self, dataset: Dataset, preset: Preset = DEFAULT_PRESET, share: tuple[int, int] = (0, 1)) -> None:
        self.scorer = StreamingScorer(dataset, PRESETS[preset], share)
        self.scans: list[ScanScore] = []
        self.watched: set[tuple[int, ...]] = set()
        self.watched_masks: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch, and return the scores if it is the last one.

        Args:
            prediction: From `SegmentationTrainer.prediction_step`. Its `label_ids` are the ids of the slices. Its
                `predictions` are their packed masks and label counts.
            compute_result: Whether this is the last batch.
        """
        # `Trainer` has collected this batch from all processes, so every process sees every slice. The scorer keeps
        # the slices of its own scans.
        columns = [np.asarray(column) for column in (prediction.label_ids, *prediction.predictions)]
        for slice_id, packed, label_counts in zip(*columns, strict=True):
            self.scorer.add(slice_id, packed, label_counts)
            if self.watched and (numbers := tuple(map(int, slice_id))) in self.watched:
                # A copy, because the row would keep the masks of its whole batch.
                self.watched_masks[numbers] = packed.copy()
        if not compute_result:
            return {}
        # Only the scores of the scans travel between the processes, not the masks. All processes then compute the same
        # means from the same list.
        self.scans = gather_object(self.scorer.take())
        return score_scans(self.scans, self.scorer.rules)
