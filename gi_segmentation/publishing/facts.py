"""The facts of a run in `run.json`: the model, the data, the settings, the versions and, at the end, the scores.

The model card is made from these facts. They also show whether a command may continue an interrupted run.
"""

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gi_segmentation import __version__
from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.files import LOCK_FILE, write_json, writing_to
from gi_segmentation.labels import GI_TRACT, LabelMode, LabelSet, find_labels
from gi_segmentation.models.loading import count_parameters
from gi_segmentation.publishing.population import are_all_synthetic, name_dataset
from gi_segmentation.rules import Preset
from gi_segmentation.schema import hash_splits
from gi_segmentation.training import resuming
from gi_segmentation.training.checkpoints import find_last_checkpoint, find_step
from gi_segmentation.training.resuming import advise, describe_changes, describe_deciding, find_changes

RUN_FILE = "run.json"
# Libraries that may change a result. Their versions are facts of the run.
LIBRARIES = ("transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "albumentations", "numpy")
# A run continues from its checkpoints only if these facts are the same, and the arguments that decide the weights
# (`training.resuming`).
IDENTITY = (
    "base_model", "model_type", "architecture", "image_size", "label_mode", "slice_context", "ema_decay",
    "dataset_fingerprint", "split_hash", "splits",
)  # fmt: skip
# Facts that each start of a run may have of its own. They say how its steps were computed.
START_FACTS = (
    "project_version", "git_commit", "versions", "device", "num_processes", "train_batch_size", "arguments",
    "gradient_accumulation_steps", "mixed_precision",
)  # fmt: skip
# Facts that are the arguments of the same names.
SETTINGS = (
    "image_size", "label_mode", "slice_context", "slice_sampling", "fold", "seed", "learning_rate",
    "head_lr_multiplier", "ema_decay", "weight_decay", "gradient_accumulation_steps",
)  # fmt: skip
# Facts that no step used. They are those of the last start.
OF_THE_CARD = ("dataset_title", "competition_preset")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts that are known before the training. Those of `SETTINGS` are explained with the arguments.

    Attributes:
        project_version: Version of this project.
        git_commit: Commit of this project, with `-dirty` if a file was changed; None outside of git.
        versions: Versions of Python and of the libraries, by name.
        device: Name of the GPU, or cpu.
        num_processes: Number of processes that train together.
        architecture: Class of the model.
        model_type: Family of the model.
        base_model: Checkpoint, or encoder under a new head, from which the training started; None for random weights.
        num_parameters: Number of weights.
        dataset: Name of the dataset.
        dataset_title: Name of the dataset on the card.
        synthetic: Whether all slices of the dataset are those of a phantom.
        dataset_fingerprint: From `fingerprint_dataset`.
        split_hash: From `schema.hash_splits`.
        splits: Numbers of patients, scans, slices and slices without any organ, by split.
        sizes: Numbers of slices by size, by split.
        train_batch_size: Number of slices in an optimizer step, on all processes together.
        optimizer: Name of the optimizer.
        lr_scheduler: Name of the schedule of the learning rate.
        augmentation: How training slices are changed at random: `none`, `usual` or `strong`.
        competition_preset: How the scores read the competition's metric.
        arguments: All arguments that differ from their defaults.
        gradient_accumulation_steps: None if an older version wrote the facts.
        mixed_precision: `no`, `bf16` or `fp16`, from the flags or from the configuration of accelerate. None if an
            older version wrote the facts.
        deciding: All arguments that decide the weights, from `training.resuming.describe_deciding`.
        earlier_starts: For a run that was interrupted and went on in another way: `until_step`, and the facts of
            `START_FACTS` with which the steps up to there were made. The facts above are those of the last steps.
        organs: The names of the organs, in the order of their label ids. Older versions did not write them: they knew
            Kaggle's organs only.
        own: Whether the dataset has its own `labels.json`, so that the card must not speak of Kaggle's data.
        drawn: For own data, the number of patients in whom somebody has drawn an organ, by split and organ.
        kept_labels: The labels whose rows of the head come from `base_model`, if that has other labels; otherwise
            None. See `models.loading.LoadedModel`.
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
    synthetic: bool
    dataset_fingerprint: str
    fold: str | None
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
    augmentation: Literal["none", "usual", "strong"]
    competition_preset: Preset
    arguments: dict[str, Any]
    gradient_accumulation_steps: int | None = None
    mixed_precision: str | None = None
    deciding: dict[str, Any] = dataclasses.field(default_factory=dict)
    earlier_starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    organs: list[str] = dataclasses.field(default_factory=lambda: list(GI_TRACT.names))
    own: bool = False
    drawn: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    kept_labels: list[str] | None = None

    @property
    def label_set(self) -> LabelSet:
        """The organs as labels."""
        return LabelSet(tuple(self.organs))


@dataclass(frozen=True, kw_only=True)
class RunResults(RunFacts):
    """The facts of a finished run, with the scores of its best checkpoint.

    Attributes:
        date: Day on which the run ended, for example 2026-01-31.
        best_step: Step of the best checkpoint.
        steps: Number of steps of the whole run.
        epochs: Number of epochs of the whole run.
        scores: The scores by name; None if there was nothing to score.
        intervals: The 95 % intervals over patients, by name; None if fewer than two patients have the score.
        clinical: From `scoring.tables.describe_clinical`.
        cases: Single scans, from `results.pick_cases`.
        folds: For a cross-validation, the facts of each fold, from `cross_validation.pooling`. The scores are then
            those of all patients. Empty for a single training.
        published_fold: For a cross-validation, the fold whose weights are the published ones, or `all`.
        worst_patients: For a cross-validation, the patients with the lowest Dice, the lowest first: `patient`, `fold`
            and `dice`.
        postprocessing: For a cross-validation with `--postprocessing`, what was learnt, from
            `cross_validation.postprocessing_search`. The other scores are without it.
        scored_by: Version and commit of this project that computed the scores, if they are not those of the training.
    """

    date: str
    best_step: int
    steps: int
    epochs: float
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    clinical: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    folds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    published_fold: str | None = None
    worst_patients: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    postprocessing: dict[str, Any] | None = None
    scored_by: dict[str, Any] | None = None


def git_commit() -> str | None:
    """Return the commit of this project's working tree, with `-dirty` if it was changed; None outside of git."""
    folder = Path(__file__).parent
    try:
        # `--exclude=*` ignores all tags, so that git describes the commit by its full hash and not by a tag.
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def fingerprint_dataset(slices: DatasetDict) -> str:
    """Return the SHA-256 of the ids and annotations of all slices, 64 hexadecimal digits.

    It is the same on every machine and for every fold, and it changes if a slice or an annotation changes.

    Args:
        slices: All splits with annotations.
    """
    # `datasets` has a fingerprint too, but it also depends on paths and versions. The images are left out, because all
    # of them would have to be read at every start. The ids say which images they are.
    lines = []
    for dataset in slices.values():
        for row in dataset.select_columns(["id", "segmentation"]):
            # The organs come in the order of the labels, which decides the ids and the overlaps.
            encodings = " ".join(f"{organ}:{rle}" for organ, rle in row["segmentation"].items())
            lines.append(f"{row['id']} {encodings}\n")
    # Another fold has the same slices in other splits, so in another order.
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def public_name(name: str) -> str:
    """Return a Hub id as it is, and of a local path only the last part.

    `run.json` is published, and the path may contain the name of a user or of a hospital.
    """
    # Every other name is a Hub id. `resolve` gives `.` and `..` a last part too.
    path = Path(name)
    return path.resolve().name if path.is_dir() or path.is_absolute() or name.startswith(".") else name


def changed_arguments(*arguments: Any) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, by name.

    Args:
        *arguments: The dataclasses of the command line.
    """
    # `run.json` is published, so paths of this machine stay out. The names of dataset and model are facts of their
    # own, without paths.
    hidden = {"output_dir", "logging_dir", "local_rank", "dataset_name", "model_name_or_path", "backbone"}
    # How a run is divided into parts changes nothing, and differs between the folds of a cross-validation.
    hidden |= {"max_hours"}
    changed = {}
    for group in arguments:
        for item in dataclasses.fields(group):
            # A field has either a default or a function that makes one, for example for a list.
            default = item.default_factory() if callable(item.default_factory) else item.default
            value = getattr(group, item.name)
            # An enumeration of `transformers`, for example of the optimizers, becomes its text.
            value = getattr(value, "value", value)
            if value != default and item.name not in hidden and isinstance(value, str | int | float | bool | list):
                changed[item.name] = value
    return changed


def count_split(dataset: Dataset) -> dict[str, int]:
    """Return the numbers of patients, scans, slices and slices without any organ of a split."""
    return {
        "patients": len(dataset.unique("case")),
        "scans": len(dataset.unique("scan")),
        "slices": len(dataset),
        # An organ that the slice does not show has an empty text.
        "empty": sum(not any(organs.values()) for organs in dataset["segmentation"]),
    }


def count_sizes(dataset: Dataset) -> dict[str, int]:
    """Return the number of slices of each size, the most frequent size first."""
    # The distance of Kaggle's slices is the same in all scans, and not named.
    apart = [f", {mm:.4g} mm apart" for mm in dataset["slice_spacing"]] if is_own(dataset) else [""] * len(dataset)
    columns = zip(dataset["height"], dataset["width"], dataset["pixel_spacing"], apart, strict=True)
    sizes = Counter(f"{h}×{w} pixels of {mm[0]:.2f}×{mm[1]:.2f} mm{apart}" for h, w, mm, apart in columns)
    return dict(sizes.most_common())


def is_own(dataset: Dataset) -> bool:
    """Return whether a dataset was built from a folder with `labels.json`, so that it cannot be Kaggle's."""
    return "slice_spacing" in dataset.column_names


def count_drawn(dataset: Dataset) -> dict[str, int]:
    """Return the number of patients in whom somebody has drawn an organ, by its name."""
    patients: dict[str, set[int]] = {organ: set() for organ in find_labels(dataset.features).names}
    for row in dataset.select_columns(["case", "segmentation"]):
        for organ, encoding in row["segmentation"].items():
            if encoding is not None:
                patients[organ].add(row["case"])
    return {organ: len(cases) for organ, cases in patients.items()}


def describe_run(
    model: PreTrainedModel,
    slices: DatasetDict,
    samples: DatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    kept_labels: list[str] | None = None,
) -> RunFacts:
    """Return the facts of a run before the training.

    Args:
        model: From `models.loading.load_model`.
        slices: The whole splits.
        samples: What is left of them after `--max_train_samples` and `--max_eval_samples`.
        model_args: Arguments of the model.
        data_args: Arguments of the data.
        run_args: Arguments of the training.
        kept_labels: From `models.loading.load_model`.
    """
    # The first access to `device` connects the processes. Before it, `world_size` is 1 on every process.
    device = run_args.device
    start = model_args.backbone if model_args.model_type else model_args.model_name_or_path
    synthetic, own = are_all_synthetic(slices), is_own(next(iter(slices.values())))
    dataset = public_name(data_args.dataset_name)
    title = data_args.dataset_title or (dataset.split("/")[-1] if own else None)
    arguments = {**vars(model_args), **vars(data_args), **vars(run_args)}
    return RunFacts(
        **{name: arguments[name] for name in SETTINGS},
        project_version=__version__,
        git_commit=git_commit(),
        versions={"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in LIBRARIES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        num_processes=run_args.world_size,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        base_model=None if start is None else public_name(start),
        num_parameters=count_parameters(model),
        dataset=dataset,
        dataset_title=name_dataset(title, synthetic),
        synthetic=synthetic,
        dataset_fingerprint=fingerprint_dataset(slices),
        split_hash=hash_splits({split: samples[split].unique("scan") for split in samples}),
        splits={split: count_split(samples[split]) for split in samples},
        sizes={split: count_sizes(samples[split]) for split in samples},
        # `run_args.train_batch_size` is the batch of one process.
        train_batch_size=run_args.train_batch_size * run_args.gradient_accumulation_steps * run_args.world_size,
        optimizer=str(getattr(run_args.optim, "value", run_args.optim)),
        lr_scheduler=str(getattr(run_args.lr_scheduler_type, "value", run_args.lr_scheduler_type))
        + (f", times 0.1 after {run_args.lr_drop_at:.0%} of the steps" if run_args.lr_drop_at else ""),
        augmentation="none" if not data_args.augmentation else "strong" if data_args.strong_augmentation else "usual",
        competition_preset=run_args.preset,
        arguments=changed_arguments(model_args, data_args, run_args),
        # From `--bf16` or `--fp16`, or else from the flags or the file of `accelerate launch`, which are no arguments.
        mixed_precision=run_args.mixed_precision,
        deciding=describe_deciding(model_args, data_args, run_args),
        organs=list(find_labels(next(iter(slices.values())).features).names),
        own=own,
        drawn={split: count_drawn(samples[split]) for split in samples} if own else {},
        kept_labels=kept_labels,
    )


def write_facts(output_dir: Path, facts: RunFacts) -> None:
    """Write `run.json`. An interruption leaves the earlier file as it was.

    Raises:
        ValueError: If a value is NaN or infinite. JSON has no such numbers; use None.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RUN_FILE, dataclasses.asdict(facts))


def read_results(output_dir: Path) -> RunResults:
    """Read the `run.json` of a finished run.

    Raises:
        InputError: If a fact is missing or unknown, because the run is not finished or another version wrote the file.
    """
    found = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    facts = dataclasses.fields(RunResults)
    # A fact with a default is one that older versions did not write.
    required = {one.name for one in facts if one.default is one.default_factory is dataclasses.MISSING}
    missing, foreign = sorted(required - found.keys()), sorted(found.keys() - {one.name for one in facts})
    if missing or foreign:
        raise InputError(
            f"{output_dir / RUN_FILE}: expected the facts of a finished run, but got others (missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(foreign) or 'none'}); run the same command again, "
            f"with the version of this project that began the run"
        )
    return RunResults(**found)


@contextmanager
def prepare_output_dir(run_args: RunArguments, facts: RunFacts) -> Iterator[RunFacts]:
    """Write the facts into a new output folder, or check that the folder belongs to an earlier start of this run.

    Until the block ends, no other run can write to this folder.

    Args:
        run_args: Arguments of the training.
        facts: From `describe_run`.

    Yields:
        The facts of the whole run: those of an earlier start stay as they are.

    Raises:
        InputError: If the folder holds something else, or a run with another model, dataset, split or argument that
            decides the weights. With another split, patients of the earlier training could now be in the validation.
            Also if another run writes to the folder, or if its disk is full.
    """
    output_dir = Path(run_args.output_dir)
    with ExitStack() as stack:
        # The main process finds an empty folder and writes `run.json`. The others wait until then, and find a run with
        # the same facts. `local=False`, because the machines of a run share this folder.
        with run_args.main_process_first(local=False, desc="checking the output folder"):
            check_run_dir(output_dir)
            is_main = run_args.process_index == 0
            if is_main:
                stack.enter_context(writing_to(output_dir, output_dir / LOCK_FILE))
            elif not (output_dir / RUN_FILE).exists():
                raise InputError(
                    f"--output_dir {output_dir}: process {run_args.process_index} does not see the folder of the main "
                    f"process; name a folder that all machines of this run share"
                )
            earlier = read_earlier(output_dir)
            if earlier is not None:
                check_identity(output_dir, earlier, facts)
                # Only the main process writes facts.
                facts = continue_facts(output_dir, earlier, facts) if is_main else facts
            # The facts of a finished run stay until `write_results`.
            if is_main and not is_finished(earlier):
                write_facts(output_dir, facts)
        yield facts


def is_finished(earlier: Mapping[str, Any] | None) -> bool:
    """Return whether the facts of an earlier start are those of a finished run."""
    return earlier is not None and "steps" in earlier


def read_earlier(output_dir: Path) -> dict[str, Any] | None:
    """Return the facts in the folder of a run; None if nothing was made with them.

    A start that ended before its first checkpoint does not fix the arguments: its batches may have been too large.

    Raises:
        InputError: If `run.json` is not that of a run.
    """
    path = output_dir / RUN_FILE
    if not path.exists():
        return None
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not the facts of a run ({one_line(error)}); name another --output_dir") from error
    # Without these facts, the file is another program's, and `check_identity` says so.
    ours = all(name in earlier for name in IDENTITY)
    made = is_finished(earlier) or any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return earlier if made or not ours else None


def check_run_dir(output_dir: Path) -> None:
    """Check that a folder is empty, or that of a run.

    Raises:
        InputError: If it holds anything else.
    """
    # A start that was killed at once leaves only hidden files, such as the lock.
    ours = not any(not path.name.startswith(".") for path in output_dir.glob("*")) or (output_dir / RUN_FILE).exists()
    if not ours or (output_dir.exists() and not output_dir.is_dir()):
        raise InputError(
            f"--output_dir {output_dir}: it exists and holds no run of ours; name another folder or empty this one"
        )


def check_identity(output_dir: Path, earlier: Mapping[str, Any], facts: RunFacts) -> None:
    """Check that the run in a folder has the same `IDENTITY` as this one, and the same arguments.

    Raises:
        InputError: If not. The message names each difference.
    """
    differing = [
        f"{name} {earlier.get(name)} (here {getattr(facts, name)})"
        for name in IDENTITY
        if earlier.get(name) != getattr(facts, name)
    ]
    changes = find_changes(earlier, vars(facts))
    if differing or changes:
        raise InputError(
            f"--output_dir {output_dir}: the folder holds a run with "
            f"{', '.join([*differing, *describe_changes(changes)])}; {advise(changes, output_dir)}"
        )


def describe_start(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of `START_FACTS`, with those arguments that may differ between the starts of a run."""
    of_a_start = {*resuming.START_ARGUMENTS, *resuming.BATCH}
    arguments = {name: value for name, value in facts["arguments"].items() if name in of_a_start}
    return {name: facts.get(name) for name in START_FACTS} | {"arguments": arguments}


def continue_facts(output_dir: Path, earlier: Mapping[str, Any], facts: RunFacts) -> RunFacts:
    """Return the facts of a run that goes on. Facts of steps that are done stay as they are.

    Args:
        output_dir: The folder of the run.
        earlier: Its facts so far, as `run.json` has them.
        facts: The facts of this start.
    """
    checkpoint = find_last_checkpoint(output_dir)
    step = find_step(checkpoint) if checkpoint else 0
    # Steps after the checkpoint are lost, and what they were made with does not count.
    starts: list[dict[str, Any]] = []
    for start in [*earlier.get("earlier_starts", []), {"until_step": step, **describe_start(earlier)}]:
        if starts and starts[-1]["until_step"] == step:
            break
        starts.append({**start, "until_step": min(start["until_step"], step)})
    if step == 0 or starts[-1] == {"until_step": step, **describe_start(vars(facts))}:
        starts.pop()
    new = {*START_FACTS, *OF_THE_CARD, "earlier_starts"}
    # An older version did not write what decides the weights.
    new |= set() if earlier.get("deciding") else {"deciding"}
    names = {one.name for one in dataclasses.fields(RunFacts)} - new
    kept = {name: value for name, value in earlier.items() if name in names}
    return dataclasses.replace(facts, **kept, earlier_starts=starts)


def settle_facts(facts: RunFacts, steps: int) -> tuple[RunFacts, dict[str, Any] | None]:
    """Return the facts of a run at its end, without a last start that made no step and only scored.

    Args:
        facts: From `prepare_output_dir`.
        steps: Number of steps of the whole run.

    Returns:
        The facts, and `RunResults.scored_by`.
    """
    *starts, last = facts.earlier_starts or [{"until_step": 0}]
    if last["until_step"] < steps:
        return facts, None
    own = describe_start(vars(facts))["arguments"]
    arguments = {name: value for name, value in facts.arguments.items() if name not in own}
    # An older version did not write all of them.
    made = {name: last.get(name) for name in START_FACTS} | {"arguments": {**arguments, **last["arguments"]}}
    settled = dataclasses.replace(facts, **made, earlier_starts=starts)
    code = ("project_version", "git_commit")
    scored_by = {name: getattr(facts, name) for name in code}
    return settled, None if scored_by == {name: getattr(settled, name) for name in code} else scored_by
