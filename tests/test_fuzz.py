"""A few cases of each fuzz target; `make fuzz` runs many thousand."""

from pathlib import Path


def test_hostile_input_is_a_clear_error_or_gives_a_right_result(tmp_path: Path) -> None:
    # Importing hypothesis takes seconds, which only the process of this test has to spend.
    from tests.fuzz.__main__ import run_target
    from tests.fuzz.targets import TARGETS, use_folder

    use_folder(tmp_path)
    for name, target in TARGETS.items():
        counts, failure = run_target(target, max(round(300 * target.share), 4))
        assert not failure, f"{name}: {failure}"
        assert counts["clear error"] + counts["right result"] == counts["cases"], name
