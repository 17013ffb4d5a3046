"""Read a folder in Kaggle's layout: `train.csv` and the slice images.

A problem of the data does not stop the reading. It becomes one line of text that names the file, the row and what to
do, so that a user sees all problems at once.
"""

import csv
import io
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from gi_segmentation.errors import InputError, one_line
from gi_segmentation.files import FoundFiles, find_files, is_hidden
from gi_segmentation.rle import RleError, Runs, parse_runs
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM, scan_name, slice_name

# Ids and file names have ASCII digits only. Without `re.ASCII`, `\d` would also match digits of other scripts. An id
# pads the number of the slice to four digits, and has no other leading zero: each slice has exactly one valid id.
# Nine digits fit into the 32 bits that the dataset has for a number.
ID_PATTERN = re.compile(r"case(0|[1-9]\d{,8})_day(0|[1-9]\d{,8})_slice_(\d{4}|[1-9]\d{4,8})", re.ASCII)
FILE_PATTERN = re.compile(r"slice_(\d{4,9})_(\d+)_(\d+)_(\d+\.\d+)_(\d+\.\d+)\.png", re.ASCII)
SCAN_PATTERN = re.compile(r"case(\d{1,9})_day(\d{1,9})", re.ASCII)
# The folders between a Kaggle folder and its slices.
FOLDER_PATTERN = re.compile(rf"train|test|scans|case\d{{1,9}}|{SCAN_PATTERN.pattern}", re.ASCII)
# A slice of an MR scanner has at most 1024 x 1024 pixels. A file of a few kilobytes can claim thousands of times as
# many, which would fill the memory.
MAX_PIXELS = 2048 * 2048
# Characters of one value of a CSV. The longest encoding of a slice of `MAX_PIXELS` is shorter.
MAX_CHARACTERS = 2**26
PNG_START = b"\x89PNG\r\n\x1a\n"
# The last chunk of every PNG: length, name and checksum. Pillow reads a file without this chunk and gives no error, so
# a download that stopped too early would not be noticed.
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

# Scans with faulty images or outlines, according to the competition's hosts (data tab and its discussion).
FAULTY_SCANS = frozenset(
    {
        "case7_day0",
        "case9_day27",
        "case13_day0",
        "case34_day20",
        "case43_day18",
        "case43_day26",
        "case61_day14",
        "case81_day30",
        "case83_day11",
        "case124_day19",
        "case138_day0",
        "case144_day15",
    }
)


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


class SliceSizeError(KaggleDataError):
    """A slice image whose size differs from the size in its name.

    `dataset_builder.verify` treats this problem on its own, because the encodings may fit either of the two sizes.
    """


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

    @property
    def scan(self) -> str:
        """Name of the scan (volume) that the slice belongs to, for example `case123_day20`."""
        return scan_name(self.case, self.day)

    @property
    def id(self) -> str:
        """Kaggle's id of the slice, for example `case123_day20_slice_0001`."""
        return slice_name(self.scan, self.number)

    @property
    def thickness_mm(self) -> float:
        """Distance between slices, which is the same in all scans of the competition."""
        return SLICE_THICKNESS_MM


class Annotation(NamedTuple):
    """One row of `train.csv`: the mask of an organ on a slice. `row` is the line number in the file."""

    rle: str
    row: int


@dataclass(frozen=True)
class Scan:
    """One volume.

    Attributes:
        name: For example `case123_day20`.
        case: Number of the patient.
        slices: Sorted by number.
        annotations: By slice id and organ; None if the split has no annotations.
        fold: Number of the fold of its patient; None before the patients are divided.
    """

    name: str
    case: int
    slices: list[SliceFile]
    annotations: dict[str, dict[str, Annotation]] | None = field(default=None, repr=False)
    fold: int | None = None


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
        >>> parsed = parse_slice_path(Path("case12_day3/scans/slice_0007_360_310_1.50_1.50.png"))
        >>> parsed.id, parsed.height, parsed.width, parsed.pixel_spacing
        ('case12_day3_slice_0007', 310, 360, (1.5, 1.5))
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


def find_slices(folder: Path) -> tuple[list[SliceFile], list[str]]:
    """List the slice images below a folder.

    Args:
        folder: Any folder above the slices: `train` of a Kaggle folder, or the folder of one scan.

    Returns:
        The slices, sorted by case, day and number. Then the problems, see `parse_slices`, and links to folders that
        are missing.

    Raises:
        KaggleDataError: If a folder cannot be read.
    """
    if not folder.exists() and not folder.is_symlink():
        return [], []
    try:
        found = find_files(folder) if folder.exists() else FoundFiles([], [folder], [])
    except InputError as error:
        raise KaggleDataError([str(error)]) from error
    slices, problems = parse_slices(list_pngs(found))
    return slices, [*problems.values(), *find_lost(found.broken).values()]


def list_pngs(found: FoundFiles) -> list[Path]:
    """Return the PNGs of a folder, sorted.

    A link with the name of a scan is a scan, even if its folder is also there under another name. A broken link to a
    PNG is one of them, because it stands for a slice: who reads it gets an error.
    """
    files = found.files + found.broken
    for folder in found.repeated:
        if SCAN_PATTERN.fullmatch(scan_folder(folder / "slice.png")):
            files += [path for path in (*folder.glob("*"), *folder.glob("scans/*")) if not is_hidden(path)]
    return sorted(path for path in files if path.suffix == ".png")


def find_lost(broken: Sequence[Path]) -> dict[Path, str]:
    """Return the problems of the broken links that have the name of a folder with slices."""
    return {
        path: f"{path}: a link to {path.readlink()}, which is missing; correct the link or remove it"
        for path in broken
        if FOLDER_PATTERN.fullmatch(path.name)
    }


def parse_slices(paths: Iterable[Path]) -> tuple[list[SliceFile], dict[Path, str]]:
    """Read the paths of slice images, in any order.

    Returns:
        The slices, sorted by case, day and number. Then the problems by file: each PNG whose path does not describe a
        slice, and each PNG with the id of another one.
    """
    slices: dict[str, SliceFile] = {}
    misnamed: dict[Path, str] = {}
    copies: dict[Path, str] = {}
    # By links to its folder, one file can have several paths. It is one slice, under a path that is right.
    resolve = cache(Path.resolve)
    for path in sorted(paths):
        try:
            parsed = parse_slice_path(path)
        except KaggleDataError as error:
            misnamed[path] = str(error)
            continue
        # Two files can have one id, because the id has neither size nor spacing.
        first = slices.setdefault(parsed.id, parsed).path
        if path != first and (path.name, resolve(path.parent)) != (first.name, resolve(first.parent)):
            copies[path] = f"{path}: the same slice as {first}; remove one of them"
    if misnamed:
        right = {(one.path.name, resolve(one.path.parent)) for one in slices.values()}
        misnamed = {path: text for path, text in misnamed.items() if (path.name, resolve(path.parent)) not in right}
    problems = dict(sorted((misnamed | copies).items()))
    # Sorted by numbers: as text, case10 would come before case2.
    return sorted(slices.values(), key=lambda item: (item.case, item.day, item.number)), problems


def read_annotations(
    csv_path: Path, rle_column: str = "segmentation"
) -> tuple[dict[str, dict[str, Annotation]], list[str]]:
    """Read an annotation CSV, or a submission.

    Args:
        csv_path: File with the columns `id`, `class` and `rle_column`; other columns are ignored.
        rle_column: Column of the run-length encodings: `segmentation` in `train.csv`, `predicted` in a submission.

    Returns:
        Annotations by slice id and organ, and the problems of the rows that were left out. The encodings are not
        checked here, because this needs the size of the image; see `read_segmentation`.

    Raises:
        KaggleDataError: If the file does not exist, is not a CSV, lacks a column or has no rows.
    """
    columns = ("id", "class", rle_column)
    if not csv_path.is_file():
        raise KaggleDataError(
            [f"{csv_path}: no such file; expected Kaggle's CSV with the columns {', '.join(columns)}"]
        )
    ids, organs, rles = read_table(csv_path, columns)
    annotations: dict[str, dict[str, Annotation]] = defaultdict(dict)
    problems: list[str] = []
    left_out: list[int] = []
    for index, (slice_id, organ, rle) in enumerate(zip(ids, organs, rles, strict=True)):
        # Rows are numbered as an editor numbers lines: from 1, and line 1 is the header.
        row = index + 2
        where = f"{csv_path}, row {row}"
        # A blank line is harmless. It was read only so that the rows below keep their numbers.
        if not (slice_id or organ or rle):
            continue
        if not ID_PATTERN.fullmatch(slice_id):
            problems.append(f"{where}: expected an id like case123_day20_slice_0001, got {slice_id!r}; correct it")
            left_out.append(index)
        elif organ not in ORGANS:
            problems.append(f"{where}: expected a class of {', '.join(ORGANS)}; got {organ!r}; correct it")
            left_out.append(index)
        elif organ in annotations[slice_id]:
            first = annotations[slice_id][organ].row
            problems.append(f"{where}: {slice_id} {organ} is in row {first} already; remove one")
        else:
            annotations[slice_id][organ] = Annotation(rle, row)
    if not annotations and not problems:
        raise KaggleDataError([f"{csv_path}: no rows below the header; download it again"])
    # One mistake must give one message. A row that was left out has been reported, and its slice would be reported
    # again because it lacks an organ. An empty mask prevents this. It is never used: a folder with problems is not
    # built, and a submission with problems is not scored.
    for index in left_out:
        if meant := guess_row(index, ids, organs, annotations):
            slice_id, organ = meant
            annotations[slice_id][organ] = Annotation("", index + 2)
    return dict(annotations), problems


def read_header(csv_path: Path) -> list[str]:
    """Return the names of the columns of a CSV that `read_table` can read."""
    with csv_path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file))


def read_table(csv_path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Read columns of a CSV as text. Blank lines are kept, so that the number of a row is its line in the file.

    Returns:
        The values of each column, in the order of `columns`. Those of a blank line are empty.

    Raises:
        KaggleDataError: If the file is not a CSV, lacks a column, or has a row with more or fewer values than columns.
    """
    # The module `csv` tells a row that was cut off from a row with an empty value. pandas fills up the former.
    csv.field_size_limit(MAX_CHARACTERS)
    try:
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
        if not lines:
            raise csv.Error("it is empty")
        header, *rows = lines
        if separator := next((sign for sign in ";\t|" if len(header) == 1 and sign in header[0]), None):
            raise KaggleDataError(
                [f"{csv_path}: expected values separated by commas, got {separator!r} between them; save it again so"]
            )
        wrong = next((index for index, row in enumerate(rows) if row and len(row) != len(header)), None)
        if wrong is not None:
            raise csv.Error(f"expected {len(header)} values in line {wrong + 2}, got {len(rows[wrong])}")
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        reason = one_line(error)
        raise KaggleDataError(
            [f"{csv_path}: expected a CSV in UTF-8, but it is not readable ({reason}); download it again"]
        ) from error
    missing = [column for column in columns if header.count(column) != 1]
    if missing:
        raise KaggleDataError(
            [f"{csv_path}: expected the columns {', '.join(columns)}; {', '.join(missing)} missing or given twice, "
             f"got {' '.join(', '.join(header).split())[:200]}; download it again"]
        )  # fmt: skip
    places = [header.index(column) for column in columns]
    return [[row[place] if row else "" for row in rows] for place in places]


def guess_row(
    index: int, ids: Sequence[str], organs: Sequence[str], annotations: dict[str, dict[str, Annotation]]
) -> tuple[str, str] | None:
    """Guess which organ of which slice a row with a wrong id or a wrong class stands for.

    Args:
        index: Index of the row.
        ids: Column `id` of all rows.
        organs: Column `class` of all rows.
        annotations: By slice id and organ, from the rows that are right.

    Returns:
        Slice id and organ. None if all slices near the row have all their organs.
    """
    # The three rows of a slice stand together. So the slice is that of the row itself or, if its id is wrong, that of
    # a row at most two lines away.
    near = [ids[other] for other in (index, index - 1, index + 1, index - 2, index + 2) if 0 <= other < len(ids)]
    possible = (organs[index],) if organs[index] in ORGANS else ORGANS
    for slice_id in filter(ID_PATTERN.fullmatch, near):
        for organ in possible:
            if organ not in annotations.get(slice_id, {}):
                return slice_id, organ
    return None


def read_segmentation(
    organs: dict[str, Annotation], slice_file: SliceFile, csv_path: Path
) -> tuple[dict[str, Runs], list[str]]:
    """Read and check the encodings of a slice.

    Returns:
        The runs of each organ with a valid encoding. Then the problems: wrong encodings, and organs without a row.
    """
    runs: dict[str, Runs] = {}
    problems: list[str] = []
    for organ in ORGANS:
        if organ not in organs:
            problems.append(
                f"{csv_path}: {slice_file.id} has no row for {organ}; add one, with an empty segmentation if need be"
            )
            continue
        try:
            runs[organ] = parse_runs(organs[organ].rle, slice_file.height * slice_file.width)
        except RleError as error:
            problems.append(
                f"{csv_path}, row {organs[organ].row}: {slice_file.id} {organ}: {error}; correct the segmentation"
            )
    return runs, problems


def is_whole_slice(data: bytes, width: int, height: int) -> bool:
    """Tell, without decoding the pixels, whether a file is a whole slice image.

    The checksum of each chunk shows that the file is as it was written. This takes a twentieth of the time that
    decoding takes.

    Args:
        data: Bytes of the file.
        width: Expected width in pixels.
        height: Expected height in pixels.

    Returns:
        True if it is a 16-bit grayscale PNG of this size without any chunks but header, the mark of a phantom, pixels
        and end, and all checksums are right. False says nothing: it may be another kind of image, for example an
        interlaced one.

    Source: https://www.w3.org/TR/png-3/, sections 5.3 (chunks) and 11.2.1 (header).
    """
    # `check_image` gives an error for an image without pixels or of an absurd size, which a name may state too.
    if not 0 < width * height <= MAX_PIXELS:
        return False
    # Length, name, size, bits of a pixel, and zeros for: grayscale, the usual compression and filters, not interlaced.
    if not data.startswith(PNG_START + struct.pack(">I4sIIB4x", 13, b"IHDR", width, height, 16)):
        return False
    view, names, place = memoryview(data), [], len(PNG_START)
    while place < len(data):
        # A chunk has the length of its data (4 bytes), a name (4), the data, and the checksum of name and data (4).
        end = place + 8 + int.from_bytes(view[place : place + 4])
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return False
        names.append(bytes(view[place + 4 : place + 8]))
        place = end + 4
    # The mark of `data.synthetic` is one text before the pixels.
    pixels = names[2:-1] if names[1:2] == [b"tEXt"] else names[1:-1]
    return names[0] == b"IHDR" and set(pixels) == {b"IDAT"} and data.endswith(PNG_END)


def from_end_chunk(data: bytes) -> bytes:
    """Return the bytes of a PNG from its first chunk `IEND` on; nothing if there is none."""
    # Each chunk has its length in 4 bytes, its name in 4 bytes, its content, and a checksum of 4 bytes.
    place = 8
    while place < len(data) and data[place + 4 : place + 8] != b"IEND":
        place += 12 + int.from_bytes(data[place : place + 4])
    return data[place:]


def check_image(data: bytes, name: object, width: int, height: int) -> None:
    """Check that bytes are a whole slice image of a size.

    Args:
        data: Bytes of the image.
        name: Path or id of the slice, for messages.
        width: Expected width in pixels.
        height: Expected height in pixels.

    Raises:
        KaggleDataError: If the image is not a whole 16-bit grayscale PNG, or has another size.
    """
    if is_whole_slice(data, width, height):
        return
    try:
        # With `formats`, another kind of image with the name of a PNG is an error.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"its header claims {image.width}x{image.height} pixels, more than a slice has")
            # `open` reads the header only. `load` decodes the pixels, and so finds a file that was cut off.
            image.load()
        if from_end_chunk(data) != PNG_END:
            raise OSError("its end is missing, or something follows it")
        # `load` does not look at the checksums of the pixels. `verify` does, and it needs an image of its own.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as unread:
            unread.verify()
    # For a broken chunk Pillow raises SyntaxError or ValueError. For a header with an absurd size, which would fill
    # the memory, it raises DecompressionBombError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no PNG header" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise KaggleDataError([f"{name}: not a whole PNG ({reason}); download it again"]) from error
    # 16 bits: older releases of Pillow call the mode `I`, newer ones `I;16`. In an image of 8 bits, which other tools
    # write, most of the intensities are lost.
    if image.mode not in ("I;16", "I"):
        raise KaggleDataError([f"{name}: expected 16-bit grayscale, got mode {image.mode}; use the original file"])
    if image.size != (width, height):
        raise SliceSizeError(
            [f"{name}: its name says {width}x{height}, "
             f"the image has {image.size[0]}x{image.size[1]}; correct the name"]
        )  # fmt: skip


def decode_image(data: bytes, name: object, width: int, height: int) -> np.ndarray:
    """Check and decode a slice image; arguments as `check_image`.

    Every reader of pixels must come here. Pillow alone leaves the checksums out: one wrong bit in the last chunk gives
    other pixels, without an error.

    Returns:
        Raw intensities, uint16, shape `(height, width)`.

    Raises:
        KaggleDataError: As `check_image`, or if the pixels cannot be decoded.
    """
    check_image(data, name, width, height)
    try:
        # `np.array` keeps all 16 bits. `convert("RGB")`, as in many examples, would clip every intensity above 255.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        # The pixels of a faulty program may have right checksums.
        raise KaggleDataError([f"{name}: its pixels cannot be decoded ({one_line(error)})"]) from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        KaggleDataError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise KaggleDataError([f"{path}: not readable ({one_line(error)}); download it again"]) from error


def read_slice(slice_file: SliceFile) -> bytes:
    """Read the PNG of a slice, and check that it is a whole image of the size in its name.

    Returns:
        The bytes of the file, unchanged.

    Raises:
        KaggleDataError: If the file is not a whole 16-bit grayscale PNG, or has another size than its name says.
    """
    # The file is read once. The bytes that pass the checks are the bytes that the dataset stores.
    data = read_file(slice_file.path)
    check_image(data, slice_file.path, slice_file.width, slice_file.height)
    return data


def split_names(kaggle_dir: Path) -> list[str]:
    """Return the splits of a Kaggle folder: always `train`, and `test` if that folder has slices or problems."""
    return ["train", "test"] if any(find_slices(kaggle_dir / "test")) else ["train"]


def group_scans(slices: list[SliceFile], annotations: dict[str, dict[str, Annotation]] | None) -> list[Scan]:
    """Group sorted slices into scans, and add the annotations of their slices."""
    by_scan: dict[str, list[SliceFile]] = defaultdict(list)
    for slice_file in slices:
        by_scan[slice_file.scan].append(slice_file)
    return [
        Scan(
            name=name,
            case=members[0].case,
            slices=members,
            annotations=None if annotations is None else {s.id: annotations.get(s.id, {}) for s in members},
        )
        for name, members in by_scan.items()
    ]


def read_scans(kaggle_dir: Path, split: str = "train") -> tuple[list[Scan], list[str]]:
    """List the scans of a Kaggle folder and their annotations.

    Args:
        kaggle_dir: Folder with `train.csv` and `train/`.
        split: `train`, whose slices need annotations, or `test`, whose slices have none.

    Returns:
        The scans, sorted by case and day, and the problems of the CSV and of the file names. Pixels are not read. If
        the CSV is not readable, the scans have no annotations.

    Raises:
        KaggleDataError: If the folder does not exist.
    """
    folder = kaggle_dir / split
    if not kaggle_dir.is_dir():
        raise KaggleDataError([f"{kaggle_dir}: no such folder; expected the unpacked Kaggle download"])
    csv_path = kaggle_dir / "train.csv"
    annotations: dict[str, dict[str, Annotation]] | None = None
    problems: list[str] = []
    if split == "train":
        try:
            annotations, problems = read_annotations(csv_path)
        except KaggleDataError as error:
            # The images are checked all the same: one run must report all problems.
            problems = error.problems
    slices, path_problems = find_slices(folder)
    problems += path_problems
    if not slices and not path_problems:
        problems.append(
            f"{folder}: no slices; expected caseN/caseN_dayN/scans/slice_*.png below it; unpack them there"
        )
    elif annotations is not None:
        problems += compare_slices(slices, annotations, folder, csv_path)
    return group_scans(slices, annotations), problems


def compare_slices(
    slices: list[SliceFile], annotations: dict[str, dict[str, Annotation]], folder: Path, csv_path: Path
) -> list[str]:
    """Return the problems of slices with an image but no rows, and of slices with rows but no image."""
    found = {slice_file.id for slice_file in slices}
    missing: dict[str, list[str]] = defaultdict(list)
    for slice_id in annotations:
        if slice_id not in found:
            missing[slice_id.split("_slice_")[0]].append(slice_id)
    # Again one message for one mistake: `find_slices` has reported every image with a wrong name, so its slice is not
    # reported as missing too. Names with a number come first, because they leave fewer slices to choose from.
    pngs = list_pngs(find_files(folder)) if missing and folder.is_dir() else []
    misnamed = [path for path in pngs if not FILE_PATTERN.fullmatch(path.name)]
    for path in sorted(misnamed, key=lambda path: (re.search(r"\d", path.name) is None, path)):
        candidates = missing.get(scan_folder(path), [])
        meant = guess_slice(path, candidates)
        if meant is not None:
            candidates.remove(meant)
    problems = [
        f"{csv_path}, row {min(annotation.row for annotation in annotations[slice_id].values())}: "
        f"no PNG for {slice_id} under {folder}; add the file or remove its rows"
        for candidates in missing.values()
        for slice_id in candidates
    ]
    problems += [
        f"{s.path}: no rows for {s.id} in {csv_path}; add them or remove the file"
        for s in slices
        if s.id not in annotations
    ]
    return problems


def guess_slice(path: Path, candidates: Sequence[str]) -> str | None:
    """Guess which slice an image with a wrong name is.

    Args:
        path: The image.
        candidates: Ids of the slices of its scan that have no image.

    Returns:
        The slice with the number in the name or, if the scan has only one candidate, this one. Otherwise None.
    """
    number = re.search(r"\d+", path.name, re.ASCII)
    meant = slice_name(scan_folder(path), int(number[0])) if number else None
    if meant in candidates:
        return meant
    return candidates[0] if len(candidates) == 1 else None
