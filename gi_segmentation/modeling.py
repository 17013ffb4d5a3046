"""Models and image processors: from the Hub, from a folder, or from random weights."""

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessorPil,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from gi_segmentation.arguments import MIN_IMAGE_SIZE, ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.schema import LABELS_BY_MODE

logger = logging.getLogger(__name__)

# What this pipeline sets itself; to change it would be without effect, or break the model's input.
OWN_KEYS = {"num_channels", "num_labels", "id2label", "label2id"}
LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


def to_number(value: Any) -> Any:
    """A value as it is, but text like `1e-4`, which YAML takes for no number, as a number."""
    if isinstance(value, list):
        return [to_number(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_overrides(text: str) -> dict[str, Any]:
    """Read `--config_overrides`.

    Args:
        text: `key=value,key=value`, or a JSON object for nested values.

    Raises:
        InputError: If it is neither.

    Example:
        >>> parse_overrides("depths=[1,1],drop_path_rate=0.0")
        {'depths': [1, 1], 'drop_path_rate': 0.0}
    """
    expected = f"--config_overrides: expected key=value,key=value or JSON, got {text!r}"
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        overrides = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(expected) from error
    if None in overrides.values() or not all(isinstance(key, str) for key in overrides):
        raise InputError(expected)
    return {key: to_number(value) for key, value in overrides.items()}


def random_config(model_type: str, overrides: dict[str, Any], image_size: int) -> PreTrainedConfig:
    """The configuration of a new model of a family.

    Raises:
        InputError: If the family is unknown or has no semantic segmentation, a key is not one of its own or is set
            by this pipeline, or a value is of the wrong type.
    """
    families = sorted(config.model_type for config in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING)
    if model_type not in families:
        raise InputError(f"--model_type: expected one of {', '.join(families)}; got {model_type!r}")
    defaults = AutoConfig.for_model(model_type)
    unknown = [key for key in overrides if not hasattr(defaults, key) or callable(getattr(defaults, key))]
    if unknown:
        raise InputError(f"--config_overrides: {model_type} has no {', '.join(unknown)}")
    own = sorted(OWN_KEYS & set(overrides))
    if own:
        raise InputError(f"--config_overrides: {', '.join(own)} cannot be set; the data decides")
    if overrides.get("image_size", image_size) != image_size:
        raise InputError(f"--config_overrides: image_size is {overrides['image_size']}, but --image_size {image_size}")
    sized = {"image_size": image_size} if hasattr(defaults, "image_size") else {}
    try:
        return AutoConfig.for_model(model_type, **{**sized, **overrides})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"--config_overrides: {error}") from error


def set_task(config: PreTrainedConfig, label_mode: str, slice_context: int) -> PreTrainedConfig:
    """Note in a configuration what this pipeline's models do: which labels, from which slices."""
    labels = LABELS_BY_MODE[label_mode]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.slice_context = slice_context
    return config


def check_image_size(config: PreTrainedConfig, image_size: int) -> None:
    """Check that a family can take an input size.

    Raises:
        InputError: If it is no multiple of the patches that the family cuts; names the nearest sizes that are.
    """
    backbone = getattr(config, "backbone_config", None) or config
    patch_size = getattr(config, "patch_size", None) or getattr(backbone, "patch_size", None)
    if isinstance(patch_size, int) and image_size % patch_size:
        below = image_size - image_size % patch_size
        nearest = [str(size) for size in (below, below + patch_size) if size >= MIN_IMAGE_SIZE]
        raise InputError(
            f"--image_size {image_size}: {config.model_type} cuts patches of {patch_size} pixels; "
            f"the nearest it can take: {' and '.join(nearest)}"
        )


def resize_table(name: str, table: torch.Tensor, length: int) -> torch.Tensor:
    """Interpolate a table of positions, as the family itself does for images of another size.

    Args:
        name: Its name in the model's state.
        table: Position embeddings `(1, 1 + n * n, channels)` with a class token first, or relative position biases
            `((2n - 1)**2 + 3, heads)` with three entries of the class token last.
        length: Rows that the result has, the class token's included.

    Raises:
        InputError: If it is neither, or its positions are no square.
    """
    relative = name.endswith("relative_position_bias_table")
    if not relative and not name.endswith("position_embeddings"):
        raise InputError(f"--image_size: {name} depends on it and cannot be interpolated; leave the size as it is")
    rows = table if relative else table[0]
    grid, extra = (rows[:-3], rows[-3:]) if relative else (rows[1:], rows[:1])
    old, new = math.isqrt(len(grid)), math.isqrt(length - len(extra))
    if old * old != len(grid) or new * new != length - len(extra):
        raise InputError(f"--image_size: {name} holds no square of positions; leave the size as it is")
    mode = "bicubic" if name.startswith("beit.embeddings") else "bilinear"
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(new, new), mode=mode).permute(0, 2, 3, 1).reshape(new * new, -1)
    return torch.cat([resized, extra]) if relative else torch.cat([extra, resized])[None]


def resize_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """A model for another input size, with its position tables interpolated and all else as it was.

    Raises:
        InputError: If a tensor depends on the input size in a way that cannot be interpolated.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    resized = type(model)(config)
    tensors, wanted = model.state_dict(), resized.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            rows = wanted[name].shape[0 if tensor.ndim == 2 else 1]
            tensors[name] = resize_table(name, tensor, rows)
            logger.warning("%s: interpolated from %s to %s", name, list(tensor.shape), list(tensors[name].shape))
    resized.load_state_dict(tensors)
    return resized


def log_loading(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Say which tensors of a checkpoint were taken over and which were newly made."""
    shapes = {name: f" (the checkpoint's is {list(theirs)})" for name, theirs, _ in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *shapes})
    taken = len(model.state_dict()) - len(new)
    for name in new:
        logger.warning("newly made: %s %s%s", name, list(model.state_dict()[name].shape), shapes.get(name, ""))
    logger.warning("all other %d tensors were loaded from the checkpoint", taken)


def load_model(
    model_args: ModelArguments, image_size: int, slice_context: int = 0
) -> tuple[PreTrainedModel, SegformerImageProcessorPil]:
    """The model to train, with our labels, and the image processor that goes with it.

    The head of a checkpoint with other labels is made anew; the log says which tensors those are. A checkpoint of
    another input size keeps its position tables, interpolated.

    Args:
        model_args: Where the model comes from and what its labels are.
        image_size: Height and width of its input.
        slice_context: Noted in its configuration, for whoever prepares its input.

    Raises:
        InputError: If there is no such model, it is not for semantic segmentation, or it cannot take the size.
    """
    if model_args.model_type is not None:
        return new_model(model_args, image_size, slice_context), new_processor(image_size)
    if model_args.config_overrides is not None:
        raise InputError("--config_overrides needs --model_type: a checkpoint's configuration cannot change")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        config = set_task(AutoConfig.from_pretrained(name, revision=revision), model_args.label_mode, slice_context)
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name, revision=revision, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        base = AutoImageProcessor.from_pretrained(name, revision=revision)
    except LOAD_ERRORS as error:
        raise InputError(f"--model_name_or_path {name}: {error}") from error
    check_image_size(config, image_size)
    log_loading(model, info)
    if getattr(config, "image_size", image_size) != image_size:
        model = resize_positions(model, image_size)
    return model, new_processor(image_size, mean=base.image_mean, std=base.image_std)


def new_model(model_args: ModelArguments, image_size: int, slice_context: int) -> PreTrainedModel:
    """A model with random weights.

    Raises:
        InputError: If the family is unknown or these values make no model.
    """
    overrides = parse_overrides(model_args.config_overrides or "")
    config = random_config(str(model_args.model_type), overrides, image_size)
    check_image_size(config, image_size)
    try:
        return AutoModelForSemanticSegmentation.from_config(set_task(config, model_args.label_mode, slice_context))
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"--config_overrides: these values make no {model_args.model_type} ({error})") from error


def new_processor(
    image_size: int, mean: list[float] | None = None, std: list[float] | None = None
) -> SegformerImageProcessorPil:
    """An image processor that stock `transformers` loads, whichever the model's family.

    Args:
        image_size: Height and width of the model's input.
        mean: Mean of the three channels; None takes ImageNet's.
        std: Standard deviation of the three channels; None takes ImageNet's.
    """
    processor = SegformerImageProcessorPil(size={"height": image_size, "width": image_size})
    processor.image_mean, processor.image_std = mean or processor.image_mean, std or processor.image_std
    return processor


def load_checkpoint(name: str, revision: str | None = None) -> tuple[PreTrainedModel, SegformerImageProcessorPil]:
    """Load a checkpoint that this project trained, for prediction.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit.

    Raises:
        InputError: If it is missing or broken, is not for semantic segmentation, or has other labels than ours.
    """
    try:
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name, revision=revision, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    except LOAD_ERRORS as error:
        raise InputError(
            f"{name}: not a checkpoint of this project ({error}); name the --output_dir of a run, or a Hub id"
        ) from error
    labels = tuple(model.config.id2label[index] for index in sorted(model.config.id2label))
    if labels not in LABELS_BY_MODE.values():
        raise InputError(
            f"{name}: expected a checkpoint with the labels {' or '.join(map(', '.join, LABELS_BY_MODE.values()))}, "
            f"got {len(labels)}: "
            f"{', '.join(map(str, labels[:4]))}{', ...' if len(labels) > 4 else ''}; fine-tune it first"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{name}: lacks {len(missing)} tensors, the first {missing[0]}; take a whole checkpoint")
    return model.eval(), processor


class CheckpointedConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
    """A ConvNeXt layer that forgets its activations until the backward pass, which `transformers` has not."""


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Let `--gradient_checkpointing` work for ConvNeXt backbones as it does for the other families.

    Raises:
        InputError: If the family's layers cannot be checkpointed.
    """
    if model.supports_gradient_checkpointing:
        return
    layers = [module for module in model.modules() if type(module) is ConvNextLayer]
    if not layers:
        raise InputError(f"--gradient_checkpointing: {model.config.model_type} cannot do that; leave it out")
    for layer in layers:
        layer.__class__ = CheckpointedConvNextLayer
    model.supports_gradient_checkpointing = True


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


def count_parameters(model: PreTrainedModel) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
