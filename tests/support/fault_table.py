"""Let each command fail in each way, and print what becomes of its processes. benchmarks/README.md has the outcome.

python -m tests.support.fault_table [PART ...]

It takes about 20 minutes on two idle cores. With PARTs, only the rows that have all of them run. The rows with
a small /dev/shm need root, because they mount one.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.faults import FAULT
from tests.support.launches import RUN
from tests.support.models import save_model
from tests.support.processes import CONFIGS, LAUNCH, ROOT
from tests.support.training import arguments

# All processes of a command have a variable of this name with a value of their own, so none can hide.
MARK = "GI_SEGMENTATION_TEST_MARK"
LIMIT_S = 10.0
PATIENCE_S = 60.0
# How a small /dev/shm is made: in a namespace of its own, which the rest of the machine does not see.
SMALL_SHM = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=160k tmpfs /dev/shm && exec "$@"', "bash"]
SHM, MEMORY = "a /dev/shm of 160 kB", "1.5 GB of addresses for the process"


@dataclass(frozen=True)
class Row:
    """A command that fails.

    Attributes:
        command: `training`, `predict` and so on.
        place: One of `faults.PLACES`, or where it happens by itself.
        error: One of `faults.ERRORS`, or `SHM`, or `MEMORY`.
        processes: Number of processes of the run.
        workers: Number of processes that read for each of them.
        rank: The process that fails.
        call: At which call of the place.
    """

    command: str
    place: str
    error: str
    processes: int = 1
    workers: int = 0
    rank: int = 0
    call: int = 1

    def __str__(self) -> str:
        where = f", rank {self.rank}" if self.processes > 1 else ""
        return f"| {self.command} | {self.place} | {self.error} | {self.processes}{where} | {self.workers} |"


def list_rows() -> Iterator[Row]:
    """Yield all rows of the table."""
    # Every error, where most of them happen. In a run of two processes, one fails while the other waits for it.
    for error in ("two dtypes", "CUDA out of memory", "SIGKILL"):
        for processes, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
            yield Row("training", "step", error, processes, workers, rank=processes - 1, call=3)
    for error in ("no memory for PyTorch", "no memory for Python", "Ctrl-C"):
        yield Row("training", "step", error, 1, 2, call=3)
    yield Row("training", "step", "two dtypes", 2, 2, rank=0, call=3)
    # Every other place.
    for place, call in (
        ("import", 1), ("callback", 2), ("evaluation", 2), ("metrics", 1), ("scoring thread", 1), ("checkpoint", 2),
    ):  # fmt: skip
        yield Row("training", place, "two dtypes", 1, 2, call=call)
        # The one scan of the evaluation is scored by the first process.
        rank = 0 if place == "scoring thread" else 1
        yield Row("training", place, "two dtypes", 2, 2, rank=rank, call=call)
    yield Row("training", "preparation", "two dtypes", 1, 2)
    yield Row("training", "preparation", "SIGKILL", 1, 2)
    for error in ("two dtypes", "no memory for Python", "SIGKILL", "SIGBUS"):
        yield Row("training", "loader", error, 1, 2, call=3)
        yield Row("training", "loader", error, 2, 2, rank=1, call=2)
    yield Row("training", "results", "two dtypes", 1, 2)
    yield Row("training", "results", "two dtypes", 2, 2)
    yield Row("training", "loader", SHM, 1, 2)
    yield Row("training", "loader", SHM, 2, 2)
    yield Row("training", "model", MEMORY, 1, 2)
    for error in ("CUDA out of memory", "two dtypes", "Ctrl-C"):
        yield Row("predict", "forward pass", error, 1, 2, call=2)
    yield Row("predict", "forward pass", "two dtypes", 2, 2, rank=1, call=2)
    yield Row("predict", "forward pass", "SIGKILL", 1, 2, call=2)
    for error in ("no memory for Python", "SIGKILL", "two dtypes"):
        yield Row("predict", "reader", error, 1, 2, call=2)
    yield Row("predict", "writer thread", "two dtypes", 1, 2)
    yield Row("predict", "writer thread", "two dtypes", 2, 0, rank=1)
    yield Row("predict", "reader", SHM, 1, 2)
    for error in ("two dtypes", "no memory for Python", "SIGKILL"):
        yield Row("build", "pool", error, 1, 2, call=2)
    yield Row("score", "scoring pool", "SIGKILL", 1, 2)
    yield Row("cross_validate", "step", "CUDA out of memory", 1, 2, call=3)
    yield Row("cross_validate", "import", "two dtypes", 1, 2)
    yield Row("app", "model", "two dtypes", 1, 0)


class Shop:
    """A folder with a dataset, a model, a recipe and the words of all commands.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        from dataset_builder.build import build
        from dataset_builder.gi_tract import GiTractConfig
        from dataset_builder.phantom import write_phantom

        self.folder = folder
        write_phantom(folder / "kaggle", num_cases=4, days_per_case=1, slices_per_scan=12, num_proc=1)
        build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
        save_model(folder / "model", "segformer", seed=0)
        self.submission = folder / "submission.csv"
        text = (folder / "kaggle" / "train.csv").read_text()
        self.submission.write_text(text.replace("segmentation", "predicted", 1))

    def words(self, row: Row, output: Path) -> list[str]:
        """Return the words of the command of a row, from the interpreter on."""
        python, kaggle = [sys.executable], self.folder / "kaggle"
        if row.processes > 1:
            python += [*LAUNCH, str(CONFIGS / "multi_cpu.yaml"), "--num_processes", str(row.processes)]
        if row.command in ("training", "cross_validate"):
            flags = {"dataloader_num_workers": row.workers, "ema_decay": 0.9, "eval_steps": 4, "save_steps": 4}
            flags |= {"image_size": 128} if row.error == SHM else {}
            words = arguments(self.folder / "gi_tract", output, max_steps=12, **flags)
        if row.command == "training":
            return [*python, str(RUN), *words]
        if row.command == "cross_validate":
            recipe, place = self.folder / "recipe.yaml", words.index("--output_dir")
            del words[place : place + 2]
            pairs = zip(words[::2], words[1::2], strict=True)
            recipe.write_text("".join(f"{key.removeprefix('--')}: {json.dumps(value)}\n" for key, value in pairs))
            more = ["--config", str(recipe), "--output_dir", str(output), "--config_file", str(CONFIGS / "cpu.yaml")]
            return [*python, "-m", "gi_segmentation.cross_validate", *more]
        if row.command == "predict":
            batch = 12 if row.error == SHM else 4
            more = ["--model", str(self.folder / "model"), "--input", str(kaggle / "train"), "--format", "nifti"]
            more += ["--output_dir", str(output), "--num_workers", str(row.workers), "--batch_size", str(batch)]
            return [*python, "-m", "gi_segmentation.predict", *more]
        if row.command == "build":
            more = ["--kaggle_dir", str(kaggle), "--output_dir", str(output / "gi_tract"), "--num_proc", "2"]
            output.mkdir(parents=True, exist_ok=True)
            return [*python, "-m", "dataset_builder", "build", "--num_folds", "2", *more]
        if row.command == "score":
            more = ["--truth", str(kaggle / "train.csv"), "--submission", str(self.submission)]
            return [*python, "-m", "gi_segmentation.score", *more]
        return [*python, "-m", "app", "--model", str(self.folder / "model")]


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        status: Its exit status; None if it was still alive after `PATIENCE_S`.
        seconds: From the error until all processes were gone.
        left: Number of processes that were still alive after `PATIENCE_S`.
        printed: All that it printed.
    """

    status: int | None
    seconds: float
    left: int
    printed: str

    @property
    def right(self) -> bool:
        """Whether it ended as an error should."""
        return self.status not in (None, 0) and self.seconds <= LIMIT_S and not self.left

    def last_line(self) -> str:
        """Return what a user would look at, without paths and numbers of this machine."""
        # A process that is killed while it prints may leave a zero byte.
        lines = [line.strip("\0 \t") for line in self.printed.replace("\r", "\n").splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"(\S*rank\d+\]:)?\s*(error: |interrupted)", line)]
        # Of a traceback, the last line is the error. The launcher has tracebacks of its own.
        raised = [line for line in lines if re.match(r"(\S*rank\d+\]:)?\s*[\w.]+(Error|Exception)\b", line)]
        own = [line for line in raised if not re.search(r"ChildFailed|CalledProcess", line)]
        # Of several processes, the others say only that one has ended.
        told = [line for line in told if "another process of this run has ended" not in line]
        line = (told or own or raised or lines or ["nothing"])[-1]
        line = re.sub(r"/(?!dev/shm)\S+/(?=[^/\s]+)", "", line)
        line = re.sub(r"torch_\w+", "torch_...", re.sub(r"pids?(\(s\))? [\d, ]+", "pid N", line))
        return line if len(line) <= 160 else line[:157] + "..."


def find_marked(mark: str) -> list[psutil.Process]:
    """Return all living processes of a command."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has ended, or is not ours
            continue
    return found


def start(row: Row, shop: Shop, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    """Start the command of a row. It fails at the place of the row."""
    path = [ROOT / "tests" / "support" / "faulty", ROOT, os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), MARK: mark, "HF_HOME": str(folder / "hf")}
    words = shop.words(row, folder / "output")
    if row.error == SHM:
        words = [*SMALL_SHM, *words]
    elif row.error == MEMORY:
        words = ["bash", "-c", 'ulimit -v 1500000; exec "$@"', "bash", *words]
    else:
        fault = {
            "place": row.place,
            "error": row.error,
            "rank": row.rank,
            "call": row.call,
            "log": str(folder / "log"),
        }
        env[FAULT] = json.dumps(fault)
    with (folder / "printed").open("w") as file:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True)


def find_failure(folder: Path) -> float | None:
    """Return the time of the error of a command that writes to a folder; None if it has not failed yet."""
    log = folder / "log"
    if log.exists() and (text := log.read_text()):
        return float(text)
    # Without a log, an error that comes by itself: it counts from its message on.
    printed = (folder / "printed").read_text(errors="replace")
    return time.time() if re.search(r"^error:|Traceback|Bus error", printed, re.M) else None


def try_row(row: Row, shop: Shop, folder: Path) -> End:
    """Run a row to its end, and kill what is left of it."""
    folder.mkdir(parents=True)
    mark = str(folder)
    process = start(row, shop, folder, mark)
    started = time.time()
    failed: float | None = None
    while living := find_marked(mark):
        process.poll()  # collects the process when it ends
        failed = failed or find_failure(folder)
        if time.time() - (failed or started + 60) > PATIENCE_S:
            break
        time.sleep(0.05)
    # The last look may have been before the error.
    seconds = time.time() - (failed or find_failure(folder) or started)
    for one in living:
        one.send_signal(signal.SIGKILL)
    status = None if living else process.wait()
    return End(status, seconds, len(living), (folder / "printed").read_text(errors="replace"))


def make_table(rows: Sequence[Row], scratch: Path) -> tuple[str, int]:
    """Return the outcome of each row as a table, and the number of rows that did not end as they should."""
    shop, wrong = Shop(scratch), 0
    lines = [
        "| command | where | error | processes | workers | status | all gone after | what it says last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows):
        end = try_row(row, shop, scratch / str(number))
        wrong += not end.right
        told = f"{'' if end.right else '**WRONG** '}{end.seconds:.1f} s"
        lines.append(f"{row} {end.status} | {told} | `{end.last_line()}` |".replace("``", "`"))
        print(lines[-1], flush=True)
        if not end.right or os.environ.get("SHOW"):
            print(end.printed[-3000:], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n", wrong


def main(parts: Sequence[str]) -> int:
    """Print the rows, and return how many are wrong."""
    rows = [row for row in list_rows() if all(part in str(row) for part in parts)]
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"HF_HOME": f"{name}/hf", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        return make_table(rows, Path(name))[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
