"""`python -m gi_segmentation.score`: score segmentations of any tool or person against those of others.

Each side is a CSV of Kaggle's, NIfTI label maps, DICOM SEG or RTSTRUCT, of the same scans. Several submissions are
compared with each other, too, over the same patients.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import write_output
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.rules import DEFAULT_PRESET, PRESETS, CompetitionRules
from gi_segmentation.shortages import POOL

if TYPE_CHECKING:
    from gi_segmentation.scoring.scans import ScanScore


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m gi_segmentation.score", description=__doc__)
    parser.add_argument(
        "--truth", type=Path, required=True, help="train.csv with the annotations, or a folder of label maps or DICOM"
    )
    parser.add_argument(
        "--submission",
        type=Path,
        required=True,
        action="append",
        help="submission.csv to score, or a folder of label maps or DICOM; give it again to compare several",
    )
    parser.add_argument(
        "--kaggle_dir", type=Path, help="folder with the slices of a CSV (default: the folder of --truth)"
    )
    add_format_flags(parser)
    parser.add_argument("--num_proc", type=int, help="number of processes (default: one per core)")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="how to read the competition's metric: as the public grader, the winner or the host's notes "
        "(default: %(default)s)",
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


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that other formats than CSV need."""
    group = parser.add_argument_group("label maps and DICOM")
    group.add_argument(
        "--images", type=Path, help="folder with the DICOM series that was drawn on, if it does not lie beside"
    )
    group.add_argument(
        "--organs", help='which structures each organ is: "stomach=Stomach*,Magen;liver=Liver" (default: known names)'
    )
    group.add_argument(
        "--label_names",
        help="names of the values of label maps: 1=stomach,2=liver, or a file such as dataset.json (default: the "
        "table beside them, or their header)",
    )
    group.add_argument(
        "--missing_scans",
        choices=["error", "leave_out", "empty"],
        default="error",
        help="what to do with a scan that a submission lacks: stop, leave it out, or count it as empty "
        "(default: %(default)s)",
    )


def measure_files(arguments: argparse.Namespace, rules: CompetitionRules) -> dict[str, list["ScanScore"]]:
    """Measure the scans of each submission, by its path.

    Raises:
        InputError: If a file cannot be read or used.
    """
    from gi_segmentation.formats.label_names import parse_label_names
    from gi_segmentation.formats.organ_names import parse_organs
    from gi_segmentation.scoring.drawn_scans import list_side, read_sides
    from gi_segmentation.scoring.referee import match_sides, measure_matches
    from gi_segmentation.scoring.submissions import measure_submission

    titles = [str(path) for path in arguments.submission]
    if len(set(titles)) < len(titles):
        raise InputError(f"--submission {titles[-1]}: given twice; name each submission once")
    truth = list_side("--truth", arguments.truth)
    submissions = [list_side("--submission", path) for path in arguments.submission]
    if truth.table and all(one.table for one in submissions):
        check_tables_only(arguments)
        tables = [one.table for one in submissions if one.table]
        options = arguments.kaggle_dir, arguments.num_proc, rules, arguments.clinical
        return {
            title: measure_submission(truth.table, table, *options)
            for title, table in zip(titles, tables, strict=True)
        }
    names = parse_label_names(arguments.label_names) if arguments.label_names else None
    sides = read_sides(truth, submissions, arguments.images, arguments.kaggle_dir, names)
    matches = match_sides(sides, parse_organs(arguments.organs) if arguments.organs else None, arguments.missing_scans)
    print(*matches.notes, sep="\n", flush=True)
    measured = measure_matches(matches, rules, arguments.num_proc, arguments.clinical)
    return dict(zip(titles, measured, strict=True))


def check_tables_only(arguments: argparse.Namespace) -> None:
    """Check that no flag of other formats is given for CSV files, where it would change nothing.

    Raises:
        InputError: If there is one.
    """
    for name in ("images", "organs", "label_names", "missing_scans"):
        if getattr(arguments, name) not in (None, "error"):
            raise InputError(f"--{name}: is for label maps and DICOM, and all sides are CSV files; leave it out")


def choose_rules(arguments: argparse.Namespace) -> tuple[CompetitionRules, str]:
    """Return the rules that the flags ask for, and a name for them: the preset, and the choices that differ."""
    # Without its flag, a choice is None and stays as the preset has it.
    preset = PRESETS[arguments.preset]
    chosen = {name: getattr(arguments, name) for name in asdict(preset) if getattr(arguments, name) is not None}
    name = arguments.preset + (f" except for {', '.join(chosen)}" if chosen else "")
    return replace(preset, **chosen), name


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score submissions and print the scores.

    Returns:
        The scores of the first submission by name.

    Raises:
        InputError: If a file cannot be read or used.
    """
    arguments = parse_arguments(argv)
    rules, preset = choose_rules(arguments)
    # These imports stand here because pandas and SciPy load slowly. `--help` or a mistake in a flag needs neither.
    from gi_segmentation.scoring.referee import format_pairs
    from gi_segmentation.scoring.scans import score_scans
    from gi_segmentation.scoring.submissions import format_submission
    from gi_segmentation.scoring.tables import describe_clinical, format_clinical, tabulate_submissions

    measured = measure_files(arguments, rules)
    for title, scans in measured.items():
        print(*[f"submission {title}"] * (len(measured) > 1), format_submission(scans, rules, preset), sep="\n")
        if arguments.clinical:
            print(format_clinical(describe_clinical(scans)))
    for line in format_pairs(measured, rules):
        print(line)
    if arguments.output is not None:
        write_output(arguments.output, tabulate_submissions(measured, rules).to_csv(index=False))
    return score_scans(measured[str(arguments.submission[0])], rules)


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(POOL):
        main()
