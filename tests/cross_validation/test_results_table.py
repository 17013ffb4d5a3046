"""`gi_segmentation.table`: each recipe has a row with the scores of its run, or with the reason why there are none."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.support.processes import ROOT, ROOT_ON_PATH, RunPython
from tests.support.training import arguments

FLAGS = {"learning_rate": 1e-6, "max_steps": 2, "max_eval_samples": None, "test_time_flips": True}


@pytest.mark.long
def test_the_results_table_has_the_scores_of_the_run(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    words = arguments(dataset_dir, tmp_path / "unused", **FLAGS)
    flags = [*words[: words.index("--dataset_name")], *words[words.index("--output_dir") + 2 :]]
    command = ["-m", "gi_segmentation.table", "--dataset_name", str(dataset_dir), "--recipes", "dpt-large", "--folds"]
    output = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--output_dir", str(tmp_path / "table")]
    words = [*command, *output, "--", *flags, "--gradient_accumulation_steps", "1"]
    done = run_python(words, tmp_path, env=ROOT_ON_PATH, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "table" / "dpt-large" / "run.json").read_text())
    row = (tmp_path / "table" / "table.md").read_text().splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert (
        cells[:3] == ["dpt-large", f"{facts['num_parameters'] / 1e6:.1f}M", "4 in 2 folds"] and cells[10] == "0.9420"
    )
    dice, *interval = re.findall(r"\d\.\d+", cells[3])
    assert float(dice) == pytest.approx(facts["scores"]["eval_dice"], abs=2e-4)
    assert [float(end) for end in interval] == pytest.approx(facts["intervals"]["eval_dice"] or [], abs=2e-3)
    (entry,) = yaml.safe_load((tmp_path / "table" / "model-index.yml").read_text())["model-index"]
    name, results = model_index_to_eval_results([entry])
    assert name == "dpt-large"
    values = {result.metric_name: result.metric_value for result in results}
    assert values["Dice, mean over slices and organs"] == round(facts["scores"]["eval_dice"], 4)
    assert values["Competition score, 0.4 Dice + 0.6 of the line above (preset mle_bench)"] == pytest.approx(
        float(cells[8].split()[0]), abs=1e-4
    )


@pytest.mark.long
def test_a_recipe_that_fails_has_its_error_in_the_results_table(
    dataset_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    command = ["-m", "gi_segmentation.table", "--dataset_name", str(dataset_dir), "--recipes", "beit-base"]
    flags = ["--image_size", "100", "--model_type", "beit", "--use_cpu", "true"]
    done = run_python([*command, "--output_dir", str(tmp_path / "table"), "--", *flags], tmp_path, env=ROOT_ON_PATH)
    assert done.returncode == 1
    assert "| beit-base | failed: error: --image_size 100:" in (tmp_path / "table" / "table.md").read_text()
