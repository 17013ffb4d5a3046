"""Measure how long the commands take until they print their help, and compare the seconds with their limits."""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The command line after `python`, and its limit in seconds.
LIMITS = {
    "run_segmentation.py --help": 2.0,
    "-m dataset_builder --help": 0.6,
    "-m gi_segmentation.predict --help": 0.6,
    "-m gi_segmentation.score --help": 0.6,
}


def time_command(words: list[str]) -> float:
    """Return the seconds of `python WORDS` in a process of its own."""
    started = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command; the median counts")
    repeats = parser.parse_args().repeats
    print("| command | seconds | limit | ratio |\n|---|---|---|---|")
    for command, limit in LIMITS.items():
        seconds = statistics.median(time_command(command.split()) for _ in range(repeats))
        print(f"| `python {command}` | {seconds:.2f} | {limit} | {seconds / limit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
