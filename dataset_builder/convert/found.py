"""Find the scans of an input and what was drawn on them, and choose one of several drawings of a scan."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset_builder.convert.options import ConvertOptions
from gi_segmentation.data.synthetic import SOURCE
from gi_segmentation.errors import InputError, join_problems, list_some, reading
from gi_segmentation.formats.beside import describe_group
from gi_segmentation.formats.dicom.files import read_dataset
from gi_segmentation.formats.dicom.header import hush_pydicom
from gi_segmentation.formats.dicom.kinds import read_text
from gi_segmentation.formats.dicom.read_structures import find_dicom_structures
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.inputs import PACKAGES_BY_KIND, require, sort_files
from gi_segmentation.formats.label_names import parse_label_names
from gi_segmentation.formats.nifti_structures import find_nifti_structures, find_patient, translate_pattern
from gi_segmentation.formats.structures import StructureSet, choose_structures, describe_structures, is_meant
from gi_segmentation.formats.volumes import Volume

# What orders the scans of a patient: attributes of a DICOM file.
TIMES = ("StudyDate", "StudyTime", "AcquisitionTime", "SeriesNumber")


@dataclass(frozen=True)
class DrawnScan:
    """A scan with what was drawn on it. Names are for the screen and for the key file only.

    Attributes:
        volume: The scan.
        patient: What tells the patient from others.
        time: What orders the scans of a patient.
        sets: What was drawn.
        synthetic: Whether it says that it is a phantom.
    """

    volume: Volume
    patient: str
    time: tuple[str, ...]
    sets: tuple[StructureSet, ...]
    synthetic: bool = False

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
        add_dicom(files, path, options, found)
    if files["foreign"]:
        found.remarks.append(describe_group("file", files["foreign"], path, "convert what is a scan to NIfTI"))
    if not found.scans:
        if found.problems:
            raise InputError(join_problems(found.problems.values()))
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


def add_dicom(files: Mapping[str, Sequence[Path]], root: Path, options: ConvertOptions, found: FoundScans) -> None:
    """Add the scans of DICOM files."""
    require(PACKAGES_BY_KIND["dicom"], files["dicom"][0])
    # A packed file beside a series may be one of its slices.
    folders = {one.parent for one in files["dicom"]}
    beside = [*files["other"], *(one for one in files["foreign"] if one.parent in folders)]
    print(f"Reading the headers of {len(files['dicom'])} DICOM files", file=sys.stderr)
    series = find_series(files["dicom"], beside)
    drawn = find_dicom_structures(files["dicom"], series, options.interpolate)
    found.problems |= {path.relative_to(root).as_posix(): problem for path, problem in drawn.problems.items()}
    found.remarks += [*series.remarks, *drawn.remarks]
    sets = group_by_volume(drawn.structures)
    names: dict[str, set[str]] = defaultdict(set)
    for volume, own in sets.items():
        number, name, _ = volume.origin.frames[0].patient
        names[number].add(name)
        scan, remark = read_drawn_scan(volume, own, root, options.patients)
        found.scans.append(scan)
        found.remarks += [remark] * bool(remark)
    # Some programs that remove names give all patients one number.
    shared = sum(len(own) > 1 for number, own in names.items() if number)
    if shared and not options.patients:
        found.remarks.append(
            f"{shared} PatientID with several names: each is taken for one patient; if it is not, --patients tells "
            f"patients apart by their folders"
        )
    if alone := [volume.name for volume in series.volumes if volume not in sets]:
        found.remarks.append(f"left over: {len(alone)} series without structures: {list_some(alone)}")
    # A series that is no scan is a problem only if something was drawn on it.
    found.remarks += [f"left over: {name}: {problem}" for name, problem in series.problems.items()]


def group_by_volume(structures: Iterable[StructureSet]) -> dict[Volume, list[StructureSet]]:
    """Return the structure sets of each scan."""
    sets: dict[Volume, list[StructureSet]] = defaultdict(list)
    for one in structures:
        sets[one.volume].append(one)
    return sets


def read_drawn_scan(volume: Volume, sets: Sequence[StructureSet], root: Path, pattern: str) -> tuple[DrawnScan, str]:
    """Return a series with what was drawn on it, and a remark.

    Args:
        volume: The series.
        sets: What was drawn.
        root: The folder that `pattern` starts from.
        pattern: `--patients`; empty: the file says it.

    Raises:
        InputError: If the file is damaged, or the pattern does not fit.
    """
    frame = volume.origin.frames[0]
    with reading(frame.path, "its header cannot be read", "export it again"), hush_pydicom():
        header = read_dataset(frame.path, stop_before_pixels=True)
        time = tuple(read_text(header, name) for name in TIMES)
        synthetic = read_text(header, "ImageComments") == SOURCE
    number, name, _ = frame.patient
    remark = ""
    if pattern:
        patient = group_by_pattern(frame.path.relative_to(root).as_posix(), pattern)
    elif number or name:
        patient = number or name
    else:
        patient = frame.study_uid or volume.name
        remark = f"{volume.name}: has neither number nor name of a patient, so its study is taken for a patient"
    return DrawnScan(volume, patient, time, tuple(sets), synthetic), remark


def add_nifti(paths: Sequence[Path], root: Path, options: ConvertOptions, found: FoundScans) -> None:
    """Add the scans of NIfTI files."""
    require(PACKAGES_BY_KIND["nifti"], paths[0])
    names = parse_label_names(options.label_names) if options.label_names else None
    nifti = find_nifti_structures(paths, root, options.patterns, names, options.channel)
    found.remarks += nifti.remarks
    found.problems |= nifti.problems
    if nifti.unused and (nifti.sets or nifti.problems):
        found.remarks.append(describe_group("NIfTI file", nifti.unused, root, "belongs to no pair"))
    sets = group_by_volume(nifti.sets)
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


def choose_sets(scan: DrawnScan, chosen: Sequence[str]) -> tuple[tuple[StructureSet, ...], str]:
    """Choose what is taken of a scan on which several have drawn.

    It is what the user says, or the newest approved structure set, or the newest. Label maps and DICOM segmentations
    that have no name in common are taken together, because many programs write a file per organ.

    Args:
        scan: The scan.
        chosen: Parts of names, of `--structure_set`.

    Returns:
        The structure sets, and a remark; empty if there was no choice.

    Raises:
        InputError: If it is not clear which one is meant.
    """
    meant = [one for one in scan.sets if any(is_meant(one, text) for text in chosen)]
    remark = f"no structure set is called {' or '.join(chosen)}" if chosen and not meant else ""
    sets = meant or list(scan.sets)
    if len(sets) > 1:
        names = [name.lower() for one in sets for name in one.names]
        if len(set(names)) == len(names) and all(one.kind != "rtstruct" for one in sets):
            listed = list_some([describe_structures(one) for one in sets])
            return tuple(sets), f"{len(sets)} files are taken together: {listed}"
    choice = choose_structures(scan.sets, [text for text in chosen if meant])
    if choice.problems:
        raise InputError(f"{next(iter(choice.problems.values()))}, by --structure_set")
    return tuple(choice.structures), "; ".join(filter(None, [remark, *choice.remarks]))
