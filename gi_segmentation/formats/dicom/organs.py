"""What DICOM files call an organ: its name in the letters of the file, its code, and what kind of structure it is."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from gi_segmentation.formats.algorithm import TITLE
from gi_segmentation.formats.dicom.header import new_item, plain_text
from gi_segmentation.known_organs import KNOWN_ORGANS, find_organ
from gi_segmentation.labels import GI_TRACT, LabelSet

# The name of SNOMED CT. A scheme of codes that is no standard begins with 99.
STANDARD_SCHEME, OUR_SCHEME = "SCT", "99GISEG"
# What SNOMED CT calls the sides. One code stands for both organs of a pair.
SIDE_CODES = {"left": ("7771000", STANDARD_SCHEME, "Left"), "right": ("24028007", STANDARD_SCHEME, "Right")}
# Letters that a code and a long text may have.
CODE_LENGTH, NAME_LENGTH = 16, 64
# Names of volumes that radiotherapy draws beside organs (ICRU reports 50 and 83), for example `PTV 50`.
TARGET_KINDS = ("GTV", "CTV", "PTV")
TARGET = re.compile(rf"({'|'.join(TARGET_KINDS)})(?![a-z])", re.IGNORECASE)
OUTLINE = re.compile(r"body|external|skin", re.IGNORECASE)


class DicomOrgan(NamedTuple):
    """An organ as DICOM files have it.

    Attributes:
        number: Its number, from 1 on.
        name: Its name in the letters of the file.
        colour: Red, green and blue from 0 to 255.
        code: Value, scheme and meaning of its code.
        side: The same of the side, if the code is that of a pair; None if it is not.
        kind: What it is for a planning system: `ORGAN`, `EXTERNAL`, `GTV`, `CTV` or `PTV`.
    """

    number: int
    name: str
    colour: tuple[int, int, int]
    code: tuple[str, str, str]
    side: tuple[str, str, str] | None
    kind: str

    def add_side(self, code: Any) -> None:
        """Add the side to the code of the organ in a file, if it has one."""
        if self.side is not None:
            value, scheme, meaning = self.side
            code.SegmentedPropertyTypeModifierCodeSequence = [
                new_item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)
            ]


def describe_organs(labels: LabelSet, subject: Any) -> list[DicomOrgan]:
    """Return the organs of a file that is written with the patient and the character set `subject`.

    Args:
        labels: The labels.
        subject: `SeriesHeader.subject`. Its character set may become a wider one.
    """
    names = name_organs(labels, subject)
    return [
        DicomOrgan(number, name, colour, organ_code(organ), organ_side(organ), interpreted_type(organ))
        for number, (organ, name, colour) in enumerate(zip(labels.names, names, labels.colours, strict=True), 1)
    ]


def organ_code(organ: str) -> tuple[str, str, str]:
    """Return the code of an organ: value, scheme and meaning. One that SNOMED CT is not known for gets a code of ours.

    Example:
        >>> organ_code("stomach"), organ_code("Lump 2")
        (('69695003', 'SCT', 'Stomach'), ('Lump 2', '99GISEG', 'Lump 2'))
    """
    if usual := find_organ(organ):
        known = KNOWN_ORGANS[usual]
        return known.code, STANDARD_SCHEME, known.meaning
    plain = spell_plainly(organ)
    short = plain == organ and len(organ) <= CODE_LENGTH
    return organ if short else hashlib.sha256(organ.encode()).hexdigest()[:CODE_LENGTH], OUR_SCHEME, plain


def organ_side(organ: str) -> tuple[str, str, str] | None:
    """Return the code of the side of an organ that is known as one of a pair; None for any other one.

    Example:
        >>> organ_side("Kidney_L"), organ_side("liver")
        (('7771000', 'SCT', 'Left'), None)
    """
    return SIDE_CODES.get((find_organ(organ) or "").rpartition("_")[2])


def interpreted_type(organ: str) -> str:
    """Return what a structure is for a planning system (RT ROI Interpreted Type).

    Example:
        >>> interpreted_type("Lung (left)"), interpreted_type("ptv_50"), interpreted_type("Body")
        ('ORGAN', 'PTV', 'EXTERNAL')
    """
    if target := TARGET.match(organ):
        return target[1].upper()
    return "EXTERNAL" if OUTLINE.fullmatch(organ) else "ORGAN"


def spell_plainly(name: str) -> str:
    """Return a name in letters that every character set has.

    Example:
        >>> spell_plainly("Œsophage né"), spell_plainly("胃")
        ('?sophage ne', '?')
    """
    decomposed = unicodedata.normalize("NFKD", name)
    return plain_text("".join(letter for letter in decomposed if not unicodedata.combining(letter)), NAME_LENGTH)


def name_organs(labels: LabelSet, subject: Any) -> tuple[str, ...]:
    """Return the names of organs as a file can have them, and declare a character set that they need.

    Args:
        labels: The labels.
        subject: `SeriesHeader.subject`. If it has plain letters only, other alphabets can be declared. Otherwise its
            own character set decides, because the name of the patient is copied byte for byte.

    Returns:
        The names. One that the character set cannot have is spelled plainly, with the number of the organ if another
        one would be spelled like it.
    """
    from pydicom.charset import convert_encodings

    if all(name.isascii() for name in labels.names):
        return labels.names
    if all(is_plain(element) for element in subject):
        subject.SpecificCharacterSet = "ISO_IR 192"
    encodings = convert_encodings(subject.get("SpecificCharacterSet") or "")
    names = [name if can_encode(name, encodings) else spell_plainly(name) for name in labels.names]
    return tuple(
        name if names.count(name) == 1 else f"{name[: NAME_LENGTH - 3]} {number}"
        for number, name in enumerate(names, start=1)
    )


def is_plain(element: Any) -> bool:
    """Tell whether an element of a header has plain letters only."""
    value = element.value
    text = getattr(value, "original_string", value)
    return (text if isinstance(text, bytes) else str(text)).isascii()


def can_encode(text: str, encodings: list[str]) -> bool:
    """Tell whether one of some character sets, by Python's names, has all letters of a text."""
    for encoding in encodings:
        try:
            text.encode(encoding)
        except (UnicodeError, LookupError):
            continue
        return True
    return False


def series_title(organs: Sequence[DicomOrgan]) -> str:
    """Return what a series of predicted organs is called."""
    names = tuple(organ.name for organ in organs)
    if names == GI_TRACT.names:
        return TITLE
    title = f"{', '.join(names)}, predicted"
    return title if len(title) <= NAME_LENGTH else f"{len(names)} structures, predicted"
