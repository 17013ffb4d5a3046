"""The configuration files of `accelerate_configs/`, run by `accelerate launch` itself.

`python -m tests.support.launch_table` runs more of them, with every family of models.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import run_segmentation
from loopback_hub import LoopbackHub
from tests.support.launches import FSDP_ON_CPU, Launch, accelerate_commands, doubled_lines
from tests.support.models import NO_DROPOUT, change_config, save_model
from tests.support.processes import CONFIGS, ROOT
from tests.support.training import arguments, train_steadily

# Sums over the slices of a step are added up in another order, and rounded to 32 bits: by up to 6e-8 each time. We saw
# differences of 2e-7.
TOLERANCE = 2e-6
README = (CONFIGS / "README.md").read_text()
MODEL_ID = "tester/model"
MINUTE = 60


@pytest.fixture
def hf_home(tmp_path: Path) -> dict[str, str]:
    """An empty cache, so that nothing is left of other tests."""
    return {"HF_HOME": str(tmp_path / "hf_home")}


def of_a_checkpoint(model: Path) -> dict[str, Any]:
    """The flags that start from a checkpoint, and not from random weights."""
    return {"model_type": None, "config_overrides": None, "model_name_or_path": model}


def scores_of(run: Path) -> dict[str, float]:
    # The validation loss is a mean over batches, so it depends on how the slices are divided into batches.
    return {
        name: value
        for name, value in json.loads((run / "run.json").read_text())["scores"].items()
        if name != "eval_loss"
    }


class TestFiles:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_accelerate_reads_every_key_and_every_key_has_a_comment(self, path: Path) -> None:
        config = load_config_from_file(str(path))
        assert (config.num_processes > 1) == (path.stem not in ("cpu", "single_gpu"))
        assert (config.num_machines > 1) == (path.stem == "multi_node")
        # `accelerate` ignores a misspelt key inside these two.
        known = vars(launch_command_parser().parse_args(["script"]))
        assert not {*config.fsdp_config, *config.deepspeed_config} - set(known)
        lines = [line for line in path.read_text().splitlines() if re.match(r" *\w+:", line)]
        assert len(lines) == len(yaml.safe_load(path.read_text())) + len(config.fsdp_config | config.deepspeed_config)
        assert all(" # " in line for line in lines)

    def test_the_readme_says_when_to_take_which(self) -> None:
        for path in CONFIGS.iterdir():
            assert path.name == "README.md" or f"`{path.name}`" in README

    def test_torchrun_understands_the_line_for_two_machines(self) -> None:
        (line,) = re.findall(r"^torchrun (.+?[^\\])$", README, re.M | re.S)
        parsed = get_args_parser().parse_args(line.replace("\\\n", " ").split())
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("2", "8", 0)
        assert Path(parsed.training_script).name == "run_segmentation.py"


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes_and_machines(
    dataset_dir: Path, tmp_path: Path, hub: LoopbackHub, hf_home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, env = tmp_path / "run", {**hub.environment(), **hf_home}
    # Averaged weights, an auxiliary head and a learning rate of the head must all survive. The model predicts pixels
    # of each organ, so that the scores are not 0.
    model = change_config(save_model(tmp_path / "model", "upernet", seed=0), use_auxiliary_head=True)
    flags = {**of_a_checkpoint(model), "ema_decay": 0.9, "head_lr_multiplier": 10, "learning_rate": 1e-4}
    flags |= {"gradient_accumulation_steps": 2, "max_steps": 8, "save_total_limit": 9, "max_eval_samples": 23}
    words = arguments(dataset_dir, run, "upernet", **flags)
    words += ["--push_to_hub", "--hub_model_id", MODEL_ID]

    # Two "machines" of a cluster, until Slurm announces the end of the time.
    stand_ins = [str(ROOT / "tests" / "support" / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {
        "PATH": os.pathsep.join(stand_ins), "REQUEUED": str(tmp_path / "requeued"),
        "CONFIG_FILE": "accelerate_configs/multi_cpu.yaml", "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    with Launch(tmp_path / "slurm", [["bash", str(CONFIGS / "slurm.sh"), *words]], env | slurm, cwd=ROOT) as job:
        job.wait_for(run / "checkpoint-2")
        job.started[0].terminate()
        assert job.wait(MINUTE) == [0], job.said()[-3000:]
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    assert json.loads((run / "run.json").read_text())["num_processes"] == 2

    # Three processes to the end.
    with Launch(tmp_path / "three", accelerate_commands("multi_cpu", words, 3), env) as launch:
        assert launch.wait() == [0], launch.said()[-3000:]
        said = launch.said()
        assert said.count("Resuming from") == said.count("find_unused_parameters=True") == 1
        assert launch.printed().count("best checkpoint:") == launch.printed().count("published:") == 1
    facts, three = json.loads((run / "run.json").read_text()), scores_of(run)
    assert (facts["num_processes"], facts["steps"], facts["train_batch_size"]) == (3, 8, 24)
    assert three["eval_dice"] > 0
    first, last = (load_file(run / f"checkpoint-{n}" / "training_weights.safetensors") for n in (1, 8))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert {"auxiliary_head.classifier.weight", "decode_head.classifier.weight"} <= set(moved)
    api = HfApi(endpoint=hub.endpoint, token="any")
    copy = api.hf_hub_download(MODEL_ID, "model.safetensors", local_dir=tmp_path / "copy")
    best = (run / f"checkpoint-{facts['best_step']}" / "model.safetensors").read_bytes()
    assert Path(copy).read_bytes() == best

    # The finished run is only scored again: to the last digit the same with one process and with two.
    words = words[:-3]
    run_segmentation.main(words)
    assert scores_of(run) == three
    with Launch(tmp_path / "two", accelerate_commands("multi_cpu", words, 2), env) as launch:
        assert launch.wait() == [0], launch.said()[-3000:]
        assert launch.said().count("is the end of this run") == launch.printed().count("best checkpoint:") == 1
        # The main process loads the model that it began with, and then the best checkpoint.
        assert launch.said().count("Loading weights: 100%") == 2
        assert doubled_lines(launch.printed() + launch.said()) == ["Loading weights"]
    assert scores_of(run) == three


def test_one_process_with_8_slices_and_two_with_4_follow_the_same_losses(
    dataset_dir: Path, tmp_path: Path, hf_home: dict[str, str]
) -> None:
    # A model that predicts some pixels of each organ, so that the scores are not 0, and without random numbers in the
    # forward pass. Batch normalisation is frozen, because each process would normalise its own slices.
    model = change_config(save_model(tmp_path / "model", "segformer", seed=0), **NO_DROPOUT)

    def words(folder: str, batch_size: int) -> list[str]:
        flags = {**of_a_checkpoint(model), "max_eval_samples": 23}
        flags |= {"max_steps": 8, "eval_steps": 8, "save_steps": 8, "gradient_accumulation_steps": 2}
        flags |= {"optim": "sgd", "learning_rate": 1e-3, "per_device_train_batch_size": batch_size}
        return arguments(dataset_dir, tmp_path / folder, **flags)

    trainer, losses, scores = train_steadily(words("one", 8))
    result = tmp_path / "two.safetensors"
    program = ROOT / "tests" / "support" / "train_once.py"
    commands = accelerate_commands("multi_cpu", [str(result), *words("two", 4)], 2, program=program)
    with Launch(tmp_path / "log", commands, hf_home) as launch:
        assert launch.wait() == [0], launch.said()[-3000:]
    losses_of_two, scores_of_two = json.loads(result.with_suffix(".json").read_text())
    assert losses[0] - losses[-1] > 0.01
    assert losses_of_two == pytest.approx(losses, rel=TOLERANCE)
    weights = load_file(result)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5)
    # The validation loss is the mean over the batches of each process, so it is not the same.
    del scores["eval_loss"], scores_of_two["eval_loss"]
    assert scores["eval_dice"] > 0 and scores["eval_competition_score"] > 0
    assert scores_of_two == pytest.approx(scores, rel=0, abs=0, nan_ok=True)


@pytest.mark.long
def test_fsdp_trains_resumes_and_publishes_as_one_process_would_read_it(
    dataset_dir: Path, tmp_path: Path, hub: LoopbackHub, hf_home: dict[str, str]
) -> None:
    run, env = tmp_path / "run", {**hub.environment(), **hf_home}
    model = change_config(save_model(tmp_path / "model", "upernet", seed=0), use_auxiliary_head=True)
    flags = {**of_a_checkpoint(model), "head_lr_multiplier": 10, "learning_rate": 1e-4, "max_steps": 4}
    words = arguments(dataset_dir, run, "upernet", save_total_limit=9, **flags)
    words += ["--push_to_hub", "--hub_model_id", MODEL_ID]
    with Launch(tmp_path / "killed", accelerate_commands("fsdp2", words, 2, program=FSDP_ON_CPU), env) as launch:
        launch.wait_for(run / "checkpoint-2")
        launch.kill(rank=1)
        assert launch.wait(MINUTE) == [1]
        assert re.search(r"Root Cause.*rank +: 1 .*SIGKILL", launch.said(), re.S)
        assert "[rank0]: Traceback" not in launch.said()
    assert not (run / "model.safetensors").exists()
    with Launch(tmp_path / "alone", accelerate_commands("fsdp2", words, 1, program=FSDP_ON_CPU), env) as launch:
        assert launch.wait() == [0], launch.said()[-3000:]
        assert "Resuming from" in launch.said() and "published:" in launch.printed()
    scores = scores_of(run)
    published = load_file(run / "model.safetensors")
    assert not any(name.startswith("auxiliary_head") for name in published)
    config = json.loads((run / "config.json").read_text())
    assert config["architectures"] == ["UperNetForSemanticSegmentation"] and not config["use_auxiliary_head"]
    # A process without FSDP scores the published weights.
    run_segmentation.main(words[:-3])
    assert scores_of(run) == scores


def test_an_error_that_all_processes_find_is_printed_once(tmp_path: Path) -> None:
    program = tmp_path / "fail.py"
    program.write_text(
        "from gi_segmentation.errors import InputError, exit_on_input_error\n"
        "with exit_on_input_error():\n"
        "    raise InputError('the same everywhere')\n"
    )
    with Launch(tmp_path / "log", accelerate_commands("multi_cpu", [], 2, program=program)) as launch:
        assert launch.wait(MINUTE) == [1]
        assert launch.said().count("error: the same everywhere") == 1
    # If the first process goes on, the other one is heard.
    alone = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, env={**os.environ, "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=MINUTE, check=False,
    )  # fmt: skip
    assert (alone.returncode, alone.stderr) == (1, "error: the same everywhere\n")
