"""The pictures of a run show the slices, outlines and curves that their titles name."""

from pathlib import Path

import numpy as np
import pytest

from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.publishing.figures import draw_learning_curve, logged
from gi_segmentation.review.overlays import Panel, draw_panels


def test_the_learning_curve_leaves_out_the_last_scoring() -> None:
    history = [{"step": 1, "eval_dice": 0.5}, {"step": 2, "eval_dice": 0.4}, {"step": 2, "eval_dice": 0.5}]
    assert [entry["eval_dice"] for entry in logged(history, "eval_dice")] == [0.5, 0.4]


def panel(brightness: float, *shown: int) -> Panel:
    """Make a slice of one brightness that shows the organs with these numbers, each as a square."""
    masks = np.zeros((len(GI_TRACT), 8, 8), dtype=bool)
    for organ in shown:
        masks[organ, 2:6, 2:6] = True
    return Panel(np.full((8, 8), brightness, dtype=np.float32), masks, f"shows {shown}")


def test_panels_stand_row_by_row_above_a_legend() -> None:
    figure = draw_panels([panel(0.5), panel(0.5, 0), panel(0.5, 0, 2)], GI_TRACT, columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["shows ()", "shows (0,)", "shows (0, 2)", ""]
    assert [len(axes.collections) for axes in figure.axes] == [0, 1, 2, 0]
    assert not any(axes.axison for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(GI_TRACT.names)


def test_one_panel_makes_a_figure_of_one_column() -> None:
    assert len(draw_panels([panel(0.5)], GI_TRACT, columns=4).axes) == 1


def test_intensities_that_would_all_be_white_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected intensities between 0 and 1, but got 200"):
        draw_panels([panel(200)], GI_TRACT, columns=1)


def test_a_darker_slice_looks_darker() -> None:
    figure = draw_panels([panel(0.2), panel(0.8)], GI_TRACT, columns=2)
    dark, bright = ((axes.images[0].get_array(), axes.images[0].get_clim()) for axes in figure.axes)
    assert dark[0].max() < bright[0].min() and dark[1] == bright[1] == (0, 1)


@pytest.mark.parametrize("name", ["an organ with a long name", "organ number"])
def test_a_legend_of_thirty_organs_stays_within_the_figure(name: str, tmp_path: Path) -> None:
    labels = LabelSet(tuple(f"{name} {number}" for number in range(30)))
    shown = Panel(np.full((8, 8), 0.5), np.zeros((30, 8, 8), dtype=bool), "no organ")
    for columns in (1, 4):
        figure = draw_panels([shown] * columns, labels, columns)
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.width <= figure.bbox.width and box.height < 0.7 * figure.bbox.height
        assert [text.get_text() for text in legend.get_texts()] == list(labels.names)
        # The slices are not pressed together.
        assert figure.axes[0].get_window_extent().height > 2.5 * figure.dpi
    entry = {"step": 1, "eval_dice": 0.5, **{f"eval_dice_{organ}": 0.5 for organ in labels.names}}
    draw_learning_curve([entry], labels, 1, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file()
