"""The trainings of a cross-validation, one per fold, each in a folder of its own."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.slices import BUILD_COMMAND, find_dataset
from gi_segmentation.errors import InputError
from gi_segmentation.publishing.facts import RUN_FILE, RunResults, read_results
from gi_segmentation.publishing.results import SCANS
from gi_segmentation.schema import ALL_FOLDS
from gi_segmentation.scoring.records import read_scans
from gi_segmentation.scoring.scans import ScanScore


@dataclass(frozen=True)
class FoldRun:
    """The finished training of a fold.

    Attributes:
        fold: Number of the fold that was held back, or `all`.
        folder: Its output folder.
        facts: From `run.json` there.
        scans: The scores of the patients that were held back, as in `training.trainer.Evaluation`.
    """

    fold: str
    folder: Path
    facts: RunResults
    scans: dict[str, list[ScanScore]]


def fold_folder(output_dir: Path, fold: str) -> Path:
    """Return the output folder of the training of a fold. The branch on the Hub has the same name.

    Example:
        >>> fold_folder(Path("cv"), "3").name, fold_folder(Path("cv"), "all").name
        ('fold-3', 'fold-all')
    """
    return output_dir / f"fold-{fold}"


def list_folds(data_args: DataArguments) -> list[str]:
    """Return the folds of a dataset, ascending.

    Args:
        data_args: Name and revision of the dataset.

    Raises:
        InputError: If the dataset cannot be loaded or has no column `fold`.
    """
    slices = find_dataset(data_args.dataset_name, data_args.dataset_revision)
    folds: set[int] = set()
    for split in ("train", "validation"):
        if split in slices and "fold" in slices[split].column_names:
            folds |= set(slices[split].unique("fold"))
    if len(folds) < 2:
        raise InputError(
            f"{data_args.dataset_name}: expected a column `fold` with at least two folds, but got {len(folds)}; build "
            f"the dataset again: `{BUILD_COMMAND}`"
        )
    return [str(fold) for fold in sorted(folds)]


def check_output_dir(output_dir: Path) -> None:
    """Check that a folder may become that of a cross-validation.

    Raises:
        InputError: If it is the output folder of a single training, whose results would be overwritten.
    """
    if is_finished(output_dir) and not read_results(output_dir).folds:
        raise InputError(f"--output_dir {output_dir}: it holds a single training; name another folder")


def is_finished(folder: Path) -> bool:
    """Return whether a folder has the results of a finished training."""
    try:
        read_results(folder)
    except (OSError, ValueError):  # `InputError` is a ValueError: the facts of a run that has begun but not ended
        return False
    return True


def run_command(command: Sequence[str], output: IO[str]) -> int:
    """Run a command to its end, and return its exit status.

    If this process is stopped, the command and all processes that it started are stopped first. Otherwise they would
    train on, beside those of the next start.

    Args:
        command: The program and its words.
        output: File for all that it prints.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    # Ctrl-C raises an exception by itself. `kill`, and a terminal that is closed, would end this process at once.
    signals = [signal.SIGTERM, signal.SIGHUP]
    handlers = [signal.signal(number, stop) for number in signals]
    # `accelerate launch` starts more processes. In a session of their own, one signal reaches all of them.
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def train_fold(fold: str, output_dir: Path, recipe: Path, flags: Sequence[str], config_file: Path | None) -> None:
    """Train with one fold held back, by `accelerate launch`, unless this was done before.

    An interrupted training continues from its last checkpoint, because `run_segmentation.py` does so.

    Args:
        fold: Number of the fold, or `all`.
        output_dir: Folder of the cross-validation. The training writes to `fold-K` there, and its output goes to
            `fold-K.log`.
        recipe: The recipe of all folds.
        flags: More flags for `run_segmentation.py`.
        config_file: Configuration of accelerate; None: its default.

    Raises:
        InputError: If the training fails. The message has the end of its output.
    """
    folder, log = fold_folder(output_dir, fold), fold_folder(output_dir, fold).with_suffix(".log")
    if is_finished(folder):
        print(f"fold {fold}: finished before, in {folder}", flush=True)
        return
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", str(config_file)] if config_file else []
    words = ["--config", str(recipe), *flags, "--fold", fold, "--output_dir", str(folder)]
    print(f"fold {fold}: training; its output goes to {log}", flush=True)
    start = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    # Appended, because the log of an interrupted training is worth keeping.
    with log.open("a", encoding="utf-8") as file:
        status = run_command([*launch, "-m", "run_segmentation", *words], file)
    if status:
        with log.open(encoding="utf-8", errors="replace") as file:
            last = "".join(deque(file, maxlen=15)).strip()
        raise InputError(
            f"fold {fold}: the training ended with status {status}; the end of {log}:\n{last}\n"
            f"After the cause is removed, run the same command again: finished folds are kept, and this one goes on"
        )
    facts = read_results(folder)
    score = f"Dice {facts.scores['eval_dice']:.4f}" if facts.scores else "nothing was held back"
    print(f"fold {fold}: {score}, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def read_fold(output_dir: Path, fold: str) -> FoldRun:
    """Read the results of the training of a fold.

    Args:
        output_dir: Folder of the cross-validation.
        fold: Number of the fold, or `all`.

    Raises:
        InputError: If there are none, or they are of another fold.
    """
    folder = fold_folder(output_dir, fold)
    if not is_finished(folder):
        raise InputError(
            f"fold {fold}: expected a finished training in {folder}, but there is none; train it with --fold {fold}, "
            f"or copy the folder from the machine that trained it"
        )
    facts = read_results(folder)
    if facts.fold != fold:
        raise InputError(
            f"{folder / RUN_FILE}: expected the training that held back fold {fold}, but it is one with --fold "
            f"{facts.fold}; give each fold its own folder"
        )
    return FoldRun(fold, folder, facts, {} if fold == ALL_FOLDS else read_scans(folder / SCANS))


def read_everyone(output_dir: Path) -> FoldRun | None:
    """Return the training on all patients; None if there is none that is finished."""
    return read_fold(output_dir, ALL_FOLDS) if is_finished(fold_folder(output_dir, ALL_FOLDS)) else None
