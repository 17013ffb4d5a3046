"""Kaggle's names: ids of slices, and the paths of their images, which state size and pixel spacing."""

import re
from pathlib import Path
from typing import NamedTuple

from gi_segmentation.errors import InputError
from gi_segmentation.schema import SLICE_THICKNESS_MM, scan_name, slice_name

# Ids and file names have ASCII digits only. Without `re.ASCII`, `\d` would also match digits of other scripts. An id
# pads the number of the slice to four digits, and has no other leading zero: each slice has exactly one valid id.
# Nine digits fit into the 32 bits that the dataset has for a number.
ID_PATTERN = re.compile(r"case(0|[1-9]\d{,8})_day(0|[1-9]\d{,8})_slice_(\d{4}|[1-9]\d{4,8})", re.ASCII)
FILE_PATTERN = re.compile(r"slice_(\d{4,9})_(\d+)_(\d+)_(\d+\.\d+)_(\d+\.\d+)\.png", re.ASCII)
SCAN_PATTERN = re.compile(r"case(\d{1,9})_day(\d{1,9})", re.ASCII)
# The folders between a Kaggle folder and its slices.
FOLDER_PATTERN = re.compile(rf"train|test|scans|case\d{{1,9}}|{SCAN_PATTERN.pattern}", re.ASCII)


class KaggleDataError(InputError):
    """The problems that were found in a Kaggle folder.

    Attributes:
        problems: One line per problem, with the file, the row if there is one, and what to do.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = (
            f"\n... and {len(problems) - 1} more; `python -m dataset_builder verify` lists all" if problems[1:] else ""
        )
        super().__init__(problems[0] + more)

    def __reduce__(self) -> tuple[type["KaggleDataError"], tuple[list[str]]]:
        # Worker processes send exceptions as pickles. By default, a pickle calls the class again with the message as
        # its argument, and the message would become the list of problems.
        return KaggleDataError, (self.problems,)


class SliceFile(NamedTuple):
    """One slice image, described by its path. No pixel has been read."""

    path: Path
    case: int
    day: int
    number: int
    width: int
    height: int
    # Height and width of a pixel in millimetres.
    pixel_spacing: tuple[float, float]
    # Distance between slices in millimetres. It is the same in all scans of the competition.
    thickness_mm: float = SLICE_THICKNESS_MM

    @property
    def scan(self) -> str:
        """Name of the scan (volume) that the slice belongs to, for example `case123_day20`."""
        return scan_name(self.case, self.day)

    @property
    def id(self) -> str:
        """Kaggle's id of the slice, for example `case123_day20_slice_0001`."""
        return slice_name(self.scan, self.number)


def scan_folder(path: Path) -> str:
    """Return the name of the folder above a slice that should be the name of its scan."""
    # Kaggle puts the folder `scans` between the scan and its slices. Predictions also accept slices without it.
    return path.parent.parent.name if path.parent.name == "scans" else path.parent.name


def parse_slice_path(path: Path) -> SliceFile:
    """Read scan, number, size and pixel spacing of a slice from its path.

    Args:
        path: Path that ends in `caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png`, or in
            `caseN_dayN/slice_....png`.

    Raises:
        KaggleDataError: If the file or its folder has another form of name.

    Example:
        >>> parsed = parse_slice_path(Path("case12_day3/scans/slice_0007_360_310_1.50_1.63.png"))
        >>> parsed.id, parsed.height, parsed.width, parsed.pixel_spacing
        ('case12_day3_slice_0007', 310, 360, (1.63, 1.5))
    """
    name = FILE_PATTERN.fullmatch(path.name)
    scan = SCAN_PATTERN.fullmatch(scan_folder(path))
    if not name or not scan:
        # A name may contain a line break, and a message is one line.
        shown = " ".join(str(path).splitlines())
        raise KaggleDataError(
            [f"{shown}: expected caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png; rename or remove it"]
        )
    # The name states the width before the height. All of our code uses the order of arrays: height, then width.
    number, width, height = (int(text) for text in name.groups()[:3])
    column_spacing, row_spacing = (float(text) for text in name.groups()[3:])
    return SliceFile(path, int(scan[1]), int(scan[2]), number, width, height, (row_spacing, column_spacing))
