"""Read and write `labels.json`: the labels of a folder in Kaggle's layout, and what its file names do not say.

`train.csv` and the names of the slices tell nothing of other organs, of the distance between slices, of the scale of
the intensities, or of organs that nobody has drawn. Kaggle's own folder has no such file.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, reading
from gi_segmentation.files import write_json
from gi_segmentation.formats.kaggle.names import SCAN_PATTERN, KaggleDataError
from gi_segmentation.labels import LabelSet
from gi_segmentation.schema import SLICE_THICKNESS_MM, scan_name

LABEL_FILE = "labels.json"
REMEDY = "correct it, or convert the data again"


@dataclass(frozen=True)
class ScanFacts:
    """What the names of the slices do not say of a scan. The defaults are those of Kaggle's scans.

    Attributes:
        slice_spacing_mm: Distance between the centres of neighbouring slices.
        rescale_slope: Factor of the intensities: a value of the source is `pixel * rescale_slope + rescale_intercept`.
        rescale_intercept: What is added to them.
        unknown: The organs that nobody has drawn in the scan, so that nobody knows where they are.
    """

    slice_spacing_mm: float = SLICE_THICKNESS_MM
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelFile:
    """The content of a `labels.json`.

    Attributes:
        labels: The organs. Their order is that of the label ids.
        scans: The facts of each scan, by its name, for example `case1_day0`.
    """

    labels: LabelSet
    scans: Mapping[str, ScanFacts]


def read_label_file(folder: Path) -> LabelFile | None:
    """Read and check the `labels.json` of a folder.

    Args:
        folder: A folder in Kaggle's layout.

    Returns:
        Its content; None if there is no such file, as in Kaggle's own folder.

    Raises:
        KaggleDataError: If the file is not readable, or something in it is wrong. It has all problems.
    """
    path = folder / LABEL_FILE
    if not path.exists() and not path.is_symlink():
        return None
    try:
        with reading(path, "expected JSON in UTF-8, but it is not readable", REMEDY):
            content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=refuse_copies)
        check_keys(content, {"labels", "scans"}, set(), "the file")
        if not isinstance(content["labels"], list):
            raise InputError(f"expected a list of names at `labels`, got {content['labels']!r:.80}")
        labels = LabelSet(tuple(content["labels"]))
        if not isinstance(content["scans"], dict):
            raise InputError(f"expected scans by their names at `scans`, got {content['scans']!r:.80}")
    except InputError as error:
        text = str(error)
        where = "" if text.startswith(str(path)) else f"{path}: "
        raise KaggleDataError([f"{where}{text}" + ("" if text.endswith(REMEDY) else f"; {REMEDY}")]) from error
    scans: dict[str, ScanFacts] = {}
    problems = []
    for name, entry in content["scans"].items():
        try:
            scans[name] = read_facts(name, entry, labels)
        except InputError as error:
            problems.append(f"{path}: {error}; {REMEDY}")
    if problems:
        raise KaggleDataError(problems)
    return LabelFile(labels, scans)


def write_label_file(folder: Path, label_file: LabelFile) -> None:
    """Write the `labels.json` of a folder in one step. The scans are sorted by case and day.

    Args:
        folder: An existing folder.
        label_file: Its content.

    Raises:
        OSError: If it cannot be written.
    """
    order = sorted(label_file.scans, key=lambda name: tuple(int(number) for number in split_name(name)))
    scans = {name: asdict(label_file.scans[name]) for name in order}
    write_json(folder / LABEL_FILE, {"labels": list(label_file.labels.names), "scans": scans}, ensure_ascii=False)


def refuse_copies(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object. By default, the last of two with one name would win, without a word."""
    counts = Counter(name for name, _ in pairs)
    if copies := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"{copies[0]!r:.80} is there {counts[copies[0]]} times, expected once")
    return dict(pairs)


def check_keys(value: Any, required: set[str], optional: set[str], where: str) -> None:
    """Check that a value is a JSON object with the members that it needs, and no others.

    A misspelt name would otherwise give the default, without a word.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {value!r:.80}")
    missing, others = sorted(required - set(value)), sorted(set(value) - required - optional)
    if missing or others:
        got = f"{missing[0]} missing" if missing else f"got {others[0]!r:.80}"
        raise InputError(f"{where}: expected {', '.join(sorted(required | optional))}; {got}")


def split_name(name: str) -> tuple[str, str]:
    """Return the numbers of the case and the day in the name of a scan.

    Raises:
        InputError: If it is no name of a scan. A leading zero would give a scan a second name.
    """
    match = SCAN_PATTERN.fullmatch(name)
    if not match or scan_name(int(match[1]), int(match[2])) != name:
        raise InputError(f"expected a scan like case1_day0, got {name!r:.80}")
    return match[1], match[2]


def read_facts(name: str, entry: Any, labels: LabelSet) -> ScanFacts:
    """Read the facts of a scan.

    Raises:
        InputError: If something in them is wrong.
    """
    split_name(name)
    required = "slice_spacing_mm"
    check_keys(entry, {required}, {field.name for field in fields(ScanFacts)} - {required}, name)
    numbers = {key: read_number(name, key, value) for key, value in entry.items() if key != "unknown"}
    unknown = entry.get("unknown", [])
    if not isinstance(unknown, list) or not set(map(str, unknown)) <= set(labels.names):
        raise InputError(f"{name}: expected a list of labels at `unknown`, got {unknown!r:.80}")
    if len(set(unknown)) == len(labels):
        raise InputError(f"{name}: no organ is drawn in it; leave the scan out")
    # In the order of the labels, so that equal facts are equal.
    return ScanFacts(**numbers, unknown=tuple(organ for organ in labels.names if organ in unknown))


def read_number(name: str, key: str, value: Any) -> float:
    """Read a number of a scan.

    Raises:
        InputError: If it is no finite number, or not above 0 where it must be.
    """
    positive = key != "rescale_intercept"
    # For Python, true is a number.
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not right or (positive and value <= 0):
        expected = "a number above 0" if positive else "a number"
        raise InputError(f"{name}: expected {expected} at {key}, got {value!r:.80}")
    return float(value)
