"""Stop a training in order when Slurm, a spot machine or the user asks for it: with a checkpoint of the last step.

The end of `--max_hours` is such a wish too.

`Trainer` has `--enable_jit_checkpoint` for it. We tried it in place of this module, with `transformers` 5.24, whose
file for it is that of 5.23. It loses what a stop is for:

- Each process waits three seconds by its own clock, and then saves for itself. When the signal reached one of two
  processes, they were at different steps and waited for each other for ever.
- It saves without `on_save`, so the checkpoint gets no checksums, and the next start removes it.
- The training ends as if it were over, with exit status 0. The pipeline would score and publish it.
- Ctrl-C saves nothing, and a second signal does not stop the run at once.
- A SIGTERM to all processes, as Slurm sends it, ends those that load slices, and so the training. Nothing is saved.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gi_segmentation.processes import start_loader
from gi_segmentation.training.time_limit import TimeLimit

# SIGTERM is what Slurm, spot machines and containers send before they kill. SIGINT is Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One request to stop may arrive twice: from the system, and from the program that started the processes.
REPEATED_WITHIN_S = 1.0
# Stands for a signal when the time is nearly up. It is smaller than theirs, so that a signal counts more.
TIME_UP = 1


def ignore_signals(worker: int) -> None:
    """Let a process that loads slices ignore `SIGNALS`, which often reach all processes of a training.

    Without its slices, the training could not end its step. The process ends with the training itself, or if the
    training sends it SIGTERM, as `multiprocessing` does when it ends, and then waits for the end of this process.

    Args:
        worker: Number of the process, from `DataLoader`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # A handler of Python does not learn who has sent a signal. So the signal is left waiting for a thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_loader(worker)


def obey_parent() -> None:
    """End this process if its parent sends SIGTERM. That of any other process is for the training."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def hold_signals(held: bool) -> None:
    """Let `SIGNALS` wait, or deliver those that have waited.

    A new process that loads slices starts with the signals of its parent, and PyTorch gives it handlers by which a
    SIGTERM ends it, until it calls `ignore_signals`. A process that is started while signals wait never gets them.
    """
    # Windows has no such function. There, a signal reaches one process only.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if held else signal.SIG_UNBLOCK, SIGNALS)


class StopCallback(TrainerCallback):
    """Saves a checkpoint and ends the training after the step in which a signal arrived, or the time was nearly up.

    Args:
        limit: Says when the time is nearly up.

    Attributes:
        number: The signal, or `TIME_UP`; 0 if none has come in this process, or in any process after `agree`.
        agreed: Whether all processes know that one of them has a number.
    """

    def __init__(self, limit: TimeLimit) -> None:
        self.limit = limit
        self.number, self.agreed = 0, False
        self.arrived_s = 0.0
        self.ended_amid_epoch = False
        self.saved_step = -1
        # The answer of the step before, on the GPU. See `on_step_end`.
        self.answer: torch.Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first of `SIGNALS` until the block ends. A second one has its usual effect at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.number in (0, TIME_UP):
                self.number, self.arrived_s = number, time.monotonic()
                # `print` must not be called here, because the signal may have interrupted a `print`.
                if os.environ.get("RANK", "0") == "0":
                    name = signal.Signals(number).name
                    os.write(2, f"\n{name}: saves a checkpoint after this step; again: stops at once\n".encode())
            elif time.monotonic() - self.arrived_s > REPEATED_WITHIN_S:
                signal.signal(number, earlier[number])
                signal.raise_signal(number)

        # A program in the background of a script ignores Ctrl-C, and this must stay so.
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        earlier = {int(number): signal.signal(number, note) for number in heeded}
        try:
            yield
        finally:
            hold_signals(False)
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def ask_all(self, args: TrainingArguments) -> torch.Tensor:
        """Return the greatest signal number of all processes, on their device. All processes call this together."""
        number = torch.tensor(self.number, device=args.device)
        if args.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number

    def agree(self, answer: torch.Tensor) -> bool:
        """Take what `ask_all` has returned, and return whether any process has a signal."""
        self.number = int(answer) or self.number
        self.agreed = self.agreed or int(answer) > 0
        return self.agreed

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let signals wait while the processes that load the slices of an epoch start."""
        hold_signals(True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals that have waited. The first batch is here."""
        hold_signals(False)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals that have waited. The first batch of an evaluation is here."""
        hold_signals(False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, unless the epoch or the training ends with this step."""
        if not self.number and self.limit.is_nearly_up(args, state, control):
            self.number = TIME_UP
        if args.world_size == 1:
            self.agreed = self.number > 0
        else:
            # All processes must stop at the same step, so they ask each other. Each step reads the answer to the
            # question of the step before. For its own answer, the CPU would wait until the GPU has done this step.
            if self.answer is not None:
                self.agree(self.answer)
            self.answer = self.ask_all(args)
        # At the end of an epoch there may be an evaluation, which belongs into the checkpoint. So such a step stops in
        # `on_epoch_end`. The last step of a training stops without us.
        ends_epoch = float(state.epoch or 0).is_integer()
        if self.agreed and not ends_epoch and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.ended_amid_epoch = True
        # The evaluation comes next, and starts processes too.
        hold_signals(control.should_evaluate)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step that was saved."""
        self.saved_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop at the end of an epoch."""
        if self.ended_amid_epoch:
            # `Trainer` takes this for the end of the epoch. An evaluation here would be one too many: the run that
            # goes on from the checkpoint has another one, at the true end.
            control.should_evaluate = control.should_save = control.should_log = False
        elif self.agreed:
            control.should_training_stop = True
            control.should_save = self.saved_step != state.global_step
        hold_signals(control.should_evaluate)
