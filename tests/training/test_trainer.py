"""Training ends with the best checkpoint, and a resumed run ends with the weights of an uninterrupted one."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import AutoModelForSemanticSegmentation, TrainerCallback

import run_segmentation
from gi_segmentation.errors import InputError
from gi_segmentation.training.checkpoints import seal
from gi_segmentation.training.evaluation import ComputeMetrics
from gi_segmentation.training.losses import dice_cross_entropy_loss
from gi_segmentation.training.trainer import SegmentationTrainer, train
from tests.support.models import FAMILIES, STEADY, save_model
from tests.support.training import arguments, freeze_batch_norm, make_trainer, weights_after


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def give_scores(trainer: SegmentationTrainer, scores: Iterator[float]) -> None:
    """Replace the Dice of each evaluation during training, so that a test knows which checkpoint is the best."""

    class Scripted(ComputeMetrics):
        def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
            found = super().__call__(prediction, compute_result)
            return {**found, "dice": next(scores)} if compute_result and trainer.is_in_train else found

    trainer.compute_metrics.__class__ = Scripted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_ends_with_the_weights_of_the_best_checkpoint(
    family: str, dataset_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, family))
    give_scores(trainer, iter([0.2, 0.9, 0.4, 0.3]))
    trained: dict[str, torch.Tensor] = {}
    save = trainer.save_model

    def keep(output_dir: str | None = None, _internal_call: bool = False) -> None:
        if trainer.state.global_step == 2:
            tensors = trainer.model.state_dict()
            trained.update({name: tensors[name].clone() for name in tensors if not name.startswith("auxiliary_head")})
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


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(dataset_dir: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"max_steps": 7, "save_total_limit": 10, "eval_steps": 7, "save_steps": 1}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "max_train_samples": 8, "num_train_epochs": 3}
    settings |= {"max_steps": -1, "eval_steps": None, "save_steps": None}
    run_segmentation.main(arguments(dataset_dir, whole, **settings))
    resumed.mkdir()
    shutil.copy(whole / "run.json", resumed)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    # A checkpoint without its state was interrupted while it was saved. The run must continue from checkpoint 2.
    (resumed / "checkpoint-4" / "trainer_state.json").unlink()
    run_segmentation.main(arguments(dataset_dir, resumed, **settings))
    for name in ("checkpoint-4", "checkpoint-6"):
        assert_same_tensors(
            load_file(whole / name / "model.safetensors"), load_file(resumed / name / "model.safetensors")
        )
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, resumed)]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "flags",
    [
        {"family": "upernet"},
        {"family": "dpt", "ema_decay": 0.9, "label_mode": "multilabel", "slice_context": 1},
        {"slice_sampling": "balanced", "head_lr_multiplier": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"streaming": True, "dataloader_num_workers": 2},
    ],
    ids=["auxiliary head", "averaged", "balanced", "accumulated", "streamed"],
)
def test_a_run_resumed_within_an_epoch_draws_the_same_random_numbers(
    flags: dict[str, Any], dataset_dir: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    # 16 slices in batches of 4 are four steps, so step 2 is in the middle of the first epoch.
    settings = {"max_train_samples": 16, "max_steps": 4, "save_total_limit": 10, **flags}
    run_segmentation.main(arguments(dataset_dir, whole, **settings))
    resumed.mkdir()
    shutil.copy(whole / "run.json", resumed)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_segmentation.main(arguments(dataset_dir, resumed, **settings))
    for path in (whole / "checkpoint-4").glob("*.safetensors"):
        assert_same_tensors(load_file(path), load_file(resumed / "checkpoint-4" / path.name))


def test_every_epoch_augments_the_slices_differently(dataset_dir: Path, tmp_path: Path) -> None:
    # Four slices in one batch, so each of the two steps is an epoch.
    flags = {"max_train_samples": 4, "max_steps": 2, "eval_steps": 2, "save_steps": 2}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    seen: list[list[float]] = []

    def collate_and_keep(examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "slice_id" not in examples[0]:
            seen.append(sorted(example["images"].float().sum().item() for example in examples))
        return default_collate(examples)

    trainer.data_collator = collate_and_keep
    train(trainer)
    first, second = seen
    assert len(first) == 4
    assert set(first).isdisjoint(second)


def test_a_finished_run_is_only_scored_again(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path))
    first = json.loads((tmp_path / "run.json").read_text())
    checkpoints = {path.name for path in tmp_path.glob("checkpoint-*")}
    run_segmentation.main(arguments(dataset_dir, tmp_path))
    second = json.loads((tmp_path / "run.json").read_text())
    assert second["scores"] == first["scores"]
    assert (second["best_step"], second["steps"]) == (first["best_step"], 4)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == checkpoints


def test_early_stopping_stops_and_stays_stopped(dataset_dir: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 20, "early_stopping_patience": 2}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **settings))
    give_scores(trainer, repeat(0.5))
    train(trainer)
    # The first evaluation is the best. Two more are not better, which is the patience.
    assert trainer.state.global_step == 3
    again, _ = make_trainer(arguments(dataset_dir, tmp_path, **settings))
    give_scores(again, repeat(0.5))
    train(again)
    assert again.state.global_step == 3


def test_a_run_does_not_continue_with_another_dataset_or_model(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path, max_steps=1))
    with pytest.raises(InputError, match="holds a run with splits"):
        run_segmentation.main(arguments(dataset_dir, tmp_path, max_eval_samples=6))
    with pytest.raises(InputError, match="holds a run with model_type"):
        run_segmentation.main(arguments(dataset_dir, tmp_path, family="beit"))


def test_an_output_dir_with_other_files_is_refused_and_not_changed(dataset_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run of ours"):
        run_segmentation.main(arguments(dataset_dir, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_lr_drop_at_divides_the_learning_rate_by_ten_once(dataset_dir: Path, tmp_path: Path) -> None:
    flags = {"lr_scheduler_type": "constant", "lr_drop_at": 0.5}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    train(trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("family", ["upernet", "beit"])
def test_a_last_batch_of_one_slice_is_left_out_of_training_but_scored(
    family: str, dataset_dir: Path, tmp_path: Path
) -> None:
    flags = {"max_train_samples": 5, "max_steps": 2, "eval_steps": 2, "save_steps": 2, "max_eval_samples": 9}
    trainer, slices = make_trainer(arguments(dataset_dir, tmp_path, family, **flags))
    train(trainer)
    # Batch normalisation cannot use a batch of one slice. So an epoch has one batch of four of the five slices, and
    # the slice that is left out is another one in each epoch.
    assert trainer.state.epoch == 2
    assert len(slices["validation"]) == 9 == trainer.num_examples(trainer.get_eval_dataloader())


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_gradient_checkpointing_does_not_change_the_weights(
    label_mode: str, dataset_dir: Path, tmp_path: Path
) -> None:
    flags = {"label_mode": label_mode, "learning_rate": 0.5, "optim": "sgd"}
    kept = weights_after(dataset_dir, tmp_path / "kept", 2, steps=3, **flags)
    recomputed = weights_after(dataset_dir, tmp_path / "recomputed", 2, steps=3, gradient_checkpointing=True, **flags)
    for tensor in kept:
        torch.testing.assert_close(recomputed[tensor], kept[tensor], atol=2e-5, rtol=1e-4)


def batch_losses(trainer: SegmentationTrainer, batch_size: int) -> torch.Tensor:
    """Return the losses of the first four slices in batches of a size, without dropout and with running statistics."""
    model, losses = trainer.model.eval(), []
    for start in range(0, 4, batch_size):
        batch = default_collate([trainer.train_dataset[index] for index in range(start, start + batch_size)])
        pixel_values, labels = trainer.transform.to_model(batch)
        losses.append(dice_cross_entropy_loss(model(pixel_values=pixel_values).logits, labels, trainer.label_mode))
    return torch.stack(losses)


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
# Four slices in four accumulated batches, or in one batch.
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_step_follows_the_mean_loss_of_its_batches(
    batch_size: int, label_mode: str, dataset_dir: Path, tmp_path: Path
) -> None:
    flags = {"label_mode": label_mode, "learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0, "weight_decay": 0}
    flags |= {"max_train_samples": 4, "augmentation": False, "max_steps": 1, "config_overrides": json.dumps(STEADY)}
    flags |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    freeze_batch_norm(trainer.model)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    expected = batch_losses(trainer, batch_size)
    expected.mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    train(trainer)
    (logged,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(expected.mean().item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.5 * gradients[name], atol=2e-5, rtol=1e-4)
    # Accumulated batches are not pooled: the same slices in one batch have another loss. Without this difference, the
    # test could not tell the two apart.
    if batch_size == 1:
        assert abs(batch_losses(trainer, 4).mean().item() - batch_losses(trainer, 1).mean().item()) > 1e-3


def test_averaged_weights_are_scored_saved_and_kept(dataset_dir: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, ema_decay=0.25, save_total_limit=10))
    raw: list[dict[str, torch.Tensor]] = []
    scored: list[dict[str, torch.Tensor]] = []
    evaluation_loop = trainer.evaluation_loop

    def keep(*args: Any, **kwargs: Any) -> Any:
        scored.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return evaluation_loop(*args, **kwargs)

    class KeepRaw(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raw.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    trainer.evaluation_loop = keep  # type: ignore[method-assign]
    trainer.add_callback(KeepRaw())
    train(trainer)
    name = "decode_head.classifier.weight"
    average = raw[0][name]
    for step, tensors in enumerate(raw[1:], start=1):
        # The decay starts low and grows to its final value: 2/11, and then 3/12 = 0.25.
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * tensors[name]
        torch.testing.assert_close(scored[step][name], average)
        saved = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / f"checkpoint-{step + 1}").state_dict()
        assert_same_tensors(saved, scored[step])
        kept = load_file(tmp_path / f"checkpoint-{step + 1}" / "training_weights.safetensors")
        assert torch.equal(kept[name], tensors[name]) and not torch.equal(kept[name], average)
    best = trainer.state.best_global_step
    assert_same_tensors(trainer.model.state_dict(), scored[best - 1])
    # After the training, the best checkpoint is scored once more.
    assert_same_tensors(scored[-1], scored[best - 1])


def test_an_auxiliary_head_is_trained_and_not_published(dataset_dir: Path, tmp_path: Path) -> None:
    run_segmentation.main(arguments(dataset_dir, tmp_path, "upernet", save_total_limit=10))
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "training_weights.safetensors") for step in (1, 4))
    moved = [name for name in first if "auxiliary_head" in name and not torch.equal(first[name], last[name])]
    assert "auxiliary_head.classifier.weight" in moved and "auxiliary_head.convs.0.conv.weight" in moved
    published = load_file(tmp_path / "model.safetensors")
    assert set(published) == {name for name in first if not name.startswith("auxiliary_head")}
    assert json.loads((tmp_path / "config.json").read_text())["use_auxiliary_head"] is False


def test_the_head_has_its_own_learning_rate_and_biases_and_norms_have_no_decay(
    dataset_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, head_lr_multiplier=10, weight_decay=0.5))
    optimizer = trainer.create_optimizer()
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        rate, decay = settings[id(parameter)]
        assert rate == pytest.approx(0.01 if name.startswith("segformer.") else 0.1), name
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.5), name


def test_the_learning_rate_warms_up_and_then_falls_in_a_straight_line(dataset_dir: Path, tmp_path: Path) -> None:
    kwargs = json.dumps({"power": 1.0, "lr_end": 0.0})
    flags = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": kwargs, "warmup_steps": 0.4, "max_steps": 5}
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, head_lr_multiplier=2, **flags))
    train(trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    # 40 % of 5 steps are 2 steps of warm-up: 0, 1/2 and 1 of the rate. Then it falls in a straight line to 0 at step
    # 5. The log has the rate of the first group, the encoder, which the multiplier does not change.
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])


@pytest.mark.parametrize("learning_rate", [1e4, 1e30])
def test_an_exploding_loss_stops_the_run(learning_rate: float, dataset_dir: Path, tmp_path: Path) -> None:
    words = arguments(dataset_dir, tmp_path, max_steps=6, save_total_limit=10)
    run_segmentation.main(words)
    for step in range(2, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    # The run continues from checkpoint 1. A checkpoint keeps its learning rate, so the large rate must be written into
    # it.
    state = tmp_path / "checkpoint-1" / "optimizer.pt"
    optimizer = torch.load(state)
    for group in optimizer["param_groups"]:
        group["lr"] = group["initial_lr"] = learning_rate
    torch.save(optimizer, state)
    scheduler = torch.load(tmp_path / "checkpoint-1" / "scheduler.pt")
    scheduler["base_lrs"] = [learning_rate] * len(scheduler["base_lrs"])
    torch.save(scheduler, tmp_path / "checkpoint-1" / "scheduler.pt")
    seal(tmp_path / "checkpoint-1")
    with pytest.raises(InputError) as caught:
        run_segmentation.main(words)
    message = str(caught.value)
    assert re.search(r"the loss became (nan|inf|[\d.e+]+) at step [3-6] \(learning rate ", message), message
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-1'};" in message
    assert "lower --learning_rate" in message


def test_flips_at_test_time_are_reported_with_their_gain(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", "segformer", seed=0)
    flags = {"model_type": None, "config_overrides": None, "model_name_or_path": base, "max_steps": 1}
    words = arguments(dataset_dir, tmp_path / "run", test_time_flips=True, learning_rate=1e-6, **flags)
    run_segmentation.main([*words, "--max_eval_samples", "24"])
    scores = json.loads((tmp_path / "run" / "run.json").read_text())["scores"]
    assert 0 < scores["eval_flips_dice"] != scores["eval_dice"]
    gain = f"averaged over four flips of the slice ({scores['eval_flips_dice'] - scores['eval_dice']:+.4f})"
    assert gain in capsys.readouterr().out and gain in (tmp_path / "run" / "README.md").read_text()


def test_fold_all_trains_on_everybody_and_says_that_nothing_was_held_back(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The dataset has 2 patients in each split, with 12 slices each.
    words = arguments(
        dataset_dir, tmp_path / "run", fold="all", max_eval_samples=None, max_steps=3, test_time_flips=True
    )
    run_segmentation.main(words)
    assert "trained on all 4 patients. Nothing was held back, so nothing was scored." in capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["fold"], facts["best_step"], facts["scores"]) == ("all", 3, {})
    assert {split: counts["patients"] for split, counts in facts["splits"].items()} == {"train": 4, "validation": 0}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Nothing was held back: the model was trained on all 4 synthetic patients." in card
    assert "model-index" not in card and "unseen" not in card
    last = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run" / "checkpoint-3").state_dict()
    published = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in published.items())
