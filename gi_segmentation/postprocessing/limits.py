"""The limits of post-processing: which pixels, slices and connected components of an organ a mask keeps.

They are learnt on patients that the model did not see in training, see `cross_validation.postprocessing_search`. They
are stored in the published configuration of the model, under the name `postprocessing`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelSet

# The greatest values that a configuration may have. No probability is above 1, no slice of a patient has 1 m², and no
# patient has 100,000 ml.
GREATEST = {
    "threshold": 1.0,
    "min_slice_confidence": 1.0,
    "min_neighbour_confidence": 1.0,
    "min_slice_area_mm2": 1_000_000.0,
    "min_volume_ml": 100_000.0,
    "min_confidence": 1.0,
}
# The first version had only these two. Every configuration has them, the others only where they change a mask.
ALWAYS_WRITTEN = ("min_volume_ml", "min_confidence")


@dataclass(frozen=True, kw_only=True)
class OrganLimits:
    """What pixels, slices and components of one organ need in order to stay. The defaults change nothing.

    The confidence of a slice is the greatest probability of the organ in it.

    Attributes:
        threshold: Pixels with a probability above it belong to the organ, too, see `gate.lower_thresholds`. At 1, only
            those do that the model chose.
        min_slice_confidence: Confidence from which a slice shows the organ at all.
        min_neighbour_confidence: Confidence from which a slice stays although it is below `min_slice_confidence`, if
            it touches a slice that stays. At 1, no such slice stays.
        min_slice_area_mm2: Smallest area of the organ in a slice, in mm².
        min_volume_ml: Smallest volume of a component in millilitres.
        min_confidence: Smallest mean probability of a component, 0 to 1.
    """

    threshold: float = 1.0
    min_slice_confidence: float = 0.0
    min_neighbour_confidence: float = 1.0
    min_slice_area_mm2: float = 0.0
    min_volume_ml: float = 0.0
    min_confidence: float = 0.0

    def to_config(self) -> dict[str, float]:
        """Return the limits that a configuration must have."""
        nothing = OrganLimits()
        values = {key: getattr(self, key) for key in GREATEST}
        return {key: value for key, value in values.items() if key in ALWAYS_WRITTEN or value != getattr(nothing, key)}

    def describe(self) -> str:
        """Describe the limits in words.

        Example:
            >>> OrganLimits(threshold=0.3, min_slice_confidence=0.8, min_neighbour_confidence=0.5).describe()
            'also above probability 0.3, in slices from confidence 0.8 (0.5 beside such a slice)'
            >>> OrganLimits().describe()
            'unchanged'
        """
        wanted = [f"also above probability {self.threshold:g}"] if self.threshold < 1 else []
        if self.min_slice_confidence:
            weaker = self.min_neighbour_confidence
            beside = f" ({weaker:g} beside such a slice)" if weaker < self.min_slice_confidence else ""
            wanted.append(f"in slices from confidence {self.min_slice_confidence:g}{beside}")
        wanted += [f"in slices from {self.min_slice_area_mm2:g} mm²"] if self.min_slice_area_mm2 else []
        wanted += [f"from {self.min_volume_ml:g} ml"] if self.min_volume_ml else []
        wanted += [f"from confidence {self.min_confidence:g}"] if self.min_confidence else []
        return ", ".join(wanted) or "unchanged"


@dataclass(frozen=True)
class Postprocessing:
    """The limits of all organs.

    Attributes:
        organs: The limits by the name of the organ, in the order of the label set.
    """

    organs: Mapping[str, OrganLimits]

    def to_config(self) -> dict[str, dict[str, float]]:
        """Return plain dictionaries for `model.config.postprocessing`.

        Example:
            >>> no_postprocessing(["liver"]).to_config()
            {'liver': {'min_volume_ml': 0.0, 'min_confidence': 0.0}}
        """
        return {organ: limits.to_config() for organ, limits in self.organs.items()}

    @classmethod
    def from_config(cls, value: Any, labels: LabelSet) -> "Postprocessing":
        """Read and check what `to_config` wrote. A published configuration may come from anybody.

        Args:
            value: The value in the configuration.
            labels: The labels of the model.

        Raises:
            InputError: If the value has another form.

        Example:
            >>> labels = LabelSet(("liver", "spleen"))
            >>> nothing = no_postprocessing(labels.names)
            >>> Postprocessing.from_config(nothing.to_config(), labels) == nothing
            True
        """
        optional = [key for key in GREATEST if key not in ALWAYS_WRITTEN]
        entries = check_entries("postprocessing", value, labels.names)
        organs = {}
        for organ in labels.names:
            name = f"postprocessing.{organ}"
            limits = check_entries(name, entries[organ], ALWAYS_WRITTEN, optional)
            organs[organ] = OrganLimits(**{key: check_limit(f"{name}.{key}", limits[key], key) for key in limits})
        return cls(organs)

    def describe(self) -> str:
        """Describe the limits in one line.

        Example:
            >>> limits = OrganLimits(min_volume_ml=0.3, min_confidence=0.6)
            >>> Postprocessing({"spleen": OrganLimits(), "stomach": limits}).describe()
            'spleen unchanged; stomach from 0.3 ml, from confidence 0.6'
        """
        return "; ".join(f"{organ} {limits.describe()}" for organ, limits in self.organs.items())


def no_postprocessing(organs: Sequence[str]) -> Postprocessing:
    """Return the limits of some organs that change nothing."""
    return Postprocessing({organ: OrganLimits() for organ in organs})


def check_entries(name: str, value: Any, keys: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return a value if it is a dictionary with exactly these keys, and with no others but the optional ones.

    Raises:
        InputError: If it is not.
    """
    # A key that is not known here is an error too. A later version may have one more limit, and without this limit the
    # masks would not be the promised ones.
    expected = f"{name}: expected a dictionary with the keys {', '.join(keys)}"
    expected += f" (and perhaps {', '.join(optional)})" if optional else ""
    # `repr` writes a line break as \n, so the message stays one line.
    if not isinstance(value, dict):
        raise InputError(f"{expected}, but got {value!r:.80}")
    if missing := [key for key in keys if key not in value]:
        raise InputError(f"{expected}, but it lacks {', '.join(missing)}")
    if unknown := [key for key in value if key not in (*keys, *optional)]:
        raise InputError(f"{expected}, but got {unknown[0]!r:.80}")
    return value


def check_limit(name: str, value: Any, key: str) -> float:
    """Return a limit as a float.

    Args:
        name: Name of the limit for the message.
        value: The value to check.
        key: Key of the limit in `GREATEST`.

    Raises:
        InputError: If it is not a number of 0 to the greatest value.
    """
    # In Python, True is a number too. JSON from Python may hold NaN and Infinity, which fail the comparison.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= GREATEST[key]:
        raise InputError(f"{name}: expected a number of 0 to {GREATEST[key]:g}, but got {value!r:.80}")
    return float(value)
