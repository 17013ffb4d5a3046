"""Learn the limits of `postprocessing` from the predictions of a cross-validation.

Each patient is predicted by the model of the fold that held this patient back. On patients of the training, a model
makes fewer mistakes, and the limits would be too low.

The search has four steps, see `STEPS`: slices by confidence, thresholds, slices by area, components. The confidence of
a slice does not depend on the threshold, and where slices stay empty, a lower threshold adds nothing wrong. Areas and
components change with the threshold, so they come last. Each step goes over the organs and keeps those limits with the
highest competition score.

The score of limits on the patients from which they were chosen is too good. So the gain of each step is cross-fitted:
for each patient, the limits are chosen on others. With few patients, all others choose. With many, those of all other
folds do, which is as good and faster. The limits to publish are chosen on all patients.

A step is judged by its own gain. If the interval of the gain is not above 0, its limits are dropped, and the next step
begins without them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset
from tqdm.auto import tqdm

from gi_segmentation.cross_validation.held_back_scans import THRESHOLDS, HeldBackScan, predict_held_back_scans
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_members
from gi_segmentation.postprocessing.limits import Postprocessing, no_postprocessing
from gi_segmentation.rules import CompetitionRules
from gi_segmentation.scoring.intervals import Gains, compare_scans
from gi_segmentation.scoring.scans import score_scans
from gi_segmentation.scoring.tables import format_interval

# The confidence of a slice from which it shows an organ, and of one that stays beside such a slice. A slice with a
# mask has a confidence above 0.5, or above 0.25 with four labels; below that, only thresholds can fill it.
SLICE_CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEIGHBOUR_CONFIDENCES = (1.0, 0.5, 0.3, 0.2, 0.1)
# A stomach has 1,000 to 5,000 mm² in most of its slices.
SLICE_AREAS_MM2 = (0.0, 50.0, 100.0, 200.0, 400.0)
# A stomach has about 200 ml, and a voxel 0.007 ml. Equal scores take the first limits, so the lowest come first.
MIN_VOLUMES_ML = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
# A voxel of a multilabel mask has a probability above 0.5, so lower limits would remove nothing there.
MIN_CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)

# What each step tries for an organ. The first changes nothing, and of equal scores the first one counts.
STEPS: dict[str, list[dict[str, float]]] = {
    "slices by confidence": [
        {},
        *(
            {"min_slice_confidence": high, "min_neighbour_confidence": low}
            for high, low in product(SLICE_CONFIDENCES, NEIGHBOUR_CONFIDENCES)
            # A lower limit beside it that is higher would change nothing.
            if low == 1 or low < high
        ),
    ],
    "thresholds": [{"threshold": one} for one in THRESHOLDS],
    "slices by area": [{"min_slice_area_mm2": one} for one in SLICE_AREAS_MM2],
    "components": [
        {"min_volume_ml": volume, "min_confidence": confidence}
        for volume, confidence in product(MIN_VOLUMES_ML, MIN_CONFIDENCES)
    ],
}
SCORE = "competition_score"
# The scores of which a gain is told. The first one decides.
TOLD = (SCORE, "dice")
# Up to so many patients, each is left out alone. A fold of the competition's data has as many as 17.
MAX_LEFT_OUT_ALONE = 30

# The patients that take no part in a choice: a patient, or a fold. None: nobody is left out.
Group: TypeAlias = int | None


@dataclass(frozen=True)
class LearntStep:
    """What one step of the search gains on patients that did not choose its limits.

    Attributes:
        name: Key in `STEPS`.
        settings: The limits after this step, chosen on all patients.
        gains: For each score of `TOLD`, its value without and with the step, and the 95 % interval of the difference
            over patients; None if there are fewer than two patients.
        helps: Whether the whole interval of the competition score is above 0, so that the gain is more than chance.
    """

    name: str
    settings: Postprocessing
    gains: Gains
    helps: bool

    def describe(self) -> str:
        """Return a line for the terminal."""
        gains = [
            f"{name} {before:.4f} to {after:.4f}, {after - before:+.4f}{format_interval(interval, '+.4f')}"
            for name, (before, after, interval) in self.gains.items()
        ]
        return f"  {self.name}: {'it helps' if self.helps else 'stays off'} ({'; '.join(gains)})"


@dataclass(frozen=True)
class LearntPostprocessing:
    """The limits that were chosen on all patients, and what they gain on patients that did not choose them.

    `dataclasses.asdict` gives values that JSON can hold.

    Attributes:
        settings: The limits of all steps that help, chosen on all patients.
        steps: What each step gains, beside those before it that help.
        helps: Whether a step helps.
        score_before: Competition score of all patients without post-processing.
        score_after: Cross-fitted competition score of all patients with the steps that help.
        num_patients: Number of patients.
        left_out: Who took no part in the choice of limits for a patient: `patient`, or the whole `fold`.
        settings_by_group: For each of these, the limits that were chosen on all others. If they differ a lot, the
            choice depends on few patients.
    """

    settings: Postprocessing
    steps: tuple[LearntStep, ...]
    helps: bool
    score_before: float
    score_after: float
    num_patients: int
    left_out: str
    settings_by_group: tuple[Postprocessing, ...] = field(default=())

    def to_config(self) -> dict[str, dict[str, float]] | None:
        """Return the value for `model.config.postprocessing`; None if post-processing does not help."""
        return self.settings.to_config() if self.helps else None

    def describe(self) -> list[str]:
        """Return lines for the terminal."""
        verdict = (
            f"the published configuration has these limits, and predict applies them: {self.settings.describe()}"
            if self.helps
            else "no interval of a gain is above 0, so each gain may be chance, and post-processing stays off"
        )
        return [
            f"post-processing, learnt on the predictions of {self.num_patients} held-back patients; gains on patients "
            f"who did not choose (left out: each {self.left_out}):",
            *(step.describe() for step in self.steps),
            f"  {verdict}",
        ]


class ScoreTable:
    """Competition scores of limits that were measured. Different limits often have the same scores of all scans.

    Args:
        rules: How to read the competition's metric.
    """

    def __init__(self, rules: CompetitionRules) -> None:
        self.rules = rules
        self.found: dict[tuple[int, ...], float] = {}

    def score(self, scans: Iterable[HeldBackScan], settings: Postprocessing) -> float:
        """Return the competition score of scans; minus infinity if there is nothing to score."""
        scores = [scan.score(settings) for scan in scans]
        # A scan keeps its scores as long as the search lasts, so no two have one `id`.
        key = tuple(map(id, scores))
        if key not in self.found:
            score = score_scans(scores, self.rules)[SCORE]
            # NaN would be neither smaller nor larger than other scores, and the choice would depend on the order.
            self.found[key] = -math.inf if math.isnan(score) else score
        return self.found[key]


def find_groups(scans: Sequence[HeldBackScan]) -> tuple[dict[str, int], str]:
    """Return who is left out when limits are chosen for each scan, by the name of the scan: its patient or its fold.

    The second value is `patient` or `fold`.
    """
    if len({scan.patient for scan in scans}) <= MAX_LEFT_OUT_ALONE:
        return {scan.name: scan.patient for scan in scans}, "patient"
    return {scan.name: scan.fold for scan in scans}, "fold"


def choose_settings(
    scans: Sequence[HeldBackScan],
    groups: Mapping[str, int],
    start: dict[Group, Postprocessing],
    grid: Sequence[dict[str, float]],
    rules: CompetitionRules,
    progress: str = "Trying limits",
) -> dict[Group, Postprocessing]:
    """Choose the limits of one step several times, each time without the patients of one group.

    Args:
        scans: All scans.
        groups: From `find_groups`.
        start: The limits of the steps before, by the group that is left out; None: nobody is.
        grid: What is tried for each organ, from `STEPS`.
        rules: How to read the competition's metric.
        progress: What the progress bar says.

    Returns:
        The chosen limits by the group that was left out.
    """
    organs, chosen, table = tuple(scans[0].organs), dict(start), ScoreTable(rules)
    with tqdm(total=len(scans) * len(organs), desc=progress, unit="scan") as bar:
        for organ in organs:
            # One distance is often that of all organs together. So the limits of an organ are tried with the limits
            # of the organs before it already in place. All organs at once would need the third power of tries.
            tried = {
                group: [
                    Postprocessing({**settings.organs, organ: replace(settings.organs[organ], **changes)})
                    for changes in grid
                ]
                for group, settings in chosen.items()
            }
            # All limits of all choices are measured while a scan is unpacked. A scan does not need the limits that are
            # tried without its own group.
            for scan in scans:
                own = groups[scan.name]
                scan.measure((one for group, ones in tried.items() if group != own for one in ones), rules)
                bar.update()
            for group, ones in tried.items():
                others = [scan for scan in scans if groups[scan.name] != group]
                scores = [table.score(others, one) for one in ones]
                # `index` finds the first of equal scores. It belongs to the limits that change the least.
                chosen[group] = ones[scores.index(max(scores))]
    return chosen


def learn_postprocessing(scans: Sequence[HeldBackScan], rules: CompetitionRules) -> LearntPostprocessing:
    """Choose the limits on all scans, and measure the gain of each step by cross-fitting.

    Args:
        scans: The predicted scans of at least two patients.
        rules: How to read the competition's metric.
    """
    groups, left_out = find_groups(scans)
    nothing = no_postprocessing(tuple(scans[0].organs))
    used: dict[Group, Postprocessing] = dict.fromkeys([None, *sorted(set(groups.values()))], nothing)
    for scan in scans:
        scan.measure([nothing], rules)
    first = before = [scan.score(nothing) for scan in scans]
    steps = []
    for name, grid in STEPS.items():
        chosen = choose_settings(scans, groups, used, grid, rules, f"Trying limits ({name})")
        for scan in scans:
            # The limits for a patient come from others.
            scan.measure([chosen[groups[scan.name]]], rules)
        after = [scan.score(chosen[groups[scan.name]]) for scan in scans]
        # The interval of the difference, over the same draws of patients. The intervals of two scores would overlap
        # even if every patient gained.
        gains = compare_scans(after, before, rules, TOLD)
        interval = gains[SCORE][2]
        helps = interval is not None and interval[0] > 0 and chosen[None] != used[None]
        steps.append(LearntStep(name, chosen[None], gains, helps))
        if helps:
            used, before = chosen, after
    return LearntPostprocessing(
        settings=used[None],
        steps=tuple(steps),
        helps=any(step.helps for step in steps),
        score_before=score_scans(first, rules)[SCORE],
        score_after=score_scans(before, rules)[SCORE],
        num_patients=len({scan.patient for scan in scans}),
        left_out=left_out,
        settings_by_group=tuple(settings for group, settings in used.items() if group is not None),
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
