"""Tiny random models of the four families for an input of 64 pixels, about as small as the library allows."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.models.heads import without_auxiliary_head
from gi_segmentation.models.loading import load_model

SIZE = 64
# The names of the label ids in the configuration of a model.
ID2LABEL = dict(enumerate(GI_TRACT.labels))
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
# The share of pixels that may differ between batch sizes. A sum of floats depends on its order, which a library
# chooses by the size of the batch. If two labels are equal to the last bits, a pixel may get either of them. We saw
# this at 1 pixel of 4 million.
MAX_TIES = 1e-5
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
# A model without random numbers in the forward pass. The same slices give the same gradient, for any division into
# batches.
NO_DROPOUT = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
STEADY = {**FAMILIES["segformer"], **NO_DROPOUT}


def save_model(
    folder: Path,
    family: str,
    seed: int,
    label_mode: str = "multiclass",
    slice_context: int = 0,
    labels: LabelSet = GI_TRACT,
) -> Path:
    """Save a tiny random model that predicts some pixels of each label."""
    torch.manual_seed(seed)
    text = json.dumps(FAMILIES[family])
    arguments = ModelArguments(model_type=family, config_overrides=text, label_mode=label_mode)
    model, processor, _ = load_model(arguments, labels, SIZE, slice_context)
    with torch.no_grad():
        # With the usual small weights, one label would win everywhere.
        if family == "dpt":
            # Its small weights multiply over many layers. Logits of 0.00000001 would say little about an export.
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(model.decode_head.classifier.weight, std=3)
    with without_auxiliary_head(model):
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def change_config(model: Path, **values: Any) -> Path:
    """Change the configuration of a saved model, and return its folder."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return model


def write_base(folder: Path, family: str, num_labels: int = 150) -> Path:
    """Save a checkpoint like those on the Hub, with other labels, an auxiliary head and its own mean and deviation."""
    size = {} if family in ("segformer", "upernet") else {"image_size": SIZE}
    config = AutoConfig.for_model(family, **FAMILIES[family], **size, num_labels=num_labels)
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(folder)
    SegformerImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def new_model(family: str, overrides: dict[str, Any] | None = None) -> tuple[PreTrainedModel, Any]:
    """Return a model of a family with random weights and our labels, and its image processor."""
    text = json.dumps(FAMILIES[family] if overrides is None else overrides)
    return load_model(ModelArguments(model_type=family, config_overrides=text), GI_TRACT, SIZE)[:2]
