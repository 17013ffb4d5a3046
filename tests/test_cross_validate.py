"""A cross-validation as a user runs it: trained by accelerate, interrupted, pooled, compared and published."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

import run_segmentation
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom
from gi_segmentation import cross_validate, predict, score
from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from loopback_hub import LoopbackHub
from tests.support.models import save_model
from tests.support.processes import CONFIGS, RunPython, processes_of
from tests.support.training import arguments

MODEL_ID = "tester/gi-folds"
FOLDS = ("0", "1", "2")


@pytest.fixture(scope="module")
def folds_dir(kaggle_dir: Path, blank_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four patients in three folds."""
    folder = tmp_path_factory.mktemp("folds") / "gi_tract"
    build(kaggle_dir, folder, GiTractConfig(num_folds=len(FOLDS)), num_proc=1)
    return folder


@pytest.fixture(scope="module")
def recipe(folds_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a few steps. Its start and its end have predictions that are wrong, but not empty."""
    folder = tmp_path_factory.mktemp("recipe")
    start = save_model(folder / "start", "segformer", seed=0)
    flags = {"model_type": None, "config_overrides": None, "max_eval_samples": None}
    words = arguments(
        folds_dir,
        folder,
        model_name_or_path=start,
        max_steps=6,
        learning_rate=1e-4,
        slice_sampling="balanced",
        **flags,
    )
    keys, values = words[::2], words[1::2]
    settings = {key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(keys, values, strict=True)}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key != "output_dir"}))
    return path


def words(recipe: Path, output_dir: Path, *more: str) -> list[str]:
    config = str(CONFIGS / "cpu.yaml")
    return ["--config", str(recipe), "--output_dir", str(output_dir), "--config_file", config, *more]


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cross-validation, which was stopped once in its third fold. Tests only read it."""
    folder = tmp_path_factory.mktemp("cv") / "cv"
    # The first two folds are trained in this process, which is faster. The command finds them finished.
    for fold in FOLDS[:2]:
        run_segmentation.main(["--config", str(recipe), "--fold", fold, "--output_dir", str(folder / f"fold-{fold}")])
    command = [sys.executable, "-m", "gi_segmentation.cross_validate", *words(recipe, folder)]
    process = subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True)
    checkpoint = folder / "fold-2" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "fold-2.log").read_text()[-2000:]
        time.sleep(0.02)
    # Only the first process gets the signal, as from `kill` or a queue. It has to stop the training itself.
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not processes_of(folder)
    before = {fold: (folder / f"fold-{fold}" / "run.json").stat().st_mtime_ns for fold in ("0", "1")}

    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = r"Dice 0\.\d{4}, competition score 0\.\d{4}"
    for fold in FOLDS[:2]:
        assert re.search(rf"^fold {fold}: finished before, in \S+; {scores}$", done.stdout, re.M)
    assert re.search(rf"^fold 2: {scores}, [\d.]+ minutes$", done.stdout, re.M)
    # There is no bar in a file.
    assert "/3 folds" not in done.stdout + done.stderr
    assert {fold: (folder / f"fold-{fold}" / "run.json").stat().st_mtime_ns for fold in before} == before
    # The third fold went on from its checkpoint.
    assert re.search(r"checkpoint-[2-5]", (folder / "fold-2.log").read_text())
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_the_pooled_scores_are_those_of_each_patients_own_model(
    trained: Path, folds_dir: Path, kaggle_dir: Path, tmp_path: Path
) -> None:
    # Each fold's model predicts all slices. The rows of the patients that it held back become one submission.
    rows = []
    for fold in FOLDS:
        out = tmp_path / fold
        words = ["--model", str(trained / f"fold-{fold}"), "--input", str(kaggle_dir), "--output_dir", str(out)]
        predict.main([*words, "--precision", "fp32"])
        table = pd.read_csv(out / "submission.csv")
        held_back = load_slices(DataArguments(dataset_name=str(folds_dir), fold=fold))["validation"].unique("id")
        rows.append(table[table["id"].isin(held_back)])
    pooled = pd.concat(rows)
    assert not pooled.duplicated(["id", "class"]).any()
    pooled.to_csv(tmp_path / "submission.csv", index=False)
    truth = ["--truth", str(kaggle_dir / "train.csv"), "--kaggle_dir", str(kaggle_dir)]
    expected = score.main([*truth, "--submission", str(tmp_path / "submission.csv")])
    scores = read_facts(trained)["scores"]
    assert 0 < scores["eval_dice"] < 1
    for name in ("dice", "dice_stomach", "dice_volume", "hausdorff_score", "competition_score"):
        assert scores[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6), name


def test_each_scan_is_scored_once(trained: Path, folds_dir: Path) -> None:
    table = pd.read_csv(trained / "oof_scores.csv")
    everyone = load_slices(DataArguments(dataset_name=str(folds_dir), fold="all"))["train"]
    assert sorted(table["scan"].unique()) == sorted(everyone.unique("scan"))
    assert not table.duplicated(["scan", "organ"]).any()
    folds = dict(zip(everyone["scan"], everyone["fold"], strict=True))
    assert [folds[scan] for scan in table["scan"]] == table["fold"].tolist()


def test_summary_and_card_say_whose_scores_and_whose_weights_these_are(trained: Path) -> None:
    facts, printed, card = (
        read_facts(trained),
        (trained / "printed.txt").read_text(),
        (trained / "README.md").read_text(),
    )
    assert "4 patients, each scored once, by a model that never saw this patient in training:" in printed
    dice = {fold: read_facts(trained / f"fold-{fold}")["scores"]["eval_dice"] for fold in FOLDS}
    best = max(dice, key=lambda fold: dice[fold])
    assert facts["published_fold"] == best
    assert f"fold {best} has the highest Dice, and there is no training on all patients" in printed
    assert f"**The published weights** are those of fold {best}" in card
    for fold in FOLDS:
        assert re.search(rf"^\| {fold} \| \d \| \d \| {dice[fold]:.4f} \|", card, re.M)
    values = torch.tensor(list(dice.values()), dtype=torch.float64)
    spread = f"{values.mean():.4f} ± {values.std():.4f} ({values.min():.4f} to {values.max():.4f})"
    assert f"between folds: Dice {spread}" in printed and f"of the Dice: {spread}" in card
    weights = load_file(trained / "model.safetensors")
    expected = load_file(trained / f"fold-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_the_publication_has_a_branch_for_each_fold(
    trained: Path, recipe: Path, kaggle_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "cv"))
    # A training on all patients, as `--fold all` starts it. Its weights become those of the main branch.
    run_segmentation.main(["--config", str(recipe), "--fold", "all", "--output_dir", str(folder / "fold-all")])
    command = ["-m", "gi_segmentation.cross_validate", *words(recipe, folder, "--collect", "--postprocessing")]
    done = run_python([*command, "--push_to_hub", MODEL_ID], cwd=tmp_path, env=hub.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"published: {hub.endpoint}/{MODEL_ID} (tag 3-folds-dice-" in done.stdout
    assert "because they were trained on all patients" in done.stdout

    api = HfApi(endpoint=hub.endpoint, token="any")
    refs = api.list_repo_refs(MODEL_ID)
    assert {branch.name for branch in refs.branches} == {"main", *(f"fold-{fold}" for fold in FOLDS)}
    program = (
        "import sys, torch; from transformers import AutoModelForSemanticSegmentation as M\n"
        "image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)\n"
        "for branch, folder in zip(sys.argv[2::2], sys.argv[3::2], strict=True):\n"
        "    theirs, ours = M.from_pretrained(sys.argv[1], revision=branch), M.from_pretrained(folder)\n"
        "    assert torch.equal(theirs(image).logits, ours(image).logits), branch\n"
    )
    branches = ("fold-1", folder / "fold-1", "fold-2", folder / "fold-2", "main", folder / "fold-all")
    done = run_python(["-c", program, MODEL_ID, *map(str, branches)], cwd=tmp_path, env=hub.environment())
    assert done.returncode == 0, done.stderr
    main = ModelCard.load(api.hf_hub_download(MODEL_ID, "README.md", local_dir=tmp_path / "main"))
    (dice, *_), facts = main.data.eval_results, read_facts(folder)
    assert dice.metric_value == round(facts["scores"]["eval_dice"], 4) and dice.metric_args["patients"] == 4
    assert "nobody measured these weights themselves" in main.text
    fold = Path(api.hf_hub_download(MODEL_ID, "README.md", local_dir=tmp_path / "one", revision="fold-1")).read_text()
    assert f'AutoModelForSemanticSegmentation.from_pretrained("{MODEL_ID}", revision="fold-1")' in fold
    # The limits travel with every branch if they help, and with none otherwise.
    learnt = facts["postprocessing"]
    assert learnt["num_patients"] == 4 and "**Post-processing**" in main.text
    for branch in ("main", "fold-0"):
        config = api.hf_hub_download(MODEL_ID, "config.json", local_dir=tmp_path / branch, revision=branch)
        assert ("postprocessing" in json.loads(Path(config).read_text())) is learnt["helps"]

    # `--folds` averages the models of all branches, and of no other one.
    predict = ["-m", "gi_segmentation.predict", "--input", str(kaggle_dir), "--output_dir"]
    each = [str(folder / f"fold-{fold}") for fold in FOLDS]
    for name, models in (("published", [MODEL_ID, "--folds"]), ("local", [str(folder), "--folds"]), ("each", each)):
        done = run_python([*predict, name, "--model", *models], cwd=tmp_path, env=hub.environment())
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("averages 3 models: " in done.stdout) is ("--folds" in models)
    expected = (tmp_path / "each" / "submission.csv").read_bytes()
    assert all((tmp_path / name / "submission.csv").read_bytes() == expected for name in ("published", "local"))

    published = {path for path in api.list_repo_files(MODEL_ID) if not path.startswith(".")}
    assert published == {
        "README.md", "cases.png", "config.json", "learning_curve.png", "model.safetensors", "oof_scores.csv",
        "preprocessor_config.json", "run.json",
    }  # fmt: skip


def test_two_cross_validations_are_compared_over_the_same_patients(
    trained: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    # In the baseline, the predictions of fold 1 overlap with nothing, so their Dice is 0.
    path, missed = other / "fold-1" / "scans.json", 0.0
    record = json.loads(path.read_text())
    for scan in record["eval"]:
        missed += sum(scan["dice_sums"])
        scan["dice_sums"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(record))
    numbers = [
        number
        for fold in FOLDS
        for scan in json.loads((other / f"fold-{fold}" / "scans.json").read_text())["eval"]
        for number in scan["dice_numbers"]
    ]
    folder = Path(shutil.copytree(trained, tmp_path / "cv"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("fold-*/config.json")}
    cross_validate.main(words(recipe, folder, "--collect", "--baseline", str(other)))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is finished is not written again"
    dice = read_facts(folder)["scores"]["eval_dice"]
    gain = missed / sum(numbers)
    printed = capsys.readouterr().out
    assert f"dice: {dice - gain:.4f} to {dice:.4f}, gain +{gain:.4f} [" in printed
    assert re.search(r"hausdorff_score: (0\.\d{4}) to \1, gain \+0\.0000", printed)


def collect(recipe: Path, folder: Path) -> str:
    """Return the message with which `--collect` refuses a folder."""
    before = sorted(path for path in folder.glob("*") if path.is_file())
    with pytest.raises(InputError) as caught:
        cross_validate.main(words(recipe, folder, "--collect"))
    assert sorted(path for path in folder.glob("*") if path.is_file()) == before
    return str(caught.value)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The folds of a cross-validation, which a test may damage; not pooled yet."""
    for fold in FOLDS:
        shutil.copytree(trained / f"fold-{fold}", tmp_path / "cv" / f"fold-{fold}")
    return tmp_path / "cv"


def change_facts(folder: Path, **facts: Any) -> None:
    (folder / "run.json").write_text(json.dumps({**read_facts(folder), **facts}))


@pytest.mark.parametrize("text", ["", '{"model_type": "segf', "[]"])
def test_a_damaged_configuration_is_named_with_the_copy_that_replaces_it(
    text: str, recipe: Path, copied: Path
) -> None:
    path = copied / "fold-1" / "config.json"
    copy = path.parent / f"checkpoint-{read_facts(path.parent)['best_step']}" / "config.json"
    path.write_text(text)
    assert re.search(rf"{path}: expected .*; copy {copy} there$", collect(recipe, copied))
    shutil.rmtree(copy.parent)
    assert collect(recipe, copied).endswith(f"; remove {path.parent / 'run.json'}, and train this fold again")


def test_a_missing_fold_is_named(recipe: Path, copied: Path) -> None:
    shutil.rmtree(copied / "fold-1")
    assert collect(recipe, copied).startswith("fold 1: expected a finished training in")


@pytest.mark.parametrize(
    ("name", "value"), [("dataset_fingerprint", "f" * 64), ("competition_preset", "first_place"), ("image_size", 96)]
)
def test_folds_that_do_not_belong_together_are_refused(recipe: Path, copied: Path, name: str, value: Any) -> None:
    change_facts(copied / "fold-2", **{name: value})
    assert f"fold-2 has {name} {value}, but" in collect(recipe, copied)


def test_trainings_on_another_dataset_are_refused(recipe: Path, copied: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "kaggle", num_cases=3, days_per_case=1, slices_per_scan=3, seed=1, num_proc=1)
    build(tmp_path / "kaggle", tmp_path / "other", GiTractConfig(num_folds=len(FOLDS)), num_proc=1)
    with pytest.raises(InputError, match="the folds were trained on another dataset"):
        cross_validate.main(words(recipe, copied, "--collect", "--", "--dataset_name", str(tmp_path / "other")))
    # Nothing is half-written.
    assert not [path for path in copied.iterdir() if path.is_file()]


def test_a_patient_in_two_folds_is_refused(recipe: Path, copied: Path) -> None:
    shutil.copyfile(copied / "fold-0" / "scans.json", copied / "fold-1" / "scans.json")
    assert re.search(r"patient \d+ was held back by fold 0 and by fold 1", collect(recipe, copied))


def test_a_fold_in_the_folder_of_another_one_is_refused(recipe: Path, copied: Path) -> None:
    shutil.rmtree(copied / "fold-1")
    shutil.copytree(copied / "fold-0", copied / "fold-1")
    assert "expected the training that held back fold 1, but it is one with --fold 0" in collect(recipe, copied)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fold", "7"], "--fold 7: the dataset has the folds 0, 1, 2"),
        (["--fold", "0", "--collect"], "--fold trains one fold and pools nothing"),
        (["--", "--fold", "1"], "--fold after --: this flag belongs to this command itself"),
        (["--", "--imge_size", "64"], "unknown argument --imge_size"),
        (["--baseline", "nowhere"], "fold 0: expected a finished training in nowhere"),
    ],
)
def test_wrong_flags_are_refused_before_any_training(
    recipe: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        cross_validate.main(words(recipe, tmp_path / "cv", *more))
    assert not (tmp_path / "cv").exists()


def test_the_folder_of_a_single_training_is_refused(recipe: Path, trained: Path) -> None:
    with pytest.raises(InputError, match="holds a single training"):
        cross_validate.main(words(recipe, trained / "fold-0", "--collect"))


def test_a_training_that_fails_ends_with_the_end_of_its_log(recipe: Path, tmp_path: Path) -> None:
    flags = ["--fold", "0", "--", "--model_name_or_path", str(tmp_path / "nowhere")]
    with pytest.raises(InputError, match=r"fold 0: the training ended with status \d") as caught:
        cross_validate.main(words(recipe, tmp_path / "cv", *flags))
    assert str(tmp_path / "nowhere") in str(caught.value).splitlines()[-2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "has no folders or branches fold-0, fold-1"),
        (["--revision", "main"], "--folds takes all folds of one --model"),
    ],
)
def test_predicting_with_folds_needs_folds(
    trained: Path, kaggle_dir: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    words = ["--model", str(trained / "fold-0"), "--folds", "--input", str(kaggle_dir), "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match=re.escape(message)):
        predict.main([*words, *more])
