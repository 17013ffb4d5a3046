"""Freed memory serves the next batch."""

import subprocess
import sys

import pytest

from tests.support.processes import ROOT

# Counts the pages that the system has to provide for a block of 200 MB, after a block of this size was freed.
PROGRAM = """
import resource, sys
import numpy as np
from gi_segmentation.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(25_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_pages(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_block_that_was_freed_is_used_again() -> None:
    # Pages have 4 KiB, or 2 MiB if the system gives out huge ones.
    assert count_pages("keep") < 20
    # Without it, this test would not be needed.
    assert count_pages("leave") > 90
