"""The benchmark of the scores that may choose a checkpoint, on made-up outlines."""

import numpy as np
import pytest

from benchmarks import presets
from gi_segmentation.labels import GI_TRACT


def draw_truths(number: int) -> list[presets.Truth]:
    """Outlines of one scan for each patient: a box for each organ, on half of the slices."""
    masks = np.zeros((3, 8, 24, 24), dtype=bool)
    masks[:, 2:6, 8:16, 8:16] = True
    return [(case, f"case{case}_day0", GI_TRACT.names, masks) for case in range(number)]


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_every_fault_costs_something_in_every_score() -> None:
    rows = cells(presets.tabulate_faults(draw_truths(4)))
    assert [row[0] for row in rows] == list(presets.SINGLE_FAULTS)
    for name, *values in (row for row in rows if "moved" in row[0] or "speck" in row[0]):
        assert all(float(value) < 0 for value in values), name
    dice = {name: float(values[0]) for name, *values in rows}
    assert dice["outlines moved by 3 pixels"] == pytest.approx(2 * 5 / 16 - 1, abs=1e-3)


def test_a_choice_loses_nothing_where_all_patients_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "NUM_DIVISIONS", 5)
    checkpoints = [presets.predict(draw_truths(4), [presets.move_border(pixels)], 0) for pixels in (3, 1, 2)]
    for name, *values in cells(presets.tabulate_losses(checkpoints)):
        assert values == ["0.0000"] * len(presets.CHOOSING), name
    for name, *values in cells(presets.tabulate_agreement(checkpoints)):
        assert values == ["1.00"] * len(presets.CHOOSING), name
