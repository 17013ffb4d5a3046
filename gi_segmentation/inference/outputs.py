"""Write the prediction files of a scan, and Kaggle's `submission.csv`."""

import csv
import filecmp
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gi_segmentation.errors import InputError, one_line
from gi_segmentation.inference.algorithm import Algorithm
from gi_segmentation.inference.arguments import FORMATS
from gi_segmentation.inference.dicom import check_uids
from gi_segmentation.inference.dicom_seg import write_dicom_seg
from gi_segmentation.inference.inputs import Kind, Scan, Scans, require
from gi_segmentation.inference.nifti import right_angles, write_label_map, write_probabilities
from gi_segmentation.inference.rtstruct import write_rtstruct
from gi_segmentation.inference.triage import TrainingRanges
from gi_segmentation.inference.volumes import Volume, native_grid
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
class PredictedScan:
    """What was predicted for a scan, for those who write files.

    Attributes:
        scan: The scan.
        slice_masks: The masks of each slice: bool, shape `(organs, height, width)`.
        slice_probabilities: The mean probabilities of each slice over all models and flips, before post-processing:
            float16, same shapes; None if nobody needs them.
        algorithm: What made the masks.
        ranges: The scans that the models were trained on; None if the checkpoints do not say it, or nobody needs it.
        agreement: By the name of the organ, the smallest Dice between the common masks, before post-processing, and
            those of one model or one flip alone; None if there is only one, or nobody needs it.
    """

    scan: Scan
    slice_masks: Sequence[np.ndarray]
    slice_probabilities: Sequence[np.ndarray] | None
    algorithm: Algorithm
    ranges: TrainingRanges | None = None
    agreement: Mapping[str, float] | None = None

    @property
    def volume(self) -> Volume:
        """The volume of the scan, with its grid in the patient."""
        return self.scan.volume

    @cached_property
    def masks(self) -> np.ndarray:
        """The masks on the grid of the volume: bool, shape `(organs, i, j, k)`."""
        return native_grid(self.volume, zip(self.scan.slices, self.slice_masks, strict=True))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The mean probabilities on the grid of the volume: float16, shape `(organs, i, j, k)`."""
        assert self.slice_probabilities is not None
        return native_grid(self.volume, zip(self.scan.slices, self.slice_probabilities, strict=True))


def choose_formats(scans: Scans, wanted: Sequence[str] | None, probabilities: bool = False) -> dict[Kind, list[str]]:
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


def leave_out(scans: Scans, formats: Mapping[Kind, Sequence[str]]) -> Scans:
    """Leave out scans of a kind for which none of the wanted formats can be written, and say so in a line."""
    others = [scan for scan in scans.usable if not formats[scan.kind]]
    if not others:
        return scans
    wanted = " or ".join(dict.fromkeys(name for names in formats.values() for name in names))
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    line = f"left out: no {wanted} can be written for {', '.join(scan.name for scan in others[:3])}{more}"
    return Scans([scan for scan in scans.scans if scan not in others], [*scans.left_out, line])


def check_formats(scan: Scan, formats: Sequence[str]) -> None:
    """Check that a scan can be written in these formats.

    Raises:
        InputError: If its slices form no volume, if this volume cannot be written as NIfTI, or if it is a DICOM
            series without UIDs.
    """
    if set(formats) != {"kaggle"}:
        volume = scan.volume
        if "nifti" in formats:
            right_angles(volume.path, volume.affine, volume.shape)
        if {"dicom-seg", "rtstruct"} & set(formats):
            check_uids(volume.origin)


def output_paths(name: str, scan: Scan) -> list[Path]:
    """Return where the files of a format lie in the output folder."""
    # The rows of a scan become a part of `submission.csv` at the end.
    folder = Path(RECORDS) if name == "kaggle" else Path()
    return [folder / (scan.name + suffix) for suffix in SUFFIXES[name]]


def list_outputs(scans: Scans, formats: Mapping[Kind, Sequence[str]]) -> list[Path]:
    """Return where the files lie in the output folder after all scans are done."""
    per_scan = [
        path
        for scan in scans.usable
        for name in formats[scan.kind]
        if name != "kaggle"
        for path in output_paths(name, scan)
    ]
    return [Path(SUBMISSION)] * ("kaggle" in formats.get("kaggle", ())) + per_scan


def write_scan(name: str, predicted: PredictedScan, path: Path, *more: Path) -> None:
    """Write the files of a scan in one format.

    Raises:
        InputError: If the libraries for DICOM do not accept what the files of the series say.
    """
    if name in PROBABILITIES:
        organ = PROBABILITIES[name]
        write_probabilities(predicted.volume, predicted.probabilities[ORGANS.index(organ)], organ, path)
    if name == "kaggle":
        write_rows(predicted, path)
    if name == "nifti":
        write_label_map(predicted.volume, predicted.masks, path)
    if name in ("dicom-seg", "rtstruct"):
        write = write_dicom_seg if name == "dicom-seg" else write_rtstruct
        try:
            write(predicted.volume, predicted.masks, path, predicted.algorithm)
        # The header of a series may have anything, and much of it is copied.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{predicted.volume.path}: no {name} can be written ({one_line(error)})") from error
    if name == "report":
        # Imported here, because Matplotlib takes a second, and this module is read before the checkpoints are loaded.
        from gi_segmentation.inference.report import write_report

        write_report(predicted, path, *more)


def write_rows(predicted: PredictedScan, path: Path) -> None:
    """Write a scan's rows of `submission.csv`: `id,class,predicted` for each slice and organ, without a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for one, masks in zip(predicted.scan.slices, predicted.slice_masks, strict=True):
            slice_id = slice_name(one.scan, one.number)
            writer.writerows([slice_id, organ, encode(mask)] for organ, mask in zip(ORGANS, masks, strict=True))


def write_submission(scans: Iterable[Scan], output_dir: Path) -> Path:
    """Join the rows of all scans to Kaggle's `submission.csv`.

    Args:
        scans: The scans, in order. All have been predicted.
        output_dir: The folder of the prediction.

    Returns:
        The file.

    Raises:
        InputError: If there is another `submission.csv`.
    """
    unfinished = output_dir / RECORDS / SUBMISSION
    with unfinished.open("wb") as file:
        file.write(b"id,class,predicted\n")
        for scan in scans:
            for path in output_paths("kaggle", scan):
                with (output_dir / path).open("rb") as rows:
                    shutil.copyfileobj(rows, file)
    path = output_dir / SUBMISSION
    if path.exists() and not filecmp.cmp(path, unfinished, shallow=False):
        raise InputError(f"{path}: exists; remove it or name another --output_dir")
    return unfinished.replace(path)


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
