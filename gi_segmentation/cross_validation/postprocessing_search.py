"""Learn the limits of `postprocessing` from the predictions of a cross-validation.

Each patient is predicted by the model of the fold that held this patient back. On patients of the training, a model
makes fewer mistakes, and the limits would be too low.

The search has two steps:

1. Predict every scan once, and find the components of each organ. See `predict_held_back_scans`.
2. For one organ after the other, try a grid of limits, and keep those with the highest competition score.

The score of limits on the patients from which they were chosen is too good. So the gain is cross-fitted: for the
patients of each fold, the limits are chosen on the patients of all other folds. The limits to publish are chosen on
all patients.
"""

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from gi_segmentation.data.dataset_scans import list_dataset_scans, list_slice_spacings
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings, compute_logits, predict_slices
from gi_segmentation.inference.members import Member, load_members
from gi_segmentation.inference.splits import read_split
from gi_segmentation.labels import find_labels
from gi_segmentation.memory import release_memory
from gi_segmentation.postprocessing.components import Components, find_components, keep_components, select_components
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing, no_postprocessing
from gi_segmentation.rle import find_unknown, organ_masks
from gi_segmentation.rules import CompetitionRules
from gi_segmentation.scoring.intervals import Interval, find_intervals
from gi_segmentation.scoring.scans import ScanScore, compare_masks, score_scans
from gi_segmentation.scoring.tables import format_interval

# A stomach has about 200 ml, and a voxel 0.007 ml. Equal scores take the first limits, so the lowest come first.
MIN_VOLUMES_ML = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
# A voxel of a multilabel mask has a probability above 0.5, so lower limits would remove nothing there.
MIN_CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
GRID = tuple(OrganLimits(*limits) for limits in product(MIN_VOLUMES_ML, MIN_CONFIDENCES))
SCORE = "competition_score"

# For each organ, which components stay, as bytes. Different limits often keep the same components.
Kept: TypeAlias = tuple[bytes, ...]


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


class HeldBackScan:
    """A scan with the components of its prediction, and the scores for all limits that were tried so far.

    Only compressed arrays stay in memory. While scores are measured, one scan is unpacked at a time.

    Args:
        fold: Index of the fold that held the patient back.
        patient: Number of the patient.
        name: Name of the scan.
        components: The predicted components by the name of the organ.
        target: True masks, bool, shape `(organs, D, H, W)`.
        unknown: Organs that are not known in this scan.
    """

    def __init__(
        self,
        fold: int,
        patient: int,
        name: str,
        components: Mapping[str, Components],
        target: np.ndarray,
        unknown: Collection[str] = (),
    ) -> None:
        self.fold, self.patient, self.name, self.unknown = fold, patient, name, unknown
        self.organs = tuple(components)
        self.labels = [PackedArray(one.labels) for one in components.values()]
        self.sizes = [(one.volumes_ml, one.confidences) for one in components.values()]
        self.target = PackedArray(target)
        self.scores: dict[Kept, ScanScore] = {}

    def keep(self, settings: Postprocessing) -> Kept:
        """Return which components stay with these limits."""
        return tuple(
            keep_components(*sizes, settings.organs[organ]).tobytes()
            for organ, sizes in zip(self.organs, self.sizes, strict=True)
        )

    def measure(self, tried: Iterable[Postprocessing], rules: CompetitionRules) -> None:
        """Measure the scan for these limits, as far as this was not done yet."""
        # Hausdorff distances take most of the time of the search. Limits that keep the same components share a score.
        new = {self.keep(settings) for settings in tried} - self.scores.keys()
        if not new:
            return
        labels, target = [one.unpack() for one in self.labels], self.target.unpack()
        for kept in new:
            # The bytes are those of a bool array, so they become one again.
            preds = [select_components(one, np.frombuffer(k, bool)) for one, k in zip(labels, kept, strict=True)]
            names = self.patient, self.name, self.organs
            self.scores[kept] = compare_masks(*names, np.stack(preds), target, rules, unknown=self.unknown)
        # Otherwise the process would grow, because scans have volumes of many sizes.
        release_memory()

    def score(self, settings: Postprocessing) -> ScanScore:
        """Return the score for limits that `measure` has measured."""
        return self.scores[self.keep(settings)]


@dataclass(frozen=True)
class LearntPostprocessing:
    """The limits that were chosen on all patients, and what they gain on patients that did not choose them.

    `dataclasses.asdict` gives values that JSON can hold.

    Attributes:
        settings: The limits, chosen on all patients.
        score_before: Competition score of all patients without post-processing.
        score_after: Cross-fitted competition score of all patients with post-processing.
        gain: The difference of the two.
        interval: 95 % interval of the gain over patients; None if there are fewer than two patients.
        helps: Whether the whole interval is above 0, so that the gain is more than chance.
        num_patients: Number of patients.
        settings_by_fold: For each fold, the limits that were chosen on the other folds. If they differ a lot, the
            choice depends on few patients.
    """

    settings: Postprocessing
    score_before: float
    score_after: float
    gain: float
    interval: Interval | None
    helps: bool
    num_patients: int
    settings_by_fold: tuple[Postprocessing, ...] = field(default=())

    def to_config(self) -> dict[str, dict[str, float]] | None:
        """Return the value for `model.config.postprocessing`; None if post-processing does not help."""
        return self.settings.to_config() if self.helps else None

    def describe(self) -> list[str]:
        """Return lines for the terminal."""
        gain = f"{self.gain:+.4f}{format_interval(self.interval, '+.4f')}"
        verdict = (
            "it helps, so the published configuration has it, and predict applies it"
            if self.helps
            else "the interval of the gain is not above 0, so the gain may be chance, and it stays off"
        )
        return [
            f"post-processing, learnt on the predictions of {self.num_patients} held-back patients:",
            f"  limits: {self.settings.describe()}",
            f"  competition score: {self.score_before:.4f} to {self.score_after:.4f}, cross-fitted gain {gain}",
            f"  {verdict}",
        ]


def predict_held_back_scans(
    member: Member, dataset: Dataset, fold: int, batch_size: int, num_workers: int
) -> Iterator[HeldBackScan]:
    """Predict the scans of a fold at native resolution, and find their components.

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
        components = {
            organ: find_components(mask, probability, spacing_mm, numbers)
            for organ, mask, probability in zip(organs, masks, probabilities, strict=True)
        }
        unknown = find_unknown(truth["segmentation"])
        yield HeldBackScan(fold, plan.case, name, components, target, unknown)


def score_settings(scans: Iterable[HeldBackScan], settings: Postprocessing, rules: CompetitionRules) -> float:
    """Return the competition score of measured scans; minus infinity if there is nothing to score."""
    score = score_scans((scan.score(settings) for scan in scans), rules)[SCORE]
    # NaN would be neither smaller nor larger than other scores, and the choice would depend on the order.
    return -math.inf if math.isnan(score) else score


def choose_settings(
    scans: Sequence[HeldBackScan], left_out: Iterable[int | None], rules: CompetitionRules
) -> dict[int | None, Postprocessing]:
    """Choose limits several times, each time without the patients of one fold, with a progress bar.

    Args:
        scans: All scans.
        left_out: The folds to leave out, one each time; None: no fold.
        rules: How to read the competition's metric.

    Returns:
        The chosen limits by the fold that was left out.
    """
    organs = scans[0].organs
    chosen: dict[int | None, Postprocessing] = dict.fromkeys(left_out, no_postprocessing(organs))
    with tqdm(total=len(scans) * len(organs), desc="Trying limits", unit="scan") as bar:
        for organ in organs:
            # One distance is often that of all organs together. So the limits of an organ are tried with the limits
            # of the organs before it already in place. A search over three at once would need 36 ** 3 tries.
            tried = {
                fold: [Postprocessing({**settings.organs, organ: limits}) for limits in GRID]
                for fold, settings in chosen.items()
            }
            # All limits of all choices are measured while a scan is unpacked. A scan does not need the limits that are
            # tried without its own fold.
            for scan in scans:
                scan.measure((one for fold, ones in tried.items() if fold != scan.fold for one in ones), rules)
                bar.update()
            for fold, ones in tried.items():
                others = [scan for scan in scans if scan.fold != fold]
                scores = [score_settings(others, one, rules) for one in ones]
                # `index` finds the first of equal scores. It belongs to the lowest limits, which remove the least.
                chosen[fold] = ones[scores.index(max(scores))]
    return chosen


def learn_postprocessing(scans: Sequence[HeldBackScan], rules: CompetitionRules) -> LearntPostprocessing:
    """Choose the limits on all scans, and measure their gain by cross-fitting.

    Args:
        scans: The predicted scans of at least two folds.
        rules: How to read the competition's metric.
    """
    folds, nothing = sorted({scan.fold for scan in scans}), no_postprocessing(scans[0].organs)
    chosen = choose_settings(scans, [None, *folds], rules)
    for scan in scans:
        # The limits for the patients of a fold come from the other folds.
        scan.measure([nothing, chosen[scan.fold]], rules)
    # Each patient counts once in both lists. Every score after post-processing is of a patient who did not choose.
    before = [scan.score(nothing) for scan in scans]
    after = [scan.score(chosen[scan.fold]) for scan in scans]
    score_before, score_after = score_scans(before, rules)[SCORE], score_scans(after, rules)[SCORE]
    # The interval of the difference, over the same draws of patients. The intervals of two scores would overlap even
    # if every patient gained.
    interval = find_intervals(after, rules, baseline=before)[SCORE]
    return LearntPostprocessing(
        settings=chosen[None],
        score_before=score_before,
        score_after=score_after,
        gain=score_after - score_before,
        interval=interval,
        helps=interval is not None and interval[0] > 0 and chosen[None] != nothing,
        num_patients=len({scan.patient for scan in scans}),
        settings_by_fold=tuple(chosen[fold] for fold in folds),
    )


def check_folds(folds: Sequence[tuple[Path, Dataset]]) -> None:
    """Check that there are at least two folds, and that each patient was held back by one of them only.

    Raises:
        InputError: If not.
    """
    if len(folds) < 2:
        raise InputError(
            f"post-processing is chosen on some folds and tested on the others, so it needs at least 2 folds, but got "
            f"{len(folds)}; train more folds"
        )
    seen: dict[int, Path] = {}
    for folder, dataset in folds:
        for patient in dataset.unique("case"):
            if patient in seen:
                raise InputError(
                    f"patient {patient} was held back by {seen[patient]} and by {folder}; use folds of one dataset"
                )
            seen[patient] = folder


def learn_from_folds(
    folds: Sequence[tuple[Path, Dataset]],
    rules: CompetitionRules,
    device: str | None,
    batch_size: int,
    num_workers: int,
) -> LearntPostprocessing:
    """Learn the limits from the trainings of a cross-validation.

    Args:
        folds: For each fold, the folder of its finished training, and the slices of the patients that it held back,
            without a transform.
        rules: How to read the competition's metric.
        device: Device for the models; None: the GPU if there is one.
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read slices.

    Raises:
        InputError: If there are fewer than two folds, a patient is in two of them, a checkpoint cannot be used, or the
            slices of a scan do not form a volume.
    """
    check_folds(folds)
    scans: list[HeldBackScan] = []
    # The slices are known before the first prediction, and name the scans. Their number is the length of the bar.
    number = sum(len(dataset.unique("scan")) for _, dataset in folds)
    with tqdm(total=number, desc="Predicting held-back patients", unit="scan") as bar:
        for index, (folder, dataset) in enumerate(folds):
            # One model at a time. The next one replaces it.
            (member,) = load_members([str(folder)], None, Computation(device))
            for scan in predict_held_back_scans(member, dataset, index, batch_size, num_workers):
                scans.append(scan)
                bar.update()
    return learn_postprocessing(scans, rules)
