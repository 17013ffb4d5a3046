"""Read `train.csv`, or a submission: run-length encodings by slice and organ."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gi_segmentation.errors import one_line
from gi_segmentation.formats.kaggle.names import ID_PATTERN, KaggleDataError, SliceFile
from gi_segmentation.rle import RleError, Runs, parse_runs

# Characters of one value of a CSV. The longest encoding of a slice of `MAX_PIXELS` is shorter.
MAX_CHARACTERS = 2**26


class Annotation(NamedTuple):
    """One row of `train.csv`: the mask of an organ on a slice. `row` is the line number in the file."""

    rle: str
    row: int


def read_annotations(
    csv_path: Path, organs: Sequence[str], rle_column: str = "segmentation", label_path: Path | None = None
) -> tuple[dict[str, dict[str, Annotation]], list[str]]:
    """Read an annotation CSV, or a submission.

    Args:
        csv_path: File with the columns `id`, `class` and `rle_column`; other columns are ignored.
        organs: The classes that it may have.
        rle_column: Column of the run-length encodings: `segmentation` in `train.csv`, `predicted` in a submission.
        label_path: The `labels.json` that names the organs, for messages; None if there is none. With it, a class that
            it does not have is one problem, and not one in each row.

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
    ids, classes, rles = read_table(csv_path, columns)
    annotations: dict[str, dict[str, Annotation]] = defaultdict(dict)
    problems: list[str] = []
    named: set[str] = set()
    # Rows are numbered as an editor numbers lines: from 1, and line 1 is the header.
    for row, (slice_id, organ, rle) in enumerate(zip(ids, classes, rles, strict=True), start=2):
        where = f"{csv_path}, row {row}"
        # A blank line is harmless. It was read only so that the rows below keep their numbers.
        if not (slice_id or organ or rle):
            continue
        if not ID_PATTERN.fullmatch(slice_id):
            problems.append(f"{where}: expected an id like case123_day20_slice_0001, got {slice_id!r}; correct it")
        elif organ not in organs:
            if label_path is None:
                problems.append(f"{where}: expected a class of {', '.join(organs)}; got {organ!r}; correct it")
            elif organ not in named:
                problems.append(
                    f"{where}: {label_path} has no label {organ!r:.80}; add it there, or remove all rows of this class"
                )
                named.add(organ)
        elif organ in annotations[slice_id]:
            first = annotations[slice_id][organ].row
            problems.append(f"{where}: {slice_id} {organ} is in row {first} already; remove one")
        else:
            annotations[slice_id][organ] = Annotation(rle, row)
    if not annotations and not problems:
        raise KaggleDataError([f"{csv_path}: no rows below the header; download it again"])
    return dict(annotations), problems


def read_column_names(csv_path: Path) -> list[str]:
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


def read_segmentation(
    annotations: dict[str, Annotation], slice_file: SliceFile, csv_path: Path, organs: Sequence[str]
) -> tuple[dict[str, Runs], list[str]]:
    """Read and check the encodings of a slice.

    Args:
        annotations: Its annotations by organ.
        slice_file: The slice.
        csv_path: Where they are from, for messages.
        organs: The organs that need a row: those that were drawn in the scan.

    Returns:
        The runs of each organ with a valid encoding. Then the problems: wrong encodings, and organs without a row.
    """
    runs: dict[str, Runs] = {}
    problems: list[str] = []
    for organ in organs:
        if organ not in annotations:
            problems.append(
                f"{csv_path}: {slice_file.id} has no row for {organ}; add one, with an empty segmentation if need be"
            )
            continue
        try:
            runs[organ] = parse_runs(annotations[organ].rle, slice_file.height * slice_file.width)
        except RleError as error:
            problems.append(
                f"{csv_path}, row {annotations[organ].row}: {slice_file.id} {organ}: {error}; correct the segmentation"
            )
    return runs, problems
