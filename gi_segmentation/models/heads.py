"""Encoder, head and auxiliary head of a model, and which of its layers forget their activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from gi_segmentation.errors import InputError
from gi_segmentation.internals import checkpoint_convnext_layers


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Let `--gradient_checkpointing` work for ConvNeXt backbones as it does for the other families.

    Raises:
        InputError: If the family's layers cannot be checkpointed.
    """
    if model.supports_gradient_checkpointing:
        return
    if not checkpoint_convnext_layers(model):
        raise InputError(f"--gradient_checkpointing: {model.config.model_type} cannot do that; leave it out")


@contextmanager
def without_auxiliary_head(model: PreTrainedModel) -> Iterator[None]:
    """The model as it is published and scored: its auxiliary head, if it has one, only helps in training."""
    head = getattr(model, "auxiliary_head", None)
    drop_auxiliary_head(model)
    try:
        yield
    finally:
        if head is not None:
            model.auxiliary_head, model.config.use_auxiliary_head = head, True


def drop_auxiliary_head(model: PreTrainedModel) -> None:
    """Take the auxiliary head from a model that has one."""
    if getattr(model, "auxiliary_head", None) is not None:
        setattr(model, "auxiliary_head", None)  # noqa: B010 - the type checker knows modules only
        model.config.use_auxiliary_head = False


@dataclass
class OutputInTraining(SemanticSegmenterOutput):
    """What a model with an auxiliary head gives in training."""

    auxiliary_logits: torch.Tensor | None = None


def return_auxiliary_logits(model: PreTrainedModel) -> None:
    """Make a model's output in training hold `auxiliary_logits`, which it computes but keeps to itself.

    They are part of the output, not fetched behind its back, because DistributedDataParallel looks there for the
    parameters that will have a gradient.
    """
    auxiliary_head = getattr(model, "auxiliary_head", None)
    if auxiliary_head is None:
        return

    def keep(head: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        head.latest_logits = logits

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        head = module.auxiliary_head
        logits = None if head is None else head.__dict__.pop("latest_logits", None)
        if module.training and logits is not None:
            return OutputInTraining(**output, auxiliary_logits=logits)
        return output

    auxiliary_head.register_forward_hook(keep)
    model.register_forward_hook(add)


def all_logits(output: Any) -> list[torch.Tensor]:
    """The logits of a model's head, and in training those of its auxiliary head if it has one."""
    return [output.logits, *([output.auxiliary_logits] if isinstance(output, OutputInTraining) else [])]


def find_encoder(model: PreTrainedModel) -> nn.Module:
    """The part of a model that is pre-trained on images at large; the rest is the head."""
    return getattr(model, "backbone", None) or model.base_model
