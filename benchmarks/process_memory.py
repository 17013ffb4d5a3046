"""Peak memory of a command and all it starts."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Measured:
    """Seconds and peak memory, in GB, of a command; its standard output."""

    seconds: float
    peak_gb: float
    output: str


def proportional_memory(root: psutil.Process) -> int:
    """Bytes that a process and its children hold; pages they share count once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between listing and looking
    return total


def measure(arguments: list[str]) -> Measured:
    """Run `python ARGUMENTS` and look at its memory ten times a second.

    Raises:
        RuntimeError: If the command fails.
    """
    start = time.monotonic()
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    running = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    root, peak = psutil.Process(running.pid), 0
    while running.poll() is None:
        try:
            peak = max(peak, proportional_memory(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    output = running.communicate()[0]
    if running.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed with status {running.returncode}")
    return Measured(time.monotonic() - start, peak / 1e9, output)
