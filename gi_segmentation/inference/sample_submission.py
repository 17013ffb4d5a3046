"""Kaggle's `sample_submission.csv`: which rows a submission must have, and in which order.

This module does not import PyTorch.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.inputs import InputScan, InputScans
from gi_segmentation.formats.kaggle.annotations import read_column_names, read_table
from gi_segmentation.schema import slice_name

# The last column of Kaggle's samples, and of its annotations.
ENCODINGS = ("predicted", "segmentation")


@dataclass(frozen=True)
class Sample:
    """The rows of a sample.

    Attributes:
        path: The file.
        encoding: Name of the column with the encodings.
        rows: The id of a slice and a class, for each row; none if the file has only a header.
    """

    path: Path
    encoding: str
    rows: Sequence[tuple[str, str]]

    @cached_property
    def ids(self) -> dict[str, None]:
        """The ids, each once, in their order."""
        return dict.fromkeys(slice_id for slice_id, _ in self.rows)

    @cached_property
    def classes(self) -> list[str]:
        """The classes, each once, in their order."""
        return list(dict.fromkeys(organ for _, organ in self.rows))


def read_sample(path: Path) -> Sample:
    """Read a sample.

    Args:
        path: A CSV with the columns `id`, `class`, and `predicted` or `segmentation`. A header is enough.

    Raises:
        InputError: If the file cannot be read, or has other columns.
    """
    read_table(path, ("id", "class"))
    names = read_column_names(path)
    encoding = next((name for name in ENCODINGS if name in names), "")
    if sorted(names) != sorted(("id", "class", encoding)):
        raise InputError(
            f"--sample_submission {path}: expected the columns id, class, and {' or '.join(ENCODINGS)}, but got "
            f"{', '.join(names)[:200]}; name the sample_submission.csv of the competition"
        )
    rows = zip(*read_table(path, ("id", "class")), strict=True)
    # Blank lines have empty values.
    return Sample(path, encoding, [row for row in rows if any(row)])


def slice_ids(scan: InputScan) -> list[str]:
    """Return the ids of the slices of a scan."""
    return [slice_name(one.scan, one.number) for one in scan.slices]


def choose_sampled(scans: InputScans, sample: Sample) -> InputScans:
    """Leave out the scans that a sample does not name, and say which slices have no rows.

    A scan of which it names some slices stays whole, because these may need the others as neighbours.

    Raises:
        InputError: If there are slices, but it names none of them.
    """
    # Without rows, the sample says nothing about ids. A scan with a problem has no slices that it could name.
    if not sample.rows:
        return scans
    chosen = [scan for scan in scans.scans if scan.problem or not sample.ids.keys().isdisjoint(slice_ids(scan))]
    if scans.scans and not chosen:
        raise InputError(
            f"--sample_submission {sample.path}: expected ids of the slices in --input, like "
            f"{slice_ids(scans.scans[0])[0]}, but got {list_some(list(sample.ids))}; name the sample of this input"
        )
    extra = [one for scan in scans.usable for one in slice_ids(scan) if one not in sample.ids]
    line = f"left out: {len(extra)} slice{'s' * (len(extra) > 1)} that {sample.path} does not name: {list_some(extra)}"
    return replace(scans, scans=chosen, left_out=[*scans.left_out, *[line] * bool(extra)])


def describe_missing(sample: Sample, scans: Iterable[InputScan]) -> str:
    """Return a line about the ids of a sample that have no slice; empty if there are none."""
    found = {one for scan in scans for one in slice_ids(scan)}
    missing = [one for one in sample.ids if one not in found]
    if not missing:
        return ""
    count = f"{len(missing)} of {len(sample.ids)} ids have" if len(sample.ids) > 1 else "its id has"
    return f"{sample.path}: {count} no slice in --input: {list_some(missing)}"


def check_classes(sample: Sample, organs: Sequence[str]) -> str:
    """Check that a checkpoint predicts all classes of a sample.

    Args:
        sample: The sample.
        organs: The names of the organs that the checkpoint predicts.

    Returns:
        A line about organs that the sample does not name; empty if there are none.

    Raises:
        InputError: If the checkpoint does not predict a class.
    """
    if unknown := [one for one in sample.classes if one not in organs]:
        raise InputError(
            f"--sample_submission {sample.path}: has rows of the class {list_some(unknown)}, which the checkpoint "
            f"does not predict; it predicts {list_some(organs, 8)}"
        )
    others = [one for one in organs if one not in sample.classes] if sample.rows else []
    return f"left out: {list_some(others)}, which {sample.path} does not name" if others else ""


def write_sampled_rows(sample: Sample, sources: Iterable[Path], path: Path) -> None:
    """Write a submission with the rows of a sample, in its order. A row that no source has is empty.

    Args:
        sample: The sample.
        sources: Files with rows and without a header, see `outputs.write_rows`.
        path: The file.
    """
    encodings = {}
    for source in sources:
        with source.open(newline="", encoding="utf-8") as file:
            encodings.update({(slice_id, organ): encoding for slice_id, organ, encoding in csv.reader(file)})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "class", sample.encoding))
        writer.writerows((*row, encodings.get(row, "")) for row in sample.rows)
