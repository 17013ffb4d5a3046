"""Training: the best checkpoint is the best one, and a resumed run is an uninterrupted one."""

import json
import shutil
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from tiny_models import FAMILIES
from transformers import AutoModelForSemanticSegmentation

import run_segmentation
from gi_segmentation.arguments import parse_arguments
from gi_segmentation.augmentation import build_augmentation
from gi_segmentation.data import collate, load_slices, transform_splits
from gi_segmentation.errors import InputError
from gi_segmentation.modeling import load_model
from gi_segmentation.trainer import SegmentationTrainer, build_trainer, find_checkpoint, train


def arguments(dataset_dir: Path, output_dir: Path, family: str = "segformer", **flags: Any) -> list[str]:
    settings = {
        "model_type": family,
        "config_overrides": json.dumps(FAMILIES[family]),
        "dataset_name": dataset_dir,
        "output_dir": output_dir,
        "image_size": 64,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "dataloader_num_workers": 0,
        "max_eval_samples": 8,
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    return [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]


def make_trainer(argv: list[str]) -> tuple[SegmentationTrainer, DatasetDict]:
    model_args, data_args, run_args = parse_arguments(argv)
    slices = load_slices(data_args, run_args.seed)
    torch.manual_seed(run_args.seed)
    model, processor = load_model(model_args, data_args.image_size)
    splits = transform_splits(slices, processor, build_augmentation(), run_args.seed)
    return build_trainer(model, processor, *splits, run_args), slices


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def give_scores(trainer: SegmentationTrainer, scores: Iterator[float]) -> None:
    """Let the evaluations during training have these Dice values, so that it is known which is the best."""
    count = trainer.compute_metrics

    def scripted(prediction: Any, compute_result: bool) -> dict[str, float]:
        counted = count(prediction, compute_result)  # type: ignore[misc, call-arg]
        return {**counted, "dice": next(scores)} if compute_result and trainer.is_in_train else counted

    trainer.compute_metrics = scripted  # type: ignore[assignment]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_checkpoint_is_what_the_trainer_ends_with(family: str, dataset_dir: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, family))
    give_scores(trainer, iter([0.2, 0.9, 0.4, 0.3]))
    trained: dict[str, torch.Tensor] = {}
    save = trainer.save_model

    def keep(output_dir: str | None = None, _internal_call: bool = False) -> None:
        if trainer.state.global_step == 2:
            trained.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        save(output_dir, _internal_call)

    trainer.save_model = keep  # type: ignore[method-assign]
    train(trainer)
    assert trainer.state.best_global_step == 2
    assert_same_tensors(trained, trainer.model.state_dict())
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_tensors(reloaded.state_dict(), trainer.model.state_dict())
    last = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert any(not torch.equal(last[name], tensor) for name, tensor in trained.items())


def test_output_dir_holds_the_checkpoint_with_the_highest_dice(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path, save_total_limit=10, learning_rate=1e-4))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    dice = {entry["step"]: entry["eval_dice"] for entry in state["log_history"] if "eval_dice" in entry}
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["scores"]["eval_dice"] == max(dice.values()) > 0
    assert dice[facts["best_step"]] == max(dice.values())
    best = tmp_path / f"checkpoint-{facts['best_step']}"
    assert (tmp_path / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(dataset_dir: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"max_steps": 7, "save_total_limit": 10, "eval_steps": 7, "save_steps": 1}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "max_train_samples": 8, "num_train_epochs": 3}
    settings |= {"max_steps": -1, "eval_steps": None, "save_steps": None}
    run_segmentation.main(arguments(dataset_dir, whole, **settings))
    resumed.mkdir()
    shutil.copy(whole / "run.json", resumed)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    (resumed / "checkpoint-4" / "trainer_state.json").unlink()  # cut off while it was saved
    run_segmentation.main(arguments(dataset_dir, resumed, **settings))
    for name in ("checkpoint-4", "checkpoint-6"):
        assert_same_tensors(
            load_file(whole / name / "model.safetensors"), load_file(resumed / name / "model.safetensors")
        )
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, resumed)]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1]


def test_resuming_within_an_epoch_repeats_the_augmentation(dataset_dir: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"max_train_samples": 16, "max_steps": 4, "save_total_limit": 10}  # four steps are one epoch
    run_segmentation.main(arguments(dataset_dir, whole, **settings))
    resumed.mkdir()
    shutil.copy(whole / "run.json", resumed)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_segmentation.main(arguments(dataset_dir, resumed, **settings))
    assert_same_tensors(
        load_file(whole / "checkpoint-4" / "model.safetensors"),
        load_file(resumed / "checkpoint-4" / "model.safetensors"),
    )


def test_every_epoch_augments_the_slices_anew(dataset_dir: Path, tmp_path: Path) -> None:
    flags = {"max_train_samples": 4, "max_steps": 2, "eval_steps": 2, "save_steps": 2}  # two epochs of one batch
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    seen: list[list[float]] = []

    def collate_and_keep(examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "organ_masks" not in examples[0]:
            seen.append(sorted(example["pixel_values"].sum().item() for example in examples))
        return collate(examples)

    trainer.data_collator = collate_and_keep
    train(trainer)
    first, second = seen
    assert len(first) == 4
    assert set(first).isdisjoint(second)


def test_a_run_that_is_over_only_scores_again(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path))
    first = json.loads((tmp_path / "run.json").read_text())
    run_segmentation.main(arguments(dataset_dir, tmp_path))
    second = json.loads((tmp_path / "run.json").read_text())
    assert second["scores"] == first["scores"]
    assert second["best_step"] == first["best_step"]


def test_early_stopping_stops_and_stays_stopped(dataset_dir: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 20, "early_stopping_patience": 2}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **settings))
    give_scores(trainer, repeat(0.5))
    train(trainer)
    assert trainer.state.global_step == 3  # the first is the best, two more are no better
    again, _ = make_trainer(arguments(dataset_dir, tmp_path, **settings))
    give_scores(again, repeat(0.5))
    train(again)
    assert again.state.global_step <= 4


def test_another_dataset_or_model_does_not_go_on_in_a_run(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path, max_steps=1))
    with pytest.raises(InputError, match="holds a run with dataset_fingerprint"):
        run_segmentation.main(arguments(dataset_dir, tmp_path, max_eval_samples=6))
    with pytest.raises(InputError, match="holds a run with model_type"):
        run_segmentation.main(arguments(dataset_dir, tmp_path, family="beit"))


def test_a_folder_with_something_else_is_left_alone(dataset_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run of ours"):
        run_segmentation.main(arguments(dataset_dir, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_learning_rate_drops_once(dataset_dir: Path, tmp_path: Path) -> None:
    flags = {"lr_scheduler_type": "constant", "lr_drop_at": 0.5}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    train(trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("family", ["upernet", "beit"])
def test_a_last_batch_of_one_slice_is_no_obstacle(family: str, dataset_dir: Path, tmp_path: Path) -> None:
    flags = {"max_train_samples": 5, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "max_eval_samples": 9}
    trainer, slices = make_trainer(arguments(dataset_dir, tmp_path, family, **flags))
    train(trainer)
    assert trainer.state.epoch == 2  # one batch of four each; the fifth slice takes turns
    assert len(slices["validation"]) == 9 == trainer.num_examples(trainer.get_eval_dataloader())


def test_no_whole_checkpoint_means_starting_anew(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": ')
    assert find_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-3").exists()
