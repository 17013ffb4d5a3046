"""An exponential moving average of the weights: it is what is scored, kept and published."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from gi_segmentation.training.trainer import SegmentationTrainer


def average_weights(
    averaged: list[torch.Tensor], current: list[torch.Tensor], step: torch.Tensor, decay: float
) -> None:
    """Move averaged weights towards the current ones, in place; for `AveragedModel`.

    In the first steps the average is short, `(1 + step) / (10 + step)`, as it would else be of mostly random weights.
    """
    weight = 1 - min(decay, (1 + int(step)) / (10 + int(step)))
    for average, value in zip(averaged, current, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight)
        else:
            average.copy_(value)


class AverageCallback(TrainerCallback):
    """Averages the weights after every step."""

    def __init__(self, trainer: "SegmentationTrainer") -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the new weights in."""
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)


@contextmanager
def exchanged_weights(model: PreTrainedModel, average: AveragedModel | None) -> Iterator[None]:
    """Let a model hold its averaged weights, and the average the model's."""

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
