"""Read DICOM files: tell what is one, and list its slices. A file has one slice, or many frames (enhanced).

A `Frame` has what the other modules of this package need of a slice. `dicom.series` sorts frames into scans,
`dicom.geometry` makes volumes of them, and `dicom.pixels` reads their pixels.
"""

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gi_segmentation.errors import InputError, one_line, reading
from gi_segmentation.formats.dicom.kinds import read_kind, read_text

# The files that hold a scan: MR and CT, with one frame, with many (enhanced), or with many by a conversion (legacy).
# All other files, such as structure sets, segmentations and reports, are passed over.
SCAN_CLASSES = frozenset(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "2.2", "4", "4.1", "4.4"))
# A file that was cut, or whose compression is unknown, may have any bytes. Its name tells that it may be a slice.
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima", ".dic"})
# The types of values that a file may name, and those whose length takes four bytes and not two.
VALUE_TYPES = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
LONG_TYPES = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
UNDEFINED_LENGTH = 0xFFFFFFFF
# The first attributes of a file are short: its class, its UIDs, dates.
MAX_FIRST_LENGTH = 4096
DEFLATED = "1.2.840.10008.1.2.1.99"
# The marks of compressed pixels.
FRAGMENT, END_OF_FRAGMENTS = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
# A coordinate of 1000 mm with this many last decimals is the nearest number that a computer has.
ROUNDING_TOLERANCE = 1e-6


class Frame(NamedTuple):
    """A slice of a series.

    Attributes:
        path: Its file.
        number: Number of the frame in its file, from 1 on; 0 for a file with a single slice.
        instance_uid: Identifies the file. This UID and the next four are empty if they were removed.
        class_uid: Kind of the file.
        series_uid: Identifies the series.
        study_uid: Identifies the study.
        frame_of_reference_uid: Identifies the coordinate system.
        position: Centre of the first pixel in millimetres, on DICOM's axes.
        orientation: Direction of a row, then of a column, on DICOM's axes.
        pixel_spacing: Height and width of a pixel in millimetres.
        size: Number of rows and columns.
        thickness_mm: Distance of slices, or their thickness, as the file states it; None if it does not.
        description: Modality, number and description of the series.
        patient: Number, name and birth date of the patient. None is for the screen.
        kind: What tells it from other images of the same place, see `dicom.kinds.KIND_ATTRIBUTES`.
        rounding_mm: The last decimal of its position, for example 0.1; 0 if it has more than three.
    """

    path: Path
    number: int
    instance_uid: str
    class_uid: str
    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]
    size: tuple[int, int]
    thickness_mm: float | None
    description: str
    patient: tuple[str, str, str]
    kind: Mapping[str, str]
    rounding_mm: float

    @property
    def uids(self) -> dict[str, str]:
        """The identifiers that contours have to name, by the names of their attributes."""
        return {
            "SOPClassUID": self.class_uid,
            "SOPInstanceUID": self.instance_uid,
            "SeriesInstanceUID": self.series_uid,
            "StudyInstanceUID": self.study_uid,
            "FrameOfReferenceUID": self.frame_of_reference_uid,
        }


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """The frames of a series, sorted along their normal."""

    frames: tuple[Frame, ...]

    @property
    def paths(self) -> list[Path]:
        """The files of the series, each once."""
        return list(dict.fromkeys(frame.path for frame in self.frames))


def is_dicom(path: Path) -> bool:
    """Tell by its first bytes whether a file is a DICOM file. The name does not matter.

    Some planning systems leave out the 128 bytes and the letters DICM at the start.
    """
    try:
        with path.open("rb") as file:
            start = file.read(MAX_FIRST_LENGTH)
    except OSError:
        # It may be a slice. The function that reads it reports the error.
        return path.suffix.lower() in DICOM_SUFFIXES or not path.suffix[1:].isalpha()
    return start[128:132] == b"DICM" or begins_with_attributes(start)


def begins_with_attributes(data: bytes) -> bool:
    """Tell whether a file begins with attributes of DICOM, and not with the 128 bytes before them.

    Args:
        data: The first bytes of the file. The first three attributes must be sound.

    Example:
        >>> begins_with_attributes(bytes.fromhex("08000500 43530a00") + b"ISO_IR 100" + bytes.fromhex("08001600"))
        True
        >>> begins_with_attributes(b"A text of more than eight bytes")
        False
    """
    # The first attribute is in group 0002 or 0008. If its high byte comes first, the file is big-endian.
    order = ">" if data[:2] in (b"\x00\x02", b"\x00\x08") else "<"
    place, last = 0, (0, 0)
    for number in range(3):
        if len(data) < place + 12:
            return number > 0
        tag = struct.unpack_from(f"{order}HH", data, place)
        # Attributes are sorted by their tags.
        if tag <= last or (number == 0 and tag[0] not in (0x0002, 0x0008)):
            return False
        value_type, start = data[place + 4 : place + 6], 8
        if value_type not in VALUE_TYPES:
            (length,) = struct.unpack_from(f"{order}I", data, place + 4)
        elif value_type in LONG_TYPES:
            (length,), start = struct.unpack_from(f"{order}I", data, place + 8), 12
        else:
            (length,) = struct.unpack_from(f"{order}H", data, place + 6)
        if length == UNDEFINED_LENGTH:
            return True
        # The standard pads each value to an even length.
        if length % 2 or length > MAX_FIRST_LENGTH:
            return False
        place, last = place + start + length, tag
    return True


def find_damage(path: Path) -> str:
    """Say what is wrong with a file that should be a slice, and is no DICOM file."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        return "a broken link" if path.is_symlink() and not path.exists() else f"cannot be read ({one_line(error)})"
    return "an empty file" if empty else "not a DICOM file, or cut"


def read_dataset(path: Path, stop_before_pixels: bool = False) -> Any:
    """Read a DICOM file. It may lack the 128 bytes and the file meta information at its start.

    Raises:
        InputError: If it is damaged.
    """
    with reading(path, "not a whole DICOM file", "copy or export it again"), path.open("rb") as file:
        return parse_dicom(file, stop_before_pixels)


def parse_dicom(file: BinaryIO, stop_before_pixels: bool) -> Any:
    """Read an open DICOM file. If it does not say how its values are written, the file tells what was found."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    dataset = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels, force=True)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def read_file_header(path: Path) -> tuple[Any, str]:
    """Read a file without its pixels, and look whether they are all there.

    Returns:
        The header, and what is wrong with the pixels; empty if they are whole, or if it is not known.

    Raises:
        InputError: If it is damaged.
    """
    with reading(path, "not a whole DICOM file", "copy or export it again"), path.open("rb") as file:
        header = parse_dicom(file, stop_before_pixels=True)
        if header.file_meta.TransferSyntaxUID == DEFLATED:
            return header, ""
        return header, find_missing_pixels(file, header)


def find_missing_pixels(file: BinaryIO, header: Any) -> str:
    """Say what is wrong with the pixels of a file, without a look at them; empty if nothing is.

    Args:
        file: The file, where its pixels begin.
        header: What stands before them.
    """
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    implicit, little = header.original_encoding
    order = "<" if little else ">"
    # A tag and a length of 4 bytes each. An explicit file has the type of the value and 2 reserved bytes between them.
    start = 8 if implicit else 12
    if place + start > size:
        return "it ends before its pixels"
    file.seek(place + start - 4)
    (length,) = struct.unpack(f"{order}I", file.read(4))
    if length == UNDEFINED_LENGTH:
        return "" if has_all_fragments(file) else "it ends within its pixels"
    if place + start + length > size:
        return f"it ends within its pixels: {size - place - start} of {length} bytes are there"
    frames = int(header.get("NumberOfFrames") or 1)
    bits = [int(header.get(name) or 0) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
    needed = frames * math.prod(bits) // 8
    encapsulated = getattr(header.file_meta.TransferSyntaxUID, "is_encapsulated", False)
    if length < needed and not encapsulated:
        return f"expected {needed} bytes of pixels, got {length}"
    return ""


def has_all_fragments(file: BinaryIO) -> bool:
    """Tell whether compressed pixels come to their end. Each fragment has a mark and its length."""
    while len(mark := file.read(8)) == 8:
        group, element, length = struct.unpack("<HHI", mark)
        if (group, element) == END_OF_FRAGMENTS:
            return True
        if (group, element) != FRAGMENT:
            return False
        file.seek(length, os.SEEK_CUR)
    return False


def is_scan(path: Path, header: Any) -> bool:
    """Tell whether a file holds slices of a scan.

    Raises:
        InputError: If the file does not say what it holds.
    """
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if not kind and "Modality" not in header:
        raise InputError(f"{path}: not a whole DICOM file (no SOPClassUID and no Modality); copy or export it again")
    # A program that removes the patient's data may have removed the kind of the file, too.
    known = str(kind) in SCAN_CLASSES if kind else header.get("Modality") in ("MR", "CT") and "Rows" in header
    return known and "LOCALIZER" not in (header.get("ImageType") or ())


def check_uids(series: DicomSeries) -> None:
    """Check that a segmentation or a structure set can refer to a series.

    Raises:
        InputError: If a file has no UID, if different slices have one UID, or if there are several series.
    """
    for frame in series.frames:
        if missing := [name for name, uid in frame.uids.items() if not uid]:
            raise InputError(
                f"{frame.path}: has no {missing[0]}, which contours have to name; export it with its UIDs, or choose "
                f"--format nifti"
            )
    files: dict[str, Path] = {}
    for frame in series.frames:
        other = files.setdefault(frame.instance_uid, frame.path)
        if other != frame.path:
            raise InputError(
                f"{frame.path}: has the SOPInstanceUID of {other}, which is another slice, so contours cannot name "
                f"one of them; export the series with its own UIDs, or choose --format nifti"
            )
    first = series.frames[0]
    if other_series := [frame for frame in series.frames if frame.series_uid != first.series_uid]:
        raise InputError(
            f"{other_series[0].path}: has another SeriesInstanceUID than {first.path}, and contours have to name one "
            f"series; export the series with its own UIDs, or choose --format nifti"
        )


def read_frames(path: Path, header: Any) -> list[Frame]:
    """Read the header of a file: one frame, or several of an enhanced file.

    Raises:
        InputError: If the file lacks what a volume needs, or if its pixels cannot be decoded here.
    """
    if (colours := header.get("PhotometricInterpretation")) != "MONOCHROME2":
        raise InputError(f"{path}: expected grey values with white as the highest (MONOCHROME2), got {colours}")
    check_codec(path, header)
    check_bits(path, header)
    if tiles := count_tiles(header):
        raise InputError(
            f"{path}: a mosaic: its image shows {tiles} slices side by side; unpack it with dcm2niix, and predict the "
            f"NIfTI file"
        )
    count = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in header:
        if count > 1:
            raise InputError(
                f"{path}: has {count} frames, and does not say where each of them lies (no functional groups); export "
                f"the series as enhanced MR, or as a file per slice"
            )
        return [read_frame(path, 0, header, [header])]
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())
    groups = list(header.PerFrameFunctionalGroupsSequence)
    if len(groups) != count:
        raise InputError(
            f"{path}: has {count} frames, and describes {len(groups)} of them (functional groups); export it again"
        )
    return [read_frame(path, number, header, [own, *shared]) for number, own in enumerate(groups, start=1)]


def check_bits(path: Path, header: Any) -> None:
    """Check that the bits of a pixel are where all readers look for them.

    Raises:
        InputError: If not.
    """
    stored, highest = header.get("BitsStored"), header.get("HighBit")
    if stored is not None and highest is not None and highest != stored - 1:
        raise InputError(
            f"{path}: expected {stored} bits of a pixel up to bit {stored - 1}, got HighBit {highest}; export it again"
        )


def count_tiles(header: Any) -> int | str:
    """Return the number of slices that a scanner has put side by side into one image; 0 if it did not.

    Siemens calls it a mosaic, and United Imaging a volume frame.
    """
    if private := read_text(header, (0x0019, 0x100A)):
        creator = read_text(header, (0x0019, 0x0010))
        if creator == "SIEMENS MR HEADER" and private.isdigit() and int(private) > 1:
            return int(private)
    element = header.get((0x0029, 0x1010))
    tiles = count_tiles_in_protocol(element.value) if element is not None and isinstance(element.value, bytes) else 0
    if tiles > 1:
        return tiles
    return "several" if {"MOSAIC", "VFRAME"} & {*read_text(header, "ImageType").split("\\")} else 0


def count_tiles_in_protocol(protocol: bytes) -> int:
    """Return `NumberOfImagesInMosaic` of the protocol that a scanner of Siemens adds; 0 if there is none.

    An entry has its name in 64 bytes, four numbers of which the last one counts its values, a mark, and for each value
    four numbers, the second of which is its length.
    """
    start = protocol.find(b"NumberOfImagesInMosaic\x00")
    if start < 0 or len(protocol) < start + 84:
        return 0
    (values,) = struct.unpack_from("<i", protocol, start + 76)
    if values < 1 or len(protocol) < start + 100:
        return 0
    (length,) = struct.unpack_from("<i", protocol, start + 88)
    digits = re.match(rb"\s*(\d+)", protocol[start + 100 : start + 100 + max(length, 0)])
    return int(digits[1]) if digits else 0


def check_codec(path: Path, header: Any) -> None:
    """Check that the pixels of a file are not compressed, or that a package can decode them.

    Raises:
        InputError: If there is no such package. The message names those that can.
    """
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    with reading(path, "its pixels are stored in an unknown way", "export it uncompressed"):
        decoder = get_decoder(syntax)
    if not decoder.is_available:
        packages = " or ".join(map(name_packages, decoder.missing_dependencies))
        raise InputError(
            f"{path}: its pixels are compressed ({syntax.name}), and no package here decodes them; "
            f"install with pip {packages}, or export it uncompressed"
        )


def name_packages(dependency: str) -> str:
    """Return the packages to install for a line of the library for DICOM.

    Example:
        >>> name_packages("gdcm - requires gdcm>=3.0.10")
        'python-gdcm>=3.0.10'
        >>> name_packages("pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1")
        'pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1'
    """
    needed = dependency.partition("requires ")[2]
    # The package `gdcm` of PyPI is another program.
    return re.sub(r"\bgdcm\b(?!-)", "python-gdcm", needed)


def read_frame(path: Path, number: int, dataset: Any, groups: Sequence[Any]) -> Frame:
    """Read one frame.

    Args:
        path: The file.
        number: Number of the frame; 0 for a file with a single slice.
        dataset: The header.
        groups: Where to look for the place of the frame: the header itself, or the functional groups.
    """

    def find(sequence: str, name: str) -> Any:
        # The frame's own group comes first, so it wins over the group that all frames share.
        for group in groups:
            for item in (group, *(group.get(sequence) or ())):
                if item.get(name) is not None:
                    return item[name].value
        return None

    def find_length(name: str) -> float | None:
        # A length that is no number counts as missing, because the places of the slices say more.
        with suppress(ValueError, TypeError, OverflowError):
            length = abs(float(find("PixelMeasuresSequence", name) or 0))
            return length if 0 < length < math.inf else None
        return None

    position = find("PlanePositionSequence", "ImagePositionPatient")
    orientation = find("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = find("PixelMeasuresSequence", "PixelSpacing")
    needed = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation, "PixelSpacing": spacing}
    for (name, value), length in zip(needed.items(), (3, 6, 2), strict=True):
        if value is None or isinstance(value, str | float) or len(value) != length:
            raise InputError(f"{path}: has no valid {name}, so its place in the patient is not known; export it again")
    check_scale(path, find("PixelValueTransformationSequence", "RescaleSlope"), "RescaleSlope")
    check_scale(path, find("PixelValueTransformationSequence", "RescaleIntercept"), "RescaleIntercept")
    return Frame(
        path=path,
        number=number,
        instance_uid=str(dataset.get("SOPInstanceUID") or ""),
        class_uid=str(dataset.get("SOPClassUID") or ""),
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        study_uid=str(dataset.get("StudyInstanceUID") or ""),
        frame_of_reference_uid=str(dataset.get("FrameOfReferenceUID") or ""),
        position=tuple(map(float, position)),
        orientation=tuple(map(float, orientation)),
        pixel_spacing=tuple(map(float, spacing)),
        size=(int(dataset.Rows), int(dataset.Columns)),
        thickness_mm=find_length("SpacingBetweenSlices") or find_length("SliceThickness"),
        description=describe_series(dataset),
        # A name may end with the marks of parts that it does not have. Capital letters do not matter.
        patient=(
            read_text(dataset, "PatientID"),
            read_text(dataset, "PatientName").rstrip("^= ").casefold(),
            read_text(dataset, "PatientBirthDate"),
        ),
        kind=read_kind(dataset, groups),
        rounding_mm=min(map(find_rounding, map(float, position))),
    )


def check_scale(path: Path, value: Any, name: str) -> None:
    """Check the number by which stored values are multiplied, or the one that is added.

    Raises:
        InputError: If it is no number, or if it makes all values equal or turns dark and bright round.
    """
    number = math.nan
    with suppress(ValueError, TypeError, OverflowError):
        number = float(1 if value in (None, "") else value)
    lowest = 0.0 if name == "RescaleSlope" else -math.inf
    if not lowest < number < math.inf:
        what = "a number above 0" if name == "RescaleSlope" else "a number"
        raise InputError(f"{path}: expected {what} as {name}, got {str(value)!r:.40}; export it again")


def find_rounding(value: float) -> float:
    """Return the last decimal of a coordinate, 0.1, 0.01 or 0.001; 0.1 for a whole number, and 0 for more decimals.

    Example:
        >>> [find_rounding(value) for value in (1.0, 1.2, 1.25, 1.0625)]
        [0.1, 0.1, 0.01, 0]
    """
    steps = (10.0**-digits for digits in (1, 2, 3))
    return next((step for step in steps if abs(value / step - round(value / step)) < ROUNDING_TOLERANCE), 0)


def describe_series(header: Any) -> str:
    """Return modality, number and description of the series of a file, without control characters."""
    words = (read_text(header, name) for name in ("Modality", "SeriesNumber", "SeriesDescription"))
    return " ".join(filter(None, words))
