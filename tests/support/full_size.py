"""The models of all recipes at full size without memory for their weights, and what a training of them needs."""

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel

from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.configuration import Task
from gi_segmentation.models.encoders import pick_stages
from gi_segmentation.models.loading import count_parameters
from gi_segmentation.models.random import build_model, parse_overrides, random_config
from gi_segmentation.training.losses import dice_cross_entropy_loss
from tests.support.architectures import ARCHITECTURES, RECIPES


class PretrainedEncoder(NamedTuple):
    """An encoder of the Hub.

    Attributes:
        name: Its Hub id.
        config: Its published configuration, without values that are the family's defaults.
        encoder_weights: Number of weights of the four stages and of the normalisation of their feature maps.
        final_norm: Number of weights of the normalisation after the last stage, if the backbone leaves it out.
        millions: Millions of weights that its source prints, with a head for the 1,000 classes of ImageNet.
    """

    name: str
    config: dict[str, Any]
    encoder_weights: int
    final_norm: int
    millions: int


CONVNEXT_BASE = {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}
LAST_CHANNELS, CLASSES = 1024, 1000  # of all three encoders, and of ImageNet
FINAL_NORM = 2 * LAST_CHANNELS  # a factor and a summand for each channel
ENCODERS = {
    # 89M are printed by its code's README. The published file agrees: 355 MB are 88.7 million numbers of 4 bytes.
    "upernet-convnextv2-base": PretrainedEncoder(
        "facebook/convnextv2-base-22k-384",
        {"model_type": "convnextv2", **CONVNEXT_BASE},
        encoder_weights=87_694_592,
        final_norm=FINAL_NORM,
        millions=89,
    ),
    # 88M are printed by its paper (arXiv 2103.14030).
    "upernet-swin-base": PretrainedEncoder(
        "microsoft/swin-base-patch4-window12-384-in22k",
        {"model_type": "swin", "image_size": 384, **SWIN_BASE},
        encoder_weights=86_882_424,
        final_norm=0,  # a Swin backbone contains it
        millions=88,
    ),
    # 89M are printed by the README of its code. This number fits only with a head like that of ConvNeXt.
    "upernet-dinov3-convnext-base": PretrainedEncoder(
        "facebook/dinov3-convnext-base-pretrain-lvd1689m",
        {"model_type": "dinov3_convnext", **CONVNEXT_BASE},
        encoder_weights=87_564_416,
        final_norm=FINAL_NORM,
        millions=89,
    ),
}


def parse(recipe: str) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Return the arguments of a recipe."""
    return parse_arguments(["--config", str(RECIPES / f"{recipe}.yaml")])


def build(recipe: str, num_labels: int) -> PreTrainedModel:
    """Make the recipe's model on the device `meta`, which has shapes but no memory for values."""
    if recipe in ENCODERS:
        return build_upernet(recipe)
    model_type, overrides, _ = ARCHITECTURES[recipe]
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, num_labels=num_labels, **overrides)
        return AutoModelForSemanticSegmentation.from_config(config)


def build_upernet(recipe: str) -> PreTrainedModel:
    """Make UPerNet on the recipe's encoder on the device `meta`, with our labels and the stages that we choose."""
    model_args, data_args, _ = parse(recipe)
    encoder = AutoConfig.for_model(**ENCODERS[recipe].config)
    encoder.out_indices = pick_stages(len(encoder.stage_names))
    overrides = {**parse_overrides(model_args.config_overrides or ""), "backbone_config": encoder}
    with torch.device("meta"):
        config = random_config("upernet", overrides, data_args.image_size)
        return build_model(config, Task(GI_TRACT, model_args.label_mode), data_args.slice_context)


def count_slice_bytes(model: PreTrainedModel, image_size: int) -> float:
    """Count the bytes that the forward pass of a training keeps for each slice, in 32 bits.

    Args:
        model: From `build`.
        image_size: Height and width of its input.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    batch = 2  # a batch normalisation needs two slices

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(pixel_values=torch.zeros(batch, 3, image_size, image_size)).logits
        dice_cross_entropy_loss(logits, torch.zeros(batch, image_size, image_size, dtype=torch.long), "multiclass")
    return sum(storage.nbytes() for storage in kept.values()) / batch


def count_training_bytes(model: PreTrainedModel, image_size: int, batch_size: int) -> float:
    """Count the bytes that a training keeps, in 32 bits and without temporary buffers.

    Five numbers of 4 bytes are kept for each weight: the weight, its gradient, two moments of AdamW and its average.
    The forward pass keeps activations for each slice.

    Args:
        model: From `build`.
        image_size: Height and width of its input.
        batch_size: Number of slices in a forward pass.
    """
    return 5 * 4 * count_parameters(model) + batch_size * count_slice_bytes(model, image_size)


def count_flops(model: PreTrainedModel, image_size: int) -> float:
    """Count the floating-point operations of a forward pass for a slice: two for each product that is added.

    Args:
        model: From `build`.
        image_size: Height and width of its input.
    """
    model.eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()
