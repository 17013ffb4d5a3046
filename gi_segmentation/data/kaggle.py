"""Read a folder in Kaggle's layout: `train.csv` and the slice images, every problem named by file and row."""

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image, UnidentifiedImageError

from gi_segmentation.errors import InputError
from gi_segmentation.rle import RleError, parse_runs
from gi_segmentation.schema import ORGANS, scan_name, slice_name

ID_PATTERN = re.compile(r"case(0|[1-9]\d*)_day(0|[1-9]\d*)_slice_(\d{4}|[1-9]\d{4,})", re.ASCII)
FILE_PATTERN = re.compile(r"slice_(\d{4,})_(\d+)_(\d+)_(\d+\.\d+)_(\d+\.\d+)\.png", re.ASCII)
SCAN_PATTERN = re.compile(r"case(\d+)_day(\d+)", re.ASCII)
PNG_END = b"IEND\xaeB`\x82"  # name and checksum of the last chunk: Pillow reads a PNG without it, and says nothing

# Scans whose images or outlines the competition's hosts call faulty (see the data tab and its discussion).
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
    """What is wrong with a Kaggle folder.

    Attributes:
        problems: One line each, naming the file, the row where there is one, and the remedy.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = (
            f"\n... and {len(problems) - 1} more; `python -m dataset_builder verify` lists all" if problems[1:] else ""
        )
        super().__init__(problems[0] + more)

    def __reduce__(self) -> tuple[type["KaggleDataError"], tuple[list[str]]]:
        return KaggleDataError, (self.problems,)  # so that it crosses process borders whole


class SliceSizeError(KaggleDataError):
    """A slice image of another size than its name says."""


class SliceFile(NamedTuple):
    """One slice image, as its path tells it."""

    path: Path
    case: int
    day: int
    number: int
    width: int
    height: int
    pixel_spacing: tuple[float, float]  # (row mm, column mm)

    @property
    def scan(self) -> str:
        """Name of the volume that the slice belongs to, `case123_day20`."""
        return scan_name(self.case, self.day)

    @property
    def id(self) -> str:
        """Kaggle's id of the slice, `case123_day20_slice_0001`."""
        return slice_name(self.scan, self.number)


class Annotation(NamedTuple):
    """One row of `train.csv`: an organ on a slice, `row` being its line in the file."""

    rle: str
    row: int


@dataclass(frozen=True)
class Scan:
    """The slices of one volume, ascending, with their annotations by slice id where the split has any."""

    name: str
    case: int
    slices: list[SliceFile]
    annotations: dict[str, dict[str, Annotation]] | None = field(default=None, repr=False)


def scan_folder(path: Path) -> str:
    """Name of the folder that should name a slice's scan."""
    return path.parent.parent.name if path.parent.name == "scans" else path.parent.name


def parse_slice_path(path: Path) -> SliceFile:
    """Read what a slice's path says.

    Args:
        path: Path that ends in `caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png`, or in
            `caseN_dayN/slice_....png`.

    Raises:
        KaggleDataError: If the file or its folder is not named so.

    Example:
        >>> parsed = parse_slice_path(Path("case12_day3/scans/slice_0007_360_310_1.50_1.50.png"))
        >>> parsed.id, parsed.height, parsed.width, parsed.pixel_spacing
        ('case12_day3_slice_0007', 310, 360, (1.5, 1.5))
    """
    name = FILE_PATTERN.fullmatch(path.name)
    scan = SCAN_PATTERN.fullmatch(scan_folder(path))
    if not name or not scan:
        raise KaggleDataError(
            [f"{path}: expected caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png; rename or remove it"]
        )
    number, width, height = (int(text) for text in name.groups()[:3])
    column_spacing, row_spacing = (float(text) for text in name.groups()[3:])
    return SliceFile(path, int(scan[1]), int(scan[2]), number, width, height, (row_spacing, column_spacing))


def find_slices(folder: Path) -> tuple[list[SliceFile], list[str]]:
    """List the slice images below a folder.

    Args:
        folder: Any folder above the scans, `train` of a Kaggle folder or one scan.

    Returns:
        The slices, sorted by case, day and number, and a problem for every PNG whose path is not a slice's, or that
        repeats an id.
    """
    slices: dict[str, SliceFile] = {}
    problems: list[str] = []
    for path in sorted(folder.rglob("*.png")):
        try:
            parsed = parse_slice_path(path)
        except KaggleDataError as error:
            problems += error.problems
            continue
        if parsed.id in slices:
            problems.append(f"{path}: the same slice as {slices[parsed.id].path}; remove one of them")
        slices[parsed.id] = parsed
    return sorted(slices.values(), key=lambda item: (item.case, item.day, item.number)), problems


def find_input(folder: Path) -> list[SliceFile]:
    """List the slices to predict.

    Raises:
        InputError: If the folder is missing, has no slices, or has PNGs that are not slices.
    """
    if not folder.is_dir():
        raise InputError(f"--input {folder}: no such folder")
    slices, problems = find_slices(folder)
    if problems:
        raise KaggleDataError(problems)
    if not slices:
        raise InputError(f"--input {folder}: no slices; expected caseN_dayN/scans/slice_*.png below it")
    return slices


def read_annotations(
    csv_path: Path, rle_column: str = "segmentation"
) -> tuple[dict[str, dict[str, Annotation]], list[str]]:
    """Read an annotation CSV, or a submission.

    Args:
        csv_path: File with the columns `id`, `class` and the one of the encodings; others are ignored.
        rle_column: `segmentation` in Kaggle's `train.csv`, `predicted` in a submission.

    Returns:
        Annotations by slice id and organ, and the problems of the rows that were left out. Run-length encodings are
        not looked at here: that needs the image's size, see `check_segmentation`.

    Raises:
        KaggleDataError: If the file is missing, is no CSV, lacks a column or has no rows.
    """
    columns = ("id", "class", rle_column)
    if not csv_path.is_file():
        raise KaggleDataError(
            [f"{csv_path}: no such file; expected Kaggle's CSV with the columns {', '.join(columns)}"]
        )
    table = read_table(csv_path, columns)
    ids, organs, rles = (table[column].tolist() for column in columns)
    annotations: dict[str, dict[str, Annotation]] = defaultdict(dict)
    problems: list[str] = []
    left_out: list[int] = []
    for index, (slice_id, organ, rle) in enumerate(zip(ids, organs, rles, strict=True)):
        row = index + 2  # line 1 is the header
        where = f"{csv_path}, row {row}"
        if not (slice_id or organ or rle):
            continue  # a blank line
        if not ID_PATTERN.fullmatch(slice_id):
            problems.append(f"{where}: expected an id like case123_day20_slice_0001, got {slice_id!r}; correct it")
            left_out.append(index)
        elif organ not in ORGANS:
            problems.append(f"{where}: expected a class of {', '.join(ORGANS)}; got {organ!r}; correct it")
            left_out.append(index)
        elif organ in annotations[slice_id]:
            first = annotations[slice_id][organ].row
            problems.append(f"{where}: {slice_id} {organ} stands in row {first} already; remove one")
        else:
            annotations[slice_id][organ] = Annotation(rle, row)
    if not annotations and not problems:
        raise KaggleDataError([f"{csv_path}: no rows below the header; download it again"])
    excuse_missing_organs(annotations, ids, organs, left_out)
    return dict(annotations), problems


def read_table(csv_path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV as text, blank lines included, so that a row's number is its line in the file.

    Raises:
        KaggleDataError: If it is no CSV or lacks a column.
    """
    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, na_filter=False, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise KaggleDataError(
            [f"{csv_path}: expected a CSV in UTF-8, but it is not readable ({reason}); download it again"]
        ) from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise KaggleDataError(
            [f"{csv_path}: expected the columns {', '.join(columns)}; {', '.join(missing)} missing, "
             f"got {', '.join(map(str, table.columns))}; download it again"]
        )  # fmt: skip
    return table


def excuse_missing_organs(
    annotations: dict[str, dict[str, Annotation]], ids: list[str], organs: list[str], left_out: list[int]
) -> None:
    """Enter an empty mask for each row that was left out, if it is clear which organ of which slice the row meant.

    The row is reported already: that its slice lacks an organ would be the same problem a second time.

    Args:
        annotations: Annotations by slice id and organ, changed in place.
        ids: Column `id` of all rows. A slice's rows stand together, so a wrong id means a neighbour's slice.
        organs: Column `class` of all rows.
        left_out: Indices of the rows whose id or class is wrong.
    """
    for index in left_out:
        neighbours = [
            ids[near] for near in (index, index - 1, index + 1, index - 2, index + 2) if 0 <= near < len(ids)
        ]
        for slice_id in filter(ID_PATTERN.fullmatch, neighbours):
            lacking = [organ for organ in ORGANS if organ not in annotations.get(slice_id, {})]
            meant = organs[index] if organs[index] in ORGANS else next(iter(lacking), None)
            if meant in lacking:
                annotations.setdefault(slice_id, {})[meant] = Annotation("", index + 2)
                break


def check_segmentation(organs: dict[str, Annotation], slice_file: SliceFile, csv_path: Path) -> Iterator[str]:
    """Yield the problems of one slice's run-length encodings, and of organs without a row."""
    for organ in ORGANS:
        if organ not in organs:
            yield f"{csv_path}: {slice_file.id} has no row for {organ}; add one, with an empty segmentation if need be"
            continue
        try:
            parse_runs(organs[organ].rle, slice_file.height * slice_file.width)
        except RleError as error:
            yield f"{csv_path}, row {organs[organ].row}: {slice_file.id} {organ}: {error}; correct the segmentation"


def read_slice(slice_file: SliceFile) -> bytes:
    """Read a slice's PNG and check that it is what its name says.

    Returns:
        The file's bytes, unchanged.

    Raises:
        KaggleDataError: If it is no whole 16-bit grayscale PNG of the named size.
    """
    try:
        data = slice_file.path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
        if not data.endswith(PNG_END):
            raise OSError("its end is missing")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no PNG header" if isinstance(error, UnidentifiedImageError) else error
        raise KaggleDataError([f"{slice_file.path}: not a whole PNG ({reason}); download it again"]) from error
    if image.mode not in ("I;16", "I"):
        raise KaggleDataError(
            [f"{slice_file.path}: expected 16-bit grayscale, got mode {image.mode}; use the original file"]
        )
    if image.size != (slice_file.width, slice_file.height):
        raise SliceSizeError(
            [f"{slice_file.path}: its name says {slice_file.width}x{slice_file.height}, "
             f"the image has {image.size[0]}x{image.size[1]}; correct the name"]
        )  # fmt: skip
    return data


def split_names(kaggle_dir: Path) -> list[str]:
    """Which of `train` and `test` a Kaggle folder has; a `test` without slices counts as none."""
    return ["train", "test"] if next((kaggle_dir / "test").rglob("*.png"), None) else ["train"]


def group_scans(slices: list[SliceFile], annotations: dict[str, dict[str, Annotation]] | None) -> list[Scan]:
    """Collect sorted slices into scans, each with the annotations of its own slices."""
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
    """Read the layout of a Kaggle folder: which scans it has, with which annotations.

    Args:
        kaggle_dir: Folder with `train.csv` and `train/`.
        split: `train`, whose slices need annotations, or `test`, which has none.

    Returns:
        The scans, sorted by case and day, and the problems of CSV and file names. Pixels are not read here. Scans
        whose CSV cannot be read at all have no annotations.

    Raises:
        KaggleDataError: If there is no such folder.
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
    """Problems of slices that have an image but no annotation, or the other way round."""
    found = {slice_file.id for slice_file in slices}
    missing = [slice_id for slice_id in annotations if slice_id not in found and annotations[slice_id]]
    unread = set(folder.rglob("*.png")) - {slice_file.path for slice_file in slices} if missing else set()
    excused = excuse_missing_images([path for path in unread if not FILE_PATTERN.fullmatch(path.name)], missing)
    problems = [
        f"{csv_path}, row {min(annotation.row for annotation in annotations[slice_id].values())}: "
        f"no PNG for {slice_id} under {folder}; add the file or remove its rows"
        for slice_id in missing
        if slice_id not in excused
    ]
    problems += [
        f"{s.path}: no rows for {s.id} in {csv_path}; add them or remove the file"
        for s in slices
        if s.id not in annotations
    ]
    return problems


def excuse_missing_images(misnamed: Iterable[Path], missing: list[str]) -> set[str]:
    """Slices without an image whose image is most likely there under a wrong name, which is reported already.

    Args:
        misnamed: Images whose names could not be read.
        missing: Ids of the slices without an image.

    Returns:
        Ids of slices: those of the number in a wrong name, or else the only one missing in its folder.
    """
    by_scan: dict[str, set[str]] = defaultdict(set)
    for slice_id in missing:
        by_scan[slice_id.split("_slice_")[0]].add(slice_id)
    excused: set[str] = set()
    for path in sorted(misnamed, key=lambda path: re.search(r"\d", path.name) is None):  # the certain ones first
        candidates = by_scan[scan_folder(path)]
        number = re.search(r"\d+", path.name, re.ASCII)
        meant = slice_name(scan_folder(path), int(number[0])) if number else ""
        if meant not in candidates and len(candidates) == 1:
            meant = next(iter(candidates))
        if meant in candidates:
            candidates.remove(meant)
            excused.add(meant)
    return excused
