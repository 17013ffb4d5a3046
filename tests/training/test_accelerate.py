"""The configuration files of `accelerate_configs/`, run by `accelerate launch` itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from tests.support.models import STEADY
from tests.support.processes import CONFIGS, ROOT, ROOT_ON_PATH, TWO_PROCESSES, RunPython
from tests.support.training import arguments, make_trainer, weights_after


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert ("multi" in path.stem or "processes" in path.stem) == (config.num_processes > 1)


def test_two_processes_give_the_same_scores_as_one(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    def words(batch_size: int) -> list[str]:
        # 23 slices are an odd number for two processes, so `accelerate` repeats some to fill the last batch. A
        # repeated slice must not count twice.
        flags = {"max_eval_samples": 23, "per_device_eval_batch_size": batch_size}
        return arguments(dataset_dir, tmp_path / "run", **flags)

    trainer, _ = make_trainer(words(4))
    one = {
        key: value
        for key, value in trainer.evaluate(clinical=True).items()
        if not re.search("loss|time|per_second", key)
    }
    assert one["eval_dice"] > 0 and one["eval_competition_score"] > 0 and "eval_hausdorff95_mm_stomach" in one
    result = tmp_path / "two.json"
    command = [*TWO_PROCESSES, "-m", "tests.support.evaluate_once", str(result), *words(3)]
    done = run_python(command, cwd=tmp_path, env=ROOT_ON_PATH)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(result.read_text())
    assert {key: two[key] for key in one} == pytest.approx(one, rel=0, abs=0, nan_ok=True)


def test_two_processes_train_as_one_with_a_batch_of_twice_the_size(
    dataset_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    flags: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5}
    # Two processes with one slice each pool their Dice. So they must train exactly like one process with batches of
    # two.
    one = weights_after(dataset_dir, tmp_path / "one", 2, steps=3, **flags)
    flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    flags |= {"config_overrides": json.dumps(STEADY), "eval_steps": 3, "save_steps": 3}
    result = tmp_path / "two.safetensors"
    words = arguments(dataset_dir, tmp_path / "two", **flags)
    done = run_python(
        [*TWO_PROCESSES, "-m", "tests.support.train_once", str(result), *words], cwd=tmp_path, env=ROOT_ON_PATH
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(result)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4)


def test_two_processes_train_and_write_one_result(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    flags = {"ema_decay": 0.9, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    words = arguments(dataset_dir, tmp_path / "run", "upernet", max_steps=2, **flags)
    command = [*TWO_PROCESSES, str(ROOT / "run_segmentation.py"), *words]
    # The second run finds a finished training and only scores again.
    for _ in range(2):
        done = run_python(command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("best checkpoint") == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["num_processes"] == 2
    assert facts["train_batch_size"] == 8
    first, last = (load_file(tmp_path / f"run/checkpoint-{n}/training_weights.safetensors") for n in (1, 2))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {"auxiliary_head.classifier.weight", "decode_head.classifier.weight"} <= set(moved)
