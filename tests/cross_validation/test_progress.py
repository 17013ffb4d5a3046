"""The bar and the lines of a cross-validation say how far it is, and how long the rest will take."""

import io
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from gi_segmentation.cross_validation import progress
from gi_segmentation.cross_validation.progress import FoldsProgress
from gi_segmentation.files import write_json
from gi_segmentation.training.progress import PROGRESS_FILE, read_progress


class Clock:
    """A clock that goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal, which is something that says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def write_step(folder: Path, step: int, max_steps: int = 100) -> None:
    """Do as a training does at a log line. Each file is a second younger than the one before."""
    folder.mkdir(exist_ok=True)
    path = folder / PROGRESS_FILE
    written = path.stat().st_mtime_ns if path.exists() else 0
    write_json(path, {"step": step, "max_steps": max_steps})
    os.utime(path, ns=(written + 10**9, written + 10**9))


def train(shown: FoldsProgress, clock: Clock, folder: Path, steps: list[int], seconds: float) -> None:
    """Train a fold whose steps take so many seconds each, after a start of 40 seconds."""
    shown.begin()
    clock.now += 40
    for before, step in zip([steps[0], *steps], steps, strict=False):
        clock.now += seconds * (step - before)
        write_step(folder, step)
        shown.watch()


def test_a_file_gets_one_estimate_and_a_line_for_each_fold(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "fold-0", tmp_path / "fold-1"]
    with FoldsProgress(folders, total=2, stream=io.StringIO()) as shown:
        train(shown, clock, folders[0], [0, 10, 20, 30, 40], seconds=12)
        # After 10 of 100 steps, 190 steps of 12 s are left for both folds: 38 minutes. It is said once.
        assert capsys.readouterr().out == "about 38 minutes left for 2 folds\n"
        clock.now += 60 * 12
        write_step(folders[0], 100)
        # From now on, the time of a whole fold counts: 40 s and 1,200 s for 100 steps.
        assert shown.finish() == "about 21 minutes left for 1 fold"
        train(shown, clock, folders[1], [0, 50, 100], seconds=12)
        assert shown.finish() == ""
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_finished_folds_and_a_share_of_the_running_one(tmp_path: Path, clock: Clock) -> None:
    # One of three folds was finished before, and another one had 60 steps when it was stopped.
    folders, terminal = [tmp_path / "fold-1", tmp_path / "fold-2"], Terminal()
    write_step(folders[0], 60)
    with FoldsProgress(folders, total=3, stream=terminal) as shown:
        shown.begin()
        # This is the file of the earlier start, and says nothing about the time of a step.
        clock.now += 500
        shown.watch()
        assert "step" not in terminal.getvalue()
        train(shown, clock, folders[0], [60, 80], seconds=6)
        # 20 steps of this fold and 100 of the next one, 6 s each.
        assert "60%|" in terminal.getvalue()
        assert "1/3 folds, step 80/100, about 12 minutes left" in terminal.getvalue()
        shown.finish()
    assert "67%|" in terminal.getvalue() and "2/3 folds" in terminal.getvalue()


def test_a_file_that_is_no_progress_says_nothing(tmp_path: Path) -> None:
    for text in ("", "[]", '{"step": 1}', "{"):
        (tmp_path / PROGRESS_FILE).write_text(text)
        assert read_progress(tmp_path) is None


def test_steps_that_are_done_again_after_a_killed_training_count(tmp_path: Path, clock: Clock) -> None:
    # It was killed after step 90, and its last checkpoint is that of step 40.
    folders = [tmp_path / "fold-0", tmp_path / "fold-1"]
    write_step(folders[0], 90)
    with FoldsProgress(folders, total=2, stream=io.StringIO()) as shown:
        shown.begin()
        write_step(folders[0], 40)
        shown.watch()
        clock.now += 60 * 12
        write_step(folders[0], 100)
        shown.watch()
        # 60 steps took 12 minutes, and the other fold has 100.
        assert shown.finish() == "about 20 minutes left for 1 fold"


def test_a_terminal_that_does_not_know_its_size_shows_the_bar(tmp_path: Path) -> None:
    # As in a container. `openpty` gives a terminal of 0 rows and 0 columns.
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, FoldsProgress([tmp_path / "fold-0"], total=1, stream=terminal) as shown:
        shown.begin()
        seen = b""
        while b"0/1 folds" not in seen:
            assert select.select([ours], [], [], 10)[0]
            seen += os.read(ours, 1000)
    os.close(ours)


def test_without_a_fold_to_train_there_is_no_bar() -> None:
    terminal = Terminal()
    with FoldsProgress([], total=2, stream=terminal):
        pass
    assert terminal.getvalue() == ""
