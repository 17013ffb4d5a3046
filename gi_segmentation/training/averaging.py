"""An exponential moving average of the weights (EMA): it is what is scored, kept and published."""

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
    """Move averaged weights towards the current ones, in place; for `AveragedModel`.

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + step) / (10 + step))

    At first d is small and the average short, because a long one would be of the random weights at the start.
    """
    weight = 1 - min(decay, (1 + int(step)) / (10 + int(step)))
    for average, value in zip(averaged, current, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight)
        else:
            average.copy_(value)  # a count, as batch normalisation keeps it, has no average


def make_average(model: PreTrainedModel, decay: float) -> AveragedModel:
    """A copy of a model that follows its weights as their average, buffers included."""
    return AveragedModel(model, multi_avg_fn=partial(average_weights, decay=decay), use_buffers=True)


class AverageCallback(TrainerCallback):
    """Updates an average after every optimizer step."""

    def __init__(self, average: AveragedModel) -> None:
        self.average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the new weights in."""
        self.average.update_parameters(kwargs["model"])


@contextmanager
def exchanged_weights(model: PreTrainedModel, average: AveragedModel | None) -> Iterator[None]:
    """Put the averaged weights into a model, and the model's own into the average, until the block ends."""

    def exchange() -> None:
        if average is not None:
            others = average.module.state_dict()
            for name, tensor in model.state_dict().items():
                kept = tensor.clone()
                tensor.copy_(others[name])
                others[name].copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()
