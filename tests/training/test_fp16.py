"""Training in fp16, as `accelerate launch --mixed_precision fp16` does on a GPU without bfloat16.

`accelerate` refuses fp16 on a CPU. So these tests give it what it has on a GPU: autocast to fp16, and PyTorch's own
scaler of the loss, which works on a CPU.
"""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainerCallback

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import StoppedError
from gi_segmentation.labels import GI_TRACT, LabelMode
from gi_segmentation.models.heads import all_logits, return_auxiliary_logits
from gi_segmentation.models.loading import load_model
from gi_segmentation.training.checkpoints import TRAINING_WEIGHTS, find_last_checkpoint
from gi_segmentation.training.losses import dice_cross_entropy_loss
from gi_segmentation.training.trainer import SegmentationTrainer, train
from tests.support.models import FAMILIES, SIZE
from tests.support.training import arguments, assert_same_end, make_trainer

FLAGS = {"ema_decay": 0.9, "save_total_limit": 10, "cache_slices": False}
# The loss is multiplied by so much. The numbers of fp16 end at 65,504.
TOO_LARGE, USUAL = 2.0**50, 2.0**10


class Watch(TrainerCallback):
    """Notes the weights, the averaged weights and the learning rate after each step."""

    def __init__(self, trainer: SegmentationTrainer) -> None:
        self.trainer = trainer
        self.weights: list[torch.Tensor] = []
        self.averages: list[torch.Tensor] = []
        self.rates: list[float] = []

    def note(self) -> None:
        average, name = self.trainer.average, "decode_head.classifier.weight"
        assert average is not None
        self.weights.append(self.trainer.model.state_dict()[name].clone())
        self.averages.append(average.module.state_dict()[name].clone())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.note()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
        assert self.trainer.average is not None
        assert int(self.trainer.average.n_averaged) == state.global_step


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[SegmentationTrainer, float], Watch]:
    """A function that lets a trainer compute in fp16, with a loss times a number, and returns what it does."""

    def scale(trainer: SegmentationTrainer, factor: float) -> Watch:
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        # Half as large after each overflow, as on a GPU, would need too many steps for a test.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor, backoff_factor=2.0**-20)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        return watch

    return scale


Scale = Callable[[SegmentationTrainer, float], Watch]


def test_steps_that_overflow_are_left_out_and_the_training_goes_on(
    dataset_dir: Path, tmp_path: Path, scaled: Scale
) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path / "run", **FLAGS))
    watch = scaled(trainer, TOO_LARGE)
    # The loss itself is finite, so `check_loss` does not end the run.
    train(trainer)
    changed = [not torch.equal(one, other) for one, other in pairwise(watch.weights)]
    assert changed == [False, False, True, True]
    assert [not torch.equal(one, other) for one, other in pairwise(watch.averages)] == changed
    # The schedule counts all steps, so it ends where it should.
    assert watch.rates == pytest.approx([0.0075, 0.005, 0.0025, 0])
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [math.isfinite(norm) for norm in norms] == changed
    last = find_last_checkpoint(tmp_path / "run")
    assert last is not None and all(tensor.isfinite().all() for tensor in load_file(last / TRAINING_WEIGHTS).values())


def test_an_interrupted_training_goes_on_with_the_same_scale(dataset_dir: Path, tmp_path: Path, scaled: Scale) -> None:
    whole, _ = make_trainer(arguments(dataset_dir, tmp_path / "whole", **FLAGS))
    scaled(whole, TOO_LARGE)
    train(whole)
    words = arguments(dataset_dir, tmp_path / "run", **FLAGS, max_hours=1e-6)
    for _ in range(4):
        part, _ = make_trainer(words)
        scaled(part, TOO_LARGE)
        with pytest.raises(StoppedError):
            train(part)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_gradients_are_clipped_in_their_own_size(dataset_dir: Path, tmp_path: Path, scaled: Scale) -> None:
    norms, weights = {}, {}
    for factor in (None, USUAL):
        settings = FLAGS | {"max_steps": 1, "max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 1}
        trainer, _ = make_trainer(arguments(dataset_dir, tmp_path / str(factor), **settings))
        start = trainer.model.decode_head.classifier.weight.detach().clone()
        if factor is not None:
            scaled(trainer, factor)
        train(trainer)
        norms[factor] = next(one["grad_norm"] for one in trainer.state.log_history if "grad_norm" in one)
        checkpoint = load_file(tmp_path / str(factor) / "checkpoint-1" / TRAINING_WEIGHTS)
        weights[factor] = checkpoint["decode_head.classifier.weight"] - start
    assert norms[USUAL] == pytest.approx(norms[None], rel=0.02)
    assert torch.allclose(weights[USUAL], weights[None], rtol=0.05, atol=1e-5) and weights[None].abs().max() > 1e-4


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_the_sums_of_the_loss_do_not_end_at_65504(label_mode: LabelMode) -> None:
    # 800,000 pixels, almost all of them of one organ: its sum is far beyond the largest number of fp16.
    generator = torch.Generator().manual_seed(0)
    channels = 4 if label_mode == "multiclass" else 3
    logits = torch.randn(2, channels, 640, 640, generator=generator).half()
    labels = torch.ones((2, 640, 640) if label_mode == "multiclass" else (2, 3, 640, 640), dtype=torch.long)
    logits.requires_grad_()
    loss = dice_cross_entropy_loss(logits, labels, label_mode)
    exact = dice_cross_entropy_loss(logits.detach().float(), labels, label_mode)
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), exact)
    (USUAL * loss).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.any()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_has_a_finite_loss_and_finite_gradients(family: str) -> None:
    torch.manual_seed(0)
    model_args = ModelArguments(model_type=family, config_overrides=json.dumps(FAMILIES[family]))
    model, _, _ = load_model(model_args, GI_TRACT, SIZE)
    return_auxiliary_logits(model)
    model.train()
    labels = torch.randint(4, (2, SIZE, SIZE))
    with torch.autocast("cpu", torch.float16):
        # Slices are normalised, so almost all pixels lie between these numbers.
        outputs = model(pixel_values=torch.rand(2, 3, SIZE, SIZE) * 6 - 3)
    every = [dice_cross_entropy_loss(logits, labels, "multiclass") for logits in all_logits(outputs)]
    loss = torch.stack(every).sum()
    assert loss.isfinite()
    (USUAL * loss).backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
