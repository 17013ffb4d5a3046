"""Find the scans of an input and what was drawn on them, and choose one of several drawings of a scan."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset_builder.convert.options import ConvertOptions
from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.beside import describe_group
from gi_segmentation.formats.inputs import PACKAGES_BY_KIND, require, sort_files
from gi_segmentation.formats.label_names import parse_label_names
from gi_segmentation.formats.nifti_structures import find_nifti_structures, find_patient, translate_pattern
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume


@dataclass(frozen=True)
class DrawnScan:
    """A scan with what was drawn on it. Names are for the screen and for the key file only.

    Attributes:
        volume: The scan.
        patient: What tells the patient from others.
        time: What orders the scans of a patient.
        sets: What was drawn.
    """

    volume: Volume
    patient: str
    time: tuple[str, ...]
    sets: tuple[StructureSet, ...]

    @property
    def name(self) -> str:
        """Name of the scan in the input."""
        return self.volume.name


@dataclass
class FoundScans:
    """What was found in an input.

    Attributes:
        scans: The scans, by patient and time.
        problems: Why others cannot be used, by their names.
        remarks: What was recognised, assumed and passed over: lines for the user.
    """

    scans: list[DrawnScan] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def find_drawn_scans(path: Path, options: ConvertOptions) -> FoundScans:
    """Find the scans of an input and what was drawn on them. No pixel of a scan is read.

    Args:
        path: The folder.
        options: Which files belong together.

    Raises:
        InputError: If there is nothing that can be converted.
    """
    if not path.is_dir():
        raise InputError(f"--input {path}: expected a folder, or a zip of one; name the folder that has the scans")
    files = sort_files(path, options.output_dir)
    if files["kaggle"] and not (files["nifti"] or files["dicom"]):
        raise InputError(f"--input {path}: has slices in Kaggle's layout already, and `build` reads it as it is")
    found = FoundScans()
    if files["nifti"]:
        add_nifti(files["nifti"], path, options, found)
    if files["dicom"]:
        add_dicom(files["dicom"], files["other"], path, options, found)
    if files["foreign"]:
        found.remarks.append(describe_group("file", files["foreign"], path, "convert what is a scan to NIfTI"))
    if not found.scans:
        if found.problems:
            raise InputError(". ".join([*list(found.problems.values())[:10], *found.remarks[:3]]))
        raise InputError(f"--input {path}: {describe_nothing(files['nifti'], files['dicom'])}")
    found.scans.sort(key=lambda scan: (sort_key(scan.patient), [sort_key(part) for part in (*scan.time, scan.name)]))
    return found


def describe_nothing(nifti: Sequence[Path], dicom: Sequence[Path]) -> str:
    """Return the message for an input without a scan on which somebody has drawn."""
    if nifti:
        return (
            f"{len(nifti)} NIfTI files such as {nifti[0].name}, in no arrangement that is known (nnU-Net, Decathlon, "
            f"TotalSegmentator, BIDS); pair them by --images and --labels"
        )
    if dicom:
        return f"{len(dicom)} DICOM files, but no structure set or segmentation of a series; export both"
    return "no DICOM and no NIfTI files below it; name the folder that has the scans"


def sort_key(text: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their values.

    Example:
        >>> sorted(["P10", "P9"], key=sort_key)
        ['P9', 'P10']
    """
    parts = re.split(r"([0-9]+)", text)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def add_dicom(
    paths: Sequence[Path], others: Sequence[Path], root: Path, options: ConvertOptions, found: FoundScans
) -> None:
    """Add the scans of DICOM files."""
    require(PACKAGES_BY_KIND["dicom"], paths[0])
    found.remarks.append(describe_group("DICOM file", paths, root))


def add_nifti(paths: Sequence[Path], root: Path, options: ConvertOptions, found: FoundScans) -> None:
    """Add the scans of NIfTI files."""
    require(PACKAGES_BY_KIND["nifti"], paths[0])
    names = parse_label_names(options.label_names) if options.label_names else None
    nifti = find_nifti_structures(paths, root, options.patterns, names, options.channel)
    found.remarks += nifti.remarks
    found.problems |= nifti.problems
    if nifti.unused and (nifti.sets or nifti.problems):
        found.remarks.append(describe_group("NIfTI file", nifti.unused, root, "belongs to no pair"))
    sets: dict[Volume, list[StructureSet]] = defaultdict(list)
    for one in nifti.sets:
        sets[one.volume].append(one)
    alone = 0
    for volume, own in sets.items():
        patient, day = find_patient(volume.name)
        if options.patients:
            patient, day = group_by_pattern(volume.name, options.patients), volume.name
        alone += not day
        found.scans.append(DrawnScan(volume, patient, (day,), tuple(own)))
    if alone > 1:
        found.remarks.append(
            f"{alone} NIfTI scans have no patient in their names, and each is taken for a patient of its own; if "
            f"several are of one patient, --patients says which"
        )


def group_by_pattern(name: str, pattern: str) -> str:
    """Return the beginning of the name of a scan that a pattern matches: the patient.

    Raises:
        InputError: If it does not match.

    Example:
        >>> group_by_pattern("site1/P7/day2/t2", "*/*")
        'site1/P7'
        >>> group_by_pattern("P07_day2", "P??")
        'P07'
    """
    form = translate_pattern(pattern)
    match = form.match(name)
    if not match:
        raise InputError(f"--patients {pattern}: does not fit to the beginning of {name}; write another pattern")
    return match[0]


def choose_sets(scan: DrawnScan, chosen: str | None) -> tuple[tuple[StructureSet, ...], str]:
    """Choose what is taken of a scan on which several have drawn.

    By default, it is the newest approved structure set, or the newest if none is approved. Label maps and DICOM
    segmentations that have no name in common are taken together, because many programs write a file per organ.

    Args:
        scan: The scan.
        chosen: `--structure_set`: a part of a name or a file name; `all`: all together; None: the default.

    Returns:
        The structure sets, and a remark; empty if there was no choice.

    Raises:
        InputError: If it is not clear which one is meant, or none is.
    """
    names = list_some([repr(describe_set(one)) for one in scan.sets], 5)
    if chosen is not None and chosen != "all":
        meant = [one for one in scan.sets if chosen.casefold() in describe_set(one).casefold()]
        if len(meant) != 1:
            raise InputError(
                f"{scan.name}: expected one structure set with {chosen!r} in its name (--structure_set), got "
                f"{len(meant)} of {names}; write more or less of the name"
            )
        return (meant[0],), f"{describe_set(meant[0])} of {names}" if len(scan.sets) > 1 else ""
    if len(scan.sets) == 1:
        return scan.sets, ""
    together = [name.lower() for one in scan.sets for name in one.names]
    disjoint = len(set(together)) == len(together)
    if chosen == "all" or (disjoint and all(one.kind != "rtstruct" for one in scan.sets)):
        return scan.sets, f"{len(scan.sets)} files taken together: {names}"
    ordered = sorted(scan.sets, key=rank_set)
    if rank_set(ordered[-1]) == rank_set(ordered[-2]):
        raise InputError(
            f"{scan.name}: has {len(scan.sets)} structure sets, {names}, and none is the newest approved one; choose "
            f"by --structure_set"
        )
    why = "the newest approved" if ordered[-1].approved else "the newest, none is approved"
    return (ordered[-1],), f"{describe_set(ordered[-1])} ({why}) of {names}"


def rank_set(one: StructureSet) -> tuple[bool, str]:
    """Return what ranks structure sets: approval, then time."""
    return bool(one.approved), one.created


def describe_set(one: StructureSet) -> str:
    """Return the name of a structure set for the screen, with its file."""
    return " ".join(filter(None, [one.label, one.paths[0].name if one.paths else ""]))
