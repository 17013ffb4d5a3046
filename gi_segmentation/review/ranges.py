"""The ranges of the scans that a model was trained on, and how far a scan lies outside of them.

The ranges are in the published configuration of the model, under the name `training_ranges`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelSet
from gi_segmentation.review.measures import PERCENTILES, ScanMeasures

# Quantiles of the training's scans between which a range lies. A single odd scan does not widen it.
RANGE_QUANTILES = (0.01, 0.99)


class Feature(NamedTuple):
    """A number of a scan that is compared with the scans of the training.

    Attributes:
        title: What it is, in plain words.
        unit: Its unit; empty for a share or an intensity.
        least_width: A range that is narrower counts as this wide. All scans of a training may have the same spacing,
            and then a difference of a hair would be infinitely many times the width of the range.
        hint: What may be the reason if the number is outside.
    """

    title: str
    unit: str
    least_width: float
    hint: str


GEOMETRY: dict[str, Feature] = {
    "slice_distance_mm": Feature("distance between slices", "mm", 1.0, ""),
    "length_mm": Feature("length of the scan from head to feet", "mm", 60.0, "another body part may be shown"),
    "height_mm": Feature("height of the field of view", "mm", 60.0, "rows and columns may be swapped"),
    "width_mm": Feature("width of the field of view", "mm", 60.0, "rows and columns may be swapped"),
}
INTENSITIES: dict[str, Feature] = {
    **{
        f"p{percentile}": Feature(
            f"{percentile}th percentile of the scaled intensities", "", 0.05, "contrast unlike the training"
        )
        for percentile in PERCENTILES
    },
    "border": Feature("mean intensity near the border of the slices", "", 0.05, "this should be air"),
    "roughness": Feature("difference of neighbouring pixels", "", 0.01, "noise, or unlike smoothing"),
}
PER_ORGAN: dict[str, Feature] = {
    "volume_ml": Feature("volume", "mL", 10.0, ""),
    "largest_share": Feature("share of the largest piece in the volume", "", 0.2, "in fragments"),
    "end_share": Feature("share of the largest area on an end slice", "", 0.2, "cut off by the scan's end"),
    "edge_share": Feature("share of the mask on the edge of the slices", "", 0.01, "cut off by the field of view"),
    "back_mm": Feature("place from front to back", "mm", 15.0, "front and back may be swapped"),
    "left_mm": Feature("place from right to left", "mm", 15.0, "left and right may be swapped"),
    "lower_mm": Feature("place from head to feet among the organs", "mm", 15.0, "head and feet may be swapped"),
}


@cache
def list_features(organs: tuple[str, ...]) -> dict[str, Feature]:
    """Return the numbers of a scan that are compared, by their names."""
    return {
        **GEOMETRY,
        **INTENSITIES,
        **{
            f"{organ}_{name}": feature._replace(title=f"{organ.replace('_', ' ')}, {feature.title}")
            for organ in organs
            for name, feature in PER_ORGAN.items()
        },
    }


@dataclass(frozen=True)
class TrainingRanges:
    """The ranges of the scans that a model was trained on.

    Attributes:
        scans: Number of scans.
        ranges: Lowest and highest value by the name of the feature. A feature that no scan has is left out.
    """

    scans: int
    ranges: Mapping[str, tuple[float, float]]

    def to_config(self) -> dict[str, Any]:
        """Return plain dictionaries for `model.config.training_ranges`.

        Example:
            >>> TrainingRanges(2, {"length_mm": (240.0, 432.0)}).to_config()
            {'scans': 2, 'ranges': {'length_mm': [240.0, 432.0]}}
        """
        return {"scans": self.scans, "ranges": {name: list(ends) for name, ends in self.ranges.items()}}

    @classmethod
    def from_config(cls, value: Any, labels: LabelSet) -> "TrainingRanges":
        """Read and check what `to_config` wrote. A published configuration may come from anybody.

        Args:
            value: The value in the configuration.
            labels: The labels of the model.

        Raises:
            InputError: If the value has another form.

        Example:
            >>> value = {"scans": 2, "ranges": {"length_mm": [240, 432]}}
            >>> TrainingRanges.from_config(value, LabelSet(("liver",))).ranges
            {'length_mm': (240.0, 432.0)}
        """
        right = isinstance(value, dict) and isinstance(value.get("ranges"), dict) and is_number(value.get("scans"))
        # A later version may have other features. Those that are not known here are not compared.
        known = list_features(labels.names)
        ranges = {name: ends for name, ends in value["ranges"].items() if name in known} if right else {}
        for name, ends in ranges.items():
            pair = isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)) and ends[0] <= ends[1]
            if not pair:
                raise InputError(f"training_ranges.{name}: expected [lowest, highest], but got {ends!r:.80}")
        if not right:
            raise InputError(f"training_ranges: expected a dictionary with scans and ranges, but got {value!r:.80}")
        return cls(int(value["scans"]), {name: (float(low), float(high)) for name, (low, high) in ranges.items()})


def is_number(value: Any) -> bool:
    """Return whether a value from a file is a finite number. In Python, True is a number too; here it is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_features(measured: ScanMeasures) -> dict[str, float]:
    """Return the numbers of a scan that `list_features` names. Those of a missing organ are NaN."""
    features = dict(zip(GEOMETRY, (measured.spacing_mm[0], *measured.field_mm), strict=True)) | dict(
        measured.intensities
    )
    for organ, one in measured.organs.items():
        features |= {f"{organ}_{name}": getattr(one, name) for name in PER_ORGAN}
    return features


def find_ranges(scans: Sequence[ScanMeasures], organs: tuple[str, ...]) -> TrainingRanges:
    """Return the ranges of the scans of a training.

    Args:
        scans: The scans. An organ that was not measured in some of them is not looked for there.
        organs: The names of the organs.
    """
    rows = [find_features(scan) for scan in scans]
    ranges = {}
    for name in list_features(organs):
        values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
        if values:
            # Four digits are more than a range of a few hundred scans is worth, and keep the configuration short.
            low, high = (float(f"{value:.4g}") for value in np.quantile(values, RANGE_QUANTILES))
            ranges[name] = (low, high)
    return TrainingRanges(len(rows), ranges)


def join_ranges(members: Sequence[TrainingRanges], organs: tuple[str, ...]) -> TrainingRanges:
    """Return the ranges of an ensemble. A value is inside if it is inside for one of the members.

    Args:
        members: The ranges of its models.
        organs: The names of the organs.

    Example:
        >>> one, two = TrainingRanges(4, {"p50": (0.1, 0.2)}), TrainingRanges(5, {"p50": (0.15, 0.3)})
        >>> join_ranges([one, two], ())
        TrainingRanges(scans=5, ranges={'p50': (0.1, 0.3)})
    """
    ranges = {}
    for name in list_features(organs):
        ends = [member.ranges[name] for member in members if name in member.ranges]
        if ends:
            ranges[name] = (min(low for low, _ in ends), max(high for _, high in ends))
    return TrainingRanges(max(member.scans for member in members), ranges)


def find_deviation(feature: Feature, value: float, ends: tuple[float, float]) -> float:
    """Return how far a value lies outside a range, in widths of this range; 0 inside.

    Example:
        >>> length = GEOMETRY["length_mm"]
        >>> find_deviation(length, 632.0, (332.0, 432.0)), find_deviation(length, 400.0, (332.0, 432.0))
        (2.0, 0.0)
    """
    low, high = ends
    return max(low - value, value - high, 0.0) / max(high - low, feature.least_width)
