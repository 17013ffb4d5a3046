"""Scans that a fold of a cross-validation held back, as the search for limits of post-processing needs them.

A scan keeps compressed arrays only. They are unpacked while its masks are scored for some limits. What decides which
slices and components stay are a few numbers for each slice and component, and different limits often keep the same.
So masks are made, and distances are measured, once for each difference.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
from datasets import Dataset

from gi_segmentation.data.dataset_scans import list_dataset_scans, list_slice_spacings
from gi_segmentation.inference.batches import PredictionSettings, compute_logits, predict_slices
from gi_segmentation.inference.members import Member
from gi_segmentation.inference.splits import read_split
from gi_segmentation.labels import LabelMode, find_labels
from gi_segmentation.memory import release_memory
from gi_segmentation.postprocessing.components import find_components, keep_components, select_components
from gi_segmentation.postprocessing.gate import find_slice_confidences, keep_slices, lower_thresholds
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing
from gi_segmentation.rle import find_unknown, organ_masks
from gi_segmentation.rules import CompetitionRules
from gi_segmentation.scoring.scans import ScanScore, compare_masks

# The thresholds that can be tried. The first one leaves the model's masks as they are.
THRESHOLDS = (1.0, 0.4, 0.3, 0.2, 0.1)


class KeptParts(NamedTuple):
    """What stays of an organ: the place of its threshold, and which slices and components, as bytes."""

    threshold: int
    slices: bytes
    components: bytes


Kept: TypeAlias = tuple[KeptParts, ...]


class PackedArray:
    """An array in compressed form. Labels and masks of a scan are mostly zeros and shrink to a few per cent.

    Args:
        array: The array to keep.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.dtype, self.shape = array.dtype, array.shape
        # Level 1 is the fastest. Higher levels hardly save more on long runs of equal values.
        self.data = zlib.compress(np.ascontiguousarray(array).data, level=1)

    def unpack(self) -> np.ndarray:
        """Return the array, read-only."""
        return np.frombuffer(zlib.decompress(self.data), dtype=self.dtype).reshape(self.shape)


class HeldBackOrgan:
    """The prediction of one organ in one scan.

    Args:
        levels: For how many of `THRESHOLDS` a pixel belongs to the organ, uint8, shape `(D, H, W)`. A pixel that
            belongs to it for one of them does so for all after it.
        probability: Probability of the organ, float16, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`.
    """

    def __init__(
        self, levels: np.ndarray, probability: np.ndarray, spacing_mm: tuple[float, ...], numbers: list[int]
    ) -> None:
        self.levels, self.probabilities = PackedArray(levels), PackedArray(probability[levels > 0])
        self.spacing_mm, self.numbers = spacing_mm, numbers
        self.confidences = find_slice_confidences(probability)
        sizes = [np.count_nonzero(levels >= len(THRESHOLDS) - place, axis=(1, 2)) for place in range(len(THRESHOLDS))]
        self.areas_mm2 = np.stack(sizes) * np.prod(spacing_mm[1:])
        # Volumes and confidences of the components for a threshold and slices that stay.
        self.sizes: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        self.kept: dict[OrganLimits, KeptParts] = {}

    def keep(self, limits: OrganLimits) -> KeptParts:
        """Return what stays with these limits."""
        if limits not in self.kept:
            self.kept[limits] = self.find_kept(limits)
        return self.kept[limits]

    def find_kept(self, limits: OrganLimits) -> KeptParts:
        """Find what stays with these limits."""
        areas_mm2 = self.areas_mm2[THRESHOLDS.index(limits.threshold)]
        # A mask grows with each threshold, so masks of equal areas are equal, and the first of them stands for all.
        place = int((self.areas_mm2 == areas_mm2).all(axis=1).argmax())
        # A slice without the organ makes no difference.
        slices = (keep_slices(self.confidences, areas_mm2, self.numbers, limits) & (areas_mm2 > 0)).tobytes()
        if not limits.min_volume_ml and not limits.min_confidence:
            return KeptParts(place, slices, b"")
        if (place, slices) not in self.sizes:
            self.label(place, slices)
        kept = keep_components(*self.sizes[place, slices], limits)
        if not kept.any():
            return KeptParts(place, bytes(len(slices)), b"")
        # As long as all stay, the components need not be known.
        return KeptParts(place, slices, b"" if kept.all() else kept.tobytes())

    def label(self, place: int, slices: bytes) -> np.ndarray:
        """Return the numbers of the components for a threshold and slices that stay, and note their sizes."""
        levels = self.levels.unpack()
        probability = np.zeros(levels.shape, dtype=self.probabilities.dtype)
        probability[levels > 0] = self.probabilities.unpack()
        found = find_components(self.select(levels, place, slices), probability, self.spacing_mm, self.numbers)
        self.sizes[place, slices] = found.volumes_ml, found.confidences
        return found.labels

    def select(self, levels: np.ndarray, place: int, slices: bytes) -> np.ndarray:
        """Return the mask for a threshold and slices that stay, bool, shape `(D, H, W)`."""
        return (levels >= len(THRESHOLDS) - place) & np.frombuffer(slices, bool)[:, None, None]

    def make_mask(self, kept: KeptParts) -> np.ndarray:
        """Return the mask of what stays, bool, shape `(D, H, W)`."""
        if not kept.components:
            return self.select(self.levels.unpack(), kept.threshold, kept.slices)
        # The bytes are those of a bool array, so they become one again.
        return select_components(self.label(kept.threshold, kept.slices), np.frombuffer(kept.components, bool))


class HeldBackScan:
    """A scan with its prediction, and the scores for all limits that were tried so far.

    Args:
        fold: Index of the fold that held the patient back.
        patient: Number of the patient.
        name: Name of the scan.
        masks: Predicted masks by the name of the organ, bool, shape `(D, H, W)`.
        probabilities: Probabilities of the organs, float16, shape `(organs, D, H, W)`.
        target: True masks, bool, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`.
        label_mode: What the channels of the model mean.
        unknown: Organs that are not known in this scan.
    """

    def __init__(
        self,
        fold: int,
        patient: int,
        name: str,
        masks: Mapping[str, np.ndarray],
        probabilities: np.ndarray,
        target: np.ndarray,
        spacing_mm: tuple[float, ...],
        numbers: list[int],
        label_mode: LabelMode,
        unknown: Collection[str] = (),
    ) -> None:
        self.fold, self.patient, self.name, self.unknown = fold, patient, name, unknown
        predicted, levels = np.stack(list(masks.values())), np.zeros(target.shape, dtype=np.uint8)
        for threshold in THRESHOLDS:
            settings = Postprocessing({organ: OrganLimits(threshold=threshold) for organ in masks})
            levels += lower_thresholds(predicted, probabilities, settings, label_mode)
        self.organs = {
            organ: HeldBackOrgan(*arrays, spacing_mm, numbers)
            for organ, arrays in zip(masks, zip(levels, probabilities, strict=True), strict=True)
        }
        self.target = PackedArray(target)
        self.scores: dict[Kept, ScanScore] = {}

    def keep(self, settings: Postprocessing) -> Kept:
        """Return what stays with these limits."""
        return tuple(one.keep(settings.organs[organ]) for organ, one in self.organs.items())

    def measure(self, tried: Iterable[Postprocessing], rules: CompetitionRules) -> None:
        """Measure the scan for these limits, as far as this was not done yet."""
        # Hausdorff distances take most of the time of the search. Limits that keep the same parts share a score.
        new = {self.keep(settings) for settings in tried} - self.scores.keys()
        if not new:
            return
        target, names = self.target.unpack(), tuple(self.organs)
        # Limits of one organ are tried while those of the others stay. Sorted, most limits differ from the ones before
        # them in one organ, and only its mask is made anew.
        last: dict[str, tuple[KeptParts, np.ndarray]] = {}
        for kept in sorted(new):
            for organ, parts in zip(names, kept, strict=True):
                if organ not in last or last[organ][0] != parts:
                    last[organ] = parts, self.organs[organ].make_mask(parts)
            preds = np.stack([last[organ][1] for organ in names])
            self.scores[kept] = compare_masks(
                self.patient, self.name, names, preds, target, rules, unknown=self.unknown
            )
        # Otherwise the process would grow, because scans have volumes of many sizes.
        release_memory()

    def score(self, settings: Postprocessing) -> ScanScore:
        """Return the score for limits that `measure` has measured."""
        return self.scores[self.keep(settings)]


def predict_held_back_scans(
    member: Member, dataset: Dataset, fold: int, batch_size: int, num_workers: int
) -> Iterator[HeldBackScan]:
    """Predict the scans of a fold at native resolution.

    Args:
        member: The checkpoint of the fold, on its device.
        dataset: The slices of the patients that the fold held back, without a transform.
        fold: Index of the fold.
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read slices.

    Yields:
        The scans, sorted by case and day.

    Raises:
        InputError: As `list_dataset_scans` and `find_labels`.
    """
    organs = find_labels(dataset.features).names
    plans = list_dataset_scans(dataset)
    # The slices of each scan in the order of their numbers, so that those of a scan come one after the other.
    ordered = dataset.select([plan.rows[number] for plan in plans.values() for number in sorted(plan.rows)])
    batches = compute_logits([member], read_split([member], ordered), PredictionSettings(batch_size, num_workers))
    slices = (
        one
        for batch, (logits,) in batches
        for one in predict_slices(batch, [logits[0]], member.label_mode, probabilities=True)
    )
    rows = dataset.with_format(None).select_columns(["segmentation", "pixel_spacing"])
    slice_spacings = list_slice_spacings(dataset)
    for name, plan in plans.items():
        numbers = sorted(plan.rows)
        predicted = list(islice(slices, len(numbers)))
        # Shapes: a slice is (organs, H, W), and a scan (organs, D, H, W).
        masks = np.stack([one.masks for one in predicted], axis=1)
        probabilities = np.stack([one.probabilities for one in predicted if one.probabilities is not None], axis=1)
        truth = rows[[plan.rows[number] for number in numbers]]
        target = np.stack([organ_masks(encodings, *plan.size) for encodings in truth["segmentation"]], axis=1)
        # `plan.spacing_mm` is None for a scan with a gap. But a single voxel has its size in such a scan too.
        spacing_mm = (slice_spacings[plan.rows[numbers[0]]], *truth["pixel_spacing"][0])
        yield HeldBackScan(
            fold,
            plan.case,
            name,
            dict(zip(organs, masks, strict=True)),
            probabilities,
            target,
            spacing_mm,
            numbers,
            member.label_mode,
            find_unknown(truth["segmentation"]),
        )
