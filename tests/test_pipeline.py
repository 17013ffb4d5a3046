"""The pipeline as a user runs it: real commands, a real Hub, new processes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, get_token
from safetensors.torch import load_file

import run_segmentation
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from gi_segmentation import predict
from loopback_hub import Fault, LoopbackHub
from tests.support.models import write_base
from tests.support.processes import ROOT, RunPython
from tests.support.training import arguments
from tests.support.volumes import prediction_words

RUN = str(ROOT / "run_segmentation.py")
MODEL_ID, DATASET_ID = "tester/gi-segformer", "tester/gi_tract"

# Runs the Python lines of a card, as a reader without this project would.
CARD_LINES = """
import re, sys
from pathlib import Path
code = re.search(r"```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.S)[1]
assert len([line for line in code.splitlines() if line.strip()]) <= 10
exec(code.replace("slice_0001_266_266_1.50_1.50.png", sys.argv[2]))
assert not any(name.split(".")[0] in ("gi_segmentation", "dataset_builder") for name in sys.modules)
numpy.save(sys.argv[3], mask.numpy())
"""


def run_command(run_python: RunPython, args: list[str], cwd: Path, hub: LoopbackHub) -> str:
    done = run_python(args, cwd=cwd, env=hub.environment(), timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_from_real_slices_to_a_published_checkpoint_that_predicts(
    test_data: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    sample = test_data / "uwmgi_sample"
    build = ["-m", "dataset_builder", "build", "--kaggle_dir", str(sample), "--num_folds", "3"]
    run_command(run_python, [*build, "--push_to_hub", DATASET_ID], tmp_path, hub)
    words = arguments(tmp_path / "gi_tract", tmp_path / "run", learning_rate=1e-4, max_steps=3, max_eval_samples=None)
    words[words.index("--dataset_name") + 1] = DATASET_ID
    train = [RUN, *words, "--push_to_hub", "--hub_model_id", MODEL_ID]
    assert f"published: {hub.endpoint}/{MODEL_ID}" in run_command(run_python, train, tmp_path, hub)

    api = HfApi(endpoint=hub.endpoint, token="any")
    published = {path for path in api.list_repo_files(MODEL_ID) if path != ".gitattributes"}
    assert published == {
        ".eval_results/gi_tract.yaml", "README.md", "cases.png", "config.json", "learning_curve.png",
        "model.safetensors", "overlay.png", "preprocessor_config.json", "run.json", "scan_scores.csv",
    }  # fmt: skip
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tag,) = api.list_repo_refs(MODEL_ID).tags
    assert tag.name == f"dice-{facts['scores']['eval_dice']:.4f}-step-{facts['best_step']}"
    assert api.dataset_info(DATASET_ID).private

    # The Hub returns the files that the run wrote.
    for name in ("README.md", "model.safetensors"):
        copy = api.hf_hub_download(MODEL_ID, name, local_dir=tmp_path / "copy", revision=tag.name)
        assert Path(copy).read_bytes() == (tmp_path / "run" / name).read_bytes()

    words = ["-m", "gi_segmentation.predict", "--model", MODEL_ID, "--input", str(sample), "--output_dir", "out"]
    run_command(run_python, words, tmp_path, hub)
    score = ["-m", "gi_segmentation.score", "--truth", str(sample / "train.csv"), "--submission", "out/submission.csv"]
    printed = run_command(run_python, score, tmp_path, hub)
    assert re.search(r"^ +0\.\d{4}  competition_score \[0\.\d{4}, 0\.\d{4}\]$", printed, re.M)

    raw = test_data / "uwmgi_originals" / "slice_0021_266_266_1.50_1.50.png"
    stranger = tmp_path / "stranger.py"
    stranger.write_text(CARD_LINES)
    run_command(run_python, [str(stranger), "run/README.md", str(raw), "mask.npy"], tmp_path, hub)

    import numpy as np

    from gi_segmentation.formats.inputs import InputScan
    from gi_segmentation.formats.kaggle.names import SliceFile
    from gi_segmentation.inference.arguments import Computation
    from gi_segmentation.inference.batches import PredictionSettings
    from gi_segmentation.inference.members import load_members
    from gi_segmentation.inference.scans import predict_scans
    from gi_segmentation.review.predicted_scan import PredictedScan

    ours = SliceFile(raw, 1, 1, 21, 266, 266, (1.5, 1.5))
    members = load_members([str(tmp_path / "run")], None, Computation("cpu"))
    ((_, predicted),) = predict_scans(members, [InputScan(ours.scan, [ours])], PredictionSettings(num_workers=0))
    assert isinstance(predicted, PredictedScan)
    (masks,) = predicted.slice_masks
    mask = np.load(tmp_path / "mask.npy")
    assert mask.shape == (266, 266)
    assert all(np.array_equal(mask == organ + 1, masks[organ]) for organ in range(3))


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("segformer-b0", marks=pytest.mark.long),
        pytest.param("upernet-convnext-small", marks=pytest.mark.long),
        pytest.param("dpt-large", marks=pytest.mark.long),
        "beit-base",
    ],
)
def test_a_recipe_trains_resumes_publishes_and_predicts_with_a_tiny_model_of_its_family(
    recipe: str, dataset_dir: Path, kaggle_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    family = recipe.split("-")[0]
    # `arguments` sets these flags for speed. None leaves them out, so that the recipe's values count.
    of_the_recipe = dict.fromkeys(("warmup_steps", "head_lr_multiplier", "ema_decay", "slice_sampling"))
    flags = {"learning_rate": 1e-4, "max_steps": 3, "save_total_limit": 5, **of_the_recipe}
    changed = arguments(dataset_dir, tmp_path / "run", family, **flags)
    words = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *changed, "--gradient_accumulation_steps", "2"]
    run_segmentation.main(words)
    # As if the run had been killed after its first checkpoint.
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("checkpoint-1", "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_python([RUN, *words, "--push_to_hub", "--hub_model_id", MODEL_ID], tmp_path, env=hub.environment())
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"Resuming from {tmp_path / 'run' / 'checkpoint-1'}" in again.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["steps"], facts["slice_context"], facts["ema_decay"]) == (3, 2, 0.999)
    best = load_file(tmp_path / "run" / f"checkpoint-{facts['best_step']}" / "model.safetensors")
    api = HfApi(endpoint=hub.endpoint, token="any")
    pushed = load_file(api.hf_hub_download(MODEL_ID, "model.safetensors", local_dir=tmp_path / "pushed"))
    assert pushed.keys() == best.keys() and all(torch.equal(pushed[name], best[name]) for name in best)
    # `predict` would refuse a checkpoint that lacks a tensor.
    pushed_dir = api.snapshot_download(MODEL_ID, local_dir=tmp_path / "pushed")
    predict.main(prediction_words(Path(pushed_dir), kaggle_dir, tmp_path / "out", "--test_time_flips"))
    assert len((tmp_path / "out" / "submission.csv").read_text().splitlines()) == 1 + 48 * 3


def test_the_original_projects_command_runs_unchanged(
    small_kaggle_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    name = "openmmlab/upernet-convnext-small"
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=write_base(tmp_path / "base", "upernet"))
    # Three slices to train on, of 288 pixels, since that is the original's size.
    build(small_kaggle_dir, tmp_path / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
    command = (
        "--base_model openmmlab/upernet-convnext-small --train_batch_size 32 --weight_decay 1e-4 --optimizer AdamW "
        "--scheduler_name MultiStepLR --epochs 6 --lr 2e-4"
    )
    done = run_python([RUN, *command.split()], cwd=tmp_path, env=hub.environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "runs" / "gi_tract" / "run.json").read_text())
    assert (facts["base_model"], facts["epochs"], facts["train_batch_size"]) == (name, 6, 32)
    assert facts["arguments"]["optim_args"] == "amsgrad=True"
    state = json.loads((tmp_path / "runs" / "gi_tract" / "trainer_state.json").read_text())
    assert state["max_steps"] == 6
    assert "newly made: decode_head.classifier.weight" in done.stderr


def test_the_card_passes_the_checks_of_the_loopback_hub(
    dataset_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    run_command(run_python, [RUN, *arguments(dataset_dir, tmp_path / "run", max_steps=1)], tmp_path, hub)
    check = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
    run_command(run_python, ["-c", check, "run/README.md"], tmp_path, hub)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Dice, mean over slices and organs"] == round(facts["scores"]["eval_dice"], 4)
    assert card.data.license == "other"
    for folder in (tmp_path, dataset_dir, Path.home()):
        assert str(folder) not in card.content + json.dumps(facts), "a path of this machine is no fact of the run"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "python -m dataset_builder build"),
        (["--learning_rat", "0.1"], "did you mean learning_rate?"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
    ids=["no dataset", "misspelt flag", "no recipe"],
)
def test_a_mistake_of_the_user_ends_in_one_error_without_a_traceback(
    words: list[str], expected: str, tmp_path: Path, run_python: RunPython
) -> None:
    done = run_python([RUN, *words], cwd=tmp_path)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_training_outlives_a_hub_that_fails_and_is_published_by_the_command_that_it_names(
    dataset_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    words = arguments(dataset_dir, tmp_path / "run", max_steps=1, report_to="tensorboard")
    push = ["--push_to_hub", "--hub_model_id", MODEL_ID, "--hub_private_repo", "true"]
    token = "hf_madeUpForThisTest"
    # The caches of the libraries are here too, so that they can be searched for the token.
    environment = {**hub.environment(token), "HF_HOME": str(tmp_path / "hf_home")}
    # Before the training the Hub is broken, and at its end it refuses the token.
    hub.faults.set([Fault("POST", "/repos/create", status=500), Fault("POST", "/commit/", status=403)])
    done = run_python([RUN, *words, *push], cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "The training starts nevertheless" in done.stderr
    assert "best checkpoint: step 1 of 1" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: publishing") and "403" in last and "HF_TOKEN" in last
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    api = HfApi(endpoint=hub.endpoint, token="any")
    assert api.list_repo_files(MODEL_ID) == [".gitattributes"]

    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = last.split("To publish it: python ")[1].split()
    again = run_python(command, cwd=ROOT, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"published: {hub.endpoint}/{MODEL_ID} (tag dice-" in again.stdout
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = ("training_args.bin", "events.out.tfevents", "run.json", "README.md", "hf_home/datasets", "hub/")
    assert all(any(kind in str(path) for path in left) for kind in kinds)
    assert not [path for path in left if token.encode() in path.read_bytes()], "the token is in a file"
    assert token not in done.stdout + done.stderr + again.stdout + again.stderr
    assert all(path.read_bytes() == data for path, data in written.items())
    assert api.model_info(MODEL_ID).private
    copy = api.hf_hub_download(MODEL_ID, "model.safetensors", local_dir=tmp_path / "copy")
    assert Path(copy).read_bytes() == written[tmp_path / "run" / "model.safetensors"]
    assert get_token() is None
