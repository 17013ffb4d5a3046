"""Models from random weights: a family and the values of its configuration."""

import json
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.models.configuration import check_image_size, set_task

# What this pipeline sets itself; to change it would be without effect, or break the model's input.
OWN_KEYS = {"num_channels", "num_labels", "id2label", "label2id"}


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
