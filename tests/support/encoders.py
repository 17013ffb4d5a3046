"""Tiny random encoders for `--backbone`, saved in the form in which the Hub has them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel

from gi_segmentation.errors import InputError
from gi_segmentation.models.efficientnet import import_extra
from tests.support.models import MEAN, STD


class TinyEncoder(NamedTuple):
    """An encoder that is about as small as the library allows.

    Attributes:
        config: Values of its configuration.
        classifies: Whether the Hub has it with a head for classification, or alone.
        new_tensors: Number of tensors that no file has, because only a backbone has a normalisation of feature maps.
    """

    config: dict[str, Any]
    classifies: bool
    new_tensors: int


VIT = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 4, 8, 8]}
SWIN = {"embed_dim": 4, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
# Each of four feature maps is normalised by a factor and a summand.
ENCODERS = {
    "swin": TinyEncoder({"image_size": 64, **SWIN}, classifies=True, new_tensors=8),
    "convnextv2": TinyEncoder(CONVNEXT, classifies=True, new_tensors=8),
    "dinov2": TinyEncoder({"image_size": 56, "patch_size": 14, **VIT}, classifies=False, new_tensors=0),
    "dinov3_vit": TinyEncoder({"intermediate_size": 16, "patch_size": 16, **VIT}, classifies=False, new_tensors=0),
    "dinov3_convnext": TinyEncoder(CONVNEXT, classifies=False, new_tensors=0),
    "beit": TinyEncoder(
        {"image_size": 64, "intermediate_size": 16, "patch_size": 16, **VIT}, classifies=True, new_tensors=0
    ),
}


def make_model(family: str, config: dict[str, Any], classifies: bool) -> PreTrainedModel:
    """Make a model with random values in all its weights. Zeros and ones, the usual start of many, hide mistakes."""
    torch.manual_seed(0)
    auto_class: Any = AutoModelForImageClassification if classifies else AutoModel
    model: PreTrainedModel = auto_class.from_config(AutoConfig.for_model(family, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_encoder(folder: Path, family: str) -> PreTrainedModel:
    """Save an encoder with its own mean and standard deviation, and return it."""
    encoder = ENCODERS[family]
    model = make_model(family, encoder.config, encoder.classifies)
    model.save_pretrained(folder)
    # The file of an image processor on the Hub names a class of its own. Only these two lists are read.
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def skip_without_timm() -> None:
    """Skip the test if timm is missing, or does not load beside this build of PyTorch."""
    try:
        import_extra("timm")
    except InputError as error:
        pytest.skip(str(error))
