"""Configurations of the four families, about as small as the library permits; for an input of 64 pixels."""

from typing import Any

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 16}
CONVNEXT = {
    "model_type": "convnext",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [4, 4, 8, 8],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 8],
        "num_attention_heads": [1, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [1, 1],
        "decoder_hidden_size": 8,
    },
    "upernet": {"backbone_config": CONVNEXT, "hidden_size": 8, "pool_scales": [1, 2]},
    "dpt": {**VIT, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 4, 8, 8], "fusion_hidden_size": 8},
    "beit": {**VIT, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "use_relative_position_bias": True},
}
