"""Short trainings for tests: flags, a trainer, and the weights at the end."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict

from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import load_slices, select_samples, transform_splits
from gi_segmentation.labels import find_labels
from gi_segmentation.models.loading import load_model
from gi_segmentation.training.checkpoints import find_last_checkpoint
from gi_segmentation.training.trainer import SegmentationTrainer, build_trainer, train
from tests.support.models import FAMILIES, STEADY


def arguments(dataset_dir: Path, output_dir: Path, family: str = "segformer", **flags: Any) -> list[str]:
    """Return the words of the command line for a training of a few steps. A flag of None is left out."""
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
        "warmup_steps": 0,
        "head_lr_multiplier": 1,
        "ema_decay": 0,
        "slice_sampling": "all",
        "dataloader_num_workers": 0,
        "max_eval_samples": 8,
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    return [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]


def make_trainer(argv: list[str]) -> tuple[SegmentationTrainer, DatasetDict]:
    """Make a trainer by the stages of `run_segmentation.py`, and return it with the selected slices."""
    model_args, data_args, run_args = parse_arguments(argv)
    slices = load_slices(data_args)
    samples = select_samples(slices, data_args, run_args.seed)
    torch.manual_seed(run_args.seed)
    labels = find_labels(slices["train"].features)
    model, processor, _ = load_model(model_args, labels, data_args.image_size, data_args.slice_context)
    splits = transform_splits(slices, samples, processor, model_args, data_args, run_args.seed)
    return build_trainer(model, processor, *splits, data_args, run_args), samples


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Use running statistics in batch normalisation. Those of a batch would depend on the division into batches."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
            torch.nn.Module.train(module, False)


def train_steadily(argv: list[str]) -> tuple[SegmentationTrainer, list[float], dict[str, float]]:
    """Train with frozen batch normalisation, and return the trainer, the loss of each step and the final scores."""
    trainer, _ = make_trainer(argv)
    freeze_batch_norm(trainer.model)
    evaluation = train(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    times = re.compile("runtime|per_second|preparation_time|epoch")
    return trainer, losses, {key: value for key, value in evaluation.scores.items() if not times.search(key)}


def weights_after(dataset_dir: Path, output_dir: Path, batch_size: int, steps: int, **flags: Any) -> dict[str, Any]:
    """Train a few steps of four slices, divided into batches of a size, and return the weights."""
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size, **flags}
    settings |= {"config_overrides": json.dumps(STEADY), "eval_steps": steps, "save_steps": steps}
    trainer, _, _ = train_steadily(arguments(dataset_dir, output_dir, max_steps=steps, **settings))
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_end(left: Path, right: Path) -> None:
    """Check that the last checkpoints of two runs are the same, bit by bit, and with them all scores."""
    last = find_last_checkpoint(left)
    assert last is not None and find_last_checkpoint(right) == right / last.name
    ends = [last, right / last.name]
    for name in ("model.safetensors", "training_weights.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(end / name) for end in ends)
        assert str(one) == str(other), name
    states = [json.loads((end / "trainer_state.json").read_text()) for end in ends]
    scores = [
        [(one["step"], one["eval_dice"]) for one in state["log_history"] if "eval_dice" in one] for state in states
    ]
    assert scores[0] == scores[1]
    for key in ("best_global_step", "best_metric", "stateful_callbacks"):
        assert states[0][key] == states[1][key], key
