"""Start programs in new processes: plain Python, and `accelerate launch` with the shipped configurations."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
LAUNCH = ["-m", "accelerate.commands.launch", "--quiet", "--config_file"]
# The packages `tests` and `benchmarks` are not installed, so a new process finds them only with this.
ROOT_ON_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


class RunPython(Protocol):
    """Type of the fixture `run_python`."""

    def __call__(
        self, args: list[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]: ...
