"""Whatever error comes, all processes of a command end, and a lack of memory is one line that says what helps."""

import json
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerState, TrainingArguments

from gi_segmentation.training import header
from tests.support.fault_table import LIMIT_S, list_rows, make_table
from tests.support.faults import FAULT
from tests.support.processes import ROOT, RunPython
from tests.support.training import arguments


@pytest.mark.parametrize(
    ("place", "error", "told", "helps"),
    [
        ("step", "CUDA out of memory", "error: the memory of the device is full", "--gradient_accumulation_steps"),
        ("loader", "SIGBUS", "error: the shared memory /dev/shm is full", "--dataloader_num_workers"),
    ],
)
def test_a_training_with_loader_processes_ends(
    place: str, error: str, told: str, helps: str, dataset_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    words = arguments(dataset_dir, tmp_path / "run", dataloader_num_workers=2, eval_steps=4, save_steps=4)
    fault = {"place": place, "error": error, "call": 3, "log": str(tmp_path / "log")}
    command = ["-m", "tests.support.faults", "run_segmentation", *words]
    ended = run_python(command, ROOT, {FAULT: json.dumps(fault)})
    assert time.time() - float((tmp_path / "log").read_text()) < LIMIT_S
    assert ended.returncode == 1, ended.stderr[-2000:]
    (line,) = [line for line in ended.stderr.splitlines() if "error: the " in line]
    assert told in line and helps in line
    assert "Traceback" not in ended.stderr


@pytest.mark.long
def test_every_error_at_every_place_ends_all_processes(tmp_path: Path) -> None:
    table, wrong = make_table(list(list_rows()), tmp_path)
    assert not wrong, table


def test_the_header_says_where_on_what_and_how_long(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=50)
    state = TrainerState(max_steps=1000, global_step=400, eval_steps=50)
    step, steps = header.describe_steps(args, state, batch_size=8, batches=500)
    assert step == "8 a batch x 2 accumulated x 1 process = 16 slices a step"
    assert steps == "1,000 steps, 600 of them left (about 4 epochs), an evaluation every 50 steps"
    slices = Dataset.from_dict({"case": [1, 1, 2]})
    told = "3 slices of 2 patients to train on, none held back to score"
    assert header.describe_slices(slices, slices.select([])) == told
    cpu = torch.device("cpu")
    assert header.find_missing_gpu(cpu, wants_cpu=True) is None
    assert str(header.find_missing_gpu(cpu, wants_cpu=False)).startswith("no GPU found: trains on the CPU")
    assert header.describe_device(cpu, 2, "bf16").endswith("2 processes, in 16 bits (bf16)")
