"""Measure the time and the peak memory of a command and of all processes that it starts."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Measured:
    """Seconds of a command, those of the processor in all its processes, and its peak memory in GB."""

    seconds: float
    processor_seconds: float
    peak_gb: float


def proportional_memory(root: psutil.Process) -> int:
    """Count the bytes of a process and of all its children. A page that several of them share is counted once."""
    # The resident memory counts a shared page fully in each process, so the sum over processes would be too high.
    # Linux also knows the proportional set size (PSS): a page shared by n processes counts as 1/n in each of them.
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            # The process ended after it was listed.
            continue
    return total


def measure(arguments: list[str]) -> Measured:
    """Run `python ARGUMENTS`, and measure its memory ten times a second. A shorter peak can be missed.

    Raises:
        RuntimeError: If the command fails.
    """
    start, earlier = time.monotonic(), os.times()
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    running = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment)
    root, peak = psutil.Process(running.pid), 0
    while running.poll() is None:
        try:
            peak = max(peak, proportional_memory(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    if running.wait():
        raise RuntimeError(f"{' '.join(arguments)} failed with status {running.returncode}")
    now = os.times()
    processor_seconds = sum(now[2:4]) - sum(earlier[2:4])
    return Measured(time.monotonic() - start, processor_seconds, peak / 1e9)
