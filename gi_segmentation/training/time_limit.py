"""When a training must end to be within `--max_hours`: what its steps, evaluations and checkpoints take is measured.

Kaggle and many clusters end a program when its time is over, and then all that it has not saved is lost. So a training
ends before. `stopping` does it, as after a signal.
"""

import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gi_segmentation.files import write_json

# In the output folder, after a part of a training. The exit status cannot tell a part from a failure, because
# `accelerate launch` turns every status that is not 0 into 1, and prints a traceback. So it is 0 after a part.
PART_FILE = "part_done.json"
# What was measured may take so many times as long when it comes again.
SPREAD = 1.5
# Seconds for the start of the launcher, which no process knows, and for the end of all processes.
ENDING_S = 60.0
# The first checkpoint of a start is not measured yet. It is taken to have so many numbers of 4 bytes for each weight
# of the model (two sets of weights, two moments of the optimizer), and the disk to write so many bytes a second.
NUMBERS, SLOW_DISK = 4, 20e6
# The final evaluation, with surface distances, takes so many times as long as one in the training. For a tiny model on
# a CPU it was 2.6 times. A larger model adds the same to both.
FINAL = 3
# An evaluation with flips has so many forward passes.
FLIPPED_PASSES = 4
# The last steps say how long the next one takes.
STEPS = 20


class TimeLimit(TrainerCallback):
    """Measures what a training does, and says when its time is nearly up.

    Args:
        max_hours: From `--max_hours`; None: there is no limit.
        started_s: When the command started, by `time.monotonic`.
        to_score: Number of slices of an evaluation.
    """

    def __init__(self, max_hours: float | None, started_s: float, to_score: int = 0) -> None:
        self.max_hours, self.started_s, self.to_score = max_hours, started_s, to_score
        # When the last thing that is measured ended.
        self.last_s = started_s
        self.steps_s: deque[float] = deque(maxlen=STEPS)
        self.evaluation_s = self.saving_s = 0.0

    def lap(self) -> float:
        """Return the seconds since the last call."""
        before, self.last_s = self.last_s, time.monotonic()
        return self.last_s - before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what is known before the first step: the last evaluation of an earlier start, the size of the model."""
        model: PreTrainedModel = kwargs["model"]
        self.saving_s = sum(one.numel() for one in model.parameters()) * 4 * NUMBERS / SLOW_DISK
        self.evaluation_s = max((one["eval_runtime"] for one in state.log_history if "eval_runtime" in one), default=0)
        self.lap()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure a step, with the wait for its slices."""
        self.steps_s.append(self.lap())
        if not self.evaluation_s:
            # A forward pass takes less than a step. The scores take some time too.
            slices = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.evaluation_s = min(self.steps_s) * self.to_score / slices

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure an evaluation."""
        self.evaluation_s = self.lap()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure a checkpoint, until it is sealed."""
        self.saving_s = self.lap()

    def lacks(self, seconds: float) -> bool:
        """Return whether something that was measured to take so long would end too late."""
        if self.max_hours is None:
            return False
        return time.monotonic() - self.started_s + SPREAD * seconds + ENDING_S > self.max_hours * 3600

    def is_nearly_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Return whether the training must end with this step, because there is no time for the next one.

        Args:
            args: Says how many processes there are, and when there is an evaluation.
            state: Has the step that has just ended.
            control: Says whether an evaluation comes now.
        """
        # Several processes stop a step later than they ask to, see `StopCallback`.
        steps = 1 if args.world_size == 1 else 2
        evaluations = count_evaluations(args, state, steps) + control.should_evaluate
        return self.lacks(steps * max(self.steps_s) + evaluations * self.evaluation_s + self.saving_s)

    def lacks_scoring(self, with_flips: bool) -> bool:
        """Return whether there is no time to score the best checkpoint when the training is over."""
        passes = FINAL + with_flips * (FINAL + FLIPPED_PASSES)
        return self.lacks(passes * self.evaluation_s + self.saving_s)


def count_evaluations(args: TrainingArguments, state: TrainerState, steps: int) -> int:
    """Return how many evaluations come in the next steps, and at the end of an epoch that has just ended."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "steps" and state.eval_steps:
        return int((state.global_step + steps) // state.eval_steps - state.global_step // state.eval_steps)
    if strategy == "epoch" and state.epoch:
        # The half is for a last step of an epoch with fewer batches than the others.
        ahead = state.epoch + (steps + 0.5) * state.epoch / state.global_step
        return int(ahead) - int(state.epoch) + float(state.epoch).is_integer()
    return 0


def write_part(output_dir: Path, state: TrainerState) -> None:
    """Say in a file that a part of a training is done, for programs that start the next part."""
    write_json(output_dir / PART_FILE, {"step": state.global_step, "of": state.max_steps})


def forget_part(output_dir: Path) -> None:
    """Remove the file of an earlier part, before the next one begins."""
    (output_dir / PART_FILE).unlink(missing_ok=True)
