"""Which files can be written for a scan, and how: a table of the formats, and a plan for each scan."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, describe_fault, join_problems, list_some
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.files import DicomSeries, check_uids
from gi_segmentation.formats.dicom.header import check_uid_forms, hush_pydicom, read_series_header
from gi_segmentation.formats.dicom.rtstruct import build_structure_set, write_rtstruct
from gi_segmentation.formats.dicom.seg import build_dicom_seg, write_dicom_seg
from gi_segmentation.formats.inputs import InputScan, InputScans, Kind, require
from gi_segmentation.formats.nifti import right_angles, write_label_map, write_probabilities
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.rle import encode
from gi_segmentation.schema import slice_name

# Number of trials that are remembered, see `find_obstacle`.
TRIALS = 256
# The hidden folder in an output folder. It has a record for each scan, and the rows of `submission.csv` until all
# scans are done.
RECORDS = ".predictions"
SUBMISSION = "submission.csv"
# The format of an organ's file of `--probabilities` has this name with that of the organ.
PROBABILITY = "probability-"
# Letters of an organ's name in the name of a file. The name of the scan needs the others.
FILE_WORD_LENGTH = 24
# What a trial writes instead of the organs.
TRIAL = LabelSet(("trial",))


@dataclass(frozen=True)
class Format:
    """A format of prediction files.

    Attributes:
        suffixes: The ends of the names of its files, after the name of the scan.
        kinds: The kinds of input that it can be chosen for.
        defaults: Those that have it without `--format`.
        write: Writes the files of a scan: takes the scan, the plan with what was written so far, and a path for each
            suffix.
        check: Raises an error if it cannot be written for a volume; None if it always can.
        packages: What must be installed to write it.
        probabilities: Whether it needs more than masks, see `predict_scans`.
        names_patient: Whether its files take the patient and the study from a DICOM series.
        comes_with: The format that it comes with, if it cannot be chosen itself.
        joined: The file that its files of all scans are joined to, if they are.
    """

    suffixes: tuple[str, ...]
    kinds: tuple[Kind, ...]
    defaults: tuple[Kind, ...]
    write: Callable[..., None]
    check: Callable[[Volume], object] | None = None
    packages: tuple[str, ...] = ()
    probabilities: bool = False
    names_patient: bool = False
    comes_with: str = ""
    joined: str = ""


def write_organ(predicted: PredictedScan, organ: str, path: Path) -> None:
    """Write the probabilities of an organ."""
    probabilities = predicted.probabilities[predicted.labels.names.index(organ)]
    write_probabilities(predicted.volume, probabilities, organ, path)


def find_format(name: str) -> Format:
    """Return the format of a name: one of `FORMATS`, or that of an organ's file of `--probabilities`."""
    organ = name.removeprefix(PROBABILITY)
    if organ == name:
        return FORMATS[name]
    # Viewers take only one number per voxel, so each organ has a file of its own.
    return Format(
        (f".{file_word(organ)}.probability.nii.gz",),
        kinds=(),
        defaults=(),
        write=lambda scan, _, path: write_organ(scan, organ, path),
        probabilities=True,
        comes_with="nifti",
    )


def file_word(organ: str) -> str:
    """Return the name of an organ as a part of a file name, without spaces, brackets and letters of other alphabets.

    Two names may lose what distinguishes them, so a name that changes gets a fingerprint.

    Example:
        >>> file_word("large_bowel"), file_word("Lung (left)")
        ('large_bowel', 'Lung_left-32d341')
    """
    word = re.sub(r"[^A-Za-z0-9_.+-]+", "_", organ).strip("_")[:FILE_WORD_LENGTH]
    return word if word == organ else f"{word}-{hashlib.sha256(organ.encode()).hexdigest()[:6]}"


# All formats that can be chosen, in the order in which they are listed.
FORMATS: dict[str, Format] = {
    "kaggle": Format(
        (".csv",),
        kinds=("kaggle",),
        defaults=("kaggle",),
        write=lambda scan, _, path: write_rows(scan, path),
        joined=SUBMISSION,
    ),
    "nifti": Format(
        (".nii.gz",),
        kinds=("kaggle", "nifti", "dicom"),
        defaults=("nifti",),
        write=lambda scan, _, path: write_label_map(scan.volume, scan.masks, path, scan.labels),
        check=lambda volume: right_angles(volume.path, volume.affine, volume.shape),
        packages=("nibabel",),
    ),
    "dicom-seg": Format(
        (".seg.dcm",),
        kinds=("dicom",),
        defaults=("dicom",),
        write=lambda scan, _, path: write_dicom_seg(scan.volume, scan.masks, path, scan.algorithm, scan.labels),
        check=lambda volume: try_contours(build_dicom_seg, volume.origin),
        packages=("highdicom",),
        names_patient=True,
    ),
    "rtstruct": Format(
        (".rtstruct.dcm",),
        kinds=("dicom",),
        defaults=("dicom",),
        write=lambda scan, _, path: write_rtstruct(scan.volume, scan.masks, path, scan.algorithm, scan.labels),
        check=lambda volume: try_contours(build_structure_set, volume.origin),
        packages=("pydicom",),
        names_patient=True,
    ),
    "report": Format(
        (".report.json", ".report.html"),
        kinds=("kaggle", "nifti", "dicom"),
        defaults=("nifti", "dicom"),
        write=lambda scan, plan, *paths: write_report_files(scan, plan, *paths),
        probabilities=True,
    ),
}


@dataclass(frozen=True)
class OutputPlan:
    """The files of a scan, as they were found before it was predicted, or as they were written.

    Attributes:
        formats: The formats that can be written.
        refused: Those that were wanted and cannot be written, and why.
        remarks: What is left out of the files, a sentence each.
        failed: Those of `refused` whose writing was begun and failed.
    """

    formats: tuple[str, ...]
    refused: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def paths(self, scan: InputScan) -> list[Path]:
        """Return where the files of the scan lie in the output folder."""
        return [path for name in self.formats for path in output_paths(name, scan)]


def possible_formats(kind: Kind) -> list[str]:
    """Return the formats that can be chosen for a kind of input."""
    return [name for name, one in FORMATS.items() if kind in one.kinds]


def choose_formats(
    scans: InputScans, wanted: Sequence[str] | None, probabilities: bool = False
) -> dict[Kind, list[str]]:
    """Return the formats to write for each kind of scans.

    Args:
        scans: The input.
        wanted: Formats that the user named; None: those that fit the input.
        probabilities: Whether the probabilities of the organs are wanted, too; see `add_probabilities`.

    Raises:
        InputError: If a format cannot be written for this input, or needs a package that is not installed.
    """
    possible = {kind: possible_formats(kind) for kind in scans.kinds}
    known = [name for name in FORMATS if any(name in names for names in possible.values())]
    if impossible := [name for name in wanted or () if name not in known]:
        raise InputError(
            f"--format {impossible[0]}: cannot be written for {' and '.join(possible)} input; "
            f"choose from {', '.join(known)}"
        )
    formats: dict[Kind, list[str]] = {}
    for kind, names in possible.items():
        chosen = wanted or [name for name in names if kind in FORMATS[name].defaults]
        formats[kind] = [name for name in dict.fromkeys(chosen) if name in names]
        for name in formats[kind]:
            require(FORMATS[name].packages, f"--format {name}")
    if probabilities and not any("nifti" in names for names in formats.values()):
        raise InputError(
            f"--probabilities: are NIfTI files; add nifti to --format, which is "
            f"{' '.join(dict.fromkeys(name for names in formats.values() for name in names))} now"
        )
    return formats


def add_probabilities(formats: Mapping[Kind, Sequence[str]], labels: LabelSet) -> dict[Kind, list[str]]:
    """Return formats with the files of `--probabilities`, one per organ, where a label map is written.

    Args:
        formats: From `choose_formats`.
        labels: The labels of the checkpoints.
    """
    organs = [PROBABILITY + organ for organ in labels.names]
    return {kind: [*names, *(organs if "nifti" in names else ())] for kind, names in formats.items()}


def leave_out(scans: InputScans, formats: Mapping[Kind, Sequence[str]]) -> InputScans:
    """Leave out scans of a kind for which none of the wanted formats can be written, and say so in a line."""
    others = [scan for scan in scans.usable if not formats[scan.kind]]
    if not others:
        return scans
    wanted = " or ".join(dict.fromkeys(name for names in formats.values() for name in names))
    line = f"left out: no {wanted} can be written for {list_some([scan.name for scan in others])}"
    return InputScans([scan for scan in scans.scans if scan not in others], [*scans.left_out, line])


def plan_outputs(scan: InputScan, wanted: Sequence[str]) -> OutputPlan:
    """Find out which formats can be written for a scan, before it is predicted.

    Args:
        scan: A scan without a problem.
        wanted: The formats to write. If a segmentation cannot be written, a structure set stands for it.

    Raises:
        InputError: If its slices form no volume, or if no masks can be written in any format.
    """
    if set(wanted) == {"kaggle"}:
        return OutputPlan(tuple(wanted), {})
    volume = scan.volume
    refused = {name: reason for name in wanted if (reason := find_obstacle(name, volume))}
    formats = [name for name in wanted if name not in refused and find_format(name).comes_with not in refused]
    if "dicom-seg" in refused and "rtstruct" not in wanted and not find_obstacle("rtstruct", volume):
        formats.insert(0, "rtstruct")
    check_masks(scan, formats, refused)
    remarks = (
        read_series_header(volume.origin).remarks if any(find_format(name).names_patient for name in formats) else ()
    )
    return OutputPlan(tuple(formats), refused, remarks)


def check_masks(scan: InputScan, formats: Collection[str], refused: Mapping[str, str]) -> None:
    """Check that a scan gets a file with masks.

    Raises:
        InputError: If formats were refused, and no other has masks.
    """
    if refused and set(formats) <= {"report"}:
        reason = next(iter(refused.values()))
        raise InputError(f"{scan.volume.path}: no {' and no '.join(refused)} can be written: {reason}")


@lru_cache(maxsize=TRIALS)
def find_obstacle(name: str, volume: Volume) -> str:
    """Return why a format cannot be written for a volume; empty if it can.

    For the formats of DICOM, this is a trial: the file is written into memory, with masks of one pixel. So whatever a
    library refuses is found before the scan is predicted.

    Args:
        name: The format.
        volume: The volume.
    """
    try:
        if (check := find_format(name).check) is not None:
            check(volume)
    except MemoryError:
        raise
    # The header of a series may have anything.
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else describe_fault(error)
        # A folder may have the name of the patient, and the reason goes into the report.
        for path in (*(volume.origin.paths if isinstance(volume.origin, DicomSeries) else ()), volume.path):
            reason = reason.replace(str(path), path.name)
        return reason
    return ""


def try_contours(build: Callable[..., Any], series: DicomSeries) -> None:
    """Write a file that names the slices of a series into memory; `build` makes it."""
    check_uids(series)
    check_uid_forms(series)
    masks = np.zeros((len(TRIAL), 1, 1, len(series.frames)), dtype=bool)
    masks[0, ..., [0, -1]] = True
    with hush_pydicom():
        trial = build(series, masks, Algorithm({"trial": ""}), TRIAL, read_series_header(series))
        trial.save_as(io.BytesIO(), enforce_file_format=True)


def output_paths(name: str, scan: InputScan) -> list[Path]:
    """Return where the files of a format lie in the output folder."""
    # The rows of a scan become a part of `submission.csv` at the end.
    found = find_format(name)
    folder = Path(RECORDS) if found.joined else Path()
    return [folder / (scan.name + suffix) for suffix in found.suffixes]


def list_outputs(scans: InputScans, formats: Mapping[Kind, Sequence[str]]) -> list[Path]:
    """Return where the files lie in the output folder after all scans are done.

    Raises:
        InputError: If no scan can be written. The message has the reasons.
    """
    paths = [Path(SUBMISSION)] * ("kaggle" in formats.get("kaggle", ()))
    problems = [scan.problem for scan in scans.scans if scan.problem]
    for scan in scans.usable:
        try:
            names = [name for name in plan_outputs(scan, formats[scan.kind]).formats if not find_format(name).joined]
            paths += [path for name in names for path in output_paths(name, scan)]
        except InputError as error:
            problems.append(str(error))
    if problems and len(problems) == len(scans.scans):
        raise InputError(join_problems(problems))
    return paths


def describe_plan(scan: InputScan, wanted: Sequence[str]) -> list[str]:
    """Return lines for the user on what cannot be written for a scan, and on what is left out."""
    try:
        plan = plan_outputs(scan, wanted)
    except InputError as error:
        return [f"{scan.name}: cannot be written: {error}"]
    lines = [f"{scan.name}: no {name} can be written: {reason}" for name, reason in plan.refused.items()]
    return lines + [f"{scan.name}: {remark}" for remark in plan.remarks]


def write_formats(predicted: PredictedScan, plan: OutputPlan, folder: Path) -> OutputPlan:
    """Write the files of a scan into a folder.

    Args:
        predicted: The scan.
        plan: From `plan_outputs`.
        folder: An empty folder.

    Returns:
        The plan, with what was written. A format that fails leaves no file.

    Raises:
        InputError: If no file with masks could be written.
        OSError: If the folder cannot be written.
    """
    written: list[str] = []
    refused = dict(plan.refused)
    # The report comes last, because it says what was written.
    for name in sorted(plan.formats, key="report".__eq__):
        paths = [folder / path.name for path in output_paths(name, predicted.scan)]
        try:
            so_far = replace(plan, formats=(*written, name), refused=refused)
            find_format(name).write(predicted, so_far, *paths)
            written.append(name)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            for path in paths:
                path.unlink(missing_ok=True)
            refused[name] = str(error) if isinstance(error, InputError) else describe_fault(error)
    check_masks(predicted.scan, written, refused)
    return replace(plan, formats=tuple(written), refused=refused, failed=tuple(refused.keys() - plan.refused.keys()))


def write_report_files(predicted: PredictedScan, plan: OutputPlan, json_path: Path, html_path: Path) -> None:
    """Write the report of a scan. It has what was written and what was not."""
    # Imported here, because Matplotlib takes a second, and this module is read before the checkpoints are loaded.
    from gi_segmentation.review.report import write_report

    write_report(predicted, describe_written(predicted.scan, plan), json_path, html_path)


def describe_written(scan: InputScan, plan: OutputPlan) -> dict[str, Any]:
    """Return what was written for a scan and what was not, as it stands in the report."""
    files = {}
    for name in plan.formats:
        joined = find_format(name).joined
        names = [joined] if joined else [path.name for path in output_paths(name, scan)]
        files[name] = {"names": names, "reason": ""}
    files |= {name: {"names": [], "reason": reason} for name, reason in plan.refused.items()}
    return {"files": files, "remarks": list(plan.remarks)}


def write_rows(predicted: PredictedScan, path: Path) -> None:
    """Write a scan's rows of `submission.csv`: `id,class,predicted` for each slice and organ, without a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for one, masks in zip(predicted.scan.slices, predicted.slice_masks, strict=True):
            slice_id = slice_name(one.scan, one.number)
            organs = zip(predicted.labels.names, masks, strict=True)
            writer.writerows([slice_id, organ, encode(mask)] for organ, mask in organs)
