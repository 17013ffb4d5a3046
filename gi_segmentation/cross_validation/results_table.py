"""Train several recipes on one dataset, score them, and write their results as Markdown and as `model-index`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from gi_segmentation.cross_validation.runs import run_command
from gi_segmentation.publishing.eval_results import FLIP_SCORE
from gi_segmentation.publishing.facts import read_results
from gi_segmentation.publishing.model_card import list_model_index_results
from gi_segmentation.schema import SCAN_SLICES
from gi_segmentation.scoring.tables import format_by_preset, format_interval

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# What stands below the table.
NOTE = (
    "Patients: none of them was in the training of the model that is scored on them. With folds, each patient is "
    "scored once, by the model of the fold that held this patient back. Otherwise they are those of the validation "
    "split. First row: {slices} slices, split `{split}`. Dice: mean over slices and organs at native resolution; a "
    "pair with the organ in neither outline is skipped. In brackets: 95 % intervals over patients. Competition score: "
    "preset {preset}. Macro F1: over all pixels and labels, one of them the background. The original project "
    "calls it Dice. Its numbers are of another split, most likely with slices of a patient on both sides. Seconds: "
    "model and masks of {scan} slices on {device}, without reading."
)


def run_python(words: list[str], log: Path) -> str | None:
    """Run a Python command, and write its output to a file.

    Returns:
        The last line of the output if the command fails, else None.
    """
    with log.open("w", encoding="utf-8") as file:
        status = run_command([sys.executable, *words], file)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    return None if status == 0 else lines[-1]


def run_recipe(
    recipe: str, dataset_name: str, output_dir: Path, flags: Sequence[str], config_file: Path | None, folds: bool
) -> dict[str, Any]:
    """Train a recipe and score it. What an earlier call has finished is only scored again.

    Args:
        recipe: Name of a file in `recipes/`, without `.yaml`.
        dataset_name: Folder of a built dataset, or a Hub id.
        output_dir: Folder for the run and its log.
        flags: More flags for `run_segmentation.py`.
        config_file: Configuration of accelerate; None: its default.
        folds: Whether to train every fold. Folds that are in the folder are pooled in any case.

    Returns:
        The `facts` of the run and its `organs` by name, with `scores` and `intervals` of the model alone and with
        flips, and `seconds_per_scan`; or only `failed` with the reason.
    """
    folder, log = output_dir / recipe, output_dir / f"{recipe}.log"
    config = ["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(folder)]
    launcher = ["--config_file", str(config_file)] if config_file else []
    # The user's flags come last, so they win over the recipe.
    flags = ["--dataset_name", dataset_name, *flags]
    cross_validated = folds or any(folder.glob("fold-*"))
    if cross_validated:
        words = ["-m", "gi_segmentation.cross_validate", *config, *launcher, "--", "--test_time_flips", "true", *flags]
    else:
        launch = ["-m", "accelerate.commands.launch", "--quiet", *launcher, "-m", "run_segmentation"]
        words = [*launch, *config, *flags]
    failed = run_python(words, log)
    if failed is None:
        # `compare` scores a checkpoint on the validation split, alone and with flips, with its intervals. For
        # a cross-validation, only its seconds for a scan are taken, because the scores are the pooled ones.
        model, compared = folder / "fold-0" if cross_validated else folder, folder / "compared.json"
        words = ["-m", "gi_segmentation.compare", "--model", str(model), "--output", str(compared)]
        failed = run_python([*words, "--dataset_name", dataset_name], log.with_suffix(".compare.log"))
    if failed is not None:
        return {"failed": failed}
    facts, found = read_results(folder), json.loads(compared.read_text(encoding="utf-8"))
    if cross_validated:
        # A score without anything to score is null in `run.json`, and NaN in the table.
        scores = {key: math.nan if score is None else score for key, score in facts.scores.items()}
        found |= {"scores": pooled_values(scores), "intervals": pooled_values(facts.intervals)}
    return {**found, "facts": facts}


def pooled_values(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of a cross-validation, or their intervals, in the form that `compare` writes."""
    alone = {key.removeprefix("eval_"): value for key, value in values.items() if key != FLIP_SCORE}
    return {"alone": alone, "with flips": {"dice": values[FLIP_SCORE]}}


def table_row(recipe: str, result: dict[str, Any], original: float | None, organs: Sequence[str]) -> str:
    """Return one line of the Markdown table."""
    theirs = "–" if original is None else f"{original:.4f}"
    if "failed" in result:
        return f"| {recipe} | failed: {result['failed']} |{' |' * (len(organs) + 5)} {theirs} | |"
    # `compare` of one checkpoint has two entries: the checkpoint alone, and with flips.
    alone, flips = result["scores"]
    dice = [(alone, "dice"), *((alone, f"dice_{organ}") for organ in organs), (flips, "dice")]
    cells = [
        f"{result['scores'][way][name]:.4f}{format_interval(result['intervals'][way][name], '.3f')}"
        for way, name in (*dice, (alone, "competition_score"), (alone, "macro_f1_seed"))
    ]
    facts = result["facts"]
    patients = f"{facts.splits['validation']['patients']}{f' in {len(facts.folds)} folds' if facts.folds else ''}"
    millions = f"{facts.num_parameters / 1e6:.1f}M"
    return (
        f"| {recipe} | {millions} | {patients} | {' | '.join(cells)} | {theirs} | {result['seconds_per_scan']:.2f} |"
    )


def format_table(results: Mapping[str, dict[str, Any]], originals: Mapping[str, float | None]) -> str:
    """Return the results as Markdown, and below the table what the columns mean.

    Args:
        results: What `run_recipe` returned, by recipe.
        originals: What the original project reports, by recipe; None where it reports nothing.
    """
    # All recipes share dataset, split and preset, so the facts of the first finished one hold for the whole table.
    done = [result for result in results.values() if "facts" in result]
    organs = list(done[0]["organs"]) if done else []
    columns = ["recipe", "parameters", "patients", "Dice", *(organ.replace("_", " ") for organ in organs)]
    columns += ["with flips", "competition score", "macro F1", "its macro F1", "s a scan"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [table_row(recipe, result, originals[recipe], organs) for recipe, result in results.items()]
    if done:
        facts, preset = done[0]["facts"], done[0]["preset"]
        split, slices = facts.split_hash[:12], facts.splits["validation"]["slices"]
        # A recipe that failed has no scores. Without flips is the first entry, as in `table_row`.
        alone = {
            recipe: [next(iter(result[name].values())) for name in ("scores", "intervals")]
            for recipe, result in results.items()
            if "facts" in result
        }
        lines += ["", format_by_preset({recipe: (one, around) for recipe, (one, around) in alone.items()}, "recipe")]
        lines += ["", NOTE.format(split=split, slices=slices, preset=preset, scan=SCAN_SLICES, device=facts.device)]
    return "\n".join(lines) + "\n"


def model_index(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the results as YAML, one model each, in the form that the Hub reads from model cards."""
    index = []
    for recipe, result in results.items():
        if "failed" not in result:
            index += eval_results_to_model_index(recipe, list_model_index_results(result["facts"]))
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
