"""The labels of a dataset and of a model: names of organs in order, colours, codes, and the rule for overlaps.

A label set comes from the data: from the columns of a dataset, or from `id2label` of a model. The three organs of
Kaggle are one label set among others.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from gi_segmentation.errors import InputError

# What a model's channels mean. `multiclass`: every pixel gets one label, by softmax over background and organs.
# `multilabel`: every organ has a channel and a mask of its own, by sigmoid, so that organs may overlap.
LabelMode: TypeAlias = Literal["multiclass", "multilabel"]

BACKGROUND = "background"
MAX_LABELS = 30
# A name stands in files, flags and tables. So it has no separator of these, and no sign that a file system refuses.
NAME_PATTERN = re.compile(r"[^\W_](?:[\w .+()&'-]{0,62}[\w.+()&'-])?")
# The scores of whole scans have keys like `dice_volume` and `dice_volume_stomach`.
RESERVED = re.compile(r"volume(_.*)?", re.IGNORECASE)

# Words of names like `left kidney` and `Kidney_L`.
SIDES = re.compile(r"(?:left|right|l|r)", re.IGNORECASE)

# The palette of Okabe and Ito, which colour-blind people can tell apart, and white. Black is the background.
COLOURS = (
    (0, 158, 115), (230, 159, 0), (86, 180, 233), (213, 94, 0), (204, 121, 167), (240, 228, 66), (0, 114, 178),
    (255, 255, 255),
)  # fmt: skip
# The share of the circle of hues between a colour and the next one, if there are more than eight. With the golden
# ratio, a new hue lies in the largest gap between those before it.
HUE_STEP = 0.618034


@dataclass(frozen=True)
class LabelSet:
    """Names of organs.

    Attributes:
        names: 1 to 30 names. Their order is that of the label ids from 1 on, of the channels of a multilabel model,
            and of every axis `organs`. It is the rule for overlaps, too: in a label map, a later organ hides an
            earlier one.

    Raises:
        InputError: If there are no or too many names, or a name cannot be used.

    Example:
        >>> LabelSet(("liver", "spleen")).labels
        ('background', 'liver', 'spleen')
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_LABELS:
            raise InputError(f"labels: expected 1 to {MAX_LABELS} names, got {len(self.names)}; leave some out")
        for name in self.names:
            check_name(name)
        lower = [name.lower() for name in self.names]
        if twice := [name for name in self.names if lower.count(name.lower()) > 1]:
            raise InputError(
                f"labels: {' and '.join(map(repr, twice))} differ in case only, or not at all; rename one"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each label id: the background, then the organs."""
        return (BACKGROUND, *self.names)

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """The colour of each organ: red, green and blue from 0 to 255."""
        return tuple(label_colour(index) for index in range(len(self.names)))

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """The colour of each label id; the background is black."""
        return ((0, 0, 0), *self.colours)

    @property
    def has_sides(self) -> bool:
        """Whether an organ is named by its side of the body, so that it becomes another one in a mirror.

        Example:
            >>> LabelSet(("Kidney_L", "liver")).has_sides, LabelSet(("vertebra L1", "liver")).has_sides
            (True, False)
        """
        return any(SIDES.fullmatch(word) for name in self.names for word in re.split(r"[\W_]+", name))

    def channels(self, label_mode: LabelMode) -> tuple[str, ...]:
        """Return the names of the channels of a model.

        Example:
            >>> LabelSet(("liver",)).channels("multiclass"), LabelSet(("liver",)).channels("multilabel")
            (('background', 'liver'), ('liver',))
        """
        return self.labels if label_mode == "multiclass" else self.names


def check_name(name: Any) -> None:
    """Check that a name can be the name of an organ.

    Raises:
        InputError: If not.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise InputError(
            f"labels: expected a name of 1 to 64 letters, digits, spaces and the signs _ . + - ( ) & ', which begins "
            f"with a letter or a digit, got {name!r:.80}; rename it"
        )
    if name.lower() == BACKGROUND:
        raise InputError(f"labels: {name!r} is no organ: what no organ covers is background; leave it out")
    if RESERVED.fullmatch(name):
        raise InputError(f"labels: {name!r} would be mixed up with the scores of whole scans; rename it")


def label_colour(index: int) -> tuple[int, int, int]:
    """Return the colour of an organ by its place in the label set.

    Example:
        >>> label_colour(0), label_colour(8)
        ((0, 158, 115), (148, 76, 230))
    """
    if index < len(COLOURS):
        return COLOURS[index]
    # Two rounds of light and dark keep neighbours in the list apart even for those who see few hues.
    lightness = 0.6 if index % 2 == 0 else 0.35
    red, green, blue = colorsys.hls_to_rgb((index * HUE_STEP + 0.8) % 1, lightness, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def find_labels(features: Mapping[str, Any]) -> LabelSet:
    """Return the labels of a dataset: the fields of its column `segmentation`, in their order.

    Args:
        features: `Dataset.features`.

    Raises:
        InputError: If there is no such column, or a name cannot be used.
    """
    segmentation = features.get("segmentation")
    if not isinstance(segmentation, Mapping):
        raise InputError("expected a column `segmentation` with an encoding of each organ; build the dataset again")
    return LabelSet(tuple(cast(Sequence[str], segmentation)))


# The label set of Kaggle's data.
GI_TRACT = LabelSet(("large_bowel", "small_bowel", "stomach"))
