"""Load models and their image processors from a folder or from the Hub."""

import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import AutoImageProcessor, PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.arguments import MIN_IMAGE_SIZE, ModelArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.labels import LabelSet
from gi_segmentation.models.configuration import (
    LOAD_ERRORS,
    NO_CODE,
    Task,
    check_image_size,
    find_task,
    set_task,
)
from gi_segmentation.models.encoders import new_upernet
from gi_segmentation.models.head_rows import keep_rows, make_label_tensors
from gi_segmentation.models.normalisation import find_normalisation, read_settings
from gi_segmentation.models.positions import resize_positions
from gi_segmentation.models.random import new_model
from gi_segmentation.models.sources import (
    check_channels,
    check_complete,
    check_encoder,
    first_line,
    load_config,
    load_segmentation_model,
)

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "preprocessor_config.json"
NEEDS_PACKAGE = "needs a package that is not installed; run `pip install -e .[timm]`"
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
    taken, unused = len(model.state_dict()) - len(new), sorted(info["unexpected_keys"])
    # These are warnings, because messages of the level INFO are not shown by default. A tensor that is new by mistake
    # would spoil the whole run.
    for name in new:
        logger.warning("newly made: %s %s%s", name, list(model.state_dict()[name].shape), shapes.get(name, ""))
    if unused:
        logger.warning("not used: %d tensors of the checkpoint, the first %s", len(unused), unused[0])
    logger.warning("all other %d tensors were loaded from the checkpoint", taken)


class LoadedModel(NamedTuple):
    """A model to train.

    Attributes:
        model: The model, with the labels of the dataset.
        processor: Its image processor.
        kept_labels: The labels whose rows of the head come from a checkpoint of this project with other labels, or of
            the other mode; None if the model does not come from such a checkpoint.
    """

    model: PreTrainedModel
    processor: SegformerImageProcessorPil
    kept_labels: list[str] | None = None


def load_model(model_args: ModelArguments, labels: LabelSet, image_size: int, slice_context: int = 0) -> LoadedModel:
    """Return the model to train, with the labels of a dataset.

    If a checkpoint has other labels, the last layer of its head is new. If it is one of this project, the rows of the
    labels that it has are kept. The log names what is new. If a checkpoint was trained at another input size, its
    position tables are interpolated.

    Args:
        model_args: Says where the model comes from and what its channels mean.
        labels: The labels of the dataset.
        image_size: Height and width of the input in pixels.
        slice_context: Written into the model's configuration. The model itself does not use it.

    Raises:
        InputError: If there is no such model, it is not for semantic segmentation, or it cannot take the input size.
    """
    task = Task(labels, model_args.label_mode)
    if model_args.backbone is not None:
        model, mean, std = new_upernet(model_args, task, image_size, slice_context)
        return LoadedModel(model, new_processor(image_size, mean, std))
    if model_args.model_type is not None:
        model = new_model(model_args, task, image_size, slice_context)
        try:
            check_channels(model.config)
        except ValueError as error:
            raise InputError(f"--config_overrides: {error}") from error
        return LoadedModel(model, new_processor(image_size))
    if model_args.config_overrides is not None:
        raise InputError("--config_overrides needs --model_type: a checkpoint's configuration cannot change")
    return load_base(model_args.model_name_or_path, model_args.model_revision, task, image_size, slice_context)


def load_base(name: str, revision: str | None, task: Task, image_size: int, slice_context: int) -> LoadedModel:
    """Return a checkpoint as a model to train, see `load_model`.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the main branch.
        task: What the model shall predict.
        image_size: Height and width of the input in pixels.
        slice_context: Written into the model's configuration.
    """
    try:
        config = load_config(name, revision)
        theirs, number = find_task(config), config.num_labels
        config = set_task(config, task, slice_context)
        # The configuration has our labels, so the model gets a head for them. `ignore_mismatched_sizes` lets tensors
        # of another shape keep their random values, where `from_pretrained` would raise an error.
        model, info = load_segmentation_model(name, revision, config=config, ignore_mismatched_sizes=True)
        check_encoder(model, info)
        mean, std = find_normalisation(read_settings(load_processor(name, revision)))
        if theirs != task and number == config.num_labels:
            info["missing_keys"] |= renew_labels(model)
        kept = None
        if theirs is not None and theirs != task:
            original, _ = load_segmentation_model(name, revision)
            kept = keep_rows(model, original, theirs, task)
    except ImportError as error:
        raise InputError(f"--model_name_or_path {name}: {NEEDS_PACKAGE}") from error
    except LOAD_ERRORS as error:
        raise InputError(f"--model_name_or_path {name}: {one_line(error)}") from error
    check_image_size(config, image_size)
    log_loading(model, info)
    if kept is not None:
        new = [label for label in task.channels if label not in kept]
        named = (", ".join(names) or "no label" for names in (cast(Task, theirs).channels, task.channels, kept, new))
        logger.warning(
            "the checkpoint has other labels (%s) than this training (%s): the new head has the checkpoint's rows for "
            "%s, and starts anew for %s",
            *named,
        )
    # The model is loaded at its own size first. At another size, `from_pretrained` would drop the position tables,
    # because their shape differs. Families without `image_size` have no such tables.
    if getattr(config, "image_size", image_size) != image_size:
        model = resize_positions(model, image_size)
    # The encoder expects the mean and the standard deviation of its pre-training.
    return LoadedModel(model, new_processor(image_size, mean, std), kept)


def load_processor(name: str, revision: str | None) -> Any:
    """Return the image processor of a model; arguments as `load_segmentation_model`.

    Raises:
        ValueError: If there is none, or if its file cannot be read.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, revision=revision, **NO_CODE)
    except LOAD_ERRORS as error:
        there = not Path(name).is_dir() or (Path(name) / PROCESSOR_FILE).exists()
        reason = f"its {PROCESSOR_FILE} cannot be read ({first_line(error)})" if there else f"no {PROCESSOR_FILE}"
        raise ValueError(f"{reason}; copy the one of its model") from error


def renew_labels(model: PreTrainedModel) -> set[str]:
    """Give the layers whose size follows from the labels random values, and return the names of their tensors.

    A checkpoint may have as many labels as we have, but other ones or in another order. Its last layer fits by chance.
    """
    changed = make_label_tensors(model)
    model.load_state_dict(changed, strict=False)
    return set(changed)


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
        load_config(name, revision)
        # A checkpoint of this project never has a pickle, which is the other form of weights.
        model, info = load_segmentation_model(name, revision, ignore_mismatched_sizes=True)
        processor = load_processor(name, revision)
    except ImportError as error:
        # An encoder of timm. The message of transformers names the missing package in a long text.
        raise InputError(f"{name}: {NEEDS_PACKAGE}") from error
    except LOAD_ERRORS as error:
        raise InputError(
            f"{name}: not a checkpoint of this project ({one_line(error)}); name the --output_dir of a "
            f"run, or a Hub id"
        ) from error
    if find_task(model.config) is None:
        labels = list((model.config.id2label or {}).values())
        raise InputError(
            f"{name}: expected a checkpoint of this project, whose labels are organs, got {len(labels)}: "
            f"{', '.join(map(str, labels[:4]))}{', ...' if len(labels) > 4 else ''}; fine-tune it first"
        )
    try:
        check_complete(model, info)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
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
    # A slice is always resized to the input of the model, as in the training.
    for key, expected in (("do_resize", True), ("do_center_crop", False), ("do_flip_channel_order", False)):
        if bool(getattr(processor, key, None)) is not expected:
            raise InputError(
                f"{name}: preprocessor_config.json: expected {str(expected).lower()} as {key}, as this project writes "
                f"it, but got {getattr(processor, key, None)!r:.80}"
            )
    try:
        mean, std = find_normalisation(read_settings(processor))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    # `data.transforms.normalize` uses these two.
    processor.image_mean, processor.image_std = tuple(mean), tuple(std)
    context = getattr(model.config, "slice_context", 0)
    if not is_whole(context, 0, MAX_SLICE_CONTEXT):
        raise InputError(
            f"{name}: config.json: expected 0 to {MAX_SLICE_CONTEXT} as slice_context, but got {context!r:.80}"
        )


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
