"""The reference runs, on a phantom: from the data to models with scores of all patients."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from loopback_hub import LoopbackHub
from tests.support.encoders import write_encoder
from tests.support.kaggle import copy_patients, list_patients
from tests.support.models import write_base
from tests.support.processes import ROOT

BASE, MODEL_ID = "openmmlab/upernet-convnext-small", "tester/gi-reference"
TINY = (
    "--image_size 64 --max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --report_to none "
    "--eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2"
)


@pytest.mark.long
def test_from_the_zip_to_a_branch_per_fold(kaggle_dir: Path, tmp_path: Path, hub: LoopbackHub) -> None:
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=write_base(tmp_path / "base", "upernet"))
    zip_file = shutil.make_archive(str(tmp_path / "download"), "zip", kaggle_dir)
    command = [str(ROOT / "reference_runs" / "gi_tract.sh"), zip_file, MODEL_ID, *TINY.split()]
    environment = {
        **os.environ,
        **hub.environment(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "RUN_DIR": str(tmp_path / "run"),
        "NUM_FOLDS": "2",
        "CONFIG_FILE": "accelerate_configs/cpu.yaml",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 patients, each scored once, by a model that never saw this patient in training:" in done.stdout
    assert f"published: {hub.endpoint}/{MODEL_ID} (tag 2-folds-dice-" in done.stdout
    # The last step loads each branch in a process of its own, with plain transformers.
    for branch in ("main", "fold-0", "fold-1"):
        assert re.search(rf"^{branch}: UperNetForSemanticSegmentation, [\d,]+ parameters$", done.stdout, re.M)
    card = Path(api.hf_hub_download(MODEL_ID, "README.md", local_dir=tmp_path / "card")).read_text()
    assert "nobody measured these weights themselves" in card

    # The same folds as jobs of Slurm: the first job finds fold 0 finished, and the last one pools.
    for number, said in (("0", "fold 0: finished before"), ("", "4 patients, each scored once")):
        job = ["bash", str(ROOT / "reference_runs" / "fold.slurm"), *TINY.split()]
        slurm = {**environment, "SLURM_ARRAY_TASK_ID": number, "RECIPE": "recipes/upernet-convnext-small.yaml"}
        done = subprocess.run(job, cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


@pytest.mark.long
def test_without_a_gpu_from_two_folders_to_a_model_of_all_patients(kaggle_dir: Path, tmp_path: Path) -> None:
    patients = list_patients(kaggle_dir)
    copy_patients(kaggle_dir, tmp_path / "first", patients[::2])
    copy_patients(kaggle_dir, tmp_path / "second", patients[1::2])
    write_encoder(tmp_path / "encoder", "convnextv2")
    script = str(ROOT / "reference_runs" / "without_gpu.sh")
    flags = ["--backbone", str(tmp_path / "encoder"), *TINY.split()]
    command = [script, str(tmp_path / "first"), str(tmp_path / "second"), "--", *flags]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "RUN_DIR": str(tmp_path / "run"),
        "NUM_FOLDS": "2",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 patients, each scored once, by a model that never saw this patient in training:" in done.stdout

    # The last line is a command that predicts with the model of all patients.
    words = done.stdout.splitlines()[-1].split(": ", 1)[1].split()
    words = [sys.executable, *words[1 : words.index("--input")]]
    weights = (tmp_path / "run" / "cv" / "fold-all" / "model.safetensors").read_bytes()
    assert Path(words[-1], "model.safetensors").read_bytes() == weights
    scan = next((kaggle_dir / "train" / patients[0]).iterdir())
    predict = [*words, "--input", str(scan), "--output_dir", str(tmp_path / "masks"), "--format", "kaggle"]
    assert subprocess.run(predict, cwd=ROOT, env=environment, capture_output=True, timeout=300).returncode == 0

    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("finished before") == 3, again.stdout + again.stderr

    # One training that fails fails the run, with what it says.
    broken = [*command[:-2], "--image_size", "16"]
    failed = subprocess.run(
        broken,
        cwd=tmp_path,
        env={**environment, "RUN_DIR": str(tmp_path / "broken")},
        capture_output=True,
        timeout=300,
    )
    assert failed.returncode != 0 and b"--image_size" in failed.stderr
    without = subprocess.run([script, "--", "--seed", "1"], capture_output=True, text=True, timeout=60)
    assert without.returncode == 2 and without.stderr.startswith("usage: ")
