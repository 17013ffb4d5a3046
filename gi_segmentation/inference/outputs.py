"""Write the prediction files of a scan, and Kaggle's `submission.csv`."""

import csv
import filecmp
import io
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, describe_fault, join_problems, list_some
from gi_segmentation.files import writing_file
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.files import DicomSeries, check_uids
from gi_segmentation.formats.dicom.header import check_uid_forms, quiet, read_header
from gi_segmentation.formats.dicom.rtstruct import build_structure_set, write_rtstruct
from gi_segmentation.formats.dicom.seg import build_dicom_seg, write_dicom_seg
from gi_segmentation.formats.inputs import InputScan, InputScans, Kind, require
from gi_segmentation.formats.nifti import right_angles, write_label_map, write_probabilities
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.inference.arguments import FORMATS
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS, slice_name

# The formats that a kind of input has without `--format`, and all that it can have.
DEFAULT_FORMATS: dict[Kind, tuple[str, ...]] = {
    "kaggle": ("kaggle",),
    "nifti": ("nifti", "report"),
    "dicom": ("dicom-seg", "rtstruct", "report"),
}
POSSIBLE_FORMATS: dict[Kind, tuple[str, ...]] = {
    "kaggle": ("kaggle", "nifti", "report"),
    "nifti": ("nifti", "report"),
    "dicom": ("nifti", "dicom-seg", "rtstruct", "report"),
}
# The formats that name the slices of a DICOM series.
CONTOURS = ("dicom-seg", "rtstruct")
# Number of trials that are remembered, see `find_obstacle`.
TRIALS = 256
# The hidden folder in an output folder. It has a record for each scan, and the rows of `submission.csv` until all
# scans are done.
RECORDS = ".predictions"
SUBMISSION = "submission.csv"
# The ends of the file names of all formats, after the name of the scan.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "kaggle": (".csv",),
    "nifti": (".nii.gz",),
    "dicom-seg": (".seg.dcm",),
    "rtstruct": (".rtstruct.dcm",),
    "report": (".report.json", ".report.html"),
}
# The files of `--probabilities`: one for each organ, as viewers take only one number per voxel. They count as formats.
PROBABILITIES: dict[str, str] = {f"probability-{organ}": organ for organ in ORGANS}
SUFFIXES |= {name: (f".{organ}.probability.nii.gz",) for name, organ in PROBABILITIES.items()}


@dataclass(frozen=True)
class Plan:
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


def choose_formats(
    scans: InputScans, wanted: Sequence[str] | None, probabilities: bool = False
) -> dict[Kind, list[str]]:
    """Return the formats to write for each kind of scans.

    Args:
        scans: The input.
        wanted: Formats that the user named; None: those that fit the input.
        probabilities: Whether to write the probabilities of the organs, too.

    Raises:
        InputError: If a format cannot be written for this input, or needs a package that is not installed.
    """
    kinds = scans.kinds
    possible = {name for kind in kinds for name in POSSIBLE_FORMATS[kind]}
    if impossible := [name for name in wanted or () if name not in possible]:
        raise InputError(
            f"--format {impossible[0]}: cannot be written for {' and '.join(kinds)} input; "
            f"choose from {', '.join(name for name in FORMATS if name in possible)}"
        )
    formats: dict[Kind, list[str]] = {}
    for kind in kinds:
        names = dict.fromkeys(wanted or DEFAULT_FORMATS[kind])
        formats[kind] = [name for name in names if name in POSSIBLE_FORMATS[kind]]
        for name in formats[kind]:
            require(name, f"--format {name}")
        if probabilities and "nifti" in formats[kind]:
            formats[kind] += PROBABILITIES
    if probabilities and not any("nifti" in names for names in formats.values()):
        raise InputError(
            f"--probabilities: are NIfTI files; add nifti to --format, which is "
            f"{' '.join(dict.fromkeys(name for names in formats.values() for name in names))} now"
        )
    return formats


def leave_out(scans: InputScans, formats: Mapping[Kind, Sequence[str]]) -> InputScans:
    """Leave out scans of a kind for which none of the wanted formats can be written, and say so in a line."""
    others = [scan for scan in scans.usable if not formats[scan.kind]]
    if not others:
        return scans
    wanted = " or ".join(dict.fromkeys(name for names in formats.values() for name in names))
    line = f"left out: no {wanted} can be written for {list_some([scan.name for scan in others])}"
    return InputScans([scan for scan in scans.scans if scan not in others], [*scans.left_out, line])


def plan_outputs(scan: InputScan, wanted: Sequence[str]) -> Plan:
    """Find out which formats can be written for a scan, before it is predicted.

    Args:
        scan: A scan without a problem.
        wanted: The formats to write. If a segmentation cannot be written, a structure set stands for it.

    Raises:
        InputError: If its slices form no volume, or if no masks can be written in any format.
    """
    if set(wanted) == {"kaggle"}:
        return Plan(tuple(wanted), {})
    volume = scan.volume
    obstacles = {name: find_obstacle(name, volume) for name in wanted if name in (*CONTOURS, "nifti")}
    refused = {name: reason for name, reason in obstacles.items() if reason}
    formats = [name for name in wanted if name not in refused and not ("nifti" in refused and name in PROBABILITIES)]
    if "dicom-seg" in refused and "rtstruct" not in wanted and not find_obstacle("rtstruct", volume):
        formats.insert(0, "rtstruct")
    check_masks(scan, formats, refused)
    remarks = read_header(volume.origin).remarks if set(CONTOURS) & set(formats) else ()
    return Plan(tuple(formats), refused, remarks)


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
        name: `nifti`, or one of `CONTOURS`.
        volume: The volume.
    """
    try:
        if name == "nifti":
            right_angles(volume.path, volume.affine, volume.shape)
        else:
            try_contours(name, volume.origin)
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


def try_contours(name: str, series: DicomSeries) -> None:
    """Write a file that names the slices of a series into memory."""
    check_uids(series)
    check_uid_forms(series)
    masks = np.zeros((len(ORGANS), 1, 1, len(series.frames)), dtype=bool)
    masks[0, ..., [0, -1]] = True
    build = build_dicom_seg if name == "dicom-seg" else build_structure_set
    with quiet():
        trial = build(series, masks, Algorithm({"trial": ""}), read_header(series))
        trial.save_as(io.BytesIO(), enforce_file_format=True)


def output_paths(name: str, scan: InputScan) -> list[Path]:
    """Return where the files of a format lie in the output folder."""
    # The rows of a scan become a part of `submission.csv` at the end.
    folder = Path(RECORDS) if name == "kaggle" else Path()
    return [folder / (scan.name + suffix) for suffix in SUFFIXES[name]]


def list_outputs(scans: InputScans, formats: Mapping[Kind, Sequence[str]]) -> list[Path]:
    """Return where the files lie in the output folder after all scans are done.

    Raises:
        InputError: If no scan can be written. The message has the reasons.
    """
    paths = [Path(SUBMISSION)] * ("kaggle" in formats.get("kaggle", ()))
    problems = [scan.problem for scan in scans.scans if scan.problem]
    for scan in scans.usable:
        try:
            names = [name for name in plan_outputs(scan, formats[scan.kind]).formats if name != "kaggle"]
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


def write_formats(predicted: PredictedScan, plan: Plan, folder: Path) -> Plan:
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
            write_scan(name, predicted, replace(plan, formats=(*written, name), refused=refused), *paths)
            written.append(name)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            for path in paths:
                path.unlink(missing_ok=True)
            refused[name] = str(error) if isinstance(error, InputError) else describe_fault(error)
    check_masks(predicted.scan, written, refused)
    return replace(plan, formats=tuple(written), refused=refused, failed=tuple(refused.keys() - plan.refused.keys()))


def write_scan(name: str, predicted: PredictedScan, plan: Plan, path: Path, *more: Path) -> None:
    """Write the files of a scan in one format."""
    if name in PROBABILITIES:
        organ = PROBABILITIES[name]
        write_probabilities(predicted.volume, predicted.probabilities[ORGANS.index(organ)], organ, path)
    if name == "kaggle":
        write_rows(predicted, path)
    if name == "nifti":
        write_label_map(predicted.volume, predicted.masks, path)
    if name == "dicom-seg":
        write_dicom_seg(predicted.volume, predicted.masks, path, predicted.algorithm)
    if name == "rtstruct":
        write_rtstruct(predicted.volume, predicted.masks, path, predicted.algorithm)
    if name == "report":
        # Imported here, because Matplotlib takes a second, and this module is read before the checkpoints are loaded.
        from gi_segmentation.review.report import write_report

        write_report(predicted, describe_written(predicted.scan, plan), path, *more)


def describe_written(scan: InputScan, plan: Plan) -> dict[str, Any]:
    """Return what was written for a scan and what was not, as it stands in the report."""
    files = {}
    for name in plan.formats:
        names = [SUBMISSION] if name == "kaggle" else [path.name for path in output_paths(name, scan)]
        files[name] = {"names": names, "reason": ""}
    files |= {name: {"names": [], "reason": reason} for name, reason in plan.refused.items()}
    return {"files": files, "remarks": list(plan.remarks)}


def write_rows(predicted: PredictedScan, path: Path) -> None:
    """Write a scan's rows of `submission.csv`: `id,class,predicted` for each slice and organ, without a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for one, masks in zip(predicted.scan.slices, predicted.slice_masks, strict=True):
            slice_id = slice_name(one.scan, one.number)
            writer.writerows([slice_id, organ, encode(mask)] for organ, mask in zip(ORGANS, masks, strict=True))


def write_submission(scans: Iterable[InputScan], output_dir: Path) -> Path:
    """Join the rows of all scans to Kaggle's `submission.csv`.

    Args:
        scans: The scans, in order. All have been predicted.
        output_dir: The folder of the prediction.

    Returns:
        The file.

    Raises:
        InputError: If there is another `submission.csv`.
    """
    path = output_dir / SUBMISSION
    with writing_file(path) as unfinished:
        with unfinished.open("wb") as file:
            file.write(b"id,class,predicted\n")
            for scan in scans:
                for part in output_paths("kaggle", scan):
                    with (output_dir / part).open("rb") as rows:
                        shutil.copyfileobj(rows, file)
        if path.exists() and not filecmp.cmp(path, unfinished, shallow=False):
            raise InputError(f"{path}: exists; remove it or name another --output_dir")
    return path


def check_submission(output_dir: Path) -> None:
    """Check that there is no `submission.csv` of an earlier prediction.

    Raises:
        InputError: If there is one.
    """
    # If rows of single scans are left, the earlier prediction was killed when it had just written the file. Its
    # command must be able to go on. `write_submission` compares both files then.
    path = output_dir / SUBMISSION
    if path.exists() and not any((output_dir / RECORDS).glob("*.csv")):
        raise InputError(f"{path}: exists; remove it or name another --output_dir")
