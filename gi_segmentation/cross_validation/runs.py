"""The trainings of a cross-validation, one per fold, each in a folder of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from gi_segmentation.arguments import DataArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.cross_validation.progress import FoldsProgress
from gi_segmentation.data.slices import BUILD_COMMAND, load_slices
from gi_segmentation.errors import InputError, StoppedError, one_line
from gi_segmentation.files import write_json
from gi_segmentation.publishing.facts import RUN_FILE, RunResults, changed_arguments, read_earlier, read_results
from gi_segmentation.publishing.results import SCANS
from gi_segmentation.schema import ALL_FOLDS
from gi_segmentation.scoring.records import read_scan_scores
from gi_segmentation.scoring.scans import ScanScore
from gi_segmentation.training.resuming import advise, describe_changes, describe_deciding, find_changes
from gi_segmentation.training.time_limit import PART_FILE

# The configuration of a model, in the folder of its weights.
CONFIG = "config.json"
# A training that is stopped has this long to save its checkpoint. Most systems give it less.
STOPPING_S = 300.0
# The time between two looks at how far a training is.
WATCHED_S = 1.0


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
        InputError: As `load_slices`, or if there is only one fold.
    """
    folds = load_slices(replace(data_args, fold=ALL_FOLDS))["train"].unique("fold")
    if len(folds) < 2:
        raise InputError(
            f"{data_args.dataset_name}: expected at least two folds in the column `fold`, but got {len(folds)}; build "
            f"the dataset again: `{BUILD_COMMAND}`"
        )
    return [str(fold) for fold in sorted(folds)]


def check_folds_dir(output_dir: Path) -> None:
    """Check that a folder may become that of a cross-validation.

    Raises:
        InputError: If it is the output folder of a single training, whose results would be overwritten.
    """
    facts = find_results(output_dir)
    if facts is not None and not facts.folds:
        raise InputError(f"--output_dir {output_dir}: it holds a single training; name another folder")


def find_results(folder: Path) -> RunResults | None:
    """Return the facts of the finished training in a folder; None if there is none."""
    try:
        return read_results(folder)
    except (OSError, ValueError):  # `InputError` is a ValueError: the facts of a run that has begun but not ended
        return None


def fold_words(fold: str, output_dir: Path, recipe: Path, flags: Sequence[str]) -> list[str]:
    """Return the words for `run_segmentation.py`; arguments as `train_fold`."""
    return ["--config", str(recipe), *flags, "--fold", fold, "--output_dir", str(fold_folder(output_dir, fold))]


def check_flags(fold: str, output_dir: Path, recipe: Path, flags: Sequence[str]) -> None:
    """Check that a fold that was trained, or begun, has the same arguments as now; arguments as `train_fold`.

    Raises:
        InputError: If an argument that decides the weights differs. A pooled score would be that of two recipes.
    """
    folder = fold_folder(output_dir, fold)
    earlier = read_earlier(folder)
    if earlier is None:
        return
    parsed = parse_arguments(fold_words(fold, output_dir, recipe, flags))
    # How many processes will train a fold is known to accelerate only.
    now = {"deciding": describe_deciding(*parsed), "arguments": changed_arguments(*parsed), "train_batch_size": None}
    if changes := find_changes(earlier, now):
        raise InputError(
            f"fold {fold}: {folder} holds a training with {', '.join(describe_changes(changes))}; "
            f"{advise(changes, folder)}"
        )


def wait_for_group(group: int) -> None:
    """Wait until all processes of a group have ended.

    `accelerate launch` ends at once when it is stopped. The training behind it saves a checkpoint first.
    """
    deadline = time.monotonic() + STOPPING_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            # The signal 0 does nothing, but it is an error if there is no process to receive it.
            os.killpg(group, 0)
            time.sleep(0.1)


def run_command(command: Sequence[str], output: IO[str], watch: Callable[[], None] = lambda: None) -> int:
    """Run a command to its end, and return its exit status.

    If this process is stopped, the command and all processes that it started are stopped first. Otherwise they would
    train on, beside those of the next start.

    Args:
        command: The program and its words.
        output: File for all that it prints.
        watch: What to do each second while it runs.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    # Ctrl-C raises an exception by itself. `kill`, and a terminal that is closed, would end this process at once.
    signals = [signal.SIGTERM, signal.SIGHUP]
    handlers = [signal.signal(number, stop) for number in signals]
    # `accelerate launch` starts more processes. In a session of their own, one signal reaches all of them.
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(WATCHED_S)
            watch()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        wait_for_group(process.pid)
        raise
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def find_hours_left(ends_s: float | None) -> list[str]:
    """Return the words that limit a training to the time that is left; none if there is no limit.

    Args:
        ends_s: When all must have ended, by `time.monotonic`; None: there is no limit.

    Raises:
        StoppedError: If no time is left.
    """
    if ends_s is None:
        return []
    if (left_s := ends_s - time.monotonic()) <= 0:
        raise StoppedError("part done: --max_hours is over; the same command trains the other folds", 0)
    return ["--max_hours", f"{left_s / 3600:.5f}"]


def train_fold(
    fold: str,
    output_dir: Path,
    recipe: Path,
    flags: Sequence[str],
    config_file: Path | None,
    progress: FoldsProgress,
    ends_s: float | None = None,
) -> None:
    """Train with one fold held back, by `accelerate launch`.

    An interrupted training continues from its last checkpoint, because `run_segmentation.py` does so.

    Args:
        fold: Number of the fold, or `all`.
        output_dir: Folder of the cross-validation. The training writes to `fold-K` there, and its output goes to
            `fold-K.log`.
        recipe: The recipe of all folds.
        flags: More flags for `run_segmentation.py`.
        config_file: Configuration of accelerate; None: its default.
        progress: Shows how far the trainings are. This fold is the next one there.
        ends_s: When all must have ended, by `time.monotonic`; None: there is no limit.

    Raises:
        InputError: If the training fails. The message has the end of its output.
        StoppedError: If the time of `--max_hours` ended it.
    """
    folder, log = fold_folder(output_dir, fold), fold_folder(output_dir, fold).with_suffix(".log")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", str(config_file)] if config_file else []
    # Of two flags the last one counts. --max_hours is meant for the whole command, and folds before took their share.
    words = fold_words(fold, output_dir, recipe, flags) + find_hours_left(ends_s)
    progress.say(f"fold {fold}: training; its output goes to {log}")
    progress.begin()
    output_dir.mkdir(parents=True, exist_ok=True)
    # Appended, because the log of an interrupted training is worth keeping.
    with log.open("a", encoding="utf-8") as file:
        status = run_command([*launch, "-m", "run_segmentation", *words], file, progress.watch)
    if status:
        with log.open(encoding="utf-8", errors="replace") as file:
            last = "".join(deque(file, maxlen=15)).strip()
        raise InputError(
            f"fold {fold}: the training ended with status {status}; the end of {log}:\n{last}\n"
            f"After the cause is removed, run the same command again: finished folds are kept, and this one goes on"
        )
    if (folder / PART_FILE).exists():
        raise StoppedError(f"part done: fold {fold} ends with --max_hours; the same command goes on from there", 0)
    scores, minutes, left = describe_fold(read_results(folder)), progress.minutes, progress.finish()
    progress.say(f"fold {fold}: {scores}, {minutes:.1f} minutes" + (f"; {left}" if left else ""))


def describe_fold(facts: RunResults) -> str:
    """Return the scores of a fold in a line."""
    if not facts.scores:
        return "nothing was held back"
    named = {"Dice": facts.scores["eval_dice"], "competition score": facts.scores["eval_competition_score"]}
    return ", ".join(f"{name} {'–' if value is None else format(value, '.4f')}" for name, value in named.items())


def train_folds(
    folds: Sequence[str],
    output_dir: Path,
    recipe: Path,
    flags: Sequence[str],
    config_file: Path | None,
    ends_s: float | None = None,
) -> None:
    """Train several folds, one after another; arguments and errors as `train_fold` and `check_flags`.

    If the time of `--max_hours` ends before all are trained, a file in `output_dir` says so.
    """
    # All folds are compared before one of them is trained for hours.
    for fold in folds:
        check_flags(fold, output_dir, recipe, flags)
    finished = {fold: find_results(fold_folder(output_dir, fold)) for fold in folds}
    for fold, facts in finished.items():
        if facts is not None:
            folder = fold_folder(output_dir, fold)
            print(f"fold {fold}: finished before, in {folder}; {describe_fold(facts)}", flush=True)
    left = [fold for fold, facts in finished.items() if facts is None]
    # A training notes by itself that a part is left. It cannot note that the next training has not begun.
    part = output_dir / PART_FILE if len(folds) > 1 else None
    if part:
        part.unlink(missing_ok=True)
    with FoldsProgress([fold_folder(output_dir, fold) for fold in left], len(folds)) as progress:
        for number, fold in enumerate(left, len(folds) - len(left)):
            try:
                train_fold(fold, output_dir, recipe, flags, config_file, progress, ends_s)
            except StoppedError:
                if part:
                    output_dir.mkdir(parents=True, exist_ok=True)
                    write_json(part, {"folds": number, "of": len(folds)})
                raise


def read_fold(output_dir: Path, fold: str) -> FoldRun:
    """Read the results of the training of a fold.

    Args:
        output_dir: Folder of the cross-validation.
        fold: Number of the fold, or `all`.

    Raises:
        InputError: If there are none, or they are of another fold.
    """
    folder = fold_folder(output_dir, fold)
    facts = find_results(folder)
    if facts is None:
        raise InputError(
            f"fold {fold}: expected a finished training in {folder}, but there is none; train it with --fold {fold}, "
            f"or copy the folder from the machine that trained it"
        )
    if facts.fold != fold:
        raise InputError(
            f"{folder / RUN_FILE}: expected the training that held back fold {fold}, but it is one with --fold "
            f"{facts.fold}; give each fold its own folder"
        )
    read_model_config(folder, facts.best_step)
    return FoldRun(fold, folder, facts, {} if fold == ALL_FOLDS else read_scan_scores(folder / SCANS))


def read_model_config(folder: Path, best_step: int | None = None) -> dict[str, Any]:
    """Read the configuration of a trained model.

    Args:
        folder: The output folder of the training.
        best_step: The step of its best checkpoint, if it is known, for the message.

    Raises:
        InputError: If the file is not whole.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"got {str(config)[:40]!r}")
    except (OSError, ValueError) as error:
        copy = folder / f"checkpoint-{best_step}" / CONFIG
        raise InputError(
            f"{path}: expected the configuration of a model in JSON, but it is not whole ({one_line(error)}); "
            + (f"copy {copy} there" if copy.is_file() else f"remove {folder / RUN_FILE}, and train this fold again")
        ) from error
    return config


def read_everyone(output_dir: Path) -> FoldRun | None:
    """Return the training on all patients; None if there is none that is finished."""
    finished = find_results(fold_folder(output_dir, ALL_FOLDS)) is not None
    return read_fold(output_dir, ALL_FOLDS) if finished else None
