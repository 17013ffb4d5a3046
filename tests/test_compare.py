"""`gi_segmentation.compare` gives the scores of the Trainer and of `score`, and its gains are their differences."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import run_segmentation
from gi_segmentation import predict
from gi_segmentation.compare import main
from gi_segmentation.errors import InputError
from gi_segmentation.inference.comparison import format_comparison
from tests.support.models import save_model
from tests.support.scoring import score_submission
from tests.support.training import arguments

FLAGS = {"learning_rate": 1e-6, "max_steps": 2, "max_eval_samples": None, "test_time_flips": True}


@pytest.fixture(scope="module", params=["multiclass", pytest.param("multilabel", marks=pytest.mark.long)])
def runs(request: Any, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The scores of two runs of one label mode, by the folders of the runs."""
    found = {}
    for family, context in (("segformer", 1), ("upernet", 0)):
        folder = tmp_path_factory.mktemp(request.param) / family
        base = save_model(folder.with_name(f"{family}-base"), family, 0, request.param, context)
        flags = {"model_type": None, "config_overrides": None, "model_name_or_path": base, **FLAGS}
        flags |= {"label_mode": request.param, "slice_context": context}
        run_segmentation.main(arguments(dataset_dir, folder, **flags))
        found[str(folder)] = json.loads((folder / "run.json").read_text())["scores"]
    return found


def compare(models: list[str], dataset_dir: Path, *flags: str) -> dict[str, dict[str, float]]:
    words = ["--model", *models, "--dataset_name", str(dataset_dir), "--device", "cpu", "--num_workers", "0"]
    return main([*words, *flags])


def test_scores_equal_those_of_the_trainer_and_of_the_score_command(
    runs: dict[str, dict[str, Any]], dataset_dir: Path, kaggle_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    scores = compare(list(runs), dataset_dir, "--output", str(tmp_path / "scores.json"))
    ways = [way for folder in runs for way in (folder, f"{folder}, flips")]
    assert list(scores) == [*ways, "all together", "all together, flips"]
    for folder, expected in runs.items():
        assert expected["eval_dice"] > 0.001
        for name, value in scores[folder].items():
            if f"eval_{name}" in expected:
                assert value == pytest.approx(expected[f"eval_{name}"], rel=1e-4), name
        assert scores[f"{folder}, flips"]["dice"] == pytest.approx(expected["eval_flips_dice"], rel=1e-4)
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == scores
    printed = capsys.readouterr().out
    gain = scores["all together"]["dice"] - max(scores[folder]["dice"] for folder in runs)
    line = re.search(rf"^\| all together \| .*\| {re.escape(f'{gain:+.4f}')} \[(.*), (.*)\] \|$", printed, re.M)
    assert line is not None
    (low, high), found = line.groups(), json.loads((tmp_path / "scores.json").read_text())
    baseline, _, interval = found["gains"]["all together"]
    assert baseline in runs and [f"{end:+.4f}" for end in interval] == [low, high]
    assert float(low) <= round(gain, 4) <= float(high) and "intervals over 2 patients" in printed
    around = found["intervals"]["all together"]["competition_score"]
    assert around[0] <= scores["all together"]["competition_score"] <= around[1]

    # The same checkpoints predict a submission, which the `score` command's functions score. Only the slices of the
    # validation split are kept on both sides.
    words = ["--input", str(kaggle_dir), "--output_dir", str(tmp_path), "--device", "cpu", "--num_workers", "0"]
    (submission,) = predict.main(["--model", *runs, *words, "--test_time_flips"])
    validation = {row["id"] for row in find_validation(dataset_dir)}
    for path, name in ((submission, "some.csv"), (kaggle_dir / "train.csv", "truth.csv")):
        head, *rows = path.read_text().splitlines()
        kept = [row for row in rows if row.split(",")[0] in validation]
        (tmp_path / name).write_text("\n".join([head, *kept]) + "\n")
    official = score_submission(tmp_path / "truth.csv", tmp_path / "some.csv", kaggle_dir, num_proc=1)
    for name in ("dice", "hausdorff_score", "competition_score"):
        assert scores["all together, flips"][name] == pytest.approx(official[name], rel=1e-4)


def find_validation(dataset_dir: Path) -> Any:
    from gi_segmentation.data.slices import find_dataset

    return find_dataset(str(dataset_dir), None)["validation"]


def test_an_ensemble_of_a_checkpoint_with_itself_scores_like_the_checkpoint(
    runs: dict[str, dict[str, Any]], dataset_dir: Path
) -> None:
    # Averaging may decide ties between labels differently, so the scores are equal only to about 0.001.
    folder, *_ = runs
    scores = compare([folder, folder], dataset_dir)
    assert scores["all together"] == pytest.approx(scores[folder], abs=1e-3)


def test_a_split_that_cannot_be_scored_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model", "segformer", seed=0))
    with pytest.raises(InputError, match="--split test: expected one of train, validation"):
        compare([model], dataset_dir, "--split", "test")
    bare = find_validation(dataset_dir).filter(lambda row: not any(row["segmentation"].values()))
    (tmp_path / "bare").mkdir()
    bare.to_parquet(tmp_path / "bare" / "validation.parquet")
    with pytest.raises(InputError, match="--split validation: expected annotations to compare with"):
        compare([model], tmp_path / "bare")


def test_an_organ_without_a_score_has_none_in_the_table() -> None:
    presets = {"mle_bench": 0.75, "first_place": 0.5, "host": 0.25}
    scores = {"dice": 0.5, "dice_left_kidney": math.nan, "dice_volume": 0.25, "competition_score": 0.75}
    scores |= {f"competition_score_{preset}": score for preset, score in presets.items()}
    described = {
        "organs": {"left_kidney": 0},
        "num_scans": 2,
        "scores": {"a": scores},
        "intervals": {"a": dict.fromkeys(scores)},
        "gains": {"a": (0.5, 0.0, None)},
    }
    heading, _, row, _, by_preset, _, scores_by_preset = format_comparison(described).splitlines()
    assert "| left kidney (known in 0 of 2 scans) |" in heading
    assert row == "| a | 0.5000 | none | 0.2500 | 0.7500 | +0.0000 |"
    assert all(preset in by_preset for preset in presets)
    assert scores_by_preset == "| a | 0.7500 | 0.5000 | 0.2500 |"
