"""Models and image processors from a folder or from the Hub."""

import logging
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.models.configuration import check_image_size, find_label_mode, set_task
from gi_segmentation.models.positions import resize_positions
from gi_segmentation.models.random import new_model
from gi_segmentation.schema import LABELS_BY_MODE

logger = logging.getLogger(__name__)
LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


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
    if find_label_mode(model.config) is None:
        labels = [model.config.id2label[index] for index in sorted(model.config.id2label)]
        raise InputError(
            f"{name}: expected a checkpoint with the labels {' or '.join(map(', '.join, LABELS_BY_MODE.values()))}, "
            f"got {len(labels)}: "
            f"{', '.join(map(str, labels[:4]))}{', ...' if len(labels) > 4 else ''}; fine-tune it first"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{name}: lacks {len(missing)} tensors, the first {missing[0]}; take a whole checkpoint")
    return model.eval(), processor


def count_parameters(model: PreTrainedModel) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
