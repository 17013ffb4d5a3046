"""The facts of a run, kept in `run.json`: what was trained on what, with what, and how it scored."""

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass
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
from gi_segmentation.rules import Preset
from gi_segmentation.schema import ORGANS, LabelMode, hash_splits

RUN_FILE = "run.json"
PACKAGES = ("transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "albumentations", "numpy")
# What must be the same for a run to go on from its checkpoints.
IDENTITY = (
    "base_model", "model_type", "architecture", "image_size", "label_mode", "slice_context", "ema_decay",
    "dataset_fingerprint", "split_hash",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run before it trains.

    Attributes:
        project_version: Version of this project.
        git_commit: Its commit, with `-dirty` where a file was changed; None outside of git.
        versions: Of Python and of the libraries, by name.
        device: Name of the GPU, or cpu.
        num_processes: How many train together.
        architecture: Class of the model.
        model_type: Its family.
        base_model: Checkpoint that it started from; None for random weights.
        num_parameters: Number of weights.
        image_size: Height and width of its input in pixels.
        label_mode: What its channels mean.
        slice_context: How far the neighbouring slices are that are channels too; 0 for none.
        slice_sampling: How slices were drawn.
        dataset: Name of the dataset.
        dataset_title: What the card calls it.
        dataset_fingerprint: SHA-256 over ids and outlines of all slices.
        split_hash: SHA-256 over which scan stands in which split.
        splits: Numbers of patients, scans, slices and empty slices, by split.
        sizes: Numbers of slices by their size, by split.
        seed: Of weights, order and augmentation.
        train_batch_size: Slices of an optimizer step, on all processes.
        learning_rate: The highest one, of the encoder.
        head_lr_multiplier: The learning rate behind the encoder, as a multiple.
        ema_decay: Decay of the averaged weights; 0 for none.
        weight_decay: Of the optimizer.
        optimizer: Its name.
        lr_scheduler: Name of the schedule of the learning rate.
        augmentation: Whether training slices were changed at random.
        competition_preset: Whose reading of the competition's metric the scores follow.
        arguments: All arguments that differ from their defaults.
    """

    project_version: str
    git_commit: str | None
    versions: dict[str, str]
    device: str
    num_processes: int
    architecture: str
    model_type: str
    base_model: str | None
    num_parameters: int
    image_size: int
    label_mode: LabelMode
    slice_context: int
    slice_sampling: str
    dataset: str
    dataset_title: str
    dataset_fingerprint: str
    split_hash: str
    splits: dict[str, dict[str, int]]
    sizes: dict[str, dict[str, int]]
    seed: int
    train_batch_size: int
    learning_rate: float
    head_lr_multiplier: float
    ema_decay: float
    weight_decay: float
    optimizer: str
    lr_scheduler: str
    augmentation: bool
    competition_preset: Preset
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunResults(RunFacts):
    """What is known of a run after it: its facts, and how its best checkpoint scored.

    Attributes:
        date: Day on which it ended, as 2026-01-31.
        best_step: Step of the best checkpoint.
        steps: Steps of the whole run.
        epochs: Epochs of the whole run.
        scores: By name; None where there was nothing to score.
        intervals: Of 95 %, over patients, by name; None where fewer than two patients were scored.
        clinical: From `scoring.tables.describe_clinical`.
        cases: By name, as best or worst, a scan and its mean Dice.
    """

    date: str
    best_step: int
    steps: int
    epochs: float
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    clinical: dict[str, Any]
    cases: dict[str, dict[str, Any]]


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
) -> RunFacts:
    """Collect what is known before training."""
    device = run_args.device  # the first look at it starts the process group: before that, world_size is 1
    return RunFacts(
        project_version=__version__,
        git_commit=git_commit(),
        versions={"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        num_processes=run_args.world_size,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        base_model=None if model_args.model_type else public_name(model_args.model_name_or_path),
        num_parameters=count_parameters(model),
        image_size=data_args.image_size,
        label_mode=model_args.label_mode,
        slice_context=data_args.slice_context,
        slice_sampling=data_args.slice_sampling,
        dataset=public_name(data_args.dataset_name),
        dataset_title=data_args.dataset_title,
        dataset_fingerprint=fingerprint_dataset(slices),
        split_hash=hash_splits({split: slices[split].unique("scan") for split in slices}),
        splits={split: count_split(slices[split]) for split in slices},
        sizes={split: count_sizes(slices[split]) for split in slices},
        seed=run_args.seed,
        train_batch_size=run_args.train_batch_size * run_args.gradient_accumulation_steps * run_args.world_size,
        learning_rate=run_args.learning_rate,
        head_lr_multiplier=run_args.head_lr_multiplier,
        ema_decay=run_args.ema_decay,
        weight_decay=run_args.weight_decay,
        optimizer=str(getattr(run_args.optim, "value", run_args.optim)),
        lr_scheduler=str(getattr(run_args.lr_scheduler_type, "value", run_args.lr_scheduler_type))
        + (f", times 0.1 after {run_args.lr_drop_at:.0%} of the steps" if run_args.lr_drop_at else ""),
        augmentation=data_args.augmentation,
        competition_preset=run_args.preset,
        arguments=changed_arguments(model_args, data_args, run_args),
    )


def write_facts(output_dir: Path, facts: RunFacts) -> None:
    """Write `run.json` whole or not at all.

    Raises:
        ValueError: If a value is infinite or not a number; what is not known is None.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    scratch = output_dir / f".{RUN_FILE}"
    text = json.dumps(dataclasses.asdict(facts), indent=2, allow_nan=False)
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(output_dir / RUN_FILE)


def read_results(output_dir: Path) -> RunResults:
    """Read the `run.json` of a run that is over.

    Raises:
        InputError: If a fact is missing there, or it has one that we do not know.
    """
    found = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    names = {item.name for item in dataclasses.fields(RunResults)}
    if found.keys() != names:
        missing, foreign = sorted(names - found.keys()), sorted(found.keys() - names)
        raise InputError(
            f"{output_dir / RUN_FILE}: expected the facts of a finished run, but missing are {missing}, and unknown "
            f"are {foreign}; run the same command again, with the version of this project that began the run"
        )
    return RunResults(**found)


def prepare_output_dir(run_args: RunArguments, facts: RunFacts) -> None:
    """Make sure that the output folder is new, or that of the same run; then write the facts there.

    Raises:
        InputError: If the folder holds something else, or a run of another model, dataset or split. To go on there
            could train on patients who are now in validation.
    """
    output_dir = Path(run_args.output_dir)
    with run_args.main_process_first(local=False, desc="checking the output folder"):
        if not output_dir.exists() or not any(output_dir.iterdir()):
            write_facts(output_dir, facts)
            return
        try:
            earlier = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"--output_dir {output_dir}: exists and holds no run of ours; name another folder or empty it"
            ) from error
        for name in IDENTITY:
            if earlier.get(name) != getattr(facts, name):
                raise InputError(
                    f"--output_dir {output_dir}: holds a run with {name} {earlier.get(name)}, but this one has "
                    f"{getattr(facts, name)}; name another folder"
                )
