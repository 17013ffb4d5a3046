"""The tables of benchmarks/README.md have commands that run, and only the table of a command is replaced."""

import importlib.util
from pathlib import Path

from benchmarks.__main__ import MARKER, README, tables_of, write_table
from tests.support.processes import ROOT_ON_PATH, RunPython

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


def test_other_lines_of_an_output_are_left_out() -> None:
    assert tables_of("log\n| a |\n|---|\nmore | log\n| b |\n") == "| a |\n|---|\n\n| b |\n"


def test_every_marker_names_a_benchmark() -> None:
    commands = [found["command"] for found in MARKER.finditer(README.read_text(encoding="utf-8"))]
    assert len(commands) > 5 and len(commands) == len(set(commands))
    for command in commands:
        assert importlib.util.find_spec(f"benchmarks.{command.split()[0]}"), command


def test_the_models_are_measured_in_all_ways(run_python: RunPython, tmp_path: Path) -> None:
    words = ["--recipes", "segformer-b0", "--batch_sizes", "2", "--image_size", "32", "--steps", "1", "--scans", "1"]
    done = run_python(["-m", "benchmarks.gpu", *words, "--precision", "fp32"], tmp_path, env=ROOT_ON_PATH)
    assert done.returncode == 0, done.stderr[-3000:]
    headings, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    assert row[:2] == ["segformer-b0", "2"] and len(row) == len(headings)
    # Without a GPU, two cells have no number.
    speeds = [float(cell) for name, cell in zip(headings, row, strict=True) if "slices/s" in name or name[0] == "/"]
    assert len(speeds) == 8 and all(speed > 0 for speed in speeds)
