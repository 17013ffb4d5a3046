"""Freed memory serves the next batch, in the main thread and in others."""

import subprocess
import sys

import pytest

from tests.support.processes import ROOT

# Counts the pages that the system has to provide for a block of 200 MB, after a block of this size was freed.
PROGRAM = """
import resource, sys, threading
import numpy as np
from gi_segmentation.memory import keep_freed_memory

if sys.argv[1] != "leave":
    keep_freed_memory(share_heap=sys.argv[1] == "share")

def count():
    np.ones(25_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(25_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

count()
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def count_pages(mode: str) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_block_that_was_freed_is_used_again() -> None:
    # Pages have 4 KiB, or 2 MiB if the system gives out huge ones. The second number is that of the thread.
    assert count_pages("keep")[0] < 20
    assert max(count_pages("share")) < 20
    # Without it, this test would not be needed.
    assert min(count_pages("leave")) > 90
