"""Read which name each value of a label map has: from the tables of nnU-Net, BIDS, ITK-SNAP, 3D Slicer and others."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.nifti import DESCRIPTION_LENGTH, hush_nibabel
from gi_segmentation.known_organs import find_organ
from gi_segmentation.labels import BACKGROUND

# The values of a structure. A region of nnU-Net has several.
Values: TypeAlias = tuple[int, ...]

# Files with these endings beside the scans may have the names of labels.
TABLE_NAMES = ("dataset.json", "label_names.json", "labels.json", "*.label", "*.ctbl", "*dseg.tsv", "*LUT.txt")
# Label maps have at most 32 bits.
MAX_VALUE = 2**31 - 1
# The code of a header extension with a text, by the standard.
COMMENT = 6
REMEDY = "write 1=stomach,2=duodenum, or correct the file"


def parse_label_names(text: str) -> dict[str, Values]:
    """Read `--label_names`: names of values, or a file that has them.

    Raises:
        InputError: If it is neither.

    Example:
        >>> parse_label_names("1=stomach, 2=duodenum")
        {'stomach': (1,), 'duodenum': (2,)}
    """
    if "=" not in text:
        if not Path(text).is_file():
            raise InputError(f"--label_names {text}: no such file; expected a file, or 1=stomach,2=duodenum")
        return read_label_table(Path(text))
    pairs = []
    for part in text.split(","):
        value, _, name = (word.strip() for word in part.partition("="))
        if not value.isdecimal() or not name:
            raise InputError(f"--label_names {text}: expected 1=stomach,2=duodenum, got {part.strip()!r}; correct it")
        pairs.append((int(value), name))
    return collect(pairs, "--label_names")


def collect(pairs: Iterable[tuple[int, str]], where: Path | str) -> dict[str, Values]:
    """Return values by names, without the background, which has the value 0.

    Raises:
        InputError: If a name or a value is there twice, or if there is none.
    """
    names: dict[str, Values] = {}
    values: dict[int, str] = {}
    for value, name in pairs:
        check_background(value, name, where)
        if value == 0:
            continue
        if name in names:
            raise InputError(f"{where}: {name!r} is there twice ({names[name][0]} and {value}); rename one of them")
        if not 0 < value <= MAX_VALUE:
            raise InputError(f"{where}: expected values from 1 to {MAX_VALUE}, got {value} for {name!r}; correct it")
        if value in values:
            raise InputError(f"{where}: the value {value} is {values[value]!r} and {name!r}; correct it")
        names[name] = (value,)
        values[value] = name
    if not names:
        raise InputError(f"{where}: has no name of a label; {REMEDY}")
    return names


def check_background(value: int, name: str, where: Path | str) -> None:
    """Check that the value 0, and no other one, is the background.

    Raises:
        InputError: If not.
    """
    if value == 0 and find_organ(name):
        raise InputError(f"{where}: {name!r} has the value 0, which is the background; give it another value")
    if value != 0 and name.lower() == BACKGROUND:
        raise InputError(
            f"{where}: {name!r} has the value {value}, and the background is 0; correct it, or give it another name"
        )


class DatasetJson(NamedTuple):
    """What a `dataset.json` says.

    Attributes:
        names: The values of each label.
        channels: The names of the channels.
        allowed: The values that a label map may have, besides 0.
        remarks: Lines for the user.
    """

    names: dict[str, Values]
    channels: dict[int, str]
    allowed: frozenset[int]
    remarks: list[str]


def read_dataset_json(path: Path) -> DatasetJson:
    """Read the `dataset.json` of nnU-Net in either version, or of the Decathlon.

    Raises:
        InputError: If it cannot be read, or has no labels.
    """
    content = read_json(path)
    channels = content.get("channel_names") or content.get("modality") or {}
    names, remarks = parse_labels(content.get("labels"), path), []
    allowed = frozenset(value for values in names.values() for value in values)
    # With this label, nnU-Net marks voxels that nobody has looked at.
    if ignored := [name for name in names if name.lower() == "ignore"]:
        remarks.append(f"{path}: the label {ignored[0]!r} is left out; its voxels count as background")
        names = {name: values for name, values in names.items() if name not in ignored}
    numbers = {}
    if isinstance(channels, Mapping):
        numbers = {int(key): str(name) for key, name in channels.items() if str(key).isdecimal()}
    return DatasetJson(names, numbers, allowed, remarks)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: If it is none.
    """
    with reading(path, "not a JSON file", "correct it"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object with labels, got {type(content).__name__}; correct it")
    return content


def parse_labels(labels: Any, where: Path | str) -> dict[str, Values]:
    """Read labels in one of the forms `{"stomach": 1}`, `{"1": "stomach"}`, `{"bowel": [1, 2]}` and `["stomach"]`.

    Raises:
        InputError: If they have another form.

    Example:
        >>> parse_labels({"background": 0, "bowel": [1, 2], "stomach": 3}, "x.json")
        {'bowel': (1, 2), 'stomach': (3,)}
        >>> parse_labels({"0": "background", "1": "liver"}, "x.json")
        {'liver': (1,)}
        >>> parse_labels(["background", "liver"], "x.json") == parse_labels(["liver"], "x.json")
        True
    """
    if isinstance(labels, list) and all(isinstance(name, str) for name in labels):
        # Some lists begin with the background, as `id2label` does.
        return collect(enumerate(labels, start=0 if labels[:1] == [BACKGROUND] else 1), where)
    if isinstance(labels, Mapping):
        if all(str(key).isdecimal() and isinstance(name, str) for key, name in labels.items()):
            return collect(((int(key), name) for key, name in labels.items()), where)
        if all(is_values(values) for values in labels.values()):
            regions = {name: tuple(v) if isinstance(v, list) else (v,) for name, v in labels.items()}
            for name, values in regions.items():
                check_background(values[0], name, where)
            names = {name: values for name, values in regions.items() if values != (0,)}
            if all(len(values) == 1 for values in names.values()):
                return collect(((values[0], name) for name, values in names.items()), where)
            return names
    raise InputError(
        f'{where}: expected labels like {{"stomach": 1}} or {{"1": "stomach"}}, got {labels!r:.80}; correct it'
    )


def is_values(value: Any) -> bool:
    """Tell whether JSON has a whole number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in values)
    return bool(values) and whole and all(0 <= one <= MAX_VALUE for one in values)


def read_label_table(path: Path) -> dict[str, Values]:
    """Read a file with the names of values: JSON, TSV of BIDS, ITK-SNAP, 3D Slicer or FreeSurfer.

    Raises:
        InputError: If it cannot be read.
    """
    if path.suffix.lower() == ".json":
        content = read_json(path)
        return parse_labels(content.get("labels", content), path)
    with reading(path, "not a text file", REMEDY):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    if path.suffix.lower() == ".tsv":
        return read_tsv(lines, path)
    pairs = []
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        with reading(path, f"expected a value and a name in each line, got {line.strip()!r:.80}", REMEDY):
            words = shlex.split(line)
            # ITK-SNAP: value, colour (3), opacity, visible, mesh, name. Others: value, name, colour (4).
            name = words[7] if len(words) == 8 and all(map(is_number, words[:7])) else words[1]
            pairs.append((int(words[0]), name))
    return collect(pairs, path)


def read_tsv(lines: list[str], path: Path) -> dict[str, Values]:
    """Read the columns `index` and `name` of a TSV, as BIDS has them."""
    header, *rows = [line.split("\t") for line in lines if line.strip()] or [[]]
    if not {"index", "name"} <= set(header):
        raise InputError(f"{path}: expected the columns index and name, got {', '.join(header)[:80]}; correct it")
    with reading(path, "expected a whole number as index and a name in each line", REMEDY):
        pairs = [(int(row[header.index("index")]), row[header.index("name")].strip()) for row in rows]
    return collect(pairs, path)


def is_number(text: str) -> bool:
    """Tell whether a text is a decimal number."""
    return bool(re.fullmatch(r"-?\d+(\.\d*)?", text))


def find_beside(root: Path) -> tuple[dict[str, Values] | None, str]:
    """Return the names in the only table of labels in a folder, and the table; None if there is none, or several."""
    tables = sorted({path for name in TABLE_NAMES for path in root.glob(name)})
    return (read_label_table(tables[0]), tables[0].name) if len(tables) == 1 else (None, "")


def read_description(path: Path) -> dict[str, Values] | None:
    """Return the names that the header of a label map of this project has, such as `1 stomach, 2 liver`.

    If they are too long for the header, an extension has them, see `nifti.write_bytes`.
    """
    import nibabel

    with reading(path, "not a whole NIfTI file", "copy it again"), hush_nibabel():
        header: Any = nibabel.load(path).header
        text = bytes(header["descrip"]).rstrip(b"\0") if "descrip" in header else b""
        whole = [bytes(one.get_content()).rstrip(b"\0") for one in header.extensions if one.get_code() == COMMENT]
    longer = next((one for one in whole if len(one) > len(text) and one.startswith(text)), b"")
    # A text of the full length was cut.
    if not longer and len(text) >= DESCRIPTION_LENGTH:
        return None
    listed = (longer or text).decode(errors="replace").split(", ")
    parts = [re.fullmatch(r"(\d+) (\S.*)", part) for part in listed]
    return collect(((int(part[1]), part[2]) for part in parts if part), path) if all(parts) else None
