"""The benchmark of the input pipeline runs, and measures the ways that it names."""

from pathlib import Path

import pytest

from tests.support.processes import ROOT_ON_PATH, RunPython


def test_the_table_has_a_row_for_a_slice_and_for_three(run_python: RunPython, tmp_path: Path) -> None:
    words = ["-m", "benchmarks.input_speed", "--image_size", "64", "--batches", "2"]
    done = run_python(words, tmp_path, env=ROOT_ON_PATH)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["a slice", "three neighbouring slices"]
    for row in rows[2:]:
        alone, cached, ratio, decoded = map(float, row[1:])
        assert cached / alone == pytest.approx(ratio, abs=0.02)
        # Decoding takes most of the time, so the cache must be faster.
        assert ratio > decoded > 0
