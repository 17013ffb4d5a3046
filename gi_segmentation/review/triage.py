"""Sort predicted scans into good, look and fail, with reasons in plain words.

The masks are compared with plain limits, and the scan with the ranges of the scans that the model was trained on, see
`review.ranges`. A checkpoint without ranges is judged by the plain limits only.

How many faults are found is measured by `benchmarks/triage.py`, see docs/clinic.md. A scan that is good here may still
have wrong outlines: the triage looks for scans that are unlike the training, and not for errors of a contour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from gi_segmentation.review.measures import ScanMeasures
from gi_segmentation.review.ranges import Feature, TrainingRanges, find_deviation, find_features, list_features

Verdict: TypeAlias = Literal["good", "look", "fail"]
# From the mildest to the gravest.
VERDICTS: tuple[Verdict, ...] = ("good", "look", "fail")


@dataclass(frozen=True)
class TriageLimits:
    """From where on a scan needs a look, and from where on it fails. The values are measured, see docs/clinic.md.

    Attributes:
        deviations: How far a number may lie outside its training range, in widths of this range.
        confidences: Mean probability inside a mask below which it is doubtful.
        agreements: Dice of a model or a flip alone with the common mask below which the mask is doubtful.
        largest_share: Without training ranges, the share of the volume that the largest piece of the stomach needs.
        cut_share: Without training ranges, the share of the largest area that an end slice may have.
    """

    deviations: tuple[float, float] = (0.75, 3.0)
    confidences: tuple[float, float] = (0.9, 0.7)
    agreements: tuple[float, float] = (0.8, 0.5)
    largest_share: float = 0.8
    cut_share: float = 0.1


class Reason(NamedTuple):
    """Why a scan is not good.

    Attributes:
        verdict: `look` or `fail`.
        check: Name of the check, for programs.
        text: The reason in plain words.
    """

    verdict: Verdict
    check: str
    text: str


@dataclass(frozen=True)
class Triage:
    """The verdict on a scan.

    Attributes:
        reasons: Why it is not good, the gravest first.
        unchecked: What could not be checked, a sentence each.
    """

    reasons: Sequence[Reason]
    unchecked: Sequence[str]

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict among the reasons; good without any."""
        return max((reason.verdict for reason in self.reasons), key=VERDICTS.index, default="good")


def judge_scan(
    measured: ScanMeasures,
    ranges: TrainingRanges | None,
    agreement: Mapping[str, float] | None = None,
    limits: TriageLimits | None = None,
) -> Triage:
    """Judge a predicted scan.

    Args:
        measured: From `measure_scan`, with probabilities.
        ranges: The ranges of the training; None if they are not known.
        agreement: By the name of the organ, the Dice of that model of an ensemble, or of that flip, which agrees least
            with the common mask; None for a single model without flips.
        limits: From where on something is a reason; None: those of `TriageLimits`.
    """
    limits = limits or TriageLimits()
    reasons = [*check_organs(measured, limits), *check_agreement(agreement or {}, limits)]
    unchecked = []
    if ranges is None:
        reasons += check_shape(measured, limits)
        unchecked.append(
            "The checkpoint does not say which scans it was trained on. So geometry, intensities, and size and place "
            "of the organs were not compared with them."
        )
    else:
        reasons += check_ranges(measured, ranges, limits)
    if agreement is None:
        unchecked.append("There is one model without flips, so nothing shows whether several predictions agree.")
    order = sorted(reasons, key=lambda reason: -VERDICTS.index(reason.verdict))
    return Triage(order, unchecked)


def check_organs(measured: ScanMeasures, limits: TriageLimits) -> list[Reason]:
    """Look for organs that are missing or doubtful."""
    missing = [organ for organ, one in measured.organs.items() if not one.volume_ml]
    if len(missing) == len(measured.organs):
        return [Reason("fail", "missing", "no organ was found")]
    reasons = [Reason("look", "missing", f"{organ.replace('_', ' ')}: not found") for organ in missing]
    for organ, one in measured.organs.items():
        if verdict := below(one.confidence, limits.confidences):
            text = f"mean probability inside the mask is only {one.confidence:.2f}"
            reasons.append(Reason(verdict, "confidence", f"{organ.replace('_', ' ')}: {text}"))
    if measured.missing_slices:
        reasons.append(Reason("look", "gaps", f"{measured.missing_slices} slices are missing within the scan"))
    return reasons


def check_agreement(agreement: Mapping[str, float], limits: TriageLimits) -> list[Reason]:
    """Look for organs on which models or flips disagree."""
    return [
        Reason(
            verdict,
            "agreement",
            f"{organ.replace('_', ' ')}: models or flips disagree (Dice with the common mask down to {dice:.2f})",
        )
        for organ, dice in agreement.items()
        if (verdict := below(dice, limits.agreements))
    ]


def below(value: float, limits: tuple[float, float]) -> Verdict | None:
    """Return the verdict on a value that should not be below two limits; None if it is not.

    Example:
        >>> below(0.9, (0.8, 0.6)), below(0.7, (0.8, 0.6)), below(0.5, (0.8, 0.6)), below(math.nan, (0.8, 0.6))
        (None, 'look', 'fail', None)
    """
    look, fail = limits
    return "fail" if value < fail else "look" if value < look else None


def check_shape(measured: ScanMeasures, limits: TriageLimits) -> list[Reason]:
    """Look for fragments and for organs that are cut off, by plain limits instead of the ranges of the training."""
    reasons = []
    for organ, one in measured.organs.items():
        title = organ.replace("_", " ")
        # A bowel is often in several pieces, because a slice is thicker than its thinnest part.
        if organ == "stomach" and one.largest_share < limits.largest_share:
            reasons.append(Reason("look", "fragments", f"{title}: in {one.pieces} pieces"))
        if one.end_share > limits.cut_share:
            reasons.append(Reason("look", "cut_off", f"{title}: cut off by the first or the last slice"))
        if one.edge_share > 0:
            reasons.append(Reason("look", "cut_off", f"{title}: cut off by the field of view"))
    return reasons


def check_ranges(measured: ScanMeasures, ranges: TrainingRanges, limits: TriageLimits) -> list[Reason]:
    """Compare a scan with the ranges of the training."""
    reasons = []
    values, features = find_features(measured), list_features(tuple(measured.organs))
    look, fail = limits.deviations
    for name, ends in ranges.ranges.items():
        value = values[name]
        # An organ that is missing has no number. It has a reason of its own.
        deviation = 0.0 if math.isnan(value) else find_deviation(features[name], value, ends)
        if deviation > look:
            text = describe_deviation(features[name], value, ends)
            reasons.append(Reason("fail" if deviation > fail else "look", name, text))
    return reasons


def describe_deviation(feature: Feature, value: float, ends: tuple[float, float]) -> str:
    """Say in plain words that a number is outside the range of the training.

    Example:
        >>> from gi_segmentation.review.ranges import GEOMETRY
        >>> describe_deviation(GEOMETRY["length_mm"], 90.0, (240.0, 432.0))
        'length of the scan from head to feet: 90 mm, in the training 240 to 432 mm (another body part may be shown)'
    """
    shown, low, high = (f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}" for number in (value, *ends))
    unit = f" {feature.unit}" if feature.unit else ""
    hint = f" ({feature.hint})" if feature.hint else ""
    return f"{feature.title}: {shown}{unit}, in the training {low} to {high}{unit}{hint}"
