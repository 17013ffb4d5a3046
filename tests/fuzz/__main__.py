"""Run many cases of each target, and print a table with a row for each: `python -m tests.fuzz`."""

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import InMemoryExampleDatabase

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Seconds of the processor after which a case hangs, and the most memory of the whole process in GB. Seconds on the wall
# would depend on what else the machine does.
MAX_SECONDS, MAX_GIGABYTES = 20, 2


class Hang(BaseException):
    """A case took longer than `MAX_SECONDS`. No `except Exception` may swallow it."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `Hang` in a case that takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"a case took more than {MAX_SECONDS} s")

    earlier = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def peak_gigabytes() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def run_target(target: Any, number: int, first: int = 0) -> tuple[Counter[str], str]:
    """Run cases of a target until one fails.

    Args:
        target: From `targets.TARGETS`.
        number: Number of cases.
        first: Seed of the cases.

    Returns:
        How many cases had each outcome, and the text of the failure; empty if all cases are right.
    """
    counts: Counter[str] = Counter()

    @seed(first)
    @settings(
        max_examples=number,
        deadline=None,
        database=InMemoryExampleDatabase(),
        suppress_health_check=list(HealthCheck),
        # The first failing case is shown as it is. To make it smaller could take as long as the whole run.
        phases=[Phase.generate],
    )
    @given(target.cases)
    def run(case: Any) -> None:
        counts["cases"] += 1
        with time_limit():
            counts[target.check(case)] += 1

    try:
        run()
    # Everything that is not a clear error is a failure, of whatever kind.
    except (Exception, Hang, SystemExit):
        counts["failures"] += 1
        return counts, traceback.format_exc()
    return counts, ""


def main(argv: list[str] | None = None) -> int:
    """Run the targets; return 1 if a case failed."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=25_000, help="number of cases of all targets (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", help="names of targets (default: all)")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    from tests.fuzz import targets

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = {name: targets.TARGETS[name] for name in arguments.targets or targets.TARGETS}
    failures = []
    print(
        "| target | cases | clear errors | right results | failures | seconds | peak memory, GB |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="gi-segmentation-fuzz-") as folder:
        targets.use_folder(Path(folder))
        for name, target in chosen.items():
            started = time.monotonic()
            counts, failure = run_target(target, max(round(arguments.cases * target.share), 1), arguments.seed)
            memory = peak_gigabytes()
            if memory > MAX_GIGABYTES:
                failure = failure or f"the process had {memory:.1f} GB"
                counts["failures"] += 1
            seconds = time.monotonic() - started
            numbers = [counts[key] for key in ("cases", "clear error", "right result", "failures")]
            cells = [name, *(f"{number:,}" for number in numbers), f"{seconds:.0f}", f"{memory:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            failures += [f"{name}:\n{failure}"] if failure else []
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
