"""Start programs in new processes: plain Python, and `accelerate launch` with the shipped configurations."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
# Real data, which has a README. It is not a part of the project.
TEST_DATA = Path(os.environ.get("GI_SEGMENTATION_TEST_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = ROOT / "accelerate_configs"
LAUNCH = ["-m", "accelerate.commands.launch", "--quiet", "--config_file"]
# The packages `tests` and `benchmarks` are not installed, so a new process finds them only with this.
ROOT_ON_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


class RunPython(Protocol):
    """Type of the fixture `run_python`."""

    def __call__(
        self, args: list[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]: ...


HOLD = """
import sys, time
from pathlib import Path
from gi_segmentation.files import writing_to
with writing_to(Path(sys.argv[1]).parent, Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def hold(lock_file: Path) -> Iterator[int]:
    """Let another process hold the lock of a folder, and kill it at the end of the block.

    Yields:
        The number of the process.
    """
    command = [sys.executable, "-c", HOLD, str(lock_file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        try:
            yield process.pid
        finally:
            process.kill()


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace").replace("\0", " ")
        except OSError:  # the process has ended
            continue
        if str(folder) in line:
            found.append(line)
    return found
