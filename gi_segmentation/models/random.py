"""Models with random weights (`--model_type` and `--config_overrides`)."""

import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.models.configuration import Task, check_image_size, set_task
from gi_segmentation.recipe_files import load_yaml

# Keys of a configuration that follow from the data: the input always has three channels, and the labels are the organs
# with or without the background. Weights have 32 bits; --bf16 computes in 16 bits where that is exact enough.
OWN_KEYS = {"num_channels", "num_labels", "id2label", "label2id", "dtype", "torch_dtype"}


def to_number(value: Any) -> Any:
    """Convert text that is a number. Any other value is returned as it is.

    Example:
        >>> to_number("1e-4"), to_number("gelu")
        (0.0001, 'gelu')
    """
    # YAML 1.1 reads `1e-4` as text, because it has no decimal point.
    if isinstance(value, list):
        return [to_number(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_overrides(text: str) -> dict[str, Any]:
    """Read `--config_overrides`.

    Args:
        text: `key=value,key=value`, or a JSON object for nested values. Empty text means no values.

    Raises:
        InputError: If the text has neither form.

    Example:
        >>> parse_overrides("depths=[1,1],drop_path_rate=0.0")
        {'depths': [1, 1], 'drop_path_rate': 0.0}
    """
    expected = f"--config_overrides: expected key=value,key=value or JSON, got {text[:200]!r}"
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        # `a=[1,2],b=3` becomes the YAML mapping `{a: [1,2],b: 3}`.
        overrides = load_yaml("{" + text.replace("=", ": ") + "}")
    # JSON that is nested too deeply ends the recursion of the parser.
    except (ValueError, RecursionError) as error:
        raise InputError(expected) from error
    # A key without a value gives None, as in `depths=` and `depths`.
    if None in overrides.values() or not all(isinstance(key, str) for key in overrides):
        raise InputError(expected)
    return {key: to_number(value) for key, value in overrides.items()}


def random_config(model_type: str, overrides: dict[str, Any], image_size: int) -> PreTrainedConfig:
    """Return the configuration of a new model.

    Args:
        model_type: Name of the family, for example segformer.
        overrides: Values that replace the defaults of the family.
        image_size: Height and width of the input in pixels.

    Raises:
        InputError: If the family is unknown or has no model for semantic segmentation, if it has no such key, if the
            key follows from the data, or if a value has the wrong type.
    """
    families = sorted(config.model_type for config in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING)
    if model_type not in families:
        raise InputError(f"--model_type: expected one of {', '.join(families)}; got {model_type!r}")
    defaults = AutoConfig.for_model(model_type)
    # A configuration accepts any key without complaint, so a misspelt key would have no effect. Its methods, for
    # example `to_dict`, are attributes too but no keys.
    unknown = [key for key in overrides if not hasattr(defaults, key) or callable(getattr(defaults, key))]
    if unknown:
        raise InputError(f"--config_overrides: {model_type} has no {', '.join(unknown)}")
    own = sorted(OWN_KEYS & set(overrides))
    if own:
        raise InputError(
            f"--config_overrides: {', '.join(own)} cannot be set, because the data decides, or the pipeline"
        )
    if overrides.get("image_size", image_size) != image_size:
        raise InputError(f"--config_overrides: image_size is {overrides['image_size']}, but --image_size {image_size}")
    sized = {"image_size": image_size} if hasattr(defaults, "image_size") else {}
    try:
        return AutoConfig.for_model(model_type, **{**sized, **overrides})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"--config_overrides: {one_line(error)}") from error


def build_model(config: PreTrainedConfig, task: Task, slice_context: int) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        config: From `random_config`.
        task: What the model predicts.
        slice_context: Written into the model's configuration.

    Raises:
        InputError: If no model can be made with these values.
    """
    # Values that do not fit together, for example three depths but four widths, only show when the layers are made.
    try:
        return AutoModelForSemanticSegmentation.from_config(set_task(config, task, slice_context), dtype=torch.float32)
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = one_line(error)
        raise InputError(f"--config_overrides: these values make no {config.model_type} ({reason})") from error


def new_model(model_args: ModelArguments, task: Task, image_size: int, slice_context: int) -> PreTrainedModel:
    """Return a model with random weights.

    Args:
        model_args: Says which family, and which values of its configuration.
        task: What the model predicts.
        image_size: Height and width of the input in pixels.
        slice_context: Written into the model's configuration.

    Raises:
        InputError: If the family is unknown, or no model can be made with these values.
    """
    overrides = parse_overrides(model_args.config_overrides or "")
    config = random_config(str(model_args.model_type), overrides, image_size)
    check_image_size(config, image_size)
    return build_model(config, task, slice_context)
