"""`python -m gi_segmentation.score`: the competition's score of a submission, and scores in millimetres."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args, get_type_hints

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import write_output
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.rules import DEFAULT_PRESET, PRESETS, CompetitionRules
from gi_segmentation.shortages import POOL


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m gi_segmentation.score", description=__doc__)
    parser.add_argument("--truth", type=Path, required=True, help="train.csv with the annotations")
    parser.add_argument("--submission", type=Path, required=True, help="submission.csv to score")
    parser.add_argument("--kaggle_dir", type=Path, help="folder with the slices (default: the folder of --truth)")
    parser.add_argument("--num_proc", type=int, help="number of processes (default: one per core)")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="how to read the competition's metric: as the public grader or as the winner (default: %(default)s)",
    )
    choices = parser.add_argument_group("choices of the metric", "each flag replaces one choice of the preset")
    # A flag for each field of the rules. The field's type lists its values, and without the flag the value is None.
    for name, hint in get_type_hints(CompetitionRules).items():
        choices.add_argument(f"--{name}", choices=get_args(hint))
    parser.add_argument("--clinical", action="store_true", help="also print scores in millimetres for each organ")
    parser.add_argument("--output", type=Path, help="CSV file to write, with the scores of each scan and organ")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InputError(
            f"--output {arguments.output}: expected a file in a folder that exists, but its folder does not exist"
        )
    return arguments


def choose_rules(arguments: argparse.Namespace) -> tuple[CompetitionRules, str]:
    """Return the rules that the flags ask for, and a name for them: the preset, and the choices that differ."""
    # Without its flag, a choice is None and stays as the preset has it.
    preset = PRESETS[arguments.preset]
    chosen = {name: getattr(arguments, name) for name in asdict(preset) if getattr(arguments, name) is not None}
    name = arguments.preset + (f" except for {', '.join(chosen)}" if chosen else "")
    return replace(preset, **chosen), name


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score a submission and print the scores.

    Returns:
        The scores by name.

    Raises:
        InputError: If a file cannot be read or used.
    """
    arguments = parse_arguments(argv)
    rules, preset = choose_rules(arguments)
    # These imports stand here because pandas and SciPy load slowly. `--help` or a mistake in a flag needs neither.
    from gi_segmentation.scoring.scans import score_scans
    from gi_segmentation.scoring.submissions import format_submission, measure_submission
    from gi_segmentation.scoring.tables import describe_clinical, format_clinical, tabulate_scans

    files = arguments.truth, arguments.submission, arguments.kaggle_dir
    scans = measure_submission(*files, arguments.num_proc, rules, arguments.clinical)
    print(format_submission(scans, rules, preset))
    if arguments.clinical:
        print(format_clinical(describe_clinical(scans)))
    if arguments.output is not None:
        write_output(arguments.output, tabulate_scans(scans).to_csv(index=False))
    return score_scans(scans, rules)


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(POOL):
        main()
