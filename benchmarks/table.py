"""Train the recipes on one dataset, and write a table of results as Markdown and as `model-index`.

The same command may be repeated: it scores a finished run again, and continues an interrupted one.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from gi_segmentation.publishing.eval_results import FLIP_SCORE
from gi_segmentation.publishing.facts import read_results
from gi_segmentation.publishing.model_card import eval_results
from gi_segmentation.schema import ORGANS, SCAN_SLICES
from gi_segmentation.scoring.tables import format_interval

ROOT = Path(__file__).resolve().parents[1]
# What the original project reports as "Dice". It is a macro F1 with the background, most likely on a split that is not
# by patient (docs/scores.md). So it is a column of the table, and no target.
ORIGINAL_DICE = {
    "segformer-b0": 0.8813,
    "segformer-b4": 0.9196,
    "segformer-b5": 0.9297,
    "upernet-convnext-small": 0.9459,
    "upernet-convnext-base": 0.9470,
    "upernet-convnext-large": 0.9494,
    "dpt-large": 0.9420,
    "beit-base": None,
}

# What stands below the table.
NOTE = (
    "Patients: none of them was in the training of the model that is scored on them. With folds, each patient is "
    "scored once, by the model of the fold that held this patient back. Otherwise they are those of the validation "
    "split. First row: {slices} slices, split `{split}`. Dice: mean over slices and organs at native resolution; a "
    "pair with the organ in neither outline is skipped. In brackets: 95 % intervals over patients. Competition score: "
    "preset {preset}. Macro F1: over all pixels and four labels, one of them the background. The original project "
    "calls it Dice. Its numbers are of another split, most likely with slices of a patient on both sides. Seconds: "
    "model and masks of {scan} slices on {device}, without reading."
)


def run(words: list[str], log: Path) -> str | None:
    """Run a Python command, and write its output to a file.

    Returns:
        The last line of the output if the command fails, else None.
    """
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return None if done.returncode == 0 else lines[-1]


def run_recipe(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe and score it.

    Returns:
        The `facts` of the run, with `scores` and `intervals` of the model alone and with flips, and
        `seconds_per_scan`; or only `failed` with the reason.
    """
    folder, log = arguments.output_dir / recipe, arguments.output_dir / f"{recipe}.log"
    config = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--output_dir", str(folder)]
    launcher = ["--config_file", str(arguments.config_file)] if arguments.config_file else []
    # The user's flags come last, so they win over the recipe.
    flags = ["--dataset_name", str(arguments.dataset_name), *arguments.flags]
    # Folds that were trained before, by `gi_segmentation.cross_validate`, are pooled.
    cross_validated = arguments.folds or any(folder.glob("fold-*"))
    if cross_validated:
        words = ["-m", "gi_segmentation.cross_validate", *config, *launcher, "--", "--test_time_flips", "true", *flags]
    else:
        launch = ["-m", "accelerate.commands.launch", "--quiet", *launcher, str(ROOT / "run_segmentation.py")]
        words = [*launch, *config, *flags]
    # A training that is already complete is only scored again.
    failed = run(words, log)
    if failed is None:
        # `compare` scores a checkpoint on the validation split, alone and with flips, with its intervals. For
        # a cross-validation, only its seconds for a scan are taken, because the scores are the pooled ones.
        model, compared = folder / "fold-0" if cross_validated else folder, folder / "compared.json"
        words = ["-m", "gi_segmentation.compare", "--model", str(model), "--output", str(compared)]
        failed = run([*words, "--dataset_name", str(arguments.dataset_name)], log.with_suffix(".compare.log"))
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


def table_row(recipe: str, result: dict[str, Any]) -> str:
    """Return one line of the Markdown table."""
    original = ORIGINAL_DICE[recipe]
    theirs = "–" if original is None else f"{original:.4f}"
    if "failed" in result:
        return f"| {recipe} | failed: {result['failed']} |{' |' * (len(ORGANS) + 5)} {theirs} | |"
    # `compare` of one checkpoint has two entries: the checkpoint alone, and with flips.
    alone, flips = result["scores"]
    dice = [(alone, "dice"), *((alone, f"dice_{organ}") for organ in ORGANS), (flips, "dice")]
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


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown, and below the table what the columns mean."""
    columns = ["recipe", "parameters", "patients", "Dice", *(organ.replace("_", " ") for organ in ORGANS)]
    columns += ["with flips", "competition score", "macro F1", "its macro F1", "s a scan"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [table_row(*item) for item in results.items()]
    # All recipes share dataset, split and preset, so the facts of the first finished one hold for the whole table.
    done = [(result["facts"], result["preset"]) for result in results.values() if "facts" in result]
    if done:
        facts, preset = done[0]
        split, slices = facts.split_hash[:12], facts.splits["validation"]["slices"]
        lines += ["", NOTE.format(split=split, slices=slices, preset=preset, scan=SCAN_SLICES, device=facts.device)]
    return "\n".join(lines) + "\n"


def model_index(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as YAML, one model each, in the form that the Hub reads from model cards."""
    index = []
    for recipe, result in results.items():
        if "failed" not in result:
            index += eval_results_to_model_index(recipe, eval_results(result["facts"]))
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)


def main() -> None:
    """Train the recipes and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset_name", default="gi_tract", help="folder of a built dataset, or a Hub id")
    parser.add_argument(
        "--recipes", nargs="+", choices=ORIGINAL_DICE, default=list(ORIGINAL_DICE), help="recipes to train"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/table"), help="folder for the runs and the table"
    )
    parser.add_argument("--config_file", type=Path, help="configuration file of accelerate; None: its default")
    parser.add_argument(
        "--folds", action="store_true", help="train every fold of each recipe, and report the scores of all patients"
    )
    parser.add_argument("flags", nargs="*", help="after --: flags for every run, for example --num_train_epochs 2")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for recipe in arguments.recipes:
        print(f"{recipe}: output in {arguments.output_dir / recipe}.log", file=sys.stderr, flush=True)
        results[recipe] = run_recipe(recipe, arguments)
        # Both files are written after each recipe, so an interruption loses one training at most.
        (arguments.output_dir / "table.md").write_text(format_table(results), encoding="utf-8")
        (arguments.output_dir / "model-index.yml").write_text(model_index(results), encoding="utf-8")
    print(format_table(results))
    print(f"{arguments.output_dir / 'table.md'}, {arguments.output_dir / 'model-index.yml'}")
    sys.exit(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    main()
