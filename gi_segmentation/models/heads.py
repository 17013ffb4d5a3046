"""The encoder and the auxiliary head of a model, and gradient checkpointing.

UPerNet, BEiT and DPT may have an auxiliary head. It predicts the organs from a feature map of the encoder. Its loss
helps to train the encoder. Predictions do not use it, so it is neither scored nor published.
"""

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
    """Make `--gradient_checkpointing` possible for ConvNeXt backbones too.

    With gradient checkpointing, a layer does not keep its activations for the backward pass but computes them again.
    This needs less memory and more time.

    Raises:
        InputError: If the layers of this family cannot do that.
    """
    if model.supports_gradient_checkpointing:
        return
    if not checkpoint_convnext_layers(model):
        raise InputError(f"--gradient_checkpointing: {model.config.model_type} cannot do that; leave it out")


@contextmanager
def without_auxiliary_head(model: PreTrainedModel) -> Iterator[None]:
    """Take the auxiliary head from a model until the block ends. A model without one stays as it is."""
    head = getattr(model, "auxiliary_head", None)
    drop_auxiliary_head(model)
    try:
        yield
    finally:
        if head is not None:
            # The same module comes back, so its parameters are still those that the optimizer holds.
            model.auxiliary_head, model.config.use_auxiliary_head = head, True


def drop_auxiliary_head(model: PreTrainedModel) -> None:
    """Take the auxiliary head from a model for good. A model without one stays as it is."""
    if getattr(model, "auxiliary_head", None) is not None:
        setattr(model, "auxiliary_head", None)  # noqa: B010 - the type checker knows modules only
        # The configuration must agree with the weights. Otherwise `from_pretrained` would make a new auxiliary head
        # and warn about missing weights.
        model.config.use_auxiliary_head = False


@dataclass
class OutputInTraining(SemanticSegmenterOutput):
    """The output of a model with an auxiliary head in training.

    Attributes:
        auxiliary_logits: Logits of the auxiliary head, float, shape `(B, channels, h, w)`.
    """

    auxiliary_logits: torch.Tensor | None = None


def return_auxiliary_logits(model: PreTrainedModel) -> None:
    """Make a model return `auxiliary_logits` in training. A model without an auxiliary head stays as it is.

    The models of `transformers` compute these logits, but they use them only for their own loss and do not return
    them. Two hooks add them to the output: the first keeps what the auxiliary head computes, and the second adds it.
    """
    # The logits must be part of the output. DistributedDataParallel searches the output of a forward pass for the
    # parameters that will get a gradient. Without these logits, it would count the parameters of the auxiliary head as
    # unused, and raise an error when their gradients arrive.
    auxiliary_head = getattr(model, "auxiliary_head", None)
    if auxiliary_head is None:
        return

    def keep(head: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        head.latest_logits = logits

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        head = module.auxiliary_head
        # The logits are removed from the head, because they keep the graph of this forward pass in memory. `nn.Module`
        # stores a plain tensor in `__dict__`.
        logits = None if head is None else head.__dict__.pop("latest_logits", None)
        if module.training and logits is not None:
            return OutputInTraining(**output, auxiliary_logits=logits)
        return output

    auxiliary_head.register_forward_hook(keep)
    model.register_forward_hook(add)


def all_logits(output: Any) -> list[torch.Tensor]:
    """Return the logits of the head and, in training, those of the auxiliary head if the model has one."""
    return [output.logits, *([output.auxiliary_logits] if isinstance(output, OutputInTraining) else [])]


def find_encoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that was pre-trained on natural images. The rest is the head."""
    # UPerNet calls its encoder `backbone`. In the other families it is the base model, for example `model.segformer`.
    return getattr(model, "backbone", None) or model.base_model
