"""An exponential moving average of the weights (EMA).

The averaged weights are scored, saved and published. The training itself goes on with the model's own weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def average_weights(
    averaged: list[torch.Tensor], current: list[torch.Tensor], step: torch.Tensor, decay: float
) -> None:
    """Move averaged weights towards the current ones, in place.

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + step) / (10 + step))

    `AveragedModel` calls this function after each step. The average reaches back over about 1 / (1 - d) steps. At
    first d is small, so that the weights of the first steps are soon forgotten.

    Args:
        averaged: The tensors of the average. They are changed.
        current: The tensors of the model, in the same order.
        step: Number of steps that the average has seen.
        decay: Greatest value of d.
    """
    # With decay 0.999, d is 2/11 at step 1, 0.92 at step 100, and reaches 0.999 at step 8990.
    weight = 1 - min(decay, (1 + int(step)) / (10 + int(step)))
    for average, value in zip(averaged, current, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight)
        else:
            # Batch normalisation counts its batches in an integer. A count has no average.
            average.copy_(value)


def make_average(model: PreTrainedModel, decay: float) -> AveragedModel:
    """Return a copy of a model that holds the average of its weights."""
    # The running statistics of batch normalisation are buffers and no parameters. They are averaged too, because the
    # model's own statistics would not fit the averaged weights.
    return AveragedModel(model, multi_avg_fn=partial(average_weights, decay=decay), use_buffers=True)


class AverageCallback(TrainerCallback):
    """Updates an average after every optimizer step."""

    def __init__(self, average: AveragedModel) -> None:
        self.average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the weights of this step to the average."""
        # Callbacks come after the optimizer and before an evaluation, so that an evaluation sees the newest average.
        self.average.update_parameters(kwargs["model"])


@contextmanager
def exchanged_weights(model: PreTrainedModel, average: AveragedModel | None) -> Iterator[None]:
    """Put the averaged weights into a model, and the model's own into the average, until the block ends.

    Args:
        model: The model that is trained.
        average: Its average; None leaves the model as it is.
    """

    def exchange() -> None:
        if average is not None:
            others = average.module.state_dict()
            # The numbers are copied and the tensors stay the same objects, because the optimizer and
            # DistributedDataParallel hold these tensors. The copies go one by one, so the exchange needs memory for
            # one more tensor and not for a third model.
            for name, tensor in model.state_dict().items():
                kept = tensor.clone()
                tensor.copy_(others[name])
                others[name].copy_(kept)

    exchange()
    try:
        yield
    finally:
        # The second exchange undoes the first one, after an error too.
        exchange()
