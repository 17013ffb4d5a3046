"""Write prediction files."""

import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.inference.algorithm import Algorithm
from gi_segmentation.inference.dicom_seg import write_dicom_seg
from gi_segmentation.inference.inputs import Kind, Scans, find_volume, require
from gi_segmentation.inference.nifti import write_label_map
from gi_segmentation.inference.rtstruct import write_rtstruct
from gi_segmentation.inference.volumes import Slice, Volume, native_masks
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS, slice_name

Prediction: TypeAlias = tuple[Slice, np.ndarray]

# The formats that a kind of input has without `--format`, and all that it can have.
DEFAULT_FORMATS: dict[Kind, tuple[str, ...]] = {
    "kaggle": ("kaggle",),
    "nifti": ("nifti",),
    "dicom": ("dicom-seg", "rtstruct"),
}
POSSIBLE_FORMATS: dict[Kind, tuple[str, ...]] = {
    "kaggle": ("kaggle", "nifti"),
    "nifti": ("nifti",),
    "dicom": ("nifti", "dicom-seg", "rtstruct"),
}
# The ends of the file names of the formats with a file per scan.
SCAN_SUFFIXES: dict[str, str] = {"nifti": ".nii.gz", "dicom-seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
SUBMISSION = "submission.csv"


def choose_formats(scans: Scans, wanted: Sequence[str] | None) -> list[str]:
    """Return the formats to write.

    Args:
        scans: The input.
        wanted: Formats that the user named; None: those that fit the input.

    Raises:
        InputError: If a format cannot be written for this input, or needs a package that is not installed.
    """
    formats = list(dict.fromkeys(wanted or DEFAULT_FORMATS[scans.kind]))
    if impossible := [name for name in formats if name not in POSSIBLE_FORMATS[scans.kind]]:
        raise InputError(
            f"--format {impossible[0]}: cannot be written for {scans.kind} input; "
            f"choose from {', '.join(POSSIBLE_FORMATS[scans.kind])}"
        )
    for name in formats:
        require(name, f"--format {name}")
    return formats


def list_outputs(scans: Scans, formats: Sequence[str]) -> list[str]:
    """Return the names of the files to write."""
    per_scan = [name + SCAN_SUFFIXES[one] for name in scans.names for one in formats if one in SCAN_SUFFIXES]
    return [SUBMISSION] * ("kaggle" in formats) + per_scan


@contextmanager
def unfinished_folder(output_dir: Path) -> Iterator[Path]:
    """Yield a hidden folder in `output_dir`. At the end its files are moved there, or removed if anything fails."""
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = output_dir / f".partial-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        for path in sorted(folder.iterdir()):
            path.replace(output_dir / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_predictions(
    predictions: Iterable[Prediction], formats: Sequence[str], folder: Path, algorithm: Algorithm
) -> None:
    """Write predictions in one or several formats, while they come.

    Args:
        predictions: Slices and their masks, scan by scan.
        formats: The formats.
        folder: Folder for the files.
        algorithm: What made the masks.
    """
    per_scan = [one for one in formats if one in SCAN_SUFFIXES]
    passing = write_scans(predictions, per_scan, folder, algorithm) if per_scan else predictions
    if "kaggle" in formats:
        write_submission(passing, folder / SUBMISSION)
    else:
        for _ in passing:
            pass


def write_scans(
    predictions: Iterable[Prediction], formats: Sequence[str], folder: Path, algorithm: Algorithm
) -> Iterator[Prediction]:
    """Write the files of each scan when its last slice has come, and pass all predictions on.

    Only the masks of one scan are in memory.
    """
    for name, group in groupby(predictions, key=lambda prediction: prediction[0].scan):
        scan = []
        for prediction in group:
            scan.append(prediction)
            yield prediction
        volume = find_volume([one for one, _ in scan])
        masks = native_masks(volume, scan)
        for one in formats:
            write_scan(one, volume, masks, folder / (name + SCAN_SUFFIXES[one]), algorithm)


def write_scan(name: str, volume: Volume, masks: np.ndarray, path: Path, algorithm: Algorithm) -> None:
    """Write the file of a scan.

    Args:
        name: The format.
        volume: The scan.
        masks: bool, on the grid of the volume, shape `(organs, i, j, k)`.
        path: The file.
        algorithm: What made the masks.
    """
    if name == "nifti":
        write_label_map(volume, masks, path)
    if name == "dicom-seg":
        write_dicom_seg(volume, masks, path, algorithm)
    if name == "rtstruct":
        write_rtstruct(volume, masks, path, algorithm)


def write_submission(predictions: Iterable[Prediction], path: Path) -> None:
    """Write Kaggle's `submission.csv`: a row `id,class,predicted` for each slice and organ.

    Args:
        predictions: Slices and their masks, bool, shape `(organs, height, width)`.
        path: The file to write, in an `unfinished_folder`.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "class", "predicted"])
        for one, masks in predictions:
            slice_id = slice_name(one.scan, one.number)
            writer.writerows([slice_id, organ, encode(mask)] for organ, mask in zip(ORGANS, masks, strict=True))
