"""Read the command line of a training: our flags, the flags of the original project, and a recipe."""

import argparse
import json
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.recipe_files import nearest, read_recipe
from gi_segmentation.schema import ALL_FOLDS

# The original project's flags, for users who come from its command line.
ALIASES = {
    "--base_model": "--model_name_or_path",
    "--train_batch_size": "--per_device_train_batch_size",
    "--optimizer": "--optim",
    "--scheduler_name": "--lr_scheduler_type",
    "--epochs": "--num_train_epochs",
    "--lr": "--learning_rate",
}
# The original project's values that have another name here. Its AdamW uses amsgrad. Its MultiStepLR lowers the
# learning rate once, after half of the training.
VALUE_ALIASES = {
    ("--optimizer", "AdamW"): ["--optim", "adamw_torch", "--optim_args", "amsgrad=True"],
    ("--scheduler_name", "MultiStepLR"): ["--lr_scheduler_type", "constant", "--lr_drop_at", "0.5"],
}
# The flag for a checkpoint to start from, and those of a new model in its place.
CHECKPOINT, NEW_MODEL = "--model_name_or_path", ("--model_type", "--backbone", "--config_overrides")
# The sections of `--help` in their order, each with its description.
SECTIONS = {
    "General": None,
    "Model": "The model that the training starts from.",
    "Data": "The slices, and how they are prepared.",
    "Training": "The flags of this pipeline, and the flags of TrainingArguments that have another default here.",
    "Scoring": None,
    "Publishing": "The model card, and the upload of the best checkpoint.",
    "TrainingArguments": "All other flags of transformers.TrainingArguments. Help texts and defaults are those of "
    "transformers.",
    "Fixed": None,  # argparse leaves out a section whose flags are all hidden
}


class RunParser(HfArgumentParser):
    """The parser of `run_segmentation.py`: help in sections, and mistakes as `InputError`."""

    def __init__(self) -> None:
        super().__init__(
            (ModelArguments, DataArguments, RunArguments),  # type: ignore[arg-type]
            prog="run_segmentation.py",
            usage="accelerate launch run_segmentation.py [--config FILE.yaml] [--flag value ...]",
            description="Fine-tune a semantic segmentation model on a dataset, score it, write its model card and "
            "publish it. Each flag that is True by default can be turned off: `--no_augmentation` means "
            "`--augmentation false`. The names of flags may contain dashes in place of underscores.",
            epilog="The flags of the original project work too: "
            + ", ".join(f"{alias} means {flag}" for alias, flag in ALIASES.items())
            + ". Its values `--optimizer AdamW` and `--scheduler_name MultiStepLR` work as well.",
            add_help=False,  # it is added below, because every flag needs a section
            allow_abbrev=False,
        )
        self.add_argument("-h", "--help", action="help", group="General", help="Show this help and exit.")
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            group="General",
            help="A recipe, for example recipes/segformer-b0.yaml. Its keys are flags without the leading dashes. "
            "Flags on the command line win over the recipe.",
        )

    @cached_property
    def sections(self) -> dict[str, Any]:
        """The argument groups by title. All are made at once, because help shows them in the order of creation."""
        return {title: self.add_argument_group(title, description) for title, description in SECTIONS.items()}

    def add_argument(self, *names: str, group: str = "TrainingArguments", **settings: Any) -> argparse.Action:
        """Add a flag to its section.

        `HfArgumentParser` calls this method for each field of the dataclasses and passes the field's metadata as
        keywords. So `group` comes from our fields, and the fields of `TrainingArguments` have none.
        """
        # Help would list each flag twice, with underscores and with dashes. `split_words` accepts the dashes.
        names = tuple(name for name in names if "-" not in name.lstrip("-"))
        if settings.get("action") == "store_false":
            settings["help"] = argparse.SUPPRESS  # `--no_flag`: the description explains these flags once
        return self.sections[group].add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise an error, where argparse would print the usage and exit."""
        raise InputError(f"{message}; --help lists every flag")


def split_words(arguments: list[str]) -> list[str]:
    """Split `--flag=value` into two words, and write flags with underscores.

    Example:
        >>> split_words(["--learning-rate=2e-4", "--run_name", "a-b"])
        ['--learning_rate', '2e-4', '--run_name', 'a-b']
    """
    words: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            flag, *value = word.split("=", 1)
            words += [f"--{flag[2:].replace('-', '_')}", *value]
        else:
            words.append(word)
    return words


def expand_aliases(arguments: list[str]) -> list[str]:
    """Replace the original project's flags and values by ours.

    Example:
        >>> expand_aliases(["--lr", "2e-4", "--scheduler_name", "linear"])
        ['--learning_rate', '2e-4', '--lr_scheduler_type', 'linear']
    """
    expanded: list[str] = []
    words = split_words(arguments)
    while words:
        flag, *rest = words
        if rest and (flag, rest[0]) in VALUE_ALIASES:
            expanded += VALUE_ALIASES[flag, rest[0]]
            words = rest[1:]
        else:
            expanded.append(ALIASES.get(flag, flag))
            words = rest
    return expanded


def replace_start(recipe: list[str], words: list[str]) -> list[str]:
    """Remove the start of the training from a recipe if the command line names a checkpoint to start from.

    A recipe for a new model would else make one, and pass over the checkpoint without a word.

    Args:
        recipe: The words of a recipe.
        words: Those of the command line.

    Example:
        >>> replace_start(["--model_type", "dpt", "--lr", "1"], ["--model_name_or_path", "runs/a"])
        ['--lr', '1']
    """
    named = set(expand_aliases(words))
    if CHECKPOINT not in named or "--model_type" in named:
        return recipe
    kept, keep = [], True
    for word in recipe:
        if word.startswith("--"):
            keep = word not in NEW_MODEL
        if keep:
            kept.append(word)
    return kept


def parse_arguments(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read the command line, and the recipe if there is one.

    Args:
        argv: Command-line words without the program's name; None: those of this process.

    Raises:
        InputError: If a flag or a key is unknown, or a value is not allowed.
    """
    # First only `--config`: the words of the recipe go before the flags, and with argparse the last value wins.
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    recipe_parser.add_argument("--config", type=Path)
    known = [item.name for group in (ModelArguments, DataArguments, RunArguments) for item in fields(group)]
    known += [alias[2:] for alias in ALIASES]
    try:
        first, words = recipe_parser.parse_known_args(argv)
        if {CHECKPOINT, "--model_type"} <= set(expand_aliases(words)):
            raise InputError(f"{CHECKPOINT} and --model_type: the training starts from one of them; leave one out")
        if first.config is not None:
            words = replace_start(read_recipe(first.config, known), words) + words
        *parsed, unknown = RunParser().parse_args_into_dataclasses(
            expand_aliases(words), return_remaining_strings=True, look_for_args_file=False
        )
        model_args, data_args, run_args = parsed[:3]  # a fourth item holds `--config`
        if data_args.fold == ALL_FOLDS:
            run_args.hold_nothing_back()
    except InputError:  # a kind of ValueError, whose message is complete
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"expected JSON, got {error.doc!r} ({error})") from error
    # `transformers` checks its own flags in many ways, and some values end in an arithmetic error.
    except (argparse.ArgumentError, ValueError, TypeError, ImportError, OSError, ArithmeticError) as error:
        raise InputError(one_line(error)) from error
    if unknown and not unknown[0].startswith("-"):
        raise InputError(f"unexpected word {unknown[0]!r}: it belongs to no flag, or its flag takes one value only")
    if unknown:
        raise InputError(f"unknown argument {unknown[0]}{nearest(unknown[0].lstrip('-'), known)}")
    return model_args, data_args, run_args
