"""Predict many scans, and write the files of each as soon as it is done.

A scan that cannot be read stops no other one.
"""

import errno
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gi_segmentation import __version__
from gi_segmentation.errors import InputError, describe_fault, list_some, one_line
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.formats.volumes import FIELD_MM, check_volumes
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import Member, find_common_field, precision_name
from gi_segmentation.inference.output_folder import OutputConflictError, check_records, is_done, write_files
from gi_segmentation.inference.outputs import OutputPlan, find_format, plan_outputs
from gi_segmentation.inference.scans import predict_scans
from gi_segmentation.memory import release_memory
from gi_segmentation.review.predicted_scan import PredictedScan

# Errors of the system that are due to the name of a scan, and not to the folder.
SCAN_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


@dataclass(frozen=True)
class ScanOutcome:
    """What became of a scan.

    Attributes:
        name: Name of the scan.
        slices: Number of its slices; 0 if they are not known.
        status: `done`; `partly`, because a format could not be written; `skipped`, because an earlier run has written
            the same files; `failed`; or `empty`, because it failed and its rows are empty.
        seconds: Time from the start of its prediction until its files are written.
        files: The files in the output folder.
        message: Why it failed.
        plan: The formats that were written, and those that could not be; None if it failed.
        problems: Why slices of it have empty masks, if some could not be read.
    """

    name: str
    slices: int
    status: Literal["done", "partly", "skipped", "failed", "empty"]
    seconds: float = 0.0
    files: list[Path] = field(default_factory=list)
    message: str = ""
    plan: OutputPlan | None = None
    problems: Sequence[str] = ()

    @property
    def refused(self) -> Mapping[str, str]:
        """The formats that could not be written, and why."""
        return self.plan.refused if self.plan else {}

    def is_complete(self, asked: bool) -> bool:
        """Tell whether all is well.

        Args:
            asked: Whether the user named the formats. If not, what cannot be written for a series is not missing.
        """
        return self.status != "failed" and not (self.plan and (self.plan.failed or (asked and self.plan.refused)))


def predict_files(
    members: list[Member],
    scans: Sequence[InputScan],
    formats: Sequence[str],
    output_dir: Path,
    settings: PredictionSettings,
) -> Iterator[ScanOutcome]:
    """Predict scans and write their files.

    Args:
        members: One checkpoint, or several for an ensemble.
        scans: The scans, also those with a problem.
        formats: The formats of the files, see `outputs.choose_formats`.
        output_dir: Folder for the files. It may have files of an earlier run with the same models and settings.
        settings: How the scans are predicted.

    Yields:
        One result per scan: first those that are not predicted, then each when its files are written and the next one
        is predicted.

    Raises:
        InputError: If the folder has files of other models or settings, or if nothing can be written to it; with
            `settings.on_error` of `empty` also if it has other files for a scan.
    """
    made_by = describe_prediction(members, settings)
    check_records(output_dir, made_by)
    left: dict[str, tuple[InputScan, OutputPlan]] = {}
    for scan in scans:
        found = check_scan(scan, formats, output_dir, settings)
        if isinstance(found, OutputPlan):
            left[scan.name] = scan, found
        else:
            yield found
    probabilities = any(find_format(name).probabilities for name in formats)
    started = time.monotonic()
    # The files of a scan are written in another thread, while this one predicts the next scan. The model stays in this
    # thread, because only the main thread keeps memory for the next batch, see `memory`.
    with ThreadPoolExecutor(1) as writer:
        writing: Future[ScanOutcome] | None = None
        for scan, predicted in predict_scans(members, [scan for scan, _ in left.values()], settings, probabilities):
            if writing is not None:
                yield writing.result()
            _, plan = left[scan.name]
            writing = writer.submit(write_result, scan, predicted, plan, output_dir, made_by, started)
            # The callback runs when the volumes that the report has needed are gone.
            writing.add_done_callback(lambda _: release_memory())
            del predicted
            started = time.monotonic()
        if writing is not None:
            yield writing.result()


def describe_prediction(members: Sequence[Member], settings: PredictionSettings) -> dict[str, Any]:
    """Return what decides the masks of a scan, in plain values for a record."""
    limits, field_mm = settings.postprocessing, find_common_field(members)
    # With `empty`, what an earlier run has predicted without it is right too. So it is compared only without it.
    strict: dict[str, Any] = {"on_error": None} if settings.on_error == "stop" else {}
    return {
        **strict,
        "version": __version__,
        "checkpoints": sorted(member.commit for member in members),
        "precision": precision_name(members[0]),
        "test_time_flips": settings.flips,
        "postprocessing": None if limits is None else limits.to_config(),
        # Earlier records have no such entry. A file has no tuples.
        "field_mm": None if field_mm == FIELD_MM else [list(ends) for ends in field_mm],
    }


def check_scan(
    scan: InputScan, formats: Sequence[str], output_dir: Path, settings: PredictionSettings
) -> ScanOutcome | OutputPlan:
    """Return the result of a scan that need not or cannot be predicted, or what will be written for it.

    Raises:
        OutputConflictError: If the folder has other files for this scan, and failed scans get empty rows.
    """
    try:
        if scan.problem:
            raise InputError(scan.problem)
        if settings.postprocessing is not None:
            reason = "post-processing works on whole scans; correct the file name, or add --no_postprocessing"
            check_volumes(scan.slices, reason)
        plan = plan_outputs(scan, formats)
        files = [output_dir / path for path in plan.paths(scan)]
        if is_done(scan, files, output_dir):
            return ScanOutcome(scan.name, len(scan.slices), "skipped", files=files, plan=plan)
    except InputError as error:
        # With `empty`, the rows of a scan that can be read would become empty because of the folder.
        if isinstance(error, OutputConflictError) and settings.on_error == "empty":
            raise
        return ScanOutcome(scan.name, len(scan.slices), "failed", message=str(error))
    except MemoryError:
        raise
    except Exception as error:
        return ScanOutcome(scan.name, len(scan.slices), "failed", message=f"{scan.name}: {describe_fault(error)}")
    return plan


def write_result(
    scan: InputScan,
    predicted: PredictedScan | InputError,
    plan: OutputPlan,
    output_dir: Path,
    made_by: dict[str, Any],
    started: float,
) -> ScanOutcome:
    """Write the files of a scan, if it was predicted, and return its result.

    Raises:
        InputError: If the folder cannot be written.
    """
    try:
        if isinstance(predicted, InputError):
            raise predicted
        if len(predicted.problems) == len(scan.slices):
            raise InputError(f"none of its slices can be read, the first because: {predicted.problems[0]}")
        if predicted.problems:
            made_by = made_by | {"on_error": "empty"}
        plan = write_files(predicted, plan, output_dir, made_by)
        seconds = time.monotonic() - started
        files = [output_dir / path for path in plan.paths(scan)]
        status: Literal["done", "partly"] = "partly" if plan.refused else "done"
        return ScanOutcome(scan.name, len(scan.slices), status, seconds, files, plan=plan, problems=predicted.problems)
    except InputError as error:
        message = str(error)
    except MemoryError:
        raise
    except Exception as error:
        # A full disk is the same for all other scans.
        if isinstance(error, OSError) and error.errno not in SCAN_ERRORS:
            raise InputError(
                f"{output_dir}: cannot be written ({one_line(error)}); start again after a correction"
            ) from error
        message = f"{scan.name}: {describe_fault(error)}"
    return ScanOutcome(scan.name, len(scan.slices), "failed", time.monotonic() - started, message=message)


def forgive(result: ScanOutcome) -> ScanOutcome:
    """Turn the failure of a scan into a problem. Its rows are empty."""
    if result.status != "failed":
        return result
    return replace(result, status="empty", message="", problems=[f"all of {result.name}: {result.message}"])


def describe_results(results: Sequence[ScanOutcome], output_dir: Path) -> str:
    """Return a table with a row per scan, and below it what could not be written or was left out.

    Example:
        >>> print(describe_results([ScanOutcome("a", 80, "done", 1.25, [Path("out/a.nii.gz")])], Path("out")))
        scan | slices | seconds | status | files
        a    |     80 |     1.2 | done   | a.nii.gz
    """
    rows = [("scan", "slices", "seconds", "status", "files")]
    notes: dict[str, list[str]] = defaultdict(list)
    for one in results:
        files = ", ".join(str(file.relative_to(output_dir)) for file in one.files if file.suffix != ".csv")
        rows.append((one.name, str(one.slices), f"{one.seconds:.1f}", one.status, files))
        for refused, reason in one.refused.items():
            notes[f"no {refused} was written: {reason}"].append(one.name)
        for remark in one.plan.remarks if one.plan else ():
            notes[remark].append(one.name)
    name, slices, seconds, status = (max(len(row[column]) for row in rows) for column in range(4))
    form = f"{{:{name}}} | {{:>{slices}}} | {{:>{seconds}}} | {{:{status}}} | {{}}"
    lines = [form.format(*row).rstrip() for row in rows]
    # Most series of a clinic have the same faults.
    for note, names in notes.items():
        lines.append(f"{list_some(names)}: {note}")
    return "\n".join(lines)


def describe_failures(results: Sequence[ScanOutcome], formats: Sequence[str]) -> str:
    """Return the message for the user if scans failed, or if files are missing."""
    failed = [result for result in results if result.status == "failed"]
    incomplete = [result for result in results if result.refused]
    texts = []
    if failed:
        others = [result.name for result in failed[1:]]
        first = f"{len(failed)} of {len(results)} scans failed: {failed[0].name} ({failed[0].message})"
        texts.append("; ".join([first, ", ".join(others)] if others else [first]))
    if incomplete:
        lacks = [f"{result.name} has no {' and no '.join(result.refused)}" for result in incomplete]
        texts.append(f"{len(incomplete)} of {len(results)} scans lack a file: {list_some(lacks)}; the table says why")
    if "kaggle" in formats:
        # Kaggle refuses a submission in which rows are missing, so half a file is of no use.
        texts.append("submission.csv needs all scans, and was not written")
    texts.append("Start the same command again after a correction; what is done is not predicted again")
    return ". ".join(texts)
