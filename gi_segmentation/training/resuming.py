"""Which arguments must stay the same when a run goes on from its checkpoints, and what differs from an earlier start.

Every argument decides the weights, unless this file or its section of the help says that it does not. So a new
argument is compared by default.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gi_segmentation.arguments import PUBLISHING, SCORING, DataArguments, ModelArguments, RunArguments
from gi_segmentation.formats.algorithm import hash_weights
from gi_segmentation.models.random import parse_overrides

logger = logging.getLogger(__name__)

# Flags of these sections describe the model, or score it. They never change its weights.
FREE_SECTIONS = (PUBLISHING["group"], SCORING["group"])
# Arguments of a single start: how it computes the steps, or how long it goes on. They may change. `run.json` says
# which steps were made with which of them.
START_ARGUMENTS = {
    "early_stopping_patience": "ends a run sooner or later, and changes no step",
    "gradient_checkpointing": "needs less memory, and computes the same",
    "gradient_checkpointing_kwargs": "as gradient_checkpointing",
    "activation_checkpointing": "as gradient_checkpointing",
    "activation_checkpointing_kwargs": "as gradient_checkpointing",
    "torch_empty_cache_steps": "needs less memory, and computes the same",
    "use_cpu": "the device may change, as the number of processes may",
    "dataloader_num_workers": "the order of the slices does not depend on it, except with --streaming",
}
# Other arguments that may change, and why.
MAY_CHANGE = {
    "output_dir": "is the folder of the run itself",
    "max_hours": "ends a start sooner, and changes no step",
    "dataset_name": "the fingerprint of the slices is compared",
    "dataset_revision": "the fingerprint of the slices is compared",
    "cache_slices": "a slice from the cache has the same pixels",
    "per_device_eval_batch_size": "masks are counted slice by slice",
    "eval_accumulation_steps": "says only when results leave the device",
    "eval_do_concat_batches": "scores are computed batch by batch",
    "save_total_limit": "the best and the last checkpoint stay in any case",
    "save_on_each_node": "makes copies",
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_always_push", "hub_revision", "hub_token", "push_to_hub"),
        "says where to publish",
    ),
    **dict.fromkeys(
        ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
         "log_pictures"),
        "says where to send the log",
    ),
    **dict.fromkeys(
        ("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
         "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
        "says what to print",
    ),
    **dict.fromkeys(
        ("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
         "dataloader_multiprocessing_context"),
        "says how slices travel to the device",
    ),
    **dict.fromkeys(("local_rank", "ddp_backend", "ddp_timeout"), "says how processes find each other"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "is set by accelerate; `check_optimizer` compares it"),
    **dict.fromkeys(("do_train", "do_eval"), "has no effect in this pipeline"),
}  # fmt: skip
# These two and the number of processes make the number of slices in a step. See `find_changes`.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# A change of these changes the learning rate of every step.
LENGTH = ("num_train_epochs", "max_steps")


def list_deciding() -> list[str]:
    """Return the names of all arguments that decide the weights, in the order of the help."""
    return [
        item.name
        for group in (ModelArguments, DataArguments, RunArguments)
        for item in dataclasses.fields(group)
        if item.metadata.get("group") not in FREE_SECTIONS and item.name not in {**START_ARGUMENTS, **MAY_CHANGE}
    ]


def describe_source(name: str) -> str:
    """Return the name of a Hub id; of a folder, the fingerprint of its weights, without its path."""
    return f"a folder with the weights {hash_weights(Path(name))}" if Path(name).is_dir() else name


def describe_deciding(model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments) -> dict[str, Any]:
    """Return the values of all arguments that decide the weights, by name, as JSON has them. No value is a path.

    Args:
        model_args: Arguments of the model.
        data_args: Arguments of the data.
        run_args: Arguments of the training.
    """
    # `to_dict` of `TrainingArguments` writes enumerations and objects as text and dictionaries.
    values = {**vars(model_args), **vars(data_args), **run_args.to_dict()}
    # With --model_type, the model starts from random weights or from --backbone.
    values["model_name_or_path"] = None if model_args.model_type else describe_source(model_args.model_name_or_path)
    values["backbone"] = model_args.backbone and describe_source(model_args.backbone)
    # Two texts may mean the same values.
    values["config_overrides"] = parse_overrides(model_args.config_overrides or "")
    return json.loads(json.dumps({name: values[name] for name in list_deciding()}, default=str))


def find_changes(earlier: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that decide the weights and differ from those of an earlier start.

    Args:
        earlier: The facts of the earlier start, as `run.json` has them.
        facts: Those of this start: `deciding` from `describe_deciding`, `arguments` with the values that are not the
            defaults, and `train_batch_size`; None if the number of processes is not known.

    Returns:
        The value of the earlier start and the value now, by the name of the argument.
    """
    known, now = earlier.get("deciding"), facts["deciding"]
    if not known:
        # An older version wrote only what differs from the defaults, and no names of folders.
        logger.warning(
            "run.json of the earlier start, by an older version of this project, lacks the arguments that had their "
            "defaults; those defaults are assumed to be the same as now"
        )
        known = {name: value for name, value in earlier.get("arguments", {}).items() if name in now}
        if "config_overrides" in known:
            known["config_overrides"] = parse_overrides(known["config_overrides"])
    changes = {name: (known[name], value) for name, value in now.items() if name in known and known[name] != value}
    # An argument that the earlier version did not have, or did not write, had its default.
    new = [name for name in now if name not in known and name in facts["arguments"]]
    changes |= {name: ("its default", now[name]) for name in new}
    if changes.keys() & set(BATCH) and same_batch(earlier, facts):
        changes = {name: change for name, change in changes.items() if name not in BATCH}
    return changes


def same_batch(earlier: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Return whether a step has as many slices as in an earlier start, or may have; arguments as `find_changes`.

    Example:
        >>> deciding = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        >>> now = {"deciding": deciding, "train_batch_size": None}
        >>> same_batch({"train_batch_size": 32}, now), same_batch({"train_batch_size": 4}, now)
        (True, False)
    """
    before, after = earlier.get("train_batch_size", 0), facts["train_batch_size"]
    if after is None:
        # There may be any number of processes.
        after_one = facts["deciding"][BATCH[0]] * facts["deciding"][BATCH[1]]
        return before >= after_one and before % after_one == 0
    return before == after


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return a text for each change of `find_changes`, such as `--seed 1 (here 2)`."""

    def text(value: Any) -> str:
        shown = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
        return shown if len(shown) <= 120 else f"{shown[:120]}..."

    return [f"--{name} {text(before)} (here {text(after)})" for name, (before, after) in changes.items()]


def advise(changes: Mapping[str, tuple[Any, Any]], output_dir: Path) -> str:
    """Return what to do about changes, for the end of a message."""
    advice = "repeat the flags with which this run began, or name another --output_dir for a new run"
    if changes.keys() & set(LENGTH):
        advice += (
            f"; the learning rate of each step depends on the length of the run, so to train longer, start a new run "
            f"with --model_name_or_path and the last checkpoint in {output_dir}"
        )
    if changes.keys() & set(BATCH):
        advice += "; with another number of processes, a step must have as many slices as before"
    return advice
