"""The limits that decide which connected components of a mask stay.

They are learnt on patients that the model did not see in training, see `cross_validation.postprocessing_search`. They
are stored in the published configuration of the model, under the name `postprocessing`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelSet

# The greatest values that a configuration may have. A patient has less than 100,000 ml, and no probability is above 1.
GREATEST = {"min_volume_ml": 100_000.0, "min_confidence": 1.0}


@dataclass(frozen=True)
class OrganLimits:
    """What a component of one organ needs in order to stay.

    Attributes:
        min_volume_ml: Smallest volume in millilitres.
        min_confidence: Smallest mean probability of the organ, 0 to 1.
    """

    min_volume_ml: float = 0.0
    min_confidence: float = 0.0


@dataclass(frozen=True)
class Postprocessing:
    """The limits of all organs. With limits of 0, nothing is removed.

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
        return {organ: asdict(limits) for organ, limits in self.organs.items()}

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
        entries = check_entries("postprocessing", value, labels.names)
        organs = {}
        for organ in labels.names:
            name = f"postprocessing.{organ}"
            limits = check_entries(name, entries[organ], tuple(GREATEST))
            organs[organ] = OrganLimits(**{key: check_limit(f"{name}.{key}", limits[key], key) for key in GREATEST})
        return cls(organs)

    def describe(self) -> str:
        """Describe the limits in one line.

        Example:
            >>> Postprocessing({"spleen": OrganLimits(), "stomach": OrganLimits(0.3, 0.6)}).describe()
            'spleen unchanged; stomach from 0.3 ml and from confidence 0.6'
        """
        parts = []
        for organ, limits in self.organs.items():
            wanted = [f"from {limits.min_volume_ml:g} ml"] if limits.min_volume_ml else []
            wanted += [f"from confidence {limits.min_confidence:g}"] if limits.min_confidence else []
            parts.append(f"{organ} {' and '.join(wanted) or 'unchanged'}")
        return "; ".join(parts)


def no_postprocessing(organs: Sequence[str]) -> Postprocessing:
    """Return the limits of some organs that remove nothing."""
    return Postprocessing({organ: OrganLimits() for organ in organs})


def check_entries(name: str, value: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    """Return a value if it is a dictionary with exactly these keys.

    Raises:
        InputError: If it is not.
    """
    # A key that is not known here is an error too. A later version may have a third limit, and without this limit the
    # masks would not be the promised ones.
    if not isinstance(value, dict) or set(value) != set(keys):
        # `repr` writes a line break as \n, so the message stays one line.
        raise InputError(f"{name}: expected a dictionary with the keys {', '.join(keys)}, but got {value!r:.80}")
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
