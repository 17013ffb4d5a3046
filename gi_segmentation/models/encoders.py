"""A pre-trained encoder under a new segmentation head: UPerNet around a backbone of `transformers` or of timm.

UPerNet (Xiao et al. 2018, arXiv 1807.10221) takes four feature maps of an encoder and joins them into one. So every
encoder that gives feature maps can become a segmentation model. The result is a stock `UperNetForSemanticSegmentation`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmBackboneConfig,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.models.configuration import check_image_size
from gi_segmentation.models.random import build_model, parse_overrides, random_config

logger = logging.getLogger(__name__)

NUM_FEATURE_MAPS = 4
TIMM_MODEL_TYPE = "timm_wrapper"  # how `transformers` calls a repository or folder in timm's own format
LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError, HfHubHTTPError)
# The normalisation of ImageNet, for an encoder that says nothing about its own.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pick_stages(number: int) -> list[int]:
    """Choose the stages of an encoder whose feature maps UPerNet takes.

    A convolutional or hierarchical encoder has four stages, often after a stem. All four are taken, and the stem is
    left out. A plain vision transformer has one stage per layer, all of one resolution. Four of them at equal distances
    are taken, as BEiT does in its UPerNet (arXiv 2106.08254, appendix): for 12 layers the layers 3, 6, 9 and 12.

    Args:
        number: Number of stages, the stem (stage 0) included.

    Returns:
        Four indices, ascending; the last stage is always one of them.

    Raises:
        ValueError: If there are fewer than four stages.

    Example:
        >>> pick_stages(4), pick_stages(5), pick_stages(13)
        ([0, 1, 2, 3], [1, 2, 3, 4], [3, 6, 9, 12])
    """
    if number < NUM_FEATURE_MAPS:
        raise ValueError(f"expected at least {NUM_FEATURE_MAPS} feature maps, but it has {number}")
    last = number - 1
    if number == NUM_FEATURE_MAPS:
        return list(range(number))
    return [round(last * part / NUM_FEATURE_MAPS) for part in range(1, NUM_FEATURE_MAPS + 1)]


Encoder = tuple[PreTrainedConfig, dict[str, torch.Tensor], Sequence[float], Sequence[float]]


def load_encoder(name: str, revision: str | None) -> Encoder:
    """Load an encoder of `transformers`.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Its configuration as a backbone, its tensors by name, and the mean and standard deviation of its input.

    Raises:
        ValueError: If it has no feature maps.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    if config.model_type == TIMM_MODEL_TYPE:
        return load_timm_encoder(name, revision, config)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(f"a {config.model_type} gives no feature maps; take a backbone such as swin or convnextv2")
    config.out_indices = pick_stages(len(config.stage_names))
    # `AutoBackbone.from_pretrained` asks the Hub whether the name is a repository, and takes a local folder for a name
    # of timm. The class itself loads both.
    encoder, info = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
        name, revision=revision, config=config, output_loading_info=True
    )
    for tensor in sorted(info["missing_keys"]):
        logger.warning("newly made: backbone.%s", tensor)
    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        mean, std = processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError):
        logger.warning("%s says nothing about the mean and deviation of its input; ImageNet's are taken", name)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    # The configuration is published with the weights. It must not tell where the encoder lay on somebody's disk.
    config.name_or_path = ""
    return config, encoder.state_dict(), mean, std


def load_timm_encoder(name: str, revision: str | None, config: Any) -> Encoder:
    """Load an encoder of timm; arguments and result as `load_encoder`.

    Args:
        name: Folder or Hub id, in timm's format: `config.json` with an `architecture`, and `model.safetensors`.
        revision: Branch, tag or commit on the Hub.
        config: What `AutoConfig` reads there.

    Raises:
        ValueError: If it has no feature maps.
    """
    # timm is an extra of this project, and slow to import.
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # RuntimeError: timm imports torchvision, which fails beside another build of PyTorch than its own.
        raise ValueError(f"this encoder needs timm (`pip install -e .[timm]`), which does not load: {error}") from error

    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}" + (f"@{revision}" if revision else "")
    # The first model only tells how many stages there are. The second has just those that are taken.
    stages = timm.create_model(config.architecture, features_only=True).feature_info
    out_indices = pick_stages(len(stages.info))
    encoder = timm.create_model(source, pretrained=True, features_only=True, out_indices=out_indices)
    backbone_config = TimmBackboneConfig(backbone=config.architecture, out_indices=out_indices)
    # `TimmBackbone` keeps the model of timm under this name. Its own way to load pre-trained weights
    # (`from_config(..., pretrained=True)`) sets the running means of batch normalisation to 0 afterwards.
    tensors = {f"_backbone.{key}": tensor for key, tensor in encoder.state_dict().items()}
    return backbone_config, tensors, config.pretrained_cfg["mean"], config.pretrained_cfg["std"]


def new_upernet(
    model_args: ModelArguments, image_size: int, slice_context: int
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """Return UPerNet with a pre-trained encoder and a new head.

    Args:
        model_args: Names the encoder, values of UPerNet's configuration, and what the channels mean.
        image_size: Height and width of the input in pixels.
        slice_context: Written into the model's configuration.

    Returns:
        The model, and the mean and standard deviation of the three channels that its encoder was trained with.

    Raises:
        InputError: If there is no such encoder, it has no feature maps, it cannot take the input size, or no model can
            be made with these values.
    """
    name, overrides = str(model_args.backbone), parse_overrides(model_args.config_overrides or "")
    if "backbone_config" in overrides:
        raise InputError("--config_overrides: backbone_config comes from --backbone; leave one of them out")
    try:
        backbone_config, tensors, mean, std = load_encoder(name, model_args.model_revision)
    except (*LOAD_ERRORS, HFValidationError) as error:
        raise InputError(f"--backbone {name}: {error}") from error
    config = random_config("upernet", {**overrides, "backbone_config": backbone_config}, image_size)
    check_image_size(config, image_size)
    model = build_model(config, model_args.label_mode, slice_context)
    model.backbone.load_state_dict(tensors)
    logger.warning("encoder: %d tensors from %s; the head is newly made", len(tensors), name)
    # Some encoders take only the size that they were trained with. One pass finds that before the training starts.
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"--backbone {name}: it does not take --image_size {image_size} ({error})") from error
    return model.train(), list(mean), list(std)
