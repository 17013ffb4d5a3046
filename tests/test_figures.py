"""The pictures of a run show what they say."""

from datasets import Dataset

from gi_segmentation.figures import logged, pick_slices

EMPTY = {"large_bowel": "", "small_bowel": "", "stomach": ""}
SHOWN = {**EMPTY, "stomach": "1 4"}


def slices(*scans: tuple[str, int, int]) -> Dataset:
    """Rows of scans, each of empty slices followed by as many that show an organ."""
    rows = [(name, organs) for name, empty, shown in scans for organs in [EMPTY] * empty + [SHOWN] * shown]
    return Dataset.from_dict({"scan": [name for name, _ in rows], "segmentation": [organs for _, organs in rows]})


def test_slices_come_from_different_scans() -> None:
    assert pick_slices(slices(("a", 2, 3), ("b", 2, 5), ("c", 4, 0)), number=2) == [9, 3]


def test_slices_of_one_scan_are_spread_over_the_organs() -> None:
    assert pick_slices(slices(("a", 10, 9)), number=3) == [12, 14, 16]


def test_fewer_slices_than_asked_for_are_no_obstacle() -> None:
    assert pick_slices(slices(("a", 3, 1)), number=4) == [3]


def test_the_last_scoring_is_no_point_of_the_curve() -> None:
    history = [{"step": 1, "eval_dice": 0.5}, {"step": 2, "eval_dice": 0.4}, {"step": 2, "eval_dice": 0.5}]
    assert [entry["eval_dice"] for entry in logged(history, "eval_dice")] == [0.5, 0.4]
