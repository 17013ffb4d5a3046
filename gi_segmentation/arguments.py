"""The arguments of a training run, with their defaults and their checks. `command_line` reads them."""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments, integrations

from gi_segmentation.errors import check_repo_id
from gi_segmentation.files import check_utf8
from gi_segmentation.labels import LabelMode
from gi_segmentation.processes import count_cores
from gi_segmentation.rules import DEFAULT_PRESET, Preset
from gi_segmentation.schema import ALL_FOLDS

MIN_IMAGE_SIZE = 32  # pixels; the deepest feature maps have 1/32 of the input's side
SliceSampling: TypeAlias = Literal["all", "balanced", "patients"]
LogPictures: TypeAlias = Literal["local", "all", "none"]
Sharding: TypeAlias = Literal["FSDP", "DeepSpeed"]

# Where `--report_to` can send the log: the package to install, and the function that finds it.
REPORTERS = {
    "tensorboard": ("tensorboard", "is_tensorboard_available"),
    "wandb": ("wandb", "is_wandb_available"),
    "mlflow": ("mlflow", "is_mlflow_available"),
    "trackio": ("trackio", "is_trackio_available"),
    "swanlab": ("swanlab", "is_swanlab_available"),
    "comet_ml": ("comet-ml", "is_comet_available"),
    "clearml": ("clearml", "is_clearml_available"),
    "neptune": ("neptune", "is_neptune_available"),
    "dagshub": ("dagshub", "is_dagshub_available"),
    "dvclive": ("dvclive", "is_dvclive_available"),
    "codecarbon": ("codecarbon", "is_codecarbon_available"),
    "azure_ml": ("azureml-core", "is_azureml_available"),
    "flyte": ("flytekit", "is_flytekit_available"),
    "kubeflow": ("kubeflow", "is_kubeflow_available"),
}
# Metadata of the fields below. HfArgumentParser hands a field's metadata to `add_argument`, see `RunParser`.
MODEL, DATA, TRAINING, SCORING, PUBLISHING = (
    {"group": title} for title in ("Model", "Data", "Training", "Scoring", "Publishing")
)
# For a flag of TrainingArguments that must keep its default in this pipeline. Help does not show it, and
# `RunArguments.__post_init__` refuses any other value.
FIXED = {"group": "Fixed", "help": argparse.SUPPRESS}


def check_at_least(arguments: Any, minima: Mapping[str, float]) -> None:
    """Check numbers that have a least allowed value.

    Args:
        arguments: An object with the values as attributes; None is always allowed.
        minima: The least allowed value by name.

    Raises:
        ValueError: If a number is smaller.
    """
    for name, minimum in minima.items():
        value = getattr(arguments, name)
        # `not >=` and not `<`, because every comparison with NaN is false.
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name} must be at least {minimum}, but got {value}")


def shown_folder(folder: Path) -> str:
    """Return the name of a folder for the card: the path from here, or the last part if the folder is elsewhere.

    A card may be published, and a longer path may contain the name of a user or of a hospital.

    Example:
        >>> shown_folder(Path.cwd() / "runs" / "segformer-b0"), shown_folder(Path("/home/anna/b0"))
        ('runs/segformer-b0', 'b0')
    """
    whole, here = folder.resolve(), Path.cwd()
    return whole.relative_to(here).as_posix() if here in whole.parents else whole.name


def count_workers() -> int:
    """Return how many processes should load slices for this process of a training."""
    # `accelerate launch` tells each process how many of them share the machine. One core is left for the process
    # itself.
    return min(max(count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 1), 8)


@dataclass
class ModelArguments:
    """The model that the training starts from."""

    model_name_or_path: str = field(
        default="nvidia/segformer-b0-finetuned-ade-512-512",
        metadata=MODEL | {"help": "Folder or Hub id of the semantic segmentation model to fine-tune. The default is "
                                  "the smallest model in the original project's table. A checkpoint of this project "
                                  "may have other labels than the dataset: the head keeps what it knows of the labels "
                                  "that both have."},
    )  # fmt: skip
    model_revision: str | None = field(
        default=None,
        metadata=MODEL | {"help": "Branch, tag or commit of the model on the Hub; None: its main branch."},
    )
    model_type: str | None = field(
        default=None,
        metadata=MODEL | {"help": "Train a new model of this family from random weights, in place of "
                                  "--model_name_or_path. Examples: segformer, upernet, dpt, beit."},
    )  # fmt: skip
    backbone: str | None = field(
        default=None,
        metadata=MODEL | {"help": "Pre-trained encoder for a new model: folder or Hub id, of transformers "
                                  "(facebook/convnextv2-tiny-22k-224) or of timm (timm/resnet50.a1_in1k). Only the "
                                  "head starts from random weights. It needs --model_type upernet."},
    )  # fmt: skip
    config_overrides: str | None = field(
        default=None,
        metadata=MODEL | {"help": "Values for the configuration of a new model (--model_type). Write them as "
                                  "depths=[2,2,2,2],drop_path_rate=0 or as a JSON object."},
    )  # fmt: skip
    label_mode: LabelMode = field(
        default="multiclass",
        metadata=MODEL | {"help": "multiclass: each pixel has one label (softmax), and the model works in the stock "
                                  "pipeline of transformers. multilabel: each organ has its own channel (sigmoid), so "
                                  "that the model learns and predicts overlaps."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check what depends on several fields."""
        if self.backbone is not None and self.model_type != "upernet":
            raise ValueError(f"--backbone needs --model_type upernet, but got {self.model_type}")


@dataclass
class DataArguments:
    """The slices to train on, and how they are prepared."""

    dataset_name: str = field(
        default="gi_tract",
        metadata=DATA | {"help": "Folder that `python -m dataset_builder build` wrote, or a Hub id."},
    )
    dataset_revision: str | None = field(
        default=None,
        metadata=DATA | {"help": "Branch, tag or commit of the dataset on the Hub; None: its main branch."},
    )
    fold: str | None = field(
        default=None,
        metadata=DATA | {"help": "Number of the fold whose patients are held back for validation, by the column "
                                 "`fold` of the dataset. all: train on all patients; nothing is held back, so nothing "
                                 "is scored. None: the splits of the dataset as they were built (fold 0)."},
    )  # fmt: skip
    dataset_title: str | None = field(
        default=None,
        metadata=PUBLISHING | {"help": "Name of the dataset on the model card. Set it if you train on your own data. "
                                       "None: UW-Madison GI Tract, or synthetic patients if a phantom made all "
                                       "slices."},
    )  # fmt: skip
    image_size: int = field(
        default=288,
        metadata=DATA | {"help": "Height and width of the model's input in pixels. The default is the original "
                                 "project's size."},
    )  # fmt: skip
    slice_context: int = field(
        default=0,
        metadata=DATA | {"help": "With a value K, the three channels are the slices i-K, i and i+K of the scan. With "
                                 "0, all three channels are the slice itself. If slices are not 3 mm apart, they "
                                 "are the slices about K times 3 mm away."},
    )  # fmt: skip
    slice_sampling: SliceSampling = field(
        default="balanced",
        metadata=DATA | {"help": "all: an epoch contains every slice once. balanced: an epoch has the same number of "
                                 "slices, drawn at random; slices without organs and slices with each organ are drawn "
                                 "equally often. patients: every patient is drawn equally often, and so are these "
                                 "groups in each patient; for patients with unequal numbers of slices. "
                                 "docs/benchmark_notes.md has figures."},
    )  # fmt: skip
    augmentation: bool = field(default=True, metadata=DATA | {"help": "Change the training slices at random."})
    strong_augmentation: bool = field(
        default=False,
        metadata=DATA | {"help": "Change the training slices more, and without flips: size, shape, contrast, coil "
                                 "sensitivity, blur and noise. This is for a few patients; docs/benchmark_notes.md "
                                 "has figures."},
    )  # fmt: skip
    cache_slices: bool = field(
        default=True,
        metadata=DATA | {"help": "Decode and resize all slices once, and keep them in the cache of `datasets`. Later "
                                 "trainings with the same --image_size use them again. The whole competition takes "
                                 "9.6 GB of disk at 288 pixels."},
    )  # fmt: skip
    streaming: bool = field(
        default=False,
        metadata=DATA | {"help": "Read the slices from the Parquet files of the dataset while the model trains, and "
                                 "keep no copy of them. This is for a dataset that is larger than the disk, or on a "
                                 "Hub. It needs --slice_sampling all, and there is no --cache_slices."},
    )  # fmt: skip
    max_train_samples: int | None = field(
        default=None,
        metadata=DATA | {"help": "Train on this number of slices, drawn at random; None: on all. For quick tests."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata=DATA | {"help": "Evaluate on this number of slices, the first ones; None: on all. For quick tests."},
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        minima = {"image_size": MIN_IMAGE_SIZE, "slice_context": 0, "max_train_samples": 1, "max_eval_samples": 1}
        check_at_least(self, minima)
        if self.strong_augmentation and not self.augmentation:
            raise ValueError("--strong_augmentation needs --augmentation, which is turned off")
        if self.streaming and self.slice_sampling != "all":
            raise ValueError(
                f"--streaming needs --slice_sampling all, but got {self.slice_sampling}, which would read a whole "
                f"group of slices from the files for each slice that it draws"
            )
        if self.fold is not None and self.fold != ALL_FOLDS and not self.fold.isdecimal():
            raise ValueError(f"--fold must be the number of a fold or {ALL_FOLDS}, but got {self.fold!r}")


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this task, and the pipeline's own training flags.

    Batch size, learning rate, weight decay and the number of epochs are the original project's (recipes/seed.yaml).
    Trials led to the other defaults (docs/benchmark_notes.md). The best checkpoint has the highest `eval_dice`.
    """

    output_dir: str = field(
        default="runs/gi_tract", metadata=TRAINING | {"help": "Folder for checkpoints and results."}
    )
    per_device_train_batch_size: int = field(
        default=32, metadata=TRAINING | {"help": "Number of slices in a training batch, per device."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata=TRAINING | {"help": "Number of slices in an evaluation batch, per device."}
    )
    learning_rate: float = field(
        default=2e-4, metadata=TRAINING | {"help": "Highest learning rate of the encoder during the training."}
    )
    warmup_steps: float = field(
        default=0.05,
        metadata=TRAINING | {"help": "Number of steps in which the learning rate rises to its highest value. A value "
                                     "below 1 is a share of all steps."},
    )  # fmt: skip
    weight_decay: float = field(default=1e-4, metadata=TRAINING | {"help": "Weight decay of the optimizer."})
    num_train_epochs: float = field(
        default=6.0, metadata=TRAINING | {"help": "Number of epochs. --max_steps replaces it if it is given."}
    )
    eval_strategy: str = field(
        default="epoch", metadata=TRAINING | {"help": "When to evaluate: `epoch`, or `steps` with --eval_steps."}
    )
    save_strategy: str = field(
        default="epoch",
        metadata=TRAINING | {"help": "When to save a checkpoint. It must be the same as --eval_strategy."},
    )
    save_total_limit: int | None = field(
        default=2, metadata=TRAINING | {"help": "Number of checkpoints to keep. With 2: the best and the last one."}
    )
    logging_steps: float = field(
        default=10,
        metadata=TRAINING
        | {"help": "Number of steps between two log lines. A value below 1 is a share of all steps."},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser expects None first
        default_factory=lambda: ["tensorboard"],
        metadata=TRAINING | {"help": "Where to send the log: tensorboard, wandb, ...; `none` turns it off."},
    )
    log_pictures: LogPictures = field(
        default="local",
        metadata=TRAINING | {"help": "Where pictures of four validation slices go after each evaluation. local: to "
                                     "TensorBoard, which writes to this machine. all: to wandb and trackio too, if "
                                     "--report_to names them; their servers then have slices of patients. none: "
                                     "nowhere."},
    )  # fmt: skip
    dataloader_num_workers: int = field(
        default_factory=count_workers,
        metadata=TRAINING | {"help": "Number of processes that load slices, per device. The default is the number of "
                                     "cores for each device minus one, at least 1 and at most 8."},
    )  # fmt: skip
    early_stopping_patience: int | None = field(
        default=None,
        metadata=TRAINING | {"help": "Stop after this number of evaluations without a better score; None: never."},
    )
    max_hours: float | None = field(
        default=None,
        metadata=TRAINING | {"help": "End within this number of hours after the start of the command, with a "
                                     "checkpoint of the last step; the same command goes on. The time for saving and "
                                     "scoring is measured in the run. None: no limit."},
    )  # fmt: skip
    lr_drop_at: float | None = field(
        default=None,
        metadata=TRAINING | {"help": "Multiply the learning rate by 0.1 after this share of the training, a number "
                                     "between 0 and 1; None: never. It needs --lr_scheduler_type constant."},
    )  # fmt: skip
    head_lr_multiplier: float = field(
        default=10.0,
        metadata=TRAINING | {"help": "Factor on --learning_rate for all layers after the encoder. The default is "
                                     "SegFormer's (arXiv 2105.15203); docs/benchmark_notes.md explains it."},
    )  # fmt: skip
    ema_decay: float = field(
        default=0.999,
        metadata=TRAINING | {"help": "Decay per step of the exponential moving average of the weights. The averaged "
                                     "weights are evaluated, saved and published. The decay is smaller at the "
                                     "beginning of the training. With 0, the weights are not averaged. "
                                     "docs/benchmark_notes.md explains the default."},
    )  # fmt: skip
    fast_head: bool = field(
        default=True,
        metadata=TRAINING | {"help": "Compute the head of a SegFormer in another order. The "
                                     "logits differ by less than 0.00001. A step of segformer-b0 on a CPU took half "
                                     "of the time in 32 bits. Other families stay as they are."},
    )  # fmt: skip
    test_time_flips: bool = field(
        default=False,
        metadata=SCORING | {"help": "At the end, score the best checkpoint a second time, with its logits averaged "
                                    "over flipped slices. This is for a model that was trained with flips."},
    )  # fmt: skip
    preset: Preset = field(
        default=DEFAULT_PRESET,
        metadata=SCORING | {"help": "How to read the competition's metric for eval_competition_score. mle_bench: as "
                                    "the public grader does. first_place: as the winner's validation code does. "
                                    "host: as the notes of one of the competition's hosts say. The other two are "
                                    "reported beside it."},
    )  # fmt: skip
    push_to_hub: bool = field(
        default=False,
        metadata=PUBLISHING | {"help": "At the end, upload the best checkpoint to the Hub. It needs --hub_model_id."},
    )
    hub_model_id: str | None = field(
        default=None,
        metadata=PUBLISHING | {"help": "Name of the model on the Hub: NAMESPACE/NAME. Without NAMESPACE/, it is that "
                                       "of the user of the token."},
    )  # fmt: skip
    hub_private_repo: bool | None = field(
        default=True,
        metadata=PUBLISHING | {"help": "Whether a new repository is private. A repository that exists stays as it "
                                       "is."},
    )  # fmt: skip
    overwrite_repository: bool = field(
        default=False,
        metadata=PUBLISHING | {"help": "Replace everything in the repository, also files that this project did not "
                                       "publish, or that were changed since. Without this flag, such files stop the "
                                       "command. The history of the repository keeps them."},
    )  # fmt: skip
    publish_pictures: bool = field(
        default=False,
        metadata=PUBLISHING | {"help": "Publish pictures that show slices of patients in a public repository too. "
                                       "Without this flag they stay out of it. A private repository always has them, "
                                       "and so have all models of synthetic patients."},
    )  # fmt: skip
    license: str = field(
        default="other",
        metadata=PUBLISHING | {"help": "Licence on the model card. `other` means non-commercial use, as the rules of "
                                       "the data demand."},
    )  # fmt: skip

    load_best_model_at_end: bool = field(default=True, metadata=FIXED)
    metric_for_best_model: str | None = field(default="eval_dice", metadata=FIXED)
    greater_is_better: bool | None = field(default=True, metadata=FIXED)
    remove_unused_columns: bool = field(default=False, metadata=FIXED)  # the transform needs all columns
    batch_eval_metrics: bool = field(default=True, metadata=FIXED)  # scores are computed batch by batch
    hub_strategy: str = field(default="end", metadata=FIXED)  # only the best checkpoint is uploaded, once
    save_only_model: bool = field(default=False, metadata=FIXED)  # resuming needs the optimizer too
    # Early stopping continues to count where an interrupted run stopped.
    restore_callback_states_from_checkpoint: bool = field(default=True, metadata=FIXED)
    prediction_loss_only: bool = field(default=False, metadata=FIXED)
    logging_nan_inf_filter: bool = field(default=False, metadata=FIXED)  # a loss that is not finite ends the run
    dataloader_drop_last: bool = field(default=False, metadata=FIXED)  # True would drop validation slices too
    label_smoothing_factor: float = field(default=0.0, metadata=FIXED)
    do_predict: bool = field(default=False, metadata=FIXED)
    enable_jit_checkpoint: bool = field(default=False, metadata=FIXED)  # `training.stopping` does it, for Ctrl-C too
    resume_from_checkpoint: str | None = field(default=None, metadata=FIXED)  # resuming needs no flag
    hub_token: str | None = field(default=None, metadata=FIXED)  # every checkpoint would have it

    def __post_init__(self) -> None:
        """Check what `TrainingArguments` cannot know."""
        for flag in ("fsdp", "deepspeed"):
            if getattr(self, flag):
                raise ValueError(f"--{flag}: leave it out; the folder accelerate_configs has a configuration for it")
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and not torch.cuda.is_available():
            self.use_cpu = True  # otherwise accelerate would not form a group of the processes
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "--resume_from_checkpoint: leave it out; the same command goes on from the last checkpoint in its "
                "--output_dir"
            )
        # `Trainer` would save the token with all other arguments, in every checkpoint. The message must not have it.
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token: leave it out, because other users of this machine see the words of a command; set "
                "HF_TOKEN, or run `hf auth login` once"
            )
        for item in fields(self):
            if item.metadata.get("group") == FIXED["group"] and getattr(self, item.name) != item.default:
                value = getattr(self, item.name)
                raise ValueError(f"--{item.name} must be {item.default} in this pipeline, but got {value}")
        positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "early_stopping_patience")
        not_negative = ("learning_rate", "head_lr_multiplier", "weight_decay", "seed")
        check_at_least(self, {**dict.fromkeys(positive, 1), **dict.fromkeys(not_negative, 0)})
        # With 0, nothing would be trained, but a head with random weights would be scored and published.
        if self.max_steps == 0:
            raise ValueError("--max_steps must be greater than 0, or -1 to count epochs, but got 0")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs must be greater than 0, but got {self.num_train_epochs}")
        if self.max_hours is not None and not self.max_hours > 0:
            raise ValueError(f"--max_hours must be greater than 0, but got {self.max_hours}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, but got {self.ema_decay}")
        if self.lr_drop_at is not None and not 0 < self.lr_drop_at < 1:
            raise ValueError(f"--lr_drop_at must lie between 0 and 1, but got {self.lr_drop_at}")
        if self.lr_drop_at is not None and self.lr_scheduler_type != "constant":
            scheduler = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise ValueError(f"--lr_drop_at needs --lr_scheduler_type constant, but got {scheduler}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id NAMESPACE/NAME")
        self.check_reporters()
        self.check_sharding()
        self.check_names()

    def check_reporters(self) -> None:
        """Check that all programs of `--report_to` are installed. `Trainer` would find that out after minutes.

        Raises:
            ValueError: If one is unknown or not installed.
        """
        # `all` is a list of what is installed by now, and `none` an empty one.
        for name in self.report_to or ():
            if name not in REPORTERS:
                raise ValueError(
                    f"--report_to: expected some of {', '.join(REPORTERS)}, all or none, but got {name!r}"
                )
            package, check = REPORTERS[name]
            if not getattr(integrations, check)():
                raise ValueError(
                    f"--report_to {name}: needs the package {package}, which is not installed or not set up; run "
                    f"`pip install {package}`, or take --report_to none"
                )

    @property
    def sharding(self) -> Sharding | None:
        """What divides the model, or the state of its optimizer, among the processes; None: each has the whole."""
        # `accelerate launch` sets one of these variables if its configuration says so.
        kinds: tuple[Sharding, ...] = ("FSDP", "DeepSpeed")
        used = [kind for kind in kinds if os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "false") == "true"]
        return used[0] if used else None

    def check_sharding(self) -> None:
        """Check that nothing goes wrong if the model, or the state of its optimizer, is divided among the processes.

        Raises:
            ValueError: If a flag, or a setting of `accelerate launch`, does not work with this division.
        """
        if self.sharding is None:
            return
        if self.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            # `accelerate` would train with DistributedDataParallel instead, and say nothing.
            raise ValueError(f"{self.sharding} needs a GPU; take accelerate_configs/multi_cpu.yaml")
        if self.ema_decay:
            raise ValueError(
                f"--ema_decay does not work with {self.sharding}; add --ema_decay 0, or take "
                f"accelerate_configs/multi_gpu.yaml"
            )
        # Another version, or another form of checkpoints, would write no weights that one could publish.
        expected = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        if self.sharding == "FSDP" and any(os.environ.get(name) != value for name, value in expected.items()):
            raise ValueError("expected the settings of FSDP from accelerate_configs/fsdp2.yaml: version 2, full state")
        if self.sharding == "DeepSpeed" and cast(Any, self.deepspeed_plugin).zero_stage > 2:
            raise ValueError("ZeRO stage 3 is not supported; take accelerate_configs/deepspeed_zero2.yaml")

    def check_names(self) -> None:
        """Check the names that stand on the model card, also inside its lines of Python.

        Raises:
            ValueError: If a name could end a string of Python, a table or a code span, or could start HTML.
        """
        if self.hub_model_id is not None:
            check_repo_id("--hub_model_id", self.hub_model_id)
        # Without a repository, the card names the output folder.
        check_utf8("--output_dir", Path(self.output_dir).resolve())
        name = shown_folder(Path(self.output_dir))
        if not name.strip() or not name.isprintable() or set(name) & set('"\\`<>|'):
            raise ValueError(
                f"--output_dir: the card shows the name of this folder, so it must have no control characters and "
                f'none of " \\ ` < > |, but got {name!r}'
            )
        if not re.fullmatch(r"[A-Za-z0-9.-]+", self.license):
            raise ValueError(f"--license: expected an identifier of the Hub like apache-2.0, but got {self.license!r}")

    def hold_nothing_back(self) -> None:
        """Change the arguments to those of a run without validation slices. Its last checkpoint is published.

        Raises:
            ValueError: If the arguments need scores.
        """
        if self.early_stopping_patience is not None:
            raise ValueError(f"--early_stopping_patience needs scores, but with --fold {ALL_FOLDS} there are none")
        # `TrainingArguments` compares these three with each other when it is made, so they change together afterwards.
        self.eval_strategy, self.load_best_model_at_end, self.metric_for_best_model = "no", False, None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of warm-up steps.

        At least one step remains after the warm-up, because some schedules divide by the number of these steps.
        """
        return min(super().get_warmup_steps(num_training_steps), num_training_steps - 1)
