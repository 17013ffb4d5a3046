"""A few cases of each fuzz target; `make fuzz` runs many thousand."""

from pathlib import Path

import pytest

from tests.fuzz.__main__ import run_target
from tests.fuzz.targets import TARGETS, use_folder


@pytest.fixture(scope="module", autouse=True)
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    use_folder(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_a_clear_error_or_gives_a_right_result(name: str, tmp_path: Path) -> None:
    counts, failure = run_target(TARGETS[name], max(round(300 * TARGETS[name].share), 4))
    assert not failure, failure
    assert counts["clear error"] + counts["right result"] == counts["cases"]
