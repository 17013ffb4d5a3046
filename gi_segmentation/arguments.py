"""What a run can be told: by flags, by a recipe file, or by the original project's flags."""

import argparse
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from gi_segmentation.errors import InputError
from gi_segmentation.rules import DEFAULT_PRESET, PRESETS, Preset
from gi_segmentation.schema import LabelMode

MIN_IMAGE_SIZE = 32  # pixels; the deepest feature maps have 1/32 of the input's side
SliceSampling: TypeAlias = Literal["all", "balanced"]

# The original project's flags, for whoever comes from its command line.
ALIASES = {
    "--base_model": "--model_name_or_path",
    "--train_batch_size": "--per_device_train_batch_size",
    "--optimizer": "--optim",
    "--scheduler_name": "--lr_scheduler_type",
    "--epochs": "--num_train_epochs",
    "--lr": "--learning_rate",
}
# Its values that go by another name here: AdamW with amsgrad, and one drop of the learning rate half-way.
VALUE_ALIASES = {
    ("--optimizer", "AdamW"): ["--optim", "adamw_torch", "--optim_args", "amsgrad=True"],
    ("--scheduler_name", "MultiStepLR"): ["--lr_scheduler_type", "constant", "--lr_drop_at", "0.5"],
}


def check_at_least(arguments: Any, minima: Mapping[str, float]) -> None:
    """Check numbers that may not be smaller than something.

    Args:
        arguments: An object with the values as attributes; None is always allowed.
        minima: The least allowed value by name.

    Raises:
        ValueError: If one is smaller.
    """
    for name, minimum in minima.items():
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name} must be at least {minimum}, but got {value}")


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(
        default="nvidia/segformer-b0-finetuned-ade-512-512",
        metadata={"help": "Folder or Hub id of a semantic segmentation model to fine-tune. Default: the smallest of "
                          "the original project's table."},
    )  # fmt: skip
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model on the Hub; None: its main branch."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Start from random weights of this family instead: segformer, upernet, dpt, beit, ..."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "With --model_type: values of its configuration, as depths=[2,2,2,2],drop_path_rate=0 or "
                          "as a JSON object."},
    )  # fmt: skip
    label_mode: LabelMode = field(
        default="multiclass",
        metadata={"help": "multiclass: one label per pixel by softmax, works in the stock pipeline; multilabel: each "
                          "organ on its own by sigmoid, overlaps are learnt and predicted."},
    )  # fmt: skip


@dataclass
class DataArguments:
    """Which slices to train on."""

    dataset_name: str = field(
        default="gi_tract", metadata={"help": "Folder that `python -m dataset_builder build` wrote, or a Hub id."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub; None: its main branch."}
    )
    dataset_title: str = field(
        default="UW-Madison GI Tract", metadata={"help": "What the model card calls the data; for data of your own."}
    )
    image_size: int = field(
        default=288, metadata={"help": "Height and width of the model's input. Default: the original project's."}
    )
    slice_context: int = field(
        default=0,
        metadata={"help": "Channels are the slices i-K, i and i+K of the scan, for this K; 0: the slice three times."},
    )
    slice_sampling: SliceSampling = field(
        default="balanced",
        metadata={"help": "all: every slice once an epoch; balanced: as many draws, in which slices without any organ "
                          "and those of each organ come equally often. Default: by trial, benchmarks/README.md."},
    )  # fmt: skip
    augmentation: bool = field(default=True, metadata={"help": "Whether to augment the training slices."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many slices, drawn at random; for trials."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first slices only, this many; for trials."}
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        minima = {"image_size": MIN_IMAGE_SIZE, "slice_context": 0, "max_train_samples": 1, "max_eval_samples": 1}
        check_at_least(self, minima)


@dataclass
class RunArguments(TrainingArguments):
    """How to train: `TrainingArguments` with this task's defaults, and a few of our own.

    Batch size, learning rate, weight decay and epochs are the original project's (see README); what differs was found
    by trial (benchmarks/README.md). The best checkpoint is kept by `eval_dice`.
    """

    output_dir: str = field(default="runs/gi_tract", metadata={"help": "Where checkpoints and results go."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per device for training."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Batch size per device for evaluation."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The highest learning rate, of the encoder."})
    warmup_steps: float = field(
        default=0.05,
        metadata={"help": "Steps in which the learning rate rises to its highest; below 1 a share of all. Default: as "
                          "the recipes."},
    )  # fmt: skip
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of the optimizer."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Epochs to train, if --max_steps is not given."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: epoch or steps."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: as --eval_strategy."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the best and the last."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(default="eval_dice", metadata={"help": "The score of the best."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a greater score is better."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser expects None first
        default_factory=lambda: ["tensorboard"], metadata={"help": "Where to log: tensorboard, wandb, none, ..."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that load slices, per device."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Keep True: early stopping counts on where an interrupted run stopped."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Keep False: a loss that is not finite ends the run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the transform needs them all."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Keep True: scores are counted batch by batch."})
    hub_strategy: str = field(default="end", metadata={"help": "Only `end`: the best checkpoint is pushed, once."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better score; None: never."}
    )
    lr_drop_at: float | None = field(
        default=None,
        metadata={"help": "Multiply the learning rate by 0.1 after this share of the training, 0 to 1; None: never."},
    )
    head_lr_multiplier: float = field(
        default=10.0,
        metadata={"help": "Learning rate of everything behind the encoder, as a multiple of --learning_rate. Default: "
                          "SegFormer's (arXiv 2105.15203); by trial, benchmarks/README.md."},
    )  # fmt: skip
    ema_decay: float = field(
        default=0.999,
        metadata={"help": "Score, keep and publish an exponential moving average of the weights, of this decay a step "
                          "(less at the beginning); 0: the weights themselves. Default: as the competition's "
                          "winners; benchmarks/README.md."},
    )  # fmt: skip
    test_time_flips: bool = field(
        default=False,
        metadata={
            "help": "At the end, score the best checkpoint also with its logits averaged over flipped slices; for "
            "a model trained with flips."
        },
    )
    preset: Preset = field(
        default=DEFAULT_PRESET,
        metadata={"help": "Whose reading of the competition's metric eval_competition_score follows: "
                          f"{' or '.join(PRESETS)}. Default: the public grader's."},
    )  # fmt: skip
    license: str = field(
        default="other", metadata={"help": "Licence on the model card. `other`: non-commercial, as the data's rules."}
    )

    def __post_init__(self) -> None:
        """Check what `TrainingArguments` cannot know."""
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and not torch.cuda.is_available():
            self.use_cpu = True  # else accelerate would not make a group of the processes
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        fixed = {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_dice",
            "greater_is_better": True,
            "remove_unused_columns": False,
            "batch_eval_metrics": True,
            "hub_strategy": "end",
            "save_only_model": False,
            "restore_callback_states_from_checkpoint": True,
            "prediction_loss_only": False,
            "logging_nan_inf_filter": False,
            "dataloader_drop_last": False,  # it would leave out validation slices too
            "label_smoothing_factor": 0.0,
            "do_predict": False,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"--{name} must be {value} in this pipeline, but got {getattr(self, name)}")
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "--resume_from_checkpoint: leave it out; the same command goes on from the last checkpoint in its "
                "--output_dir"
            )
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "early_stopping_patience")
        not_negative = ("learning_rate", "head_lr_multiplier", "weight_decay", "seed")
        check_at_least(self, {**dict.fromkeys(positive, 1), **dict.fromkeys(not_negative, 0)})
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs must be greater than 0, but got {self.num_train_epochs}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, but got {self.ema_decay}")
        if self.lr_drop_at is not None and not 0 < self.lr_drop_at < 1:
            raise ValueError(f"--lr_drop_at must lie between 0 and 1, but got {self.lr_drop_at}")
        if self.lr_drop_at is not None and self.lr_scheduler_type != "constant":
            scheduler = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise ValueError(f"--lr_drop_at needs --lr_scheduler_type constant, but got {scheduler}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id NAMESPACE/NAME")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; at least one is left for what follows, which some schedules divide by."""
        return min(super().get_warmup_steps(num_training_steps), num_training_steps - 1)


class RunParser(HfArgumentParser):
    """A parser that raises `InputError` where argparse would print a page of usage."""

    def __init__(self) -> None:
        super().__init__(
            (ModelArguments, DataArguments, RunArguments),  # type: ignore[arg-type]
            prog="run_segmentation.py",
            description="Fine-tune a semantic segmentation model on gi_tract, score it, write its card, publish it.",
            allow_abbrev=False,
        )
        self.add_argument(
            "--config", metavar="FILE.yaml", help="A recipe: its keys are flags without dashes; flags given here win."
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise InputError(f"{message}; --help lists every flag")


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence on an unknown name: the known one it resembles."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists every flag"


def expand_aliases(arguments: list[str]) -> list[str]:
    """Replace the original project's flags and values by ours.

    Example:
        >>> expand_aliases(["--lr", "2e-4", "--scheduler_name", "linear"])
        ['--learning_rate', '2e-4', '--lr_scheduler_type', 'linear']
    """
    expanded: list[str] = []
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        flag, *rest = words
        if rest and (flag, rest[0]) in VALUE_ALIASES:
            expanded += VALUE_ALIASES[flag, rest[0]]
            words = rest[1:]
        else:
            expanded.append(ALIASES.get(flag, flag))
            words = rest
    return expanded


def read_recipe(path: Path, known: list[str]) -> list[str]:
    """Read a recipe as command-line words.

    Args:
        path: YAML mapping whose keys are flags without dashes.
        known: The flags there are, without dashes.

    Raises:
        InputError: If the file is missing, is no mapping, or has an unknown key or one without a value.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: not a readable YAML file ({error})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path}: expected lines of `flag: value`, got {type(recipe).__name__}")
    words: list[str] = []
    for key, value in recipe.items():
        if key not in known:
            raise InputError(f"--config {path}: unknown key {key!r}{nearest(str(key), known)}")
        if value is None:
            raise InputError(f"--config {path}: {key} has no value; give it one or remove the line")
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return words


def parse_arguments(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read flags and recipe.

    Args:
        argv: Command-line words without the program's name; None takes the process's own.

    Raises:
        InputError: If a flag or key is unknown, or a value is not allowed.
    """
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    recipe_parser.add_argument("--config", type=Path)
    known = [item.name for group in (ModelArguments, DataArguments, RunArguments) for item in fields(group)]
    known += [alias[2:] for alias in ALIASES]
    try:
        first, words = recipe_parser.parse_known_args(argv)
        if first.config is not None:
            words = read_recipe(first.config, known) + words
        *parsed, unknown = RunParser().parse_args_into_dataclasses(
            expand_aliases(words), return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"expected JSON, got {error.doc!r} ({error})") from error
    except (argparse.ArgumentError, ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(str(error)) from error
    if unknown and not unknown[0].startswith("-"):
        raise InputError(f"unexpected word {unknown[0]!r}: it belongs to no flag, or its flag takes one value only")
    if unknown:
        raise InputError(f"unknown argument {unknown[0]}{nearest(unknown[0].lstrip('-'), known)}")
    model_args, data_args, run_args = parsed[:3]
    return model_args, data_args, run_args
