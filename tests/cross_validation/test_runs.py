"""The trainings of a cross-validation, one after another."""

import json
import time
from pathlib import Path

import pytest

from gi_segmentation.cross_validation.runs import train_folds
from gi_segmentation.errors import StoppedError
from gi_segmentation.training.time_limit import PART_FILE
from tests.support.processes import ROOT


def test_folds_without_time_are_noted_as_left(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "demo.yaml"
    with pytest.raises(StoppedError, match="the same command trains the other folds"):
        train_folds(["0", "1"], tmp_path / "cv", recipe, [], None, ends_s=time.monotonic())
    part = tmp_path / "cv" / PART_FILE
    assert json.loads(part.read_text()) == {"folds": 0, "of": 2}
