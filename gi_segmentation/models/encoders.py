"""A pre-trained encoder under a new segmentation head: UPerNet around a backbone of `transformers` or of timm.

UPerNet (Xiao et al. 2018, arXiv 1807.10221) takes four feature maps of an encoder and joins them into one. So every
encoder that gives feature maps can become a segmentation model. The result is a stock
`UperNetForSemanticSegmentation`.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TimmBackboneConfig,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError, one_line
from gi_segmentation.models.configuration import LOAD_ERRORS, NO_CODE, Task, check_image_size
from gi_segmentation.models.normalisation import find_normalisation
from gi_segmentation.models.random import build_model, parse_overrides, random_config
from gi_segmentation.models.sources import (
    check_channels,
    check_finite,
    check_share,
    find_model_problem,
    list_model_files,
    load_tensors,
)

logger = logging.getLogger(__name__)

NUM_FEATURE_MAPS = 4
MAX_RESOLUTIONS = 6  # an encoder with more stages has several of one resolution
TIMM_MODEL_TYPE = "timm_wrapper"  # how `transformers` calls a repository or folder in timm's own format
NEEDS_TIMM = "this encoder needs timm (`pip install -e .[timm]`), which does not load: {}"
# The normalisation of ImageNet, for an encoder that says nothing about its own.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Encoder(NamedTuple):
    """A pre-trained encoder.

    Attributes:
        config: Its configuration as a backbone of `transformers`.
        tensors: Its weights and buffers by name.
        mean: Mean of each of the three channels of its input, for an image scaled to 0 to 1.
        std: Standard deviation of each channel.
    """

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    mean: list[float]
    std: list[float]


def pick_stages(number: int) -> list[int]:
    """Choose the stages of an encoder whose feature maps UPerNet takes.

    A convolutional or hierarchical encoder halves the resolution from stage to stage. Its last four stages are taken.
    A plain vision transformer has one stage per layer, all of one resolution. Four of them at equal distances are
    taken: for 12 layers the layers 3, 6, 9 and 12. The code of DINOv3 takes the same layers for segmentation.

    Args:
        number: Number of stages. The stem may be the first of them.

    Returns:
        Four indices, ascending; the last stage is always one of them.

    Raises:
        ValueError: If there are fewer than four stages.

    Example:
        >>> pick_stages(4), pick_stages(5), pick_stages(12), pick_stages(13)
        ([0, 1, 2, 3], [1, 2, 3, 4], [2, 5, 8, 11], [3, 6, 9, 12])
    """
    if number < NUM_FEATURE_MAPS:
        raise ValueError(f"expected at least {NUM_FEATURE_MAPS} feature maps, but it has {number}")
    if number <= MAX_RESOLUTIONS:
        return list(range(number - NUM_FEATURE_MAPS, number))
    # Vision transformers have 12, 24, 32 or 40 layers. `transformers` counts the stem as one more stage, and timm does
    # not.
    stem = 0 if number % NUM_FEATURE_MAPS == 0 else 1
    layers = number - stem
    return [stem - 1 + round(layers * part / NUM_FEATURE_MAPS) for part in range(1, NUM_FEATURE_MAPS + 1)]


def load_encoder_config(name: str, revision: str | None) -> PreTrainedConfig:
    """Load the configuration of an encoder; arguments as `load_encoder`.

    Raises:
        ValueError: If there is no such folder or repository, it has no configuration, or it needs a missing package.
    """
    if Path(name).is_dir() and (problem := find_model_problem(list_model_files(name, revision) or [])):
        raise ValueError(
            f"expected a folder with the config.json and the model.safetensors of an encoder, but: {problem}"
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
    except ImportError as error:
        # Only the configuration of an encoder of timm needs a package that this project does not install.
        raise ValueError(NEEDS_TIMM.format(error)) from error
    except LOAD_ERRORS as error:
        # The first line says what is wrong. The lines below it are about private repositories and offline use.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(name).is_dir():
            raise ValueError(
                f"expected a folder with the config.json and the model.safetensors of an encoder, but: {reason}"
            ) from error
        # Such a name can only be a path, so the Hub was not asked. The library complains about its form.
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            reason = "there is no such folder"
        raise ValueError(
            f"expected a folder, or a repository of the Hub that you may read, got neither ({reason}). "
            "Check the name. A recipe says how to make its folder, or which licence to accept on the Hub"
        ) from error


def load_normalisation(name: str, revision: str | None) -> tuple[list[float], list[float]]:
    """Load the mean and the standard deviation of an encoder's input; arguments as `load_encoder`."""
    # The file is read as it is, because some classes of image processors need torchvision. This project does not
    # install torchvision.
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except OSError:
        settings = {}
    if settings.get("do_normalize", True) and not ("image_mean" in settings and "image_std" in settings):
        logger.warning("%s says nothing about the mean and deviation of its input; ImageNet's are taken", name)
        return IMAGENET_MEAN, IMAGENET_STD
    return find_normalisation(settings)


def load_encoder(name: str, revision: str | None) -> Encoder:
    """Load an encoder of `transformers` or of timm.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If there is no such encoder, it has no feature maps, or its file has too few of its weights.
    """
    config = load_encoder_config(name, revision)
    if config.model_type == TIMM_MODEL_TYPE:
        return load_timm_encoder(name, revision, config)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(f"a {config.model_type} gives no feature maps; take a backbone such as swin or convnextv2")
    check_channels(config)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"its weights are quantized; name the {config.model_type} from which it was made")
    config.out_indices = pick_stages(len(config.stage_names))
    # `AutoBackbone.from_pretrained` asks the Hub whether the name is a repository, and takes a local folder for a name
    # of timm. The class itself loads both.
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    encoder, info = load_tensors(backbone_class.from_pretrained, name, revision, config=config)
    tensors, missing = encoder.state_dict(), sorted(info["missing_keys"])
    # An encoder that was trained to classify has no normalisation of its feature maps, so these layers are new. If
    # most tensors are missing, the file is of another model. `from_pretrained` would only log that, and the training
    # would start from random weights.
    check_share(tensors, missing, config.model_type)
    for tensor in missing:
        logger.warning("newly made: backbone.%s", tensor)
    logger.warning("%d tensors of the encoder were loaded from %s", len(tensors) - len(missing), name)
    # The configuration is published with the weights. It must not tell where the encoder lay on somebody's disk.
    config.name_or_path = ""
    return Encoder(config, tensors, *load_normalisation(name, revision))


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
        raise ValueError(NEEDS_TIMM.format(error)) from error

    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}" + (f"@{revision}" if revision else "")
    # The first model only tells how many stages there are. The second has just those that are taken.
    stages = timm.create_model(config.architecture, features_only=True).feature_info
    out_indices = pick_stages(len(stages.info))
    encoder = timm.create_model(source, pretrained=True, features_only=True, out_indices=out_indices)
    # `from_dict`, because `out_indices` is a property, which type checkers do not find among the arguments.
    backbone_config = TimmBackboneConfig.from_dict({"backbone": config.architecture, "out_indices": out_indices})
    # `TimmBackbone` keeps the model of timm under this name. Its own way to load pre-trained weights
    # (`from_config(..., pretrained=True)`) sets the running means of batch normalisation to 0 afterwards.
    tensors = {f"_backbone.{key}": tensor for key, tensor in encoder.state_dict().items()}
    check_finite(tensors)
    logger.warning("%d tensors of the encoder were loaded from %s", len(tensors), name)
    return Encoder(backbone_config, tensors, list(config.pretrained_cfg["mean"]), list(config.pretrained_cfg["std"]))


def new_upernet(
    model_args: ModelArguments, task: Task, image_size: int, slice_context: int
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """Return UPerNet with a pre-trained encoder and a new head.

    Args:
        model_args: Names the encoder, and values of UPerNet's configuration.
        task: What the model predicts.
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
        encoder = load_encoder(name, model_args.model_revision)
    except (*LOAD_ERRORS, ImportError) as error:
        raise InputError(f"--backbone {name}: {one_line(error)}") from error
    config = random_config("upernet", {**overrides, "backbone_config": encoder.config}, image_size)
    check_image_size(config, image_size)
    model = build_model(config, task, slice_context)
    backbone: Any = model.backbone
    # Some encoders take only the size that they were trained with. One pass finds that before the training starts.
    try:
        backbone.load_state_dict(encoder.tensors)
        with torch.no_grad():
            maps = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).feature_maps
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = one_line(error)
        raise InputError(f"--backbone {name}: it does not take --image_size {image_size} ({reason})") from error
    # Some encoders of timm, for example its Swin, give maps of the shape (batch, height, width, channels).
    expected, got = list(backbone.channels), [feature_map.shape[1] for feature_map in maps]
    if got != expected:
        raise InputError(
            f"--backbone {name}: expected feature maps with {expected} channels as their second axis, got {got}; if "
            "it is an encoder of timm, take the same one in the form of transformers"
        )
    logger.warning("the head is newly made")
    return model.train(), encoder.mean, encoder.std
