"""Load models and their image processors from a folder or from the Hub."""

import logging
import math
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from gi_segmentation.arguments import MIN_IMAGE_SIZE, ModelArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.models.configuration import LOAD_ERRORS, NO_CODE, check_image_size, find_label_mode, set_task
from gi_segmentation.models.encoders import new_upernet
from gi_segmentation.models.positions import resize_positions
from gi_segmentation.models.random import new_model
from gi_segmentation.schema import LABELS_BY_MODE

logger = logging.getLogger(__name__)

# Height and width of a model's input in pixels, and distance to the neighbours in slices. More is a damaged file.
MAX_IMAGE_SIZE, MAX_SLICE_CONTEXT = 2048, 1000


def log_loading(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Log which tensors were loaded from a checkpoint and which are new.

    Args:
        model: The loaded model.
        info: The loading info of `from_pretrained`.
    """
    # `from_pretrained` does not load tensors of another shape: the last layer of a head for other labels.
    shapes = {name: f" (the checkpoint's is {list(theirs)})" for name, theirs, _ in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *shapes})
    taken = len(model.state_dict()) - len(new)
    # These are warnings, because messages of the level INFO are not shown by default. A tensor that is new by mistake
    # would spoil the whole run.
    for name in new:
        logger.warning("newly made: %s %s%s", name, list(model.state_dict()[name].shape), shapes.get(name, ""))
    logger.warning("all other %d tensors were loaded from the checkpoint", taken)


def load_model(
    model_args: ModelArguments, image_size: int, slice_context: int = 0
) -> tuple[PreTrainedModel, SegformerImageProcessorPil]:
    """Return the model to train, with our labels, and its image processor.

    If a checkpoint has other labels, the last layer of its head is new. The log names the new tensors. If a checkpoint
    was trained at another input size, its position tables are interpolated.

    Args:
        model_args: Says where the model comes from and what its channels mean.
        image_size: Height and width of the input in pixels.
        slice_context: Written into the model's configuration. The model itself does not use it.

    Raises:
        InputError: If there is no such model, it is not for semantic segmentation, or it cannot take the input size.
    """
    if model_args.backbone is not None:
        model, mean, std = new_upernet(model_args, image_size, slice_context)
        return model, new_processor(image_size, mean, std)
    if model_args.model_type is not None:
        return new_model(model_args, image_size, slice_context), new_processor(image_size)
    if model_args.config_overrides is not None:
        raise InputError("--config_overrides needs --model_type: a checkpoint's configuration cannot change")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    try:
        base_config = AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
        config = set_task(base_config, model_args.label_mode, slice_context)
        # The configuration has our labels, so the model gets a head for them. `ignore_mismatched_sizes` lets tensors
        # of another shape keep their random values, where `from_pretrained` would raise an error.
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name, revision=revision, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **NO_CODE
        )
        base = AutoImageProcessor.from_pretrained(name, revision=revision, **NO_CODE)
    except LOAD_ERRORS as error:
        raise InputError(f"--model_name_or_path {name}: {one_line(error)}") from error
    check_image_size(config, image_size)
    log_loading(model, info)
    # The model is loaded at its own size first. At another size, `from_pretrained` would drop the position tables,
    # because their shape differs. Families without `image_size` have no such tables.
    if getattr(config, "image_size", image_size) != image_size:
        model = resize_positions(model, image_size)
    # The encoder expects the mean and the standard deviation of its pre-training.
    return model, new_processor(image_size, mean=base.image_mean, std=base.image_std)


def new_processor(
    image_size: int, mean: list[float] | None = None, std: list[float] | None = None
) -> SegformerImageProcessorPil:
    """Return an image processor. All families get the same class, so that all published models work alike.

    Args:
        image_size: Height and width of the model's input in pixels.
        mean: Mean of each channel, for an image scaled to 0 to 1; None: that of ImageNet.
        std: Standard deviation of each channel; None: that of ImageNet.
    """
    # This class needs Pillow only. The others need torchvision, which this project does not install.
    processor = SegformerImageProcessorPil(size={"height": image_size, "width": image_size})
    processor.image_mean, processor.image_std = mean or processor.image_mean, std or processor.image_std
    return processor


def load_checkpoint(name: str, revision: str | None = None) -> tuple[PreTrainedModel, SegformerImageProcessorPil]:
    """Load a checkpoint that this project trained, for prediction.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the main branch.

    Returns:
        The model in evaluation mode, and its image processor.

    Raises:
        InputError: If the checkpoint is missing or damaged, is not for semantic segmentation, has other labels, or
            needs a package that is not installed.
    """
    try:
        # A checkpoint of this project never has a pickle, which is the other form of weights.
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name, revision=revision, use_safetensors=True, output_loading_info=True, **NO_CODE
        )
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, **NO_CODE)
    except ImportError as error:
        # An encoder of timm. The message of transformers names the missing package in a long text.
        raise InputError(f"{name}: needs a package that is not installed; run `pip install -e .[timm]`") from error
    except LOAD_ERRORS as error:
        raise InputError(
            f"{name}: not a checkpoint of this project ({one_line(error)}); name the --output_dir of a run, or a Hub "
            f"id"
        ) from error
    if find_label_mode(model.config) is None:
        labels = list((model.config.id2label or {}).values())
        raise InputError(
            f"{name}: expected a checkpoint with the labels {' or '.join(map(', '.join, LABELS_BY_MODE.values()))}, "
            f"got {len(labels)}: "
            f"{', '.join(map(str, labels[:4]))}{', ...' if len(labels) > 4 else ''}; fine-tune it first"
        )
    # `from_pretrained` fills missing tensors with random values and only logs it. A prediction would be nonsense.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{name}: lacks {len(missing)} tensors, the first {missing[0]}; use a checkpoint that is complete"
        )
    check_settings(name, model, processor)
    return model.eval(), processor


def check_settings(name: str, model: PreTrainedModel, processor: Any) -> None:
    """Check what a prediction takes from the JSON files of a checkpoint. Anybody may have written them.

    Raises:
        InputError: If a value is missing, or has another form than this project writes.
    """

    def is_whole(value: Any, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    size = getattr(processor, "size", None)
    height: Any = getattr(size, "height", None)
    width: Any = getattr(size, "width", None)
    if not (is_whole(height, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE) and height == width):
        raise InputError(
            f"{name}: preprocessor_config.json: expected a size with the same height and width, {MIN_IMAGE_SIZE} to "
            f"{MAX_IMAGE_SIZE}, but got {size!r:.80}"
        )
    check_image_size(model.config, height)
    for key, above in (("image_mean", -math.inf), ("image_std", 0)):
        value = getattr(processor, key, None)
        numbers = value if isinstance(value, list | tuple) else ()
        if len(numbers) != 3 or not all(isinstance(one, int | float) and above < one < math.inf for one in numbers):
            raise InputError(
                f"{name}: preprocessor_config.json: expected three numbers {'above 0 ' if above == 0 else ''}as "
                f"{key}, but got {value!r:.80}"
            )
    context = getattr(model.config, "slice_context", 0)
    if not is_whole(context, 0, MAX_SLICE_CONTEXT):
        raise InputError(
            f"{name}: config.json: expected 0 to {MAX_SLICE_CONTEXT} as slice_context, but got {context!r:.80}"
        )


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
