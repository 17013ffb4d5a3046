"""What somebody has drawn on a scan: a structure set, a segmentation or a label map of any format."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.volumes import Volume

StructureKind: TypeAlias = Literal["rtstruct", "seg", "nifti", "kaggle"]


@dataclass(frozen=True, eq=False)
class StructureSet:
    """The structures of one scan, from one source. No mask has been made.

    Attributes:
        volume: The scan that they were drawn on.
        kind: What its files are.
        paths: The files that it is read from.
        names: The names of its structures (ROIs, segments, labels), as they stand there. Each name is there once. If
            several structures have one name, reading it is an error.
        read: Makes the masks of some of its structures, by their names: bool, shape `(names, i, j, k)` on the own grid
            of the volume. Raises `InputError`.
        label: What it is called there. For the screen only, because it may name the patient.
        created: Date and time as DICOM writes them, `YYYYMMDDHHMMSS`; empty if not known. For choosing and for the
            screen only.
        approved: Whether somebody approved it; None if it does not say.
        empty: The names of ROIs without a contour. They can be read, and are empty. A planning system writes them for
            what nobody has drawn yet, so they do not say that the organ is not there. Not among `names`.
        notes: What the user should know of it, for example what was left out.
        reading: How the files are read, where the user can choose. Other masks of the same files have another text.
    """

    volume: Volume
    kind: StructureKind
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    read: Callable[[Sequence[str]], np.ndarray] = field(repr=False)
    label: str = ""
    created: str = ""
    approved: bool | None = None
    empty: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reading: str = ""


def empty_masks(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return masks without a voxel: bool, shape `(number, i, j, k)`.

    In memory, k is the first axis of a mask and i the last one, as in the files of NIfTI and of DICOM. So their slices
    are read and written without jumps, in a tenth of the time.
    """
    width, height, depth = shape
    return np.zeros((number, depth, height, width), dtype=bool).transpose(0, 3, 2, 1)


class ChosenStructures(NamedTuple):
    """One structure set for each scan.

    Attributes:
        structures: The structure sets, sorted as they came.
        remarks: Which of several was taken, and what was left: a line for each scan with several.
        problems: Why none could be chosen, by the names of the scans.
    """

    structures: list[StructureSet]
    remarks: list[str]
    problems: dict[str, str]


def choose_structures(structures: Iterable[StructureSet], chosen: Sequence[str] = ()) -> ChosenStructures:
    """Choose one structure set for each scan: what the user says, else the newest approved one, else the newest.

    Args:
        structures: The structure sets of any number of scans.
        chosen: Parts of the labels or of the names of files. Capital letters do not matter. They decide only where a
            scan has a structure set that fits.

    Raises:
        InputError: If one of `chosen` fits nothing.
    """
    structures = list(structures)
    for text in chosen:
        if not any(is_meant(one, text) for one in structures):
            names = list_some(list(dict.fromkeys(map(describe_structures, structures))), limit=20)
            raise InputError(
                f"{text}: no structure set has this in its label or in the name of its file; there are {names}"
            )
    by_volume: dict[int, list[StructureSet]] = defaultdict(list)
    for one in structures:
        by_volume[id(one.volume)].append(one)
    found = ChosenStructures([], [], {})
    for same in by_volume.values():
        meant = [one for one in same if any(is_meant(one, text) for text in chosen)] or same
        approved = [one for one in meant if one.approved] or meant
        newest = [one for one in approved if one.created == max(other.created for other in approved)]
        name = same[0].volume.name
        if len(newest) > 1:
            words = [describe_structures(one) for one in newest]
            if len(set(words)) < len(words):
                words = [name_in_folder(one.paths[0]) for one in newest]
            both = list_some(words)
            found.problems[name] = f"{name}: has {len(newest)} structure sets of one time, {both}; choose one of them"
            continue
        found.structures.extend(newest)
        if len(same) > 1:
            left = list_some([describe_structures(one) for one in same if one is not newest[0]])
            why = (
                "chosen"
                if meant is not same
                else "the newest approved one"
                if newest[0].approved
                else "the newest one"
            )
            found.remarks.append(f"{name}: taken {describe_structures(newest[0])}, {why}; left {left}")
    return found


def is_meant(one: StructureSet, text: str) -> bool:
    """Tell whether a user means a structure set by a part of its label or of the name of its file.

    A text with a slash means its folder, too, as in `monday/RS.dcm`.
    """
    names = [one.label, *(name_in_folder(path) if "/" in text else path.name for path in one.paths)]
    return any(text.casefold() in name.casefold() for name in names)


def name_in_folder(path: Path) -> str:
    """Return the name of a file with that of its folder.

    Example:
        >>> name_in_folder(Path("plans/monday/RS.dcm"))
        'monday/RS.dcm'
    """
    return "/".join(path.parts[-2:])


def describe_structures(one: StructureSet) -> str:
    """Return what tells a structure set from another one of the same scan, for the screen."""
    status = {True: "approved", False: "not approved", None: ""}[one.approved]
    words = [repr(one.label) if one.label else "", one.created, status]
    return f"{one.paths[0].name} ({', '.join(filter(None, words))})"
