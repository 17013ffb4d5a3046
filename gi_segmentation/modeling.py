"""Models and image processors: from the Hub, from a folder, or from random weights."""

import json
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.schema import ID2LABEL, LABEL2ID, LABELS

# What this pipeline sets itself; to change it would be without effect, or break the model's input.
OWN_KEYS = {"num_channels", "num_labels", "id2label", "label2id", "use_auxiliary_head"}
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


def set_labels(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give a configuration our labels, and no auxiliary head: nothing here would train it."""
    config.id2label = ID2LABEL
    config.label2id = LABEL2ID
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    return config


def load_model(model_args: ModelArguments, image_size: int) -> tuple[PreTrainedModel, SegformerImageProcessorPil]:
    """The model to train, with our labels, and the image processor that goes with it.

    The head of a checkpoint with other labels is made anew; the log says which tensors those are.

    Args:
        model_args: Where the model comes from.
        image_size: Height and width of its input.

    Raises:
        InputError: If there is no such model or it is not for semantic segmentation.
    """
    if model_args.model_type is not None:
        overrides = parse_overrides(model_args.config_overrides or "")
        config = set_labels(random_config(model_args.model_type, overrides, image_size))
        try:
            return AutoModelForSemanticSegmentation.from_config(config), new_processor(image_size)
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise InputError(f"--config_overrides: these values make no {model_args.model_type} ({error})") from error
    if model_args.config_overrides is not None:
        raise InputError("--config_overrides needs --model_type: a checkpoint's configuration cannot change")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        config = set_labels(AutoConfig.from_pretrained(name, revision=revision))
        model = AutoModelForSemanticSegmentation.from_pretrained(
            name, revision=revision, config=config, ignore_mismatched_sizes=True
        )
        base = AutoImageProcessor.from_pretrained(name, revision=revision)
    except LOAD_ERRORS as error:
        raise InputError(f"--model_name_or_path {name}: {error}") from error
    return model, new_processor(image_size, mean=base.image_mean, std=base.image_std)


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
        raise InputError(f"{name}: not a checkpoint of this project ({error})") from error
    labels = tuple(model.config.id2label[index] for index in sorted(model.config.id2label))
    if labels != LABELS:
        raise InputError(
            f"{name}: expected a checkpoint with the labels {', '.join(LABELS)}, got {len(labels)}: "
            f"{', '.join(map(str, labels[:4]))}{', ...' if len(labels) > 4 else ''}; fine-tune it first"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{name}: lacks {len(missing)} tensors, the first {missing[0]}; take a whole checkpoint")
    return model.eval(), processor


def count_parameters(model: PreTrainedModel) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
