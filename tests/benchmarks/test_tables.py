"""The tables of benchmarks/README.md have commands that run, and only the table of a command is replaced."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import __main__ as tables
from benchmarks import gpu
from benchmarks.__main__ import MARKER, README, tables_of, write_table

TEXT = """# Title

<!-- table: first --flag 1 -->
| old |
<!-- end -->

Text | with a bar.

<!-- long table: second -->
| kept |
<!-- end -->
"""


def test_only_the_table_of_the_command_is_replaced() -> None:
    changed = write_table(TEXT, "first --flag 1", "| new |\n")
    assert changed == TEXT.replace("| old |", "| new |")
    assert write_table(TEXT, "second", "| new |\n") == TEXT.replace("| kept |", "| new |")
    assert write_table(TEXT, "first", "| new |\n") == TEXT


def test_a_benchmark_writes_its_table_and_a_failed_one_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    commands = ("interval_coverage --trials 1", "interval_coverage --no_such_flag")
    readme.write_text("".join(f"<!-- table: {command} -->\n| old |\n<!-- end -->\n" for command in commands))
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    with pytest.raises(SystemExit, match="their tables are the old ones: interval_coverage --no_such_flag"):
        tables.main()
    first, second = MARKER.finditer(readme.read_text())
    assert "| patients | ours |" in first["table"] and "Measured on 20" in first["table"]
    assert second["table"] == "| old |\n"


def test_other_lines_of_an_output_are_left_out() -> None:
    assert tables_of("log\n| a |\n|---|\nmore | log\n| b |\n") == "| a |\n|---|\n\n| b |\n"


def test_every_marker_names_a_benchmark() -> None:
    commands = [found["command"] for found in MARKER.finditer(README.read_text(encoding="utf-8"))]
    assert len(commands) > 5 and len(commands) == len(set(commands))
    for command in commands:
        assert importlib.util.find_spec(f"benchmarks.{command.split()[0]}"), command


@pytest.mark.long
def test_the_models_are_measured_in_all_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Scans of 12 slices instead of 144, so that it takes seconds.
    for name in ("gpu", "model_speed"):
        monkeypatch.setattr(f"benchmarks.{name}.SCAN", 12)
    monkeypatch.setattr("benchmarks.gpu.disable_progress_bars", lambda: None)
    words = ["--recipes", "segformer-b0", "--batch_sizes", "2", "--image_size", "32", "--steps", "1", "--scans", "1"]
    monkeypatch.setattr("sys.argv", ["gpu", *words, "--precision", "fp32"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    headings, _, row = (line.strip("| ").split(" | ") for line in lines if line.startswith("|"))
    assert row[:2] == ["segformer-b0", "2"] and len(row) == len(headings)
    # Without a GPU, two cells have no number.
    speeds = [float(cell) for name, cell in zip(headings, row, strict=True) if "slices/s" in name or name[0] == "/"]
    assert len(speeds) == 8 and all(speed > 0 for speed in speeds)
