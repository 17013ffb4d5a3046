"""The configurations of the recipes' models at full size, so that tests and benchmarks need no download.

The values are those of the published checkpoints. Weights are random, or not even made (tests on the `meta`
device).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class Architecture(NamedTuple):
    """A model of the original project's table.

    Attributes:
        model_type: Its family in `transformers`.
        overrides: Values of its configuration that differ from the family's defaults.
        millions: Millions of weights as the table prints them. The table counts published checkpoints, which have
            150 labels and an auxiliary head.
    """

    model_type: str
    overrides: dict[str, Any]
    millions: float


def segformer(depths: list[int], hidden_sizes: list[int], decoder_hidden_size: int) -> dict[str, Any]:
    """Return the configuration of a SegFormer of some size (arXiv 2105.15203)."""
    return {
        "depths": depths,
        "hidden_sizes": hidden_sizes,
        # All sizes from B0 to B5 share these values. Attention at high resolution would be too slow, so the first
        # stages reduce keys and values by 8 x 8, 4 x 4 and 2 x 2 pixels.
        "num_attention_heads": [1, 2, 5, 8],
        "sr_ratios": [8, 4, 2, 1],
        "mlp_ratios": [4, 4, 4, 4],
        "decoder_hidden_size": decoder_hidden_size,
    }


def upernet_convnext(hidden_sizes: list[int]) -> dict[str, Any]:
    """Return the configuration of UPerNet on a ConvNeXt (arXiv 2201.03545).

    Small, Base and Large differ only in the number of channels of the four stages.
    """
    return {
        "backbone_config": {
            "model_type": "convnext",
            "depths": [3, 3, 27, 3],
            "hidden_sizes": hidden_sizes,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "hidden_size": 512,
        "pool_scales": [1, 2, 3, 6],
        "use_auxiliary_head": True,
        # The auxiliary head reads the third of the four stages.
        "auxiliary_in_channels": hidden_sizes[2],
        "auxiliary_channels": 256,
        "auxiliary_num_convs": 1,
    }


DPT_LARGE = {
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "backbone_out_indices": [5, 11, 17, 23],
    "readout_type": "project",
    "reassemble_factors": [4, 2, 1, 0.5],
    "neck_hidden_sizes": [256, 512, 1024, 1024],
    "fusion_hidden_size": 256,
    "use_auxiliary_head": True,
}
BEIT_BASE = {
    "image_size": 640,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "out_indices": [3, 5, 7, 11],
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": True,
    "layer_scale_init_value": 0.1,
    "pool_scales": [1, 2, 3, 6],
    "use_auxiliary_head": True,
    "auxiliary_channels": 256,
    "auxiliary_num_convs": 1,
}

ARCHITECTURES: dict[str, Architecture] = {
    "segformer-b0": Architecture("segformer", segformer([2, 2, 2, 2], [32, 64, 160, 256], 256), 3.7),
    "segformer-b4": Architecture("segformer", segformer([3, 8, 27, 3], [64, 128, 320, 512], 768), 64),
    "segformer-b5": Architecture("segformer", segformer([3, 6, 40, 3], [64, 128, 320, 512], 768), 84),
    "upernet-convnext-small": Architecture("upernet", upernet_convnext([96, 192, 384, 768]), 82),
    "upernet-convnext-base": Architecture("upernet", upernet_convnext([128, 256, 512, 1024]), 122),
    "upernet-convnext-large": Architecture("upernet", upernet_convnext([192, 384, 768, 1536]), 234),
    "dpt-large": Architecture("dpt", DPT_LARGE, 343),
    # The table has no number for BEiT, so we counted. The published file has 900 MB: these weights are 654 MB of it,
    # and twelve tables of indices for 1601 x 1601 pairs of positions are the other 246 MB.
    "beit-base": Architecture("beit", BEIT_BASE, 163),
}


def recipe_flags(recipe: str) -> dict[str, Any]:
    """Return the flags of `run_segmentation.py` that train a recipe's model from random weights."""
    model_type, overrides, _ = ARCHITECTURES[recipe]
    # The pipeline sets these two values itself, so they must not be among the overrides.
    of_the_run = {"image_size", "use_auxiliary_head"}
    overrides = {key: value for key, value in overrides.items() if key not in of_the_run}
    config = RECIPES / f"{recipe}.yaml"
    return {"config": config, "model_type": model_type, "config_overrides": json.dumps(overrides)}
