"""The benchmark of an evaluation's memory scores every copy of a scan as a scan of its own."""

from pathlib import Path

from benchmarks.evaluation_memory import evaluate_scans


def test_each_copy_is_scored_and_the_memory_is_noted(dataset_dir: Path, tmp_path: Path) -> None:
    # The split for validation has 24 slices, and a batch has 32.
    memory = evaluate_scans(dataset_dir, tmp_path / "run", 4)
    assert len(memory.resident) == len(memory.peaks) == 3
    assert all(0.1 < resident <= peak for resident, peak in zip(memory.resident, memory.peaks, strict=True))
