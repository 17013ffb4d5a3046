"""What a training says before its first step: where it computes, on what, and how long it will take."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The times of so many steps make an estimate. The first steps of a run take longer, so they are not among them.
TIMED_STEPS, FIRST_STEPS = 10, 2
# A shorter rest of a run needs no estimate.
SHORT_S = 60
# The driver of NVIDIA makes this folder, even if PyTorch does not find a GPU.
NVIDIA = Path("/proc/driver/nvidia/gpus")
PRECISIONS = {"no": "32 bits", "bf16": "16 bits (bf16)", "fp16": "16 bits (fp16)"}


def describe_device(device: torch.device, num_processes: int, precision: str) -> str:
    """Return a line about the device and the precision.

    Args:
        device: The device of this process.
        num_processes: Number of processes of the run.
        precision: A key of `PRECISIONS`.
    """
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
    else:
        name = f"the CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
    bits = PRECISIONS.get(precision, precision)
    if device.type == "cuda" and precision == "no" and torch.backends.cuda.matmul.allow_tf32:
        bits += ", products of matrices in TF32"
    processes = f", {num_processes} processes" if num_processes > 1 else ""
    return f"trains on {name}{processes}, in {bits}"


def find_missing_gpu(device: torch.device, wants_cpu: bool) -> str | None:
    """Return a line that says why a run that could use a GPU does not; None if there is nothing to say.

    Args:
        device: The device of this process.
        wants_cpu: Whether the flags or the configuration of accelerate ask for the CPU.
    """
    if device.type != "cpu" or wants_cpu:
        return None
    line = "no GPU found: trains on the CPU, which is many times slower"
    if NVIDIA.is_dir() and any(NVIDIA.iterdir()):
        line += (
            f"; this machine has one, but PyTorch {torch.__version__} for {platform.machine()} cannot use it: check "
            f"CUDA_VISIBLE_DEVICES, the driver, and that this PyTorch is built for CUDA"
        )
    return line


def describe_slices(train: Dataset, validation: Dataset) -> str:
    """Return a line about the slices and the patients."""

    def count(slices: Dataset) -> str:
        patients = len(slices.unique("case"))
        return f"{len(slices):,} slices of {patients} patient{'s' * (patients > 1)}"

    return f"{count(train)} to train on, {count(validation) if len(validation) else 'none held back'} to score"


def describe_steps(args: TrainingArguments, state: TrainerState, batch_size: int, batches: int) -> list[str]:
    """Return lines about batches and steps.

    Args:
        args: Says how batches are accumulated, and when there is an evaluation.
        state: Says how many steps the run has, and how many are done.
        batch_size: Number of slices in a batch of a process.
        batches: Number of batches of a process in an epoch.
    """
    accumulated, processes = args.gradient_accumulation_steps, args.world_size
    step = (
        f"{batch_size} a batch x {accumulated} accumulated x {processes} "
        f"process{'es' * (processes > 1)} = {batch_size * accumulated * processes} slices a step"
    )
    epochs = state.max_steps * accumulated / max(batches, 1)
    left = f", {state.max_steps - state.global_step:,} of them left" if state.global_step else ""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    often = {
        "steps": f"an evaluation every {state.eval_steps or 0:g} steps",
        "epoch": "an evaluation after each epoch",
    }
    steps = f"{state.max_steps:,} steps{left} (about {epochs:.3g} epochs), {often.get(strategy, 'no evaluation')}"
    return [step, steps]


def describe_seconds(seconds: float) -> str:
    """Return a time as a person would say it.

    Example:
        >>> describe_seconds(70), describe_seconds(200), describe_seconds(9_000)
        ('1 minute', '3 minutes', '2.5 hours')
    """
    minutes = round(seconds / 60)
    return f"{minutes} minute{'s' * (minutes != 1)}" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class HeaderCallback(TrainerCallback):
    """Prints the header, and after the first steps about how long the run will take.

    Args:
        train: The training slices.
        validation: The slices to score; empty with `--fold all`.
    """

    def __init__(self, train: Dataset, validation: Dataset) -> None:
        self.slices = describe_slices(train, validation)
        self.steps = 0
        self.seconds: list[float] = []
        # The end of the step before, if nothing else has happened since.
        self.last: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the header. With `--auto_find_batch_size`, there is one for each batch size that is tried."""
        if not state.is_world_process_zero:
            return
        # `accelerate launch` tells by this variable what its configuration asks for.
        wants_cpu = args.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        loader = kwargs["train_dataloader"]
        batch_size = state.train_batch_size or args.train_batch_size
        lines = [
            describe_device(args.device, args.world_size, AcceleratorState().mixed_precision),
            find_missing_gpu(args.device, wants_cpu),
            self.slices,
            *describe_steps(args, state, batch_size, len(loader)),
        ]
        print("\n".join(line for line in lines if line), flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the time of a step, and print the estimate when there are enough."""
        now = time.monotonic()
        self.steps += 1
        if self.last is not None and self.steps > FIRST_STEPS:
            self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) != TIMED_STEPS or not state.is_world_process_zero:
            return
        left = sum(self.seconds) / TIMED_STEPS * (state.max_steps - state.global_step)
        # Once.
        self.seconds.append(0)
        if left >= SHORT_S:
            # Beside a progress bar.
            tqdm.write(f"about {describe_seconds(left)} left, without evaluations")

    def forget(self, *args: Any, **kwargs: Any) -> None:
        """Leave the present step out, because something else has happened since the one before."""
        self.last = None

    on_epoch_begin = on_evaluate = on_save = forget
