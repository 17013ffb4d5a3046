"""The shipped accelerate configurations, under `accelerate launch` itself."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import RunPython
from safetensors.torch import load_file
from test_trainer import STEADY, arguments

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"
LAUNCH = ["-m", "accelerate.commands.launch", "--quiet", "--config_file"]
TESTS_ON_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert ("multi" in path.stem or "processes" in path.stem) == (config.num_processes > 1)


def test_two_processes_score_as_one(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    scores: dict[str, dict[str, Any]] = {}
    for config, batch_size in (("cpu", 4), ("cpu_2_processes", 3), ("cpu_2_processes", 5)):
        result = tmp_path / f"{config}-{batch_size}.json"
        # 11 slices: neither a multiple of the batch sizes nor of the processes, so that the last batch is filled up
        flags = {"max_eval_samples": 11, "per_device_eval_batch_size": batch_size}
        words = arguments(dataset_dir, tmp_path / "run", **flags)
        command = [*LAUNCH, str(CONFIGS / f"{config}.yaml"), str(ROOT / "tests" / "evaluate_once.py"), str(result)]
        done = run_python([*command, *words], cwd=tmp_path, env=TESTS_ON_PATH)
        assert done.returncode == 0, done.stderr[-3000:]
        scores[result.stem] = {
            key: value for key, value in json.loads(result.read_text()).items() if "dice" in key or "macro" in key
        }
    one, *others = scores.values()
    assert one["eval_dice"] > 0
    assert all(other == pytest.approx(one, abs=0, nan_ok=True) for other in others)


def test_two_processes_learn_as_one(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    weights = {}
    for config, batch_size, accumulation in (("cpu", 4, 1), ("cpu_2_processes", 2, 1), ("cpu_2_processes", 1, 2)):
        name = f"{config}-{batch_size}"
        flags: dict[str, Any] = {"config_overrides": json.dumps(STEADY), "optim": "sgd", "learning_rate": 0.5}
        flags |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        words = arguments(dataset_dir, tmp_path / name, max_steps=3, eval_steps=3, save_steps=3, **flags)
        script, result = ROOT / "tests" / "train_once.py", tmp_path / f"{name}.safetensors"
        command = [*LAUNCH, str(CONFIGS / f"{config}.yaml"), str(script), str(result), *words]
        done = run_python(command, cwd=tmp_path, env=TESTS_ON_PATH)
        assert done.returncode == 0, done.stderr[-3000:]
        weights[name] = load_file(result)
    one, *others = weights.values()
    for other in others:
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=2e-5, rtol=1e-4)


def test_two_processes_train_an_auxiliary_head_and_an_average(
    dataset_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    flags = {"ema_decay": 0.9, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    words = arguments(dataset_dir, tmp_path / "run", "upernet", max_steps=2, **flags)
    command = [*LAUNCH, str(CONFIGS / "cpu_2_processes.yaml"), str(ROOT / "run_segmentation.py"), *words]
    done = run_python(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (load_file(tmp_path / f"run/checkpoint-{n}/training_weights.safetensors") for n in (1, 2))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {"auxiliary_head.classifier.weight", "decode_head.classifier.weight"} <= set(moved)


def test_two_processes_train_and_write_one_result(dataset_dir: Path, tmp_path: Path, run_python: RunPython) -> None:
    words = arguments(dataset_dir, tmp_path / "run", max_steps=2)
    command = [*LAUNCH, str(CONFIGS / "cpu_2_processes.yaml"), str(ROOT / "run_segmentation.py"), *words]
    for _ in range(2):  # the second time it finds its work done
        done = run_python(command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("best checkpoint") == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["num_processes"] == 2
    assert facts["train_batch_size"] == 8
