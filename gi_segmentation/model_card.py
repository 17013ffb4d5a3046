"""The results of a run: best weights, pictures, scores and the model card, all in the output folder."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData

from gi_segmentation.arguments import RunArguments
from gi_segmentation.card import render_card
from gi_segmentation.facts import RUN_FILE, write_facts
from gi_segmentation.figures import draw_learning_curve, draw_overlay
from gi_segmentation.publish import Publication, publish_folder
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM
from gi_segmentation.trainer import SegmentationTrainer

CARD, OVERLAY, CURVE = "README.md", "overlay.png", "learning_curve.png"
WEIGHTS = ("model.safetensors", "config.json", "preprocessor_config.json")
PUBLISHED = (*WEIGHTS, CARD, RUN_FILE, OVERLAY, CURVE)

SCORE_NAMES = {
    "eval_dice": "Dice, mean over slices and organs",
    **{f"eval_dice_{organ}": f"Dice, {organ.replace('_', ' ')}" for organ in ORGANS},
    "eval_dice_volume": "Dice over whole scans, mean over scans and organs",
    **{f"eval_dice_volume_{organ}": f"Dice over whole scans, {organ.replace('_', ' ')}" for organ in ORGANS},
}

# There with --test_time_flips only.
FLIP_SCORE_NAMES = {"eval_flips_dice": "Dice, mean over slices and organs, averaged over four flips of the slice"}


def scored(scores: dict[str, float | None]) -> dict[str, str]:
    """What the scores of a run are called, in the order of a card; the gain of flips is part of their name."""
    names = dict(SCORE_NAMES)
    for key, name in FLIP_SCORE_NAMES.items():
        if key in scores:
            gain = (scores[key] or 0) - (scores["eval_dice"] or 0)
            names[key] = f"{name} ({gain:+.4f})"
    return names


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """The scores of a run as entries of a `model-index`."""
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation, patients apart",
            dataset_type="gi_tract",
            dataset_name=f"{facts['dataset_title']} (split {facts['split_hash'][:12]})",
            dataset_split="validation",
            metric_type="dice",
            metric_name=name,
            metric_value=round(facts["scores"][key], 4),
        )
        for key, name in SCORE_NAMES.items()
        if facts["scores"][key] is not None
    ]


def card_metadata(facts: dict[str, Any], model_name: str, license_name: str) -> str:
    """The card's YAML front matter, with the scores as `model-index`."""
    data = ModelCardData(
        language="en",
        license=license_name,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=facts["base_model"] if facts["base_model"] and "/" in facts["base_model"] else None,
        datasets=facts["dataset"] if "/" in facts["dataset"] else None,
        tags=["medical", "mri", "radiotherapy", "semantic-segmentation"],
        model_name=model_name,
        eval_results=eval_results(facts),
        license_name="non-commercial-competition-data" if license_name == "other" else None,
    )
    return data.to_yaml()


def write_card(output_dir: Path, facts: dict[str, Any], repo_id: str, license_name: str) -> Path:
    """Render the model card.

    Args:
        output_dir: Where it goes, as README.md.
        facts: From `facts.describe_run`, with `scores` and `best_step`.
        repo_id: What users pass to `from_pretrained`.
        license_name: Licence identifier of the Hub.

    Returns:
        The card's path.

    Raises:
        jinja2.UndefinedError: If a fact is missing.
    """
    model_name = repo_id.split("/")[-1]
    card = render_card(
        "model_card.md",
        metadata=card_metadata(facts, model_name, license_name),
        model_name=model_name,
        repo_id=repo_id,
        license_name=license_name,
        score_names=scored(facts["scores"]),
        organs=ORGANS,
        slice_thickness_mm=SLICE_THICKNESS_MM,
        overlay=OVERLAY,
        curve=CURVE,
        **facts,
    )
    path = output_dir / CARD
    path.write_text(card, encoding="utf-8")
    return path


def write_results(
    trainer: SegmentationTrainer,
    validation: Dataset,
    facts: dict[str, Any],
    scores: dict[str, float],
) -> dict[str, Any]:
    """Put the best checkpoint's files, its scores, pictures and card into the output folder.

    The weights are the checkpoint's own files, byte for byte. No pickle is written.

    Args:
        trainer: After `trainer.train`, holding the best weights.
        validation: The validation split, with its transform.
        facts: From `facts.describe_run`.
        scores: Of the best checkpoint.

    Returns:
        The facts, completed.
    """
    output_dir = Path(trainer.args.output_dir)
    best_step = int(trainer.state.best_global_step or 0)
    best = Path(trainer.state.best_model_checkpoint or "")
    for name in WEIGHTS:
        shutil.copyfile(best / name, output_dir / name)
    trainer.save_metrics("eval", scores)
    trainer.save_state()
    facts = {
        **facts,
        "best_step": best_step,
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 2),
        "scores": {
            key: None if math.isnan(scores[key]) else scores[key]
            for key in (*SCORE_NAMES, *FLIP_SCORE_NAMES, "eval_macro_f1_seed", "eval_loss")
            if key in scores or key not in FLIP_SCORE_NAMES
        },
    }
    write_facts(output_dir, facts)
    draw_overlay(trainer.model, validation, output_dir / OVERLAY)
    draw_learning_curve(trainer.state.log_history, best_step, output_dir / CURVE)
    repo_id = trainer.args.hub_model_id or output_dir.resolve().name
    write_card(output_dir, facts, repo_id, trainer.args.license)
    return facts


def publish_model(run_args: RunArguments, facts: dict[str, Any]) -> Publication:
    """Push the results, and nothing else of the output folder, to `--hub_model_id`.

    Args:
        run_args: How the run was told to publish.
        facts: From `write_results`.

    Raises:
        InputError: As `publish_folder`.
    """
    dice, step = facts["scores"]["eval_dice"], facts["best_step"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in PUBLISHED:
            shutil.copyfile(Path(run_args.output_dir) / name, Path(scratch) / name)
        return publish_folder(
            Path(scratch),
            str(run_args.hub_model_id),
            "model",
            tag=f"dice-{dice:.4f}-step-{step}",
            message=f"Publish the best checkpoint: eval_dice {dice:.4f} at step {step}",
            private=run_args.hub_private_repo,
        )


def summarize(run_args: RunArguments, facts: dict[str, Any], publication: Publication | None) -> str:
    """The end of a run as a few lines for a terminal."""
    output_dir = Path(run_args.output_dir)
    lines = [f"best checkpoint: step {facts['best_step']} of {facts['steps']}, scores on unseen patients:"]
    scores = {name: facts["scores"][key] for key, name in scored(facts["scores"]).items()}
    lines += [f"  {'   none' if score is None else format(score, '7.4f')}  {name}" for name, score in scores.items()]
    lines += [
        f"{label}: {output_dir / name}" for label, name in (("card", CARD), ("overlay", OVERLAY), ("curve", CURVE))
    ]
    if publication is not None:
        lines.append(f"published: {publication.url} (tag {publication.tag}, commit {publication.commit[:12]})")
    return "\n".join(lines)
