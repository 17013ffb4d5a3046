"""From logits to scores on the slices' native grid while the Trainer evaluates; neither logits nor masks pile up."""

import ctypes
import math
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel

from gi_segmentation.clinical import score_organs
from gi_segmentation.competition import PRESETS, CompetitionRules
from gi_segmentation.data import collate, organ_masks, plan_scans
from gi_segmentation.dice import count_pixels
from gi_segmentation.scans import ScanScore, score_scan, score_scans
from gi_segmentation.schema import LABELS, ORGANS

# Axes to turn around for a test-time flip: none, left-right, up-down, both.
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def flip_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of the slices as they are and flipped, each turned back; their mean is the answer with test-time flips.

    Args:
        model: A semantic segmentation model.
        pixel_values: Model input, float, shape `(B, 3, S, S)`.

    Returns:
        float32, shape `(flips, B, channels, h, w)`, unflipped first.
    """
    return torch.stack([model(pixel_values=pixel_values.flip(axes)).logits.float().flip(axes) for axes in FLIPS])


def predict_masks(logits: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Organ masks on a grid of any size, from one model or from several.

    A single model's masks are those of the image processor's `post_process_semantic_segmentation`, or, where it gives
    each organ a channel of its own, the pixels with a probability above one half. Of several models, probabilities
    are averaged on that grid.

    Args:
        logits: Per model float, shape `(B, channels, h, w)`; 4 channels with the background first, or an organ each.
        height: Height of the grid in pixels.
        width: Width of the grid in pixels.

    Returns:
        bool, shape `(B, organs, height, width)`.

    Example:
        >>> logits = torch.tensor([0.0, 2.0, 1.0, -1.0]).reshape(1, 4, 1, 1)
        >>> predict_masks([logits], 1, 1).flatten().tolist()
        [True, False, False]
        >>> predict_masks([logits[:, 1:]], 1, 1).flatten().tolist()
        [True, True, False]
    """
    resized = [
        F.interpolate(one.float(), size=(height, width), mode="bilinear", align_corners=False) for one in logits
    ]
    if resized[0].shape[1] == len(ORGANS):
        return torch.stack([one.sigmoid() for one in resized]).mean(dim=0) > 0.5
    scores = torch.stack([one.softmax(dim=1) for one in resized]).mean(dim=0) if len(resized) > 1 else resized[0]
    return scores.argmax(dim=1, keepdim=True) == torch.arange(1, len(LABELS), device=scores.device)[:, None, None]


def label_masks(organ_masks: torch.Tensor) -> torch.Tensor:
    """One mask per label, background first; where organs overlap the highest label wins, as in `annotation`.

    Args:
        organ_masks: bool, shape `(B, organs, H, W)`.

    Returns:
        bool, shape `(B, labels, H, W)`.
    """
    labels = (organ_masks * torch.arange(1, len(LABELS), device=organ_masks.device)[:, None, None]).amax(dim=1)
    return labels[:, None] == torch.arange(len(LABELS), device=labels.device)[:, None, None]


def predict_batch(logits: Sequence[torch.Tensor], native_sizes: torch.Tensor) -> list[torch.Tensor]:
    """Organ masks of the slices of a batch, each on its own grid.

    Args:
        logits: As in `predict_masks`.
        native_sizes: Height and width of each slice, shape `(B, 2)`.

    Returns:
        Per slice bool, shape `(organs, height, width)`.
    """
    return [
        predict_masks([one[index : index + 1] for one in logits], height, width)[0]
        for index, (height, width) in enumerate(native_sizes.tolist())
    ]


def pack_masks(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Masks as bits, eight pixels a byte, so that many can be kept and sent to other processes.

    Args:
        masks: bool, of any shapes.

    Returns:
        uint8, shape `(masks, bytes of the largest)`, for `numpy.unpackbits`.

    Example:
        >>> pack_masks([torch.tensor([[True, False, False], [False, True, True]])]).tolist()
        [[140]]
    """
    num_bytes = max(-(-mask.numel() // 8) for mask in masks)
    bits = torch.stack([F.pad(mask.flatten().to(torch.uint8), (0, 8 * num_bytes - mask.numel())) for mask in masks])
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(len(masks), num_bytes, 8) * places).sum(dim=-1, dtype=torch.uint8)


def count_labels(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Count the pixels of every label, background first, at the resolution of the model's input.

    Args:
        logits: As in `predict_masks`.
        labels: Label ids `(B, S, S)`, or masks `(B, organs, S, S)`.

    Returns:
        int64, shape `(B, labels, 3)`.
    """
    preds = label_masks(predict_masks(logits, *labels.shape[-2:]))
    ids = torch.arange(1, len(LABELS), device=labels.device)[:, None, None]
    organs = labels.bool() if labels.ndim == 4 else labels[:, None] == ids
    return torch.stack(count_pixels(preds, label_masks(organs)), dim=-1)


def score_slices(model: PreTrainedModel, dataset: Dataset, batch_size: int = 16) -> np.ndarray:
    """Count the pixels of every slice of a split, with a progress bar; for a look at single slices.

    Args:
        model: Predicts.
        dataset: A split whose `SliceTransform` is scoring.
        batch_size: Slices a forward pass.

    Returns:
        Pixels in both, predicted and true, on the native grid: int64, shape `(slices, organs, 3)`.
    """
    counts = []
    outlines = iter(dataset.with_format(None)["segmentation"])
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collate), desc="Scoring", unit="batch"):
        with torch.no_grad():
            logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        for preds in predict_batch([logits], batch["native_size"]):
            target = organ_masks(next(outlines), *preds.shape[1:])
            counts.append(np.stack(count_pixels(preds.cpu().numpy(), target), axis=-1))
    return np.stack(counts)


def release_memory() -> None:
    """Give free memory back to the system, of which glibc would keep ever more in pieces; elsewhere nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class ScanScorer:
    """Scores the scans of a split while their slices are predicted, each as soon as it is whole.

    Slices may come in any order. Of the scans that are not yet whole the masks are kept, eight pixels a byte.

    Args:
        dataset: The split; its `segmentation` is the truth.
        rules: Of the competition's distance.
        share: Which process this is, and of how many: each scores scans of its own.

    Attributes:
        clinical: Whether to add the scores in millimetres. A scan with a gap between its slices gets none.

    Raises:
        InputError: As `plan_scans`.
    """

    def __init__(
        self, dataset: Dataset, rules: CompetitionRules = PRESETS["mle_bench"], share: tuple[int, int] = (0, 1)
    ) -> None:
        self.outlines = dataset.with_format(None).select_columns(["segmentation"])
        self.plans = plan_scans(dataset)
        index, number = share
        self.own = set(list(self.plans)[index::number])
        self.rules = rules
        self.clinical = False
        self.restart()

    def restart(self) -> None:
        """Forget what came."""
        self.scored: dict[tuple[int, int], ScanScore] = {}
        self.preds: dict[tuple[int, int], dict[int, np.ndarray]] = defaultdict(dict)
        self.label_counts: dict[tuple[int, int], np.ndarray] = {}

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
        scan = case, day
        if scan not in self.plans or number not in self.plans[scan].rows:
            raise ValueError(f"expected slices of the split, but got case{case}_day{day} slice {number}")
        if scan not in self.own:
            return
        if scan in self.scored or number in self.preds[scan]:
            raise ValueError(f"expected each slice once, but case{case}_day{day} slice {number} came again")
        self.preds[scan][number] = packed
        self.label_counts[scan] = self.label_counts.get(scan, 0) + label_counts
        if len(self.preds[scan]) == len(self.plans[scan].rows):
            self.scored[scan] = self.score(scan)
            del self.preds[scan]
            release_memory()

    def score(self, scan: tuple[int, int]) -> ScanScore:
        """Score a scan whose slices are all there."""
        rows, (height, width), spacing_mm = self.plans[scan]
        numbers, shape = sorted(rows), (len(ORGANS), height, width)
        outlines = self.outlines[[rows[number] for number in numbers]]["segmentation"]
        preds, target = np.empty((2, len(ORGANS), len(rows), height, width), dtype=bool)
        for place, number in enumerate(numbers):
            preds[:, place] = np.unpackbits(self.preds[scan][number], count=math.prod(shape)).reshape(shape)
            target[:, place] = organ_masks(outlines[place], height, width)
        clinical = score_organs(preds, target, spacing_mm if self.clinical else None)
        case, day = scan
        return score_scan(case, f"case{case}_day{day}", preds, target, self.rules, self.label_counts[scan], clinical)

    def take(self) -> list[ScanScore]:
        """This process's scans; then start anew.

        Raises:
            ValueError: If slices are missing.
        """
        scored, missing = list(self.scored.values()), self.own - self.scored.keys()
        self.restart()
        if missing:
            case, day = min(missing)
            raise ValueError(f"slices of {len(missing)} scans have not come, the first case{case}_day{day}")
        return scored


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

    def __init__(self, dataset: Dataset, preset: str = "mle_bench", share: tuple[int, int] = (0, 1)) -> None:
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
