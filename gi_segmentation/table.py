"""`python -m gi_segmentation.table`: train the recipes on one dataset, and write a table of their results.

The same command may be repeated: it scores a finished run again, and continues an interrupted one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import write_text
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.shortages import CROSS_VALIDATION

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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.table",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Everything after -- goes to run_segmentation.py, for example: -- --num_train_epochs 2",
    )
    parser.add_argument("--dataset_name", default="gi_tract", help="folder of a built dataset, or a Hub id")
    parser.add_argument(
        "--recipes", nargs="+", choices=ORIGINAL_DICE, default=list(ORIGINAL_DICE), help="recipes to train"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/table"), help="folder for the runs and the table"
    )
    parser.add_argument("--config_file", type=Path, help="configuration of accelerate; None: accelerate's default")
    parser.add_argument(
        "--folds", action="store_true", help="train every fold of each recipe, and report the scores of all patients"
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more flags for run_segmentation.py")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train the recipes one after the other, and write the table after each.

    Returns:
        1 if a recipe failed, else 0. The table has the reason.

    Raises:
        InputError: If the package was installed without the recipes.
    """
    arguments = parse_arguments(argv)
    # This import stands here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.cross_validation.results_table import RECIPES, format_table, model_index, run_recipe

    if not RECIPES.is_dir():
        raise InputError(f"{RECIPES}: no such folder; the recipes are in a clone of the repository, start this there")
    output_dir = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for recipe in arguments.recipes:
        print(f"{recipe}: output in {output_dir / recipe}.log", file=sys.stderr, flush=True)
        options = arguments.dataset_name, output_dir, arguments.flags, arguments.config_file, arguments.folds
        results[recipe] = run_recipe(recipe, *options)
        # Both files are written after each recipe, so an interruption loses one training at most.
        write_text(output_dir / "table.md", format_table(results, ORIGINAL_DICE))
        write_text(output_dir / "model-index.yml", model_index(results))
    print(format_table(results, ORIGINAL_DICE))
    print(f"{output_dir / 'table.md'}, {output_dir / 'model-index.yml'}")
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(CROSS_VALIDATION):
        sys.exit(main())
