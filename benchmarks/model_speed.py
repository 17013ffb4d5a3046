"""Compare training, evaluation and prediction with bare loops over the same model, and with the usual way.

A bare loop has everything in memory and does only what the model needs: forward pass, loss, backward pass and
optimizer in a training, and the forward pass otherwise. It is the limit of every pipeline on this machine.
`benchmarks.peer` is the usual way with Hugging Face. All ways take turns in one process, with the same architecture,
batches and precision.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars
from torch.utils.data import default_collate
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.peer import make_peer
from benchmarks.training import flag_words, make_trainer, write_phantom_dataset
from gi_segmentation.arguments import count_workers
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import find_dataset, load_slices
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import Member, load_members, processor_has
from gi_segmentation.inference.output_folder import write_submission
from gi_segmentation.inference.prediction import predict_files
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import load_model
from gi_segmentation.training.trainer import SegmentationTrainer
from tests.support.architectures import ARCHITECTURES, recipe_flags

# Steps before the clock starts. Libraries allocate memory and choose algorithms in the first ones.
WARM_UP = 2
# Slices of a scan of the competition, and how many scans are evaluated.
SCAN = 144
NUM_SCANS = 2
QUIET = {"report_to": "none", "disable_tqdm": True}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        recipe: Name of the recipe of our trainer. Its model has random weights here.
        dataset_dir: Folder of a dataset with `train` and `validation`.
        image_size: Height and width of the model's input in pixels.
        batch_size: Number of slices in a batch.
        bf16: Whether to compute in bfloat16 where autocast does so.
        steps: Number of steps of a measured training.
        accumulation: Number of batches of a step.
    """

    recipe: str
    dataset_dir: Path
    image_size: int
    batch_size: int
    bf16: bool
    steps: int
    accumulation: int = 1

    @property
    def slices_per_step(self) -> int:
        """Number of slices of an optimizer step."""
        return self.batch_size * self.accumulation

    def trainer_flags(self) -> dict[str, Any]:
        """Return the flags that our trainer and the peer's have in common."""
        return {
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": WARM_UP + self.steps,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 10,
        }


class Stopwatch(TrainerCallback):
    """Measures the steps of a training after the first `WARM_UP` ones.

    Attributes:
        seconds: Seconds of a step, a mean over all of them.
        waiting: Share of this time in which the training waits for the next batch.
    """

    def __init__(self) -> None:
        self.started = self.ended = self.seconds = self.waiting = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the time since the last step. In this time `Trainer` fetched the batch of this step."""
        if state.global_step >= WARM_UP:
            self.waiting += time.perf_counter() - self.ended

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start after the warm-up, and stop after the last step."""
        if state.global_step == WARM_UP:
            self.started = now()
        elif state.global_step == state.max_steps:
            seconds = now() - self.started
            self.seconds, self.waiting = seconds / (state.max_steps - WARM_UP), self.waiting / seconds
        self.ended = time.perf_counter()


def now() -> float:
    """Return the time in seconds, when the GPU has done all that it was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def computes_bf16() -> bool:
    """Return whether the GPU or the processor has units for bfloat16. Without them it takes several times as long."""
    return torch.cuda.is_available() or processor_has("avx512_bf16") or processor_has("amx_bf16")


def autocast(setting: Setting) -> AbstractContextManager:
    """Return the context in which a bare loop computes, as `accelerate` makes it for a trainer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=setting.bf16)


def make_ours(setting: Setting, scratch: Path) -> SegmentationTrainer:
    """Return our trainer, made by the stages of `run_segmentation.py`."""
    flags = recipe_flags(setting.recipe) | setting.trainer_flags() | QUIET
    flags |= {"dataset_name": setting.dataset_dir, "output_dir": scratch, "image_size": setting.image_size}
    model_args, data_args, run_args = parse_arguments(flag_words(flags))
    slices = load_slices(data_args)
    trainer = make_trainer(slices, repeat_training_slices(slices, setting), model_args, data_args, run_args)
    # Without a progress bar, `Trainer` prints each line of its log.
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_usual(setting: Setting, scratch: Path) -> Trainer:
    """Return the peer's trainer for the same slices and the same architecture, as it is in `transformers`."""
    model_args, _, _ = parse_arguments(flag_words(recipe_flags(setting.recipe)))
    model = load_model(model_args, GI_TRACT, setting.image_size).model
    slices = repeat_training_slices(find_dataset(str(setting.dataset_dir), None), setting)
    trainer = make_peer(model, slices, setting.image_size, scratch, **setting.trainer_flags(), **QUIET)
    trainer.remove_callback(PrinterCallback)
    return trainer


def repeat_training_slices(slices: DatasetDict, setting: Setting) -> DatasetDict:
    """Return the splits with so many training slices that the measured steps are within one epoch."""
    # At the end of an epoch, a training waits for the first batch of the next one. Real epochs are much longer.
    train = slices["train"]
    times = -(-(WARM_UP + setting.steps) * setting.slices_per_step // len(train))
    return DatasetDict(train=concatenate_datasets([train] * times), validation=slices["validation"])


def time_training(setting: Setting, trainer: Trainer) -> Stopwatch:
    """Train, and return the stopwatch with the measured seconds for a slice."""
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.train()
    stopwatch.seconds /= setting.slices_per_step
    return stopwatch


def time_evaluation(trainer: Trainer) -> float:
    """Return the seconds of an evaluation for a slice, with all scores that are computed during a training."""
    started = now()
    trainer.evaluate()
    return (now() - started) / len(cast(Dataset, trainer.eval_dataset))


def time_bare_training(setting: Setting, trainer: SegmentationTrainer) -> float:
    """Return the seconds for a slice of a loop with our model, loss and optimizer, and one batch in memory."""
    model, optimizer = trainer.model.train(), trainer.create_optimizer()
    pixel_values, labels = read_batch(trainer, setting.batch_size)
    for step in range(WARM_UP + setting.steps):
        if step == WARM_UP:
            started = now()
        with autocast(setting):
            outputs = model(pixel_values=pixel_values)
        trainer.batch_loss(outputs, labels, training=True).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (now() - started) / setting.steps / setting.batch_size


def time_bare_passes(setting: Setting, model: PreTrainedModel, pixel_values: torch.Tensor) -> float:
    """Return the seconds of forward passes for a slice, with one batch in memory."""
    model.eval()
    passes = -(-SCAN // setting.batch_size)
    with torch.no_grad(), autocast(setting):
        model(pixel_values=pixel_values)
        started = now()
        for _ in range(passes):
            model(pixel_values=pixel_values)
        return (now() - started) / passes / setting.batch_size


def read_batch(trainer: SegmentationTrainer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's input and the labels of the first training slices, on the device of the model."""
    # `__getitems__` reads as a process of a `DataLoader` does.
    batch = default_collate(cast(Dataset, trainer.train_dataset).__getitems__(list(range(size))))
    return trainer.transform.to_model({name: value.to(trainer.args.device) for name, value in batch.items()})


def time_prediction(setting: Setting, members: list[Member], kaggle_dir: Path, scratch: Path) -> float:
    """Return the seconds of `predict` for a slice, after the checkpoint was loaded."""
    scans = find_scans(kaggle_dir).scans[:1]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        started = now()
        list(
            predict_files(
                members, scans, ["kaggle"], Path(folder), PredictionSettings(setting.batch_size, count_workers())
            )
        )
        write_submission(scans, Path(folder))
        return (now() - started) / SCAN


def take_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measure several ways in turn, and return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare_training(setting: Setting, rounds: int, scratch: Path) -> dict[str, float]:
    """Measure the seconds of a training for a slice: ours, the bare loop, and the usual way."""
    ways = {
        "ours": lambda: time_training(setting, make_ours(setting, scratch)).seconds,
        "bare": lambda: time_bare_training(setting, make_ours(setting, scratch)),
        "usual": lambda: time_training(setting, make_usual(setting, scratch)).seconds,
    }
    return take_turns(ways, rounds)


def compare_accumulation(setting: Setting, rounds: int, scratch: Path) -> dict[str, float]:
    """Measure the seconds for a slice of steps with twice the batch: in four parts (ours), and at once (bare)."""
    whole = replace(setting, batch_size=2 * setting.batch_size)
    parts = replace(setting, batch_size=setting.batch_size // 2, accumulation=4)
    ways = {
        "ours": lambda: time_training(parts, make_ours(parts, scratch)).seconds,
        "bare": lambda: time_training(whole, make_ours(whole, scratch)).seconds,
    }
    return take_turns(ways, rounds)


def compare_evaluation(setting: Setting, rounds: int, scratch: Path) -> dict[str, float]:
    """Measure the seconds of an evaluation for a slice: ours, bare forward passes, and the usual way."""
    ours, usual = make_ours(setting, scratch), make_usual(setting, scratch)
    pixel_values, _ = read_batch(ours, setting.batch_size)
    # The first evaluation of a process also loads libraries and makes memory ready.
    ours.evaluate()
    ways = {
        "ours": lambda: time_evaluation(ours),
        "bare": lambda: time_bare_passes(setting, ours.model, pixel_values),
        "usual": lambda: time_evaluation(usual),
    }
    return take_turns(ways, rounds + 1)


def compare_prediction(setting: Setting, rounds: int, scratch: Path) -> dict[str, float]:
    """Measure the seconds of a prediction for a slice: ours, and bare forward passes."""
    trainer = make_ours(setting, scratch)
    trainer.model.save_pretrained(scratch / "model")
    cast(Any, trainer.processing_class).save_pretrained(scratch / "model")
    members = load_members([str(scratch / "model")], None, Computation(precision="bf16" if setting.bf16 else "fp32"))
    pixel_values, _ = read_batch(trainer, setting.batch_size)
    kaggle_dir = setting.dataset_dir.parent / "kaggle"
    # As with evaluations, the first prediction of a process does not count.
    time_prediction(setting, members, kaggle_dir, scratch)
    ways = {
        "ours": lambda: time_prediction(setting, members, kaggle_dir, scratch),
        "bare": lambda: time_bare_passes(setting, members[0].model, pixel_values),
    }
    return take_turns(ways, rounds + 1)


def print_row(name: str, setting: Setting, seconds: dict[str, float]) -> None:
    """Print a row of the table: slices in a second, and the speed as a ratio to each of the other ways."""
    ours, usual = seconds["ours"], seconds.get("usual")
    against = f"{seconds['bare'] / ours:.2f} | {f'{usual / ours:.2f}' if usual else ''}"
    print(f"| {name} | {'bf16' if setting.bf16 else 'fp32'} | {1 / ours:.1f} | {against} |", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--recipe", choices=ARCHITECTURES, default="segformer-b0", help="recipe of the model")
    parser.add_argument("--image_size", type=int, default=288, help="height and width of the model's input")
    parser.add_argument("--batch_size", type=int, default=16, help="number of slices in a batch")
    parser.add_argument("--steps", type=int, default=4, help="number of steps of a measured training")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="number of trainings of each way; there is one more evaluation and prediction, because they are shorter",
    )
    arguments = parser.parse_args()
    disable_progress_bars()
    print("| what | precision | slices/s | speed / bare loop | speed / usual way |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dataset_dir = write_phantom_dataset(scratch, 2 * NUM_SCANS, days_per_case=1, slices_per_scan=SCAN, num_folds=2)
        for bf16 in (False, True) if computes_bf16() else (False,):
            sizes = arguments.image_size, arguments.batch_size
            setting = Setting(arguments.recipe, dataset_dir, *sizes, bf16, arguments.steps)
            batch = setting.batch_size
            ways = {
                f"training, {batch} slices": compare_training,
                f"training, 4 x {batch // 2} slices; the other loop: 1 x {2 * batch}": compare_accumulation,
                f"evaluation of {NUM_SCANS} scans": compare_evaluation,
                "`predict`, a scan": compare_prediction,
            }
            for name, compare in ways.items():
                # Accumulation does the same in each precision, and it takes longest.
                if not (bf16 and compare is compare_accumulation):
                    print_row(name, setting, compare(setting, arguments.rounds, scratch))


if __name__ == "__main__":
    main()
