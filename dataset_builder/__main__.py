"""`python -m dataset_builder phantom | verify | build`: from a Kaggle folder to the dataset `gi_tract`."""

import argparse
import sys
from pathlib import Path

from dataset_builder.build import build, push_dataset
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import DIFFICULTIES, write_phantom
from dataset_builder.verify import verify
from gi_segmentation.errors import InputError, exit_on_input_error


def run_phantom(arguments: argparse.Namespace) -> int:
    """Write a synthetic Kaggle folder."""
    try:
        summary = write_phantom(
            arguments.output_dir,
            num_cases=arguments.num_cases,
            days_per_case=arguments.days_per_case,
            slices_per_scan=arguments.slices_per_scan,
            seed=arguments.seed,
            num_proc=arguments.num_proc,
            difficulty=arguments.difficulty,
        )
    except (ValueError, FileExistsError) as error:
        raise InputError(str(error)) from error
    print(summary)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Print every problem of a Kaggle folder, one a line."""
    inspection = verify(arguments.kaggle_dir, arguments.num_proc)
    counts = inspection.counts
    for problem in inspection.problems:
        print(problem)
    print(
        f"{len(inspection.problems)} problems in {counts['scans']} scans, {counts['slices']} slices "
        f"({counts['empty']} empty, {counts['overlapping']} with overlapping organs)",
        file=sys.stderr,
    )
    return 1 if inspection.problems else 0


def run_build(arguments: argparse.Namespace) -> int:
    """Build the dataset folder and, if asked, publish it."""
    config = GiTractConfig(
        num_folds=arguments.num_folds,
        fold=arguments.fold,
        seed=arguments.seed,
        include_faulty_scans=arguments.include_faulty_scans,
    )
    try:
        report = build(arguments.kaggle_dir, arguments.output_dir, config, arguments.num_proc)
    except OSError as error:
        raise InputError(f"--output_dir {arguments.output_dir}: {error}; free space or name another folder") from error
    print(report.summary())
    if arguments.push_to_hub:
        publication = push_dataset(report, arguments.push_to_hub)
        print(f"published as {publication.url}, tag {publication.tag}, private unless it was public before")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m dataset_builder", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="phantom | verify | build")

    phantom = commands.add_parser("phantom", help="write a synthetic Kaggle folder", formatter_class=formatter)
    phantom.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    phantom.add_argument("--num_cases", type=int, default=6, help="patients")
    phantom.add_argument("--days_per_case", type=int, default=2, help="scans of each patient")
    phantom.add_argument("--slices_per_scan", type=int, help="slices of each scan; None: 144 or 80, as in the data")
    phantom.add_argument("--seed", type=int, default=0, help="another seed gives other patients")
    phantom.add_argument(
        "--difficulty",
        choices=tuple(DIFFICULTIES),
        default="easy",
        help="easy: brightness tells the organs apart; hard: as on real scans, place and shape do",
    )
    phantom.set_defaults(run=run_phantom)

    check = commands.add_parser("verify", help="report every problem of a Kaggle folder", formatter_class=formatter)
    check.set_defaults(run=run_verify)

    make = commands.add_parser("build", help="build the dataset from a Kaggle folder", formatter_class=formatter)
    make.add_argument("--output_dir", type=Path, default=Path("gi_tract"), help="where the dataset goes")
    make.add_argument("--num_folds", type=int, default=5, help="into how many folds the patients are dealt")
    make.add_argument("--fold", type=int, default=0, help="the fold that becomes the validation split")
    make.add_argument("--seed", type=int, default=0, help="seed of the deal")
    make.add_argument(
        "--include_faulty_scans", action="store_true", help="keep the scans that the competition's hosts call faulty"
    )
    make.add_argument(
        "--push_to_hub",
        metavar="NAMESPACE/gi_tract",
        help="publish there too, privately: the data is not ours to share",
    )
    make.set_defaults(run=run_build)

    for command in (check, make):
        command.add_argument("--kaggle_dir", type=Path, required=True, help="the unpacked Kaggle download")
    for command in (phantom, check, make):
        command.add_argument("--num_proc", type=int, help="processes; None: one per core")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands."""
    arguments = parse_arguments(argv)
    with exit_on_input_error():
        return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
