"""The facts of a run, kept in `run.json`: what was trained on what, with what, and how it scored."""

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from gi_segmentation import __version__
from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.errors import InputError
from gi_segmentation.models.loading import count_parameters
from gi_segmentation.schema import ORGANS, hash_splits

RUN_FILE = "run.json"
PACKAGES = ("transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "albumentations", "numpy")
# What must be the same for a run to go on from its checkpoints.
IDENTITY = (
    "base_model", "model_type", "architecture", "image_size", "label_mode", "slice_context", "ema_decay",
    "dataset_fingerprint", "split_hash",
)  # fmt: skip


def git_commit() -> str | None:
    """Commit of this project's working tree, with `-dirty` where it was changed; None outside of git."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def fingerprint_dataset(slices: DatasetDict) -> str:
    """SHA-256 over ids and outlines of all slices: the same on any machine, another when an outline changes."""
    digest = hashlib.sha256()
    for split in sorted(slices):
        columns = slices[split].select_columns(["id", "segmentation"])
        for row in columns:
            outlines = " ".join(f"{organ}:{row['segmentation'][organ]}" for organ in ORGANS)
            digest.update(f"{split} {row['id']} {outlines}\n".encode())
    return digest.hexdigest()


def public_name(name: str) -> str:
    """A Hub id as it is, a local path by its last part: where things lie on somebody's disk is no fact of the run."""
    path = Path(name)
    return path.resolve().name if path.is_dir() or path.is_absolute() or name.startswith(".") else name


def changed_arguments(*arguments: Any) -> dict[str, Any]:
    """The arguments that differ from their defaults, without tokens and without paths of the machine."""
    hidden = {"hub_token", "output_dir", "logging_dir", "local_rank", "dataset_name", "model_name_or_path"}
    changed = {}
    for group in arguments:
        for item in dataclasses.fields(group):
            default = item.default_factory() if callable(item.default_factory) else item.default
            value = getattr(group, item.name)
            value = getattr(value, "value", value)  # enumerations by their value
            if value != default and item.name not in hidden and isinstance(value, str | int | float | bool | list):
                changed[item.name] = value
    return changed


def count_split(dataset: Dataset) -> dict[str, int]:
    """Patients, scans, slices and slices without any organ of a split."""
    return {
        "patients": len(dataset.unique("case")),
        "scans": len(dataset.unique("scan")),
        "slices": len(dataset),
        "empty": sum(not any(organs.values()) for organs in dataset["segmentation"]),
    }


def count_sizes(dataset: Dataset) -> dict[str, int]:
    """Slices of each size, the most frequent first."""
    columns = zip(dataset["height"], dataset["width"], dataset["pixel_spacing"], strict=True)
    sizes = Counter(f"{h}×{w} pixels of {spacing[0]:.2f}×{spacing[1]:.2f} mm" for h, w, spacing in columns)
    return dict(sizes.most_common())


def describe_run(
    model: PreTrainedModel,
    slices: DatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
) -> dict[str, Any]:
    """Collect what is known before training."""
    device = run_args.device  # the first look at it starts the process group: before that, world_size is 1
    return {
        "project_version": __version__,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": run_args.world_size,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "base_model": None if model_args.model_type else public_name(model_args.model_name_or_path),
        "num_parameters": count_parameters(model),
        "image_size": data_args.image_size,
        "label_mode": model_args.label_mode,
        "slice_context": data_args.slice_context,
        "slice_sampling": data_args.slice_sampling,
        "dataset": public_name(data_args.dataset_name),
        "dataset_title": data_args.dataset_title,
        "dataset_fingerprint": fingerprint_dataset(slices),
        "split_hash": hash_splits({split: slices[split].unique("scan") for split in slices}),
        "splits": {split: count_split(slices[split]) for split in slices},
        "sizes": {split: count_sizes(slices[split]) for split in slices},
        "seed": run_args.seed,
        "train_batch_size": run_args.train_batch_size * run_args.gradient_accumulation_steps * run_args.world_size,
        "learning_rate": run_args.learning_rate,
        "head_lr_multiplier": run_args.head_lr_multiplier,
        "ema_decay": run_args.ema_decay,
        "weight_decay": run_args.weight_decay,
        "optimizer": str(getattr(run_args.optim, "value", run_args.optim)),
        "lr_scheduler": str(getattr(run_args.lr_scheduler_type, "value", run_args.lr_scheduler_type))
        + (f", times 0.1 after {run_args.lr_drop_at:.0%} of the steps" if run_args.lr_drop_at else ""),
        "augmentation": data_args.augmentation,
        "competition_preset": run_args.preset,
        "arguments": changed_arguments(model_args, data_args, run_args),
    }


def write_facts(output_dir: Path, facts: dict[str, Any]) -> None:
    """Write `run.json` whole or not at all.

    Raises:
        ValueError: If a number is none; what is not known is null.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    scratch = output_dir / f".{RUN_FILE}"
    scratch.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(output_dir / RUN_FILE)


def read_facts(output_dir: Path) -> dict[str, Any]:
    """Read `run.json`."""
    return json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))


def prepare_output_dir(run_args: RunArguments, facts: dict[str, Any]) -> None:
    """Make sure that the output folder is new, or that of the very run that is to go on; then note the facts there.

    Raises:
        InputError: If it holds something else, or a run of another model, dataset or split (going on there could
            train on patients that are now in validation).
    """
    output_dir = Path(run_args.output_dir)
    with run_args.main_process_first(local=False, desc="checking the output folder"):
        if not output_dir.exists() or not any(output_dir.iterdir()):
            write_facts(output_dir, facts)
            return
        try:
            earlier = read_facts(output_dir)
        except (OSError, ValueError) as error:
            raise InputError(
                f"--output_dir {output_dir}: exists and holds no run of ours; name another folder or empty it"
            ) from error
        for name in IDENTITY:
            if earlier.get(name) != facts[name]:
                raise InputError(
                    f"--output_dir {output_dir}: holds a run with {name} {earlier.get(name)}, but this one has "
                    f"{facts[name]}; name another folder"
                )
