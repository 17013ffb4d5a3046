"""The results of a run: best weights, pictures, scores and the model card, all in the output folder."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData

from gi_segmentation.arguments import RunArguments
from gi_segmentation.card import render_card
from gi_segmentation.competition import PRESETS
from gi_segmentation.facts import RUN_FILE, read_facts, write_facts
from gi_segmentation.figures import draw_cases, draw_learning_curve, draw_overlay
from gi_segmentation.publish import Publication, publish_folder
from gi_segmentation.scans import (
    CONFIDENCE,
    NUM_RESAMPLES,
    ScanScore,
    describe_clinical,
    find_intervals,
    format_clinical,
    format_interval,
    tabulate_scans,
)
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM
from gi_segmentation.trainer import Evaluation, SegmentationTrainer

CARD, SCAN_SCORES = "README.md", "scan_scores.csv"
OVERLAY, CASES, CURVE = "overlay.png", "cases.png", "learning_curve.png"
WEIGHTS = ("model.safetensors", "config.json", "preprocessor_config.json")
PUBLISHED = (*WEIGHTS, CARD, RUN_FILE, SCAN_SCORES, OVERLAY, CASES, CURVE)

SCORE_NAMES = {
    "eval_dice": "Dice, mean over slices and organs",
    **{f"eval_dice_{organ}": f"Dice, {organ.replace('_', ' ')}" for organ in ORGANS},
    "eval_dice_volume": "Dice over whole scans, mean over scans and organs",
    **{f"eval_dice_volume_{organ}": f"Dice over whole scans, {organ.replace('_', ' ')}" for organ in ORGANS},
    "eval_hausdorff_score": "1 − normalised 3D Hausdorff distance",
    "eval_competition_score": "Competition score, 0.4 Dice + 0.6 of the line above",
}
FLIP_SCORE = "eval_flips_dice"  # there with --test_time_flips only
SEED_SCORE = "eval_macro_f1_seed"
OF_THE_COMPETITION = ("eval_hausdorff_score", "eval_competition_score")
# What the Hub groups scores by; all others are Dice.
METRIC_TYPES = {SEED_SCORE: "f1", **{key: key.removeprefix("eval_") for key in OF_THE_COMPETITION}}


def scored(facts: dict[str, Any]) -> dict[str, str]:
    """What the scores of a run are called, in the order of a card, with their preset and the gain of flips."""
    names = dict(SCORE_NAMES)
    for key in OF_THE_COMPETITION:
        names[key] += f" (preset {facts['competition_preset']})"
    if FLIP_SCORE in facts["scores"]:
        gain = (facts["scores"][FLIP_SCORE] or 0) - (facts["scores"]["eval_dice"] or 0)
        names[FLIP_SCORE] = f"{SCORE_NAMES['eval_dice']}, averaged over four flips of the slice ({gain:+.4f})"
    names[SEED_SCORE] = f"Macro F1 over four labels with background, pooled, at {facts['image_size']} pixels a side"
    return names


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """The scores of a run as entries of a `model-index`, each with what it needs to be compared."""
    rules = PRESETS[facts["competition_preset"]]
    results = []
    for key, name in scored(facts).items():
        if facts["scores"][key] is None:
            continue
        interval = facts["intervals"][key] and [round(end, 4) for end in facts["intervals"][key]]
        how = {"interval_95": interval, "patients": facts["splits"]["validation"]["patients"]}
        if key in OF_THE_COMPETITION:
            how |= {"preset": facts["competition_preset"], **asdict(rules)}
        elif key != SEED_SCORE:
            how |= {"both_empty": "skipped"}
        results.append(
            EvalResult(
                task_type="image-segmentation",
                task_name="Semantic segmentation, patients apart",
                dataset_type="gi_tract",
                dataset_name=f"{facts['dataset_title']} (split {facts['split_hash'][:12]})",
                dataset_split="validation",
                dataset_args={"split_hash": facts["split_hash"], "fingerprint": facts["dataset_fingerprint"]},
                metric_type=METRIC_TYPES.get(key, "dice"),
                metric_name=name,
                metric_value=round(facts["scores"][key], 4),
                metric_args=how,
            )
        )
    return results


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


def write_card(output_dir: Path, repo_id: str, license_name: str) -> Path:
    """Render the model card from `run.json`.

    Args:
        output_dir: Where `run.json` is and the card goes, as README.md.
        repo_id: What users pass to `from_pretrained`.
        license_name: Licence identifier of the Hub.

    Returns:
        The card's path.

    Raises:
        jinja2.UndefinedError: If a fact that the template names is missing.
        KeyError: If one that stands in a table or in the front matter is.
    """
    facts = read_facts(output_dir)
    model_name = repo_id.split("/")[-1]
    card = render_card(
        "model_card.md",
        metadata=card_metadata(facts, model_name, license_name),
        model_name=model_name,
        repo_id=repo_id,
        license_name=license_name,
        score_names=scored(facts),
        clinical_table=format_clinical(facts["clinical"]) if facts["clinical"]["scans"] else None,
        competition_rules=asdict(PRESETS[facts["competition_preset"]]),
        organs=ORGANS,
        slice_thickness_mm=SLICE_THICKNESS_MM,
        confidence=CONFIDENCE,
        num_resamples=NUM_RESAMPLES,
        overlay=OVERLAY,
        cases_picture=CASES,
        curve=CURVE,
        scan_scores=SCAN_SCORES,
        **facts,
    )
    path = output_dir / CARD
    path.write_text(card, encoding="utf-8")
    return path


def pick_cases(scans: Sequence[ScanScore]) -> dict[str, dict[str, Any]]:
    """The best, the median and the worst scan by their mean Dice; of fewer than three those there are.

    Returns:
        By name, `scan` and `dice`.
    """
    ranked = sorted((scan for scan in scans if not math.isnan(scan.dice)), key=lambda scan: (-scan.dice, scan.key))
    last = len(ranked) - 1
    places = {"best": 0, "median": last // 2, "worst": last}
    if last < 2:
        places = {"best": 0, "worst": 1} if last else {"only": 0}
    return {name: {"scan": ranked[place].name, "dice": ranked[place].dice} for name, place in places.items()}


def describe_scores(evaluation: Evaluation, preset: str) -> dict[str, Any]:
    """The facts of an evaluation: scores, their intervals over patients, scores in millimetres, single cases."""
    rules = PRESETS[preset]
    keys = [*SCORE_NAMES, SEED_SCORE, *([FLIP_SCORE] if "eval_flips" in evaluation.scans else [])]
    intervals = {
        f"{prefix}_{name}": interval
        for prefix, scans in evaluation.scans.items()
        for name, interval in find_intervals(scans, rules).items()
    }
    return {
        "scores": {
            key: None if math.isnan(evaluation.scores[key]) else evaluation.scores[key] for key in (*keys, "eval_loss")
        },
        "intervals": {key: intervals[key] for key in keys},
        "clinical": describe_clinical(evaluation.scans["eval"]),
        "cases": pick_cases(evaluation.scans["eval"]),
    }


def write_results(
    trainer: SegmentationTrainer, validation: Dataset, facts: dict[str, Any], evaluation: Evaluation
) -> dict[str, Any]:
    """Put the best checkpoint's files, its scores, pictures and card into the output folder.

    The weights are the checkpoint's own files, byte for byte. No pickle is written.

    Args:
        trainer: After `trainer.train`, holding the best weights.
        validation: The validation split, with its transform.
        facts: From `facts.describe_run`.
        evaluation: Of the best checkpoint.

    Returns:
        The facts, completed.
    """
    output_dir = Path(trainer.args.output_dir)
    best_step = int(trainer.state.best_global_step or 0)
    best = Path(trainer.state.best_model_checkpoint or "")
    for name in WEIGHTS:
        shutil.copyfile(best / name, output_dir / name)
    trainer.save_metrics("eval", {**evaluation.scores, "competition_preset": trainer.args.competition_preset})
    trainer.save_state()
    tabulate_scans(evaluation.scans["eval"]).to_csv(output_dir / SCAN_SCORES, index=False)
    facts = {
        **facts,
        "date": datetime.now(UTC).date().isoformat(),
        "best_step": best_step,
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 2),
        **describe_scores(evaluation, trainer.args.competition_preset),
    }
    write_facts(output_dir, facts)
    draw_overlay(trainer.model, validation, output_dir / OVERLAY)
    draw_cases(trainer.model, validation, facts["cases"], output_dir / CASES)
    draw_learning_curve(trainer.state.log_history, best_step, output_dir / CURVE)
    write_card(output_dir, trainer.args.hub_model_id or output_dir.resolve().name, trainer.args.license)
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
    for key, name in scored(facts).items():
        score, interval = facts["scores"][key], format_interval(facts["intervals"][key], ".3f")
        lines.append(f"  {'   none' if score is None else format(score, '7.4f')}  {name}{interval}")
    patients = facts["splits"]["validation"]["patients"]
    lines.append(
        f"in brackets 95 % intervals over {patients} patients" if patients > 1 else "no intervals: one patient"
    )
    files = {"card": CARD, "overlay": OVERLAY, "cases": CASES, "curve": CURVE, "scores of each scan": SCAN_SCORES}
    lines += [f"{label}: {output_dir / name}" for label, name in files.items()]
    if publication is not None:
        lines.append(f"published: {publication.url} (tag {publication.tag}, commit {publication.commit[:12]})")
    return "\n".join(lines)
