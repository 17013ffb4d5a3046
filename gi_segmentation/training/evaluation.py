"""The Trainer's `compute_metrics`: scans are scored as their last slice is predicted."""

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EvalPrediction

from gi_segmentation.rules import DEFAULT_PRESET, PRESETS, Preset
from gi_segmentation.scoring.scans import ScanScore, score_scans
from gi_segmentation.scoring.streaming import ScanScorer


class ComputeMetrics:
    """The Trainer's `compute_metrics` with `batch_eval_metrics`: adds slices batch by batch, scores at the last.

    Args:
        dataset: The validation split.
        preset: How to read the competition's metric.
        share: As in `ScanScorer`.

    Attributes:
        scorer: Takes the slices in.
        scans: Of all processes, after the last batch.
    """

    def __init__(self, dataset: Dataset, preset: Preset = DEFAULT_PRESET, share: tuple[int, int] = (0, 1)) -> None:
        self.scorer = ScanScorer(dataset, PRESETS[preset], share)
        self.scans: list[ScanScore] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch: of `label_ids` the slices, of `predictions` their packed masks and counts of labels."""
        columns = [np.asarray(column) for column in (prediction.label_ids, *prediction.predictions)]
        for slice_id, packed, label_counts in zip(*columns, strict=True):
            self.scorer.add(slice_id, packed, label_counts)
        if not compute_result:
            return {}
        self.scans = gather_object(self.scorer.take())
        return score_scans(self.scans, self.scorer.rules)
