"""How far a cross-validation is: a bar over its folds in a terminal, and a few lines in a file."""

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from gi_segmentation.training.header import describe_seconds
from gi_segmentation.training.progress import PROGRESS_FILE, read_progress

# From so many seconds of steps on, an estimate is worth something.
MEASURED_S = 60
BAR = "{percentage:3.0f}%|{bar:12}| {desc}"


def describe_left(seconds: float) -> str:
    """Return the time that remains, as a person would say it.

    Example:
        >>> describe_left(9_000), describe_left(20)
        ('about 2.5 hours left', 'less than a minute left')
    """
    return f"about {describe_seconds(seconds)} left" if seconds >= 60 else "less than a minute left"


def find_time(folder: Path) -> int | None:
    """Return when the training in a folder has last written how far it is, in nanoseconds; None if it never has."""
    try:
        return (folder / PROGRESS_FILE).stat().st_mtime_ns
    except OSError:
        return None


def count_steps(folder: Path) -> int:
    """Return the steps that the training in a folder has done."""
    found = read_progress(folder)
    return found.step if found else 0


class FoldsProgress(AbstractContextManager):
    """Shows how far the trainings of a cross-validation are, and how long the rest will take.

    The time of a step is measured: first on the steps of the running fold, and on whole folds, with their start and
    their scores, as soon as one is finished.

    Args:
        folders: The output folders of the folds that are not finished, in the order of their trainings.
        total: Number of all folds.
        stream: Where the bar goes, if it is a terminal.

    Attributes:
        folders: The folders of the folds that are not finished. The first one is that of the running fold.
        seconds: The time of the folds that this command has trained.
        steps: The steps of these folds.
    """

    def __init__(self, folders: Sequence[Path], total: int, stream: TextIO | None = None) -> None:
        self.folders = list(folders)
        self.total = total
        self.seconds, self.steps = 0.0, 0
        # A file gets one estimate before the first fold is finished.
        self.estimated = False
        stream = stream or sys.stderr
        # Some terminals do not know their size. Then it is 80 x 24, and tqdm, which would take 0 rows, shows the bar.
        columns, rows = shutil.get_terminal_size()
        hidden = not (stream.isatty() and self.folders)
        self.bar = tqdm(total=total, bar_format=BAR, file=stream, disable=hidden, ncols=columns, nrows=rows)

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.bar.clear()
        print(line, flush=True)
        self.bar.refresh()

    def begin(self) -> None:
        """Begin with the next fold."""
        folder = self.folders[0]
        self.begun_s = time.monotonic()
        # An earlier start may have left the file. It says where the training goes on, but not when.
        self.old, self.first_step = find_time(folder), count_steps(folder)
        # When a step was first and last read, and which one.
        self.first: tuple[float, int] | None = None
        self.last = (self.begun_s, self.first_step)
        self.show("", 0)

    def watch(self) -> None:
        """Look how far the running fold is. This is called about once a second."""
        found, now = read_progress(self.folders[0]), time.monotonic()
        if found is None or find_time(self.folders[0]) == self.old:
            return
        self.first = self.first or (now, found.step)
        # A training that was killed goes on from its last checkpoint, which lies before its last log line.
        self.first_step = min(self.first_step, found.step)
        if found.step != self.last[1]:
            self.last = now, found.step
        left = self.find_left(found.max_steps)
        self.show(f"step {found.step:,}/{found.max_steps:,}", found.step / max(found.max_steps, 1), left)
        if self.bar.disable and left and not self.estimated and now - self.first[0] >= MEASURED_S:
            self.estimated = True
            self.say(f"{left} for {self.count_folds()}")

    def finish(self) -> str:
        """Count the running fold as finished, and return how long the others will take; empty if there are none."""
        found = read_progress(self.folders[0])
        if found is not None:
            self.seconds += 60 * self.minutes
            self.steps += found.step - self.first_step
        del self.folders[0]
        self.estimated = True
        self.show("", 0)
        left = self.find_left(found.max_steps) if found else ""
        return f"{left} for {self.count_folds()}" if left else ""

    def count_folds(self) -> str:
        """Return the number of folds that are not finished, in words."""
        return f"{len(self.folders)} fold{'s' * (len(self.folders) != 1)}"

    @property
    def minutes(self) -> float:
        """The time of the running fold so far."""
        return (time.monotonic() - self.begun_s) / 60

    def find_left(self, max_steps: int) -> str:
        """Return how long the folds that are not finished will take; empty if there are none, or nothing is measured.

        Args:
            max_steps: The steps of a fold.
        """
        seconds, steps = self.seconds, self.steps
        if not steps and self.first is not None:
            seconds, steps = self.last[0] - self.first[0], self.last[1] - self.first[1]
        if steps <= 0 or not self.folders:
            return ""
        left = sum(max_steps - count_steps(folder) for folder in self.folders)
        return describe_left(seconds / steps * left)

    def show(self, text: str, share: float, left: str = "") -> None:
        """Move the bar: by the finished folds and a share of the running one."""
        finished = self.total - len(self.folders)
        words = [f"{finished}/{self.total} folds", text, left]
        self.bar.n = finished + share
        self.bar.set_description_str(", ".join(word for word in words if word))
