"""Copy the patient and the study of a series into the DICOM files that refer to it.

Clinics have headers that break the standard, such as a sex of `UNKNOWN` or a birth date `1990/01/`. Writers refuse
such values, and one bad value must not prevent the contours of a scan. So a value that breaks the standard is left out
here, and a remark names it. Planning systems find the patient by name and ID. These two are copied byte for byte, in
their character set.
"""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.dicom.files import DicomSeries, read_dataset

# Planning systems find the patient by these. They must be there, even if they are empty, and they are never changed.
PATIENT_IDENTITY = ("PatientName", "PatientID")
# These must be there, even if they are empty (type 2 in the standard).
NOT_OPTIONAL = (
    "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
OPTIONAL = ("IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "StudyDescription")
SEXES = ("M", "F", "O")
# Family name, given name, middle name, prefix and suffix.
NAME_PARTS = 5
# The names of character sets as they are meant, such as `ISO IR 100` for ISO_IR 100.
MISSPELLED = re.compile(r"ISO[ _-]?(2022[ _-]?)?IR[ _-]?(\d+)", re.ASCII)
# What the standard allows for a UID that we copy. Some programs write parts that start with a zero.
UID_FORM = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
UID_LENGTH = 64


class SeriesHeader(NamedTuple):
    """What the files that refer to a series take from it.

    Attributes:
        subject: The character set, the patient and the study, ready to be written.
        compression: Whether and how the pixels were compressed with a loss, ready to be written.
        thickness_mm: Thickness of a slice; None if the file has none.
        remarks: What was left out or is odd, a sentence each. No value of the patient is in them.
    """

    subject: Any
    compression: Any
    thickness_mm: float | None
    remarks: tuple[str, ...]


def check_uid_forms(series: DicomSeries) -> None:
    """Check that the identifiers that contours have to name are UIDs. They are never changed.

    Raises:
        InputError: If one is not. An empty one is not looked at, see `files.check_uids`.
    """
    for frame in series.frames:
        for name, uid in frame.uids.items():
            if uid and (len(uid) > UID_LENGTH or not UID_FORM.fullmatch(uid)):
                raise InputError(
                    f"{frame.path}: expected digits and dots, at most {UID_LENGTH}, as {name}, got {uid!r:.80}; "
                    f"contours have to name it, so export it again, or choose --format nifti"
                )


def read_series_header(series: DicomSeries) -> SeriesHeader:
    """Read what the files that refer to a series take from it. A value that breaks the standard is left out.

    Raises:
        InputError: If a file is damaged.
    """
    path = series.frames[0].path
    with reading(path, "its header cannot be read", "export it again"), hush_pydicom():
        header = read_dataset(path, stop_before_pixels=True)
        subject, remarks = copy_subject(header)
        subject.StudyInstanceUID = series.frames[0].study_uid
        thickness_mm = read_thickness(header)
        if thickness_mm is None:
            remarks.append("SliceThickness is missing or no number, and the distance of the slices stands for it")
        return SeriesHeader(subject, copy_compression(header), thickness_mm, tuple(remarks))


def copy_subject(header: Any) -> tuple[Any, list[str]]:
    """Return the character set, the patient and the study of a header, and remarks."""
    from pydicom.charset import convert_encodings
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    values = {name: read_bytes(header, name) for name in (*PATIENT_IDENTITY, *NOT_OPTIONAL, *OPTIONAL)}
    names, remarks = choose_character_set(header, [value for value in values.values() if value])
    encodings, declared = convert_encodings(list(names)), any(names)
    subject = Dataset()
    if declared:
        # pydicom would check and convert a value that it is given in the usual way.
        subject.add(DataElement("SpecificCharacterSet", "CS", names, already_converted=True))
    for name, value in values.items():
        problem = find_value_problem(name, value, encodings, declared) if value else ""
        if problem and name in PATIENT_IDENTITY:
            remarks.append(f"{name} {problem}; it was copied as it is, because programs find the patient by it")
        elif problem:
            remarks.append(f"{name} {problem} and was left {'empty' if name in NOT_OPTIONAL else 'out'}")
            value = b""
        if value or name not in OPTIONAL:
            subject.add(new_element(name, value or b"", encodings))
    if missing := [name for name in NOT_OPTIONAL if values[name] is None]:
        remarks.append(f"{', '.join(missing)}: not in the files, and left empty")
    return subject, remarks


def copy_compression(header: Any) -> Any:
    """Return the attributes that say how the pixels were compressed with a loss; an empty dataset if they were not."""
    from pydicom.dataset import Dataset
    from pydicom.valuerep import format_number_as_ds

    copied = Dataset()
    if header.get("LossyImageCompression") != "01":
        return copied
    copied.LossyImageCompression = "01"
    # Both may have several values, and each may be odd.
    with suppress(ValueError, TypeError, OverflowError):
        if header.get("LossyImageCompressionRatio"):
            ratios = np.atleast_1d(np.array(header.LossyImageCompressionRatio, dtype=float))
            copied.LossyImageCompressionRatio = [format_number_as_ds(float(ratio)) for ratio in ratios]
    with suppress(ValueError, TypeError):
        if header.get("LossyImageCompressionMethod"):
            copied.LossyImageCompressionMethod = header.LossyImageCompressionMethod
    return copied


def read_thickness(header: Any) -> float | None:
    """Return the thickness of a slice in millimetres as a header states it; None if it does not."""
    items = [header]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(header.get(name) or ())[:1]:
            items += list(group.get("PixelMeasuresSequence") or ())[:1]
    for item in items:
        with suppress(ValueError, TypeError, OverflowError):
            thickness_mm = float(item.get("SliceThickness") or 0)
            if 0 < thickness_mm < math.inf:
                return thickness_mm
    return None


def read_bytes(header: Any, name: str) -> bytes | None:
    """Return the bytes of an attribute as they are in the file, without zeros at the end; None if it is not there."""
    from pydicom.datadict import tag_for_keyword

    element = header.get_item(tag_for_keyword(name))
    if element is None:
        return None
    value = element.value or b""
    # The text of a file that is not read from a disk, or of a converted attribute.
    return (value if isinstance(value, bytes) else str(value).encode()).rstrip(b"\0")


def choose_character_set(header: Any, values: list[bytes]) -> tuple[list[str], list[str]]:
    """Return the names of the character sets to write, and remarks.

    Args:
        header: The header. The first of several names may be empty, which is the default.
        values: The texts that are copied.
    """
    from pydicom.charset import python_encoding
    from pydicom.multival import MultiValue

    found = header.get("SpecificCharacterSet") or ""
    found = [str(name).strip() for name in (found if isinstance(found, MultiValue | list) else [found])]
    names = [name if name in python_encoding else respell(name) for name in found]
    unknown = [name for name in names if name not in python_encoding]
    if not unknown:
        return names, [f"SpecificCharacterSet was misspelled and is now {chr(92).join(names)}"] * (names != found)
    if all(value.isascii() and b"\x1b" not in value for value in values):
        return [""], [f"SpecificCharacterSet {unknown[0]!r:.40} is not known and was left out; all letters are plain"]
    return names, [f"SpecificCharacterSet {unknown[0]!r:.40} is not known, so letters may look wrong"]


def respell(name: str) -> str:
    """Return the name of a character set with the usual separators.

    Example:
        >>> respell("ISO IR 100"), respell("ISO_2022_IR_87"), respell("unknown")
        ('ISO_IR 100', 'ISO 2022 IR 87', 'unknown')
    """
    match = MISSPELLED.fullmatch(name)
    return name if match is None else ("ISO 2022 IR " if match[1] else "ISO_IR ") + match[2]


def find_value_problem(name: str, value: bytes, encodings: list[str], declared: bool) -> str:
    """Return why the standard does not allow a value; empty if it does.

    Args:
        name: The attribute.
        value: Its bytes.
        encodings: Python's names of the character sets.
        declared: Whether the file names a character set.
    """
    from pydicom import config
    from pydicom.charset import decode_bytes
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import DA, TEXT_VR_DELIMS, TM, PersonName, validate_value

    vr = str(dictionary_VR(name))
    if not declared and not value.isascii():
        return "has letters, but the file names no character set"
    try:
        # A warning of pydicom says that it has replaced letters.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if vr == "PN":
                text = str(PersonName(value, encodings, validation_mode=config.IGNORE))
            else:
                text = decode_bytes(value, encodings, TEXT_VR_DELIMS)
    except (LookupError, ValueError, UserWarning):
        return "does not fit SpecificCharacterSet"
    text = text.strip(" ")
    try:
        validate_value(vr, text, config.RAISE)
        for form in {"DA": (DA,), "TM": (TM,)}.get(vr, ()):
            form(text)
    except (ValueError, OverflowError):
        return "is not a valid " + {"DA": "date", "TM": "time", "AS": "age", "DS": "number"}.get(vr, "value")
    # pydicom does not look at the parts of a name, nor at what a sex may be.
    parts = max(group.count("^") for group in text.split("=")) if vr == "PN" else 0
    sex = name != "PatientSex" or text in ("", *SEXES)
    return "" if text.isprintable() and "\\" not in text and parts < NAME_PARTS and sex else "is not a valid value"


def new_element(name: str, value: bytes, encodings: list[str]) -> Any:
    """Return an attribute that is written with the same bytes."""
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import DataElement
    from pydicom.valuerep import PersonName

    vr = str(dictionary_VR(name))
    if vr == "PN":
        # With the encodings of the file, pydicom writes the bytes that it was given.
        return DataElement(name, vr, PersonName(value, encodings), already_converted=True)
    if vr in ("LO", "SH"):
        return DataElement(name, vr, value, already_converted=True)
    return DataElement(name, vr, value.decode("ascii").strip(" "), already_converted=True)


def plain_text(text: str, length: int) -> str:
    """Return a text of ours with letters that every character set has, and not longer than an attribute may be.

    Example:
        >>> plain_text("Größe", 4)
        'Gr??'
    """
    return text.encode("ascii", "replace").decode()[:length]


@contextmanager
def hush_pydicom() -> Iterator[None]:
    """Suppress the warnings of pydicom. Our own remarks say what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def set_attributes(dataset: Any, **values: Any) -> Any:
    """Set attributes of a dataset, and return it."""
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def new_item(**values: Any) -> Any:
    """Return a dataset with some attributes."""
    from pydicom.dataset import Dataset

    return set_attributes(Dataset(), **values)
