"""The folder that predictions are written to: the records of its scans, and Kaggle's `submission.csv`.

A record of each scan says what made its files, so that a prediction which was interrupted goes on where it stopped.
This module does not import PyTorch.
"""

import csv
import filecmp
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, reading
from gi_segmentation.files import find_files, hash_file, write_json, writing_file
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.inference.outputs import RECORDS, SUBMISSION, OutputPlan, output_paths, write_formats
from gi_segmentation.inference.sample_submission import Sample, slice_ids, write_sampled_rows
from gi_segmentation.review.predicted_scan import PredictedScan


class OutputConflictError(InputError):
    """The output folder has files that do not belong to a scan. The scan itself may be whole."""


def check_records(output_dir: Path, made_by: dict[str, Any]) -> None:
    """Check that everything in an output folder was made by the same models with the same settings.

    Raises:
        InputError: If not.
    """
    records = find_files(output_dir / RECORDS).files if (output_dir / RECORDS).is_dir() else []
    # Hidden are the files of a scan that a killed process was writing.
    for path in (one for one in records if one.suffix == ".json"):
        earlier = read_record(path)["made_by"]
        if different := [key for key in made_by if earlier.get(key) != made_by[key]]:
            key, name = different[0], record_name(path, output_dir)
            raise InputError(
                f"{output_dir}: has predictions of {name} with other settings: {key} was {earlier.get(key)} and "
                f"is now {made_by[key]}; name another --output_dir, or remove this folder with its {RECORDS}"
            )


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a scan.

    Raises:
        InputError: If it is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"made_by": dict(record["made_by"]), "input": str(record["input"]), "files": list(record["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a record of a prediction; remove it and the files of this scan") from error


def record_name(path: Path, output_dir: Path) -> str:
    """Return the name of the scan that a record is of."""
    return path.relative_to(output_dir / RECORDS).as_posix().removesuffix(".json")


def record_path(scan: InputScan, output_dir: Path) -> Path:
    """Return where the record of a scan lies."""
    return output_dir / RECORDS / f"{scan.name}.json"


def is_done(scan: InputScan, files: Sequence[Path], output_dir: Path) -> bool:
    """Return whether an earlier run has written the files of a scan.

    Raises:
        OutputConflictError: If a file exists that no earlier run has written, or if the scan has other content than
            then.
        InputError: If a file of the scan cannot be read.
    """
    path = record_path(scan, output_dir)
    record = read_record(path) if path.exists() else {"files": []}
    recorded = [output_dir / name for name in record["files"]]
    if foreign := [file for file in files if file.exists() and file not in recorded]:
        raise OutputConflictError(f"{foreign[0]}: exists; remove it or name another --output_dir")
    if not recorded:
        return False
    if record["input"] != hash_files(scan.paths):
        raise OutputConflictError(
            f"{scan.paths[0]}: {output_dir} has predictions of another scan with the name {scan.name}; "
            f"name another --output_dir"
        )
    return all(file.exists() and file in recorded for file in files)


def hash_files(paths: Sequence[Path]) -> str:
    """Return a fingerprint of the contents of files. Neither their names nor their order matter.

    Raises:
        InputError: If a file cannot be read.
    """
    digests = []
    for path in paths:
        # A broken link counts as an empty file, with `--on_error empty`. Otherwise nobody gets here with one.
        with reading(path, "cannot be read", "copy it again"):
            digests.append(bytes.fromhex(hash_file(path)) if path.exists() else b"")
    return "sha256 " + hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def write_files(predicted: PredictedScan, plan: OutputPlan, output_dir: Path, made_by: dict[str, Any]) -> OutputPlan:
    """Write the files of a scan, and move them to their places together.

    Returns:
        What was written, see `outputs.write_formats`.
    """
    scan = predicted.scan
    record = record_path(scan, output_dir)
    # In the same folder, because a file can be moved in one step only on its own disk. An earlier run that was killed
    # may have left it.
    unfinished = record.with_name(f".{record.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        plan = write_formats(predicted, plan, unfinished)
        paths = plan.paths(scan)
        earlier = read_record(record)["files"] if record.exists() else []
        names = list(dict.fromkeys([*earlier, *map(str, paths)]))
        content = {"made_by": made_by, "input": hash_files(scan.paths), "files": names}
        # First the record: a run that stops between two moves leaves files that the next run knows as ours.
        write_json(record, content)
        for path in paths:
            (output_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path.name).replace(output_dir / path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return plan


def write_submission(
    scans: Sequence[InputScan], output_dir: Path, organs: Sequence[str] = (), sample: Sample | None = None
) -> Path:
    """Join the rows of all scans to Kaggle's `submission.csv`.

    Args:
        scans: The scans, in order.
        output_dir: The folder of the prediction.
        organs: Names of the organs, for scans without a prediction. They get empty rows.
        sample: What decides which rows there are; None: the slices of the scans.

    Returns:
        The file.

    Raises:
        InputError: If there is another `submission.csv`.
    """
    path = output_dir / SUBMISSION
    with writing_file(path) as unfinished:
        sources = [rows_path(scan, output_dir) for scan in scans]
        if sample is not None and sample.rows:
            write_sampled_rows(sample, [source for source in sources if source.exists()], unfinished)
        else:
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("id", "class", sample.encoding if sample else "predicted"))
                for scan, source in zip(scans, sources, strict=True):
                    if not source.exists():
                        writer.writerows((one, organ, "") for one in slice_ids(scan) for organ in organs)
                        continue
                    with source.open(newline="", encoding="utf-8") as rows:
                        shutil.copyfileobj(rows, file)
        if path.exists() and not filecmp.cmp(path, unfinished, shallow=False):
            raise InputError(f"{path}: exists; remove it or name another --output_dir")
    return path


def rows_path(scan: InputScan, output_dir: Path) -> Path:
    """Return where the rows of a scan lie until all scans are done."""
    (path,) = output_paths("kaggle", scan)
    return output_dir / path


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


def forget_rows(scans: Sequence[InputScan], output_dir: Path) -> None:
    """Remove the rows of `submission.csv` that were kept per scan, after the whole file was written."""
    for scan in scans:
        rows, path = rows_path(scan, output_dir), record_path(scan, output_dir)
        if not rows.exists():
            continue
        record = read_record(path)
        record["files"].remove(str(rows.relative_to(output_dir)))
        # First the rows: without a record, the next run would take them for those of somebody else.
        rows.unlink()
        if record["files"]:
            write_json(path, record)
        else:
            path.unlink()
    if (output_dir / RECORDS).is_dir() and not any((output_dir / RECORDS).iterdir()):
        (output_dir / RECORDS).rmdir()
