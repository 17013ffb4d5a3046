"""The parts of a model's configuration that this pipeline sets or checks: labels, neighbouring slices, input size."""

import math
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from gi_segmentation.arguments import MIN_IMAGE_SIZE
from gi_segmentation.errors import InputError
from gi_segmentation.labels import BACKGROUND, GI_TRACT, LabelMode, LabelSet
from gi_segmentation.schema import FieldOfView

# A repository may ask for Python code of its own (`auto_map` in its JSON). Without this, `transformers` would ask the
# user whether to run it.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# What `from_pretrained` raises for a missing, damaged or foreign checkpoint. A wrong value in its JSON is found by the
# layer that uses it, in its own way.
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip


class Task(NamedTuple):
    """What a model predicts.

    Attributes:
        labels: The organs.
        label_mode: What the model's channels mean.
    """

    labels: LabelSet
    label_mode: LabelMode

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the model's channels."""
        return self.labels.channels(self.label_mode)


def set_task(config: PreTrainedConfig, task: Task, slice_context: int) -> PreTrainedConfig:
    """Write labels and slice context into a configuration, and return it.

    Args:
        config: Configuration of a model. It is changed.
        task: What the model predicts.
        slice_context: The channels are the slices i-K, i and i+K of a scan, with K this number.
    """
    # `transformers` makes the head with as many channels as there are labels. The configuration is published with the
    # weights, so labels and slice context reach every user of the model.
    config.id2label = dict(enumerate(task.channels))
    config.label2id = {label: index for index, label in enumerate(task.channels)}
    config.slice_context = slice_context
    # A checkpoint of this project may have limits for components, which were learnt from its own predictions, and the
    # ranges and the field of view of the scans that it was trained on.
    for name in ("postprocessing", "training_ranges", "field_mm"):
        vars(config).pop(name, None)
    return config


def find_task(config: PreTrainedConfig) -> Task | None:
    """Return what a checkpoint of this project predicts; None for any other model.

    The labels tell the mode: with `multiclass` there is a background, with `multilabel` there is none.

    Example:
        >>> config = PreTrainedConfig(id2label={0: "background", 1: "liver"}, slice_context=0)
        >>> find_task(config)
        Task(labels=LabelSet(names=('liver',)), label_mode='multiclass')
    """
    id2label = cast(dict[int, str], config.id2label or {})
    if not all(isinstance(index, int) for index in id2label):
        return None
    # The order of the ids counts, because the channels have it too.
    names = tuple(id2label[index] for index in sorted(id2label))
    multiclass = names[:1] == (BACKGROUND,)
    try:
        task = Task(LabelSet(names[1:] if multiclass else names), "multiclass" if multiclass else "multilabel")
    except InputError:
        return None
    # The names of streets or of animals could be those of organs too. Only a training of ours writes this entry. The
    # first versions did not, and knew only the three organs of Kaggle.
    return task if task.labels == GI_TRACT or hasattr(config, "slice_context") else None


def read_field_mm(config: PreTrainedConfig) -> FieldOfView | None:
    """Return the field of view of the slices that a checkpoint was trained on; None if it is that of Kaggle's slices.

    A model sees each slice as a square of the same number of pixels. So a prediction crops or pads a slice to a field
    of view that the training had. `training.training_ranges.find_field_mm` finds it.

    Raises:
        InputError: If the configuration has a field of view of another form. Anybody may have written it.

    Example:
        >>> read_field_mm(PreTrainedConfig(field_mm=[[350, 420.5], [350, 500]]))
        ((350.0, 420.5), (350.0, 500.0))
    """
    value = getattr(config, "field_mm", None)
    if value is None:
        return None

    def is_range(ends: Any) -> bool:
        numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        return numbers and all(map(math.isfinite, ends)) and 0 < ends[0] <= ends[1]

    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_range, value))):
        raise InputError(
            f"config.json: expected the smallest and the largest height, and the same of the width, in millimetres as "
            f"field_mm, but got {value!r:.80}"
        )
    (low, high), (left, right) = value
    return (float(low), float(high)), (float(left), float(right))


def check_image_size(config: PreTrainedConfig, image_size: int) -> None:
    """Check that a model can take an input size.

    Args:
        config: Configuration of the model.
        image_size: Height and width of the input in pixels.

    Raises:
        InputError: If the size is not a multiple of the model's patch size. The message names the nearest sizes that
            are.
    """
    # DPT and BEiT cut the image into patches, for example 288 / 16 = 18 in each direction. The patch size of a UPerNet
    # is that of its backbone. SegFormer has no single patch size and takes every input size.
    backbone = getattr(config, "backbone_config", None) or config
    patch_size = getattr(config, "patch_size", None) or getattr(backbone, "patch_size", None)
    if isinstance(patch_size, int) and image_size % patch_size:
        below = image_size - image_size % patch_size
        nearest = [str(size) for size in (below, below + patch_size) if size >= MIN_IMAGE_SIZE]
        raise InputError(
            f"--image_size {image_size}: {config.model_type} cuts patches of {patch_size} pixels; "
            f"the nearest it can take: {' and '.join(nearest)}"
        )
