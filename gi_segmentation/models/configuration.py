"""What this pipeline asks of a model's configuration: labels, neighbouring slices, an input size it can take."""

from typing import cast

from transformers import PreTrainedConfig

from gi_segmentation.arguments import MIN_IMAGE_SIZE
from gi_segmentation.errors import InputError
from gi_segmentation.schema import LABELS_BY_MODE, LabelMode


def set_task(config: PreTrainedConfig, label_mode: LabelMode, slice_context: int) -> PreTrainedConfig:
    """Note in a configuration what this pipeline's models do: which labels, from which slices."""
    labels = LABELS_BY_MODE[label_mode]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.slice_context = slice_context
    return config


def find_label_mode(config: PreTrainedConfig) -> LabelMode | None:
    """What the channels of a model mean; None where its labels are not ours.

    The labels say it, and travel in every published configuration.
    """
    id2label = cast(dict[int, str], config.id2label or {})
    labels = tuple(id2label[index] for index in sorted(id2label))
    return next((mode for mode, names in LABELS_BY_MODE.items() if names == labels), None)


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
