"""The folder of a finished run without a training: a tiny random checkpoint, its facts and its card."""

from pathlib import Path

from PIL import Image

from gi_segmentation.publishing.facts import RunResults, write_facts
from gi_segmentation.publishing.model_card import CURVE, write_card
from tests.support.models import SIZE, save_model

COUNTS = {"patients": 1, "scans": 1, "slices": 2, "empty": 1}
FACTS = RunResults(
    project_version="0",
    git_commit=None,
    versions={},
    device="cpu",
    num_processes=1,
    architecture="SegformerForSemanticSegmentation",
    model_type="segformer",
    base_model=None,
    num_parameters=1,
    image_size=SIZE,
    label_mode="multiclass",
    slice_context=0,
    slice_sampling="all",
    dataset="gi_tract",
    dataset_title="Phantom",
    synthetic=True,
    dataset_fingerprint="0" * 64,
    fold="all",
    split_hash="0" * 64,
    splits={"train": COUNTS, "validation": {**COUNTS, "patients": 0, "scans": 0, "slices": 0, "empty": 0}},
    sizes={"train": {}, "validation": {}},
    seed=0,
    train_batch_size=1,
    learning_rate=0.1,
    head_lr_multiplier=1,
    ema_decay=0,
    weight_decay=0,
    optimizer="adamw_torch",
    lr_scheduler="linear",
    augmentation="none",
    competition_preset="mle_bench",
    arguments={},
    date="2026-01-31",
    best_step=3,
    steps=3,
    epochs=1,
    scores={},
    intervals={},
    clinical={},
    cases={},
)


def write_run(folder: Path) -> Path:
    """Write a finished run with `--fold all`, so without scores. Its card names the folder, as without a Hub."""
    save_model(folder, "segformer", seed=0)
    write_facts(folder, FACTS)
    Image.new("L", (2, 2)).save(folder / CURVE)
    write_card(folder, folder.name, "other")
    return folder
