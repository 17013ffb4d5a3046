"""`python -m dataset_builder phantom | series | convert | verify | build | export`: from scans to a dataset."""

import argparse
import gc
import re
import sys
from pathlib import Path

from dataset_builder.convert.options import add_convert_flags, read_options
from dataset_builder.difficulty import DIFFICULTIES
from gi_segmentation.errors import InputError, check_repo_id, exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.publishing.options import add_publication_options, read_publication_options
from gi_segmentation.shortages import POOL

# Each run_* function imports what it needs. pandas, datasets and OpenCV load slowly, and `--help` or a mistake in a
# flag needs none of them.


def run_phantom(arguments: argparse.Namespace) -> int:
    """Write a synthetic Kaggle folder."""
    from dataset_builder.phantom import write_phantom

    try:
        summary = write_phantom(
            arguments.output_dir,
            num_cases=arguments.num_cases,
            days_per_case=arguments.days_per_case,
            slices_per_scan=arguments.slices_per_scan,
            seed=arguments.seed,
            num_proc=arguments.num_proc,
            difficulty=arguments.difficulty,
            num_labels=arguments.labels,
            undrawn=arguments.undrawn,
            slice_spacing_mm=arguments.slice_spacing_mm,
        )
    except (ValueError, FileExistsError) as error:
        raise InputError(str(error)) from error
    print(summary)
    return 0


def run_series(arguments: argparse.Namespace) -> int:
    """Write the first scan of a synthetic Kaggle folder as a DICOM series, or all scans with structure sets."""
    try:
        from dataset_builder.clinic_export import write_clinic_export
        from dataset_builder.series import write_scan_series
    except ImportError as error:
        raise InputError(
            f"series: needs {error.name}, which is not installed; run `pip install -e .[clinic]`"
        ) from error

    if arguments.structures:
        plans = write_clinic_export(arguments.output_dir, arguments.kaggle_dir)
        print(f"{len(plans)} series with a structure set each in {arguments.output_dir}")
        return 0
    files = write_scan_series(arguments.output_dir, arguments.kaggle_dir)
    print(f"{len(files)} slices in {arguments.output_dir}")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Write the scans of a clinic as a Kaggle folder, or list them."""
    options = read_options(arguments)
    from dataset_builder.convert.command import convert

    print(convert(arguments.input, options, arguments.list))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Print every problem of a Kaggle folder, one on each line."""
    from dataset_builder.verify import verify

    inspection = verify(arguments.kaggle_dir, arguments.num_proc)
    counts = inspection.counts
    for problem in inspection.problems:
        print(problem)
    # The summary goes to stderr, so that stdout has only the problems and can be piped to another program.
    print(
        f"{len(inspection.problems)} problems in {counts['scans']} scans, {counts['slices']} slices "
        f"({counts['empty']} empty, {counts['overlapping']} with overlapping organs)",
        file=sys.stderr,
    )
    return 1 if inspection.problems else 0


def run_build(arguments: argparse.Namespace) -> int:
    """Build the dataset folder, and publish it if the command line says so."""
    from dataset_builder.build import CardOptions, build, prepare_push, push_dataset
    from dataset_builder.gi_tract import GiTractConfig
    from gi_segmentation.formats.kaggle.label_file import LABEL_FILE

    options = read_publication_options(arguments)
    if arguments.license and not re.fullmatch(r"[A-Za-z0-9.-]+", arguments.license):
        raise InputError(f"--license: expected an identifier of the Hub like cc-by-4.0, but got {arguments.license!r}")
    # Patients of a hospital. The card of such data without a licence says that nobody may see it in public.
    own = any((folder / LABEL_FILE).is_file() for folder in arguments.kaggle_dir)
    if arguments.push_to_hub and options.private is False and own and not arguments.license:
        raise InputError(
            "--hub_private_repo false: nobody has stated a licence of this data, so it must stay private; add "
            "--license if its rules allow a public copy, or leave the flag out"
        )
    if arguments.push_to_hub:
        check_repo_id("--push_to_hub", arguments.push_to_hub)
        arguments.push_to_hub = prepare_push(arguments.push_to_hub, options)
    # What was imported stays until the end. Python would look through it for garbage again and again, and once more
    # when it ends, which takes as long as building 500 slices.
    gc.freeze()
    config = GiTractConfig(
        num_folds=arguments.num_folds,
        fold=arguments.fold,
        seed=arguments.seed,
        include_faulty_scans=arguments.include_faulty_scans,
    )
    card = CardOptions(arguments.dataset_title, arguments.license, arguments.push_to_hub)
    try:
        report = build(arguments.kaggle_dir, arguments.output_dir, config, arguments.num_proc, card)
    except OSError as error:
        raise InputError(
            f"--output_dir {arguments.output_dir}: {error}; free some space or choose another folder"
        ) from error
    print(report.summary())
    if arguments.push_to_hub:
        publication = push_dataset(report, arguments.push_to_hub, options)
        visibility = "private" if publication.private else "public"
        print(f"published as {publication.url}, tag {publication.tag}, {visibility}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write a built dataset for another program."""
    try:
        from dataset_builder.nnunet import export_nnunet
    except ImportError as error:
        raise InputError(
            f"export: needs {error.name}, which is not installed; run `pip install -e .[clinic]`"
        ) from error

    try:
        report = export_nnunet(arguments.dataset_dir, arguments.output_dir, arguments.channel)
    except OSError as error:
        raise InputError(
            f"--output_dir {arguments.output_dir}: {error}; free some space or choose another folder"
        ) from error
    print(report.summary())
    return 0


def add_export_flags(export: argparse.ArgumentParser) -> None:
    """Add the flags of `export`."""
    export.add_argument("--format", choices=("nnunet",), required=True, help="the program that shall read it")
    export.add_argument("--dataset_dir", default="gi_tract", help="folder of the dataset, or its name on a Hub")
    export.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="a new folder in nnUNet_raw, with a name like Dataset501_Abdomen",
    )
    export.add_argument(
        "--channel",
        default="MRI",
        help="name of the channel; nnU-Net normalises CT, and no other, as Hounsfield units",
    )


def add_phantom_flags(phantom: argparse.ArgumentParser) -> None:
    """Add the flags that only `phantom` has."""
    phantom.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    phantom.add_argument("--num_cases", type=int, default=6, help="number of patients")
    phantom.add_argument("--days_per_case", type=int, default=2, help="number of scans of each patient")
    phantom.add_argument(
        "--slices_per_scan", type=int, help="number of slices of each scan; None: 144 or 80, as in the real data"
    )
    phantom.add_argument("--seed", type=int, default=0, help="each seed gives other patients")
    phantom.add_argument(
        "--difficulty",
        choices=tuple(DIFFICULTIES),
        default="easy",
        help="easy: the organs differ in brightness; hard: they differ only in place and shape, as on real scans",
    )
    phantom.add_argument(
        "--labels",
        type=int,
        metavar="N",
        help="number of organs that are annotated, 1 to 19: stomach, liver, spleen, large bowel, small bowel, and so "
        "on; None: Kaggle's three. With this flag or one of the next two, the folder has labels.json",
    )
    phantom.add_argument(
        "--undrawn",
        nargs="+",
        default=[],
        metavar="ORGAN",
        help="organs that nobody has drawn in every second scan",
    )
    phantom.add_argument(
        "--slice_spacing_mm",
        type=float,
        metavar="MM",
        help="distance between slices; None: they are spread over the body",
    )


def add_build_flags(make: argparse.ArgumentParser) -> None:
    """Add the flags that only `build` has."""
    make.add_argument(
        "--kaggle_dir",
        type=Path,
        nargs="+",
        required=True,
        help="the unpacked Kaggle download, or a phantom; or several such folders, each with other patients",
    )
    make.add_argument("--output_dir", type=Path, default=Path("gi_tract"), help="folder for the dataset")
    make.add_argument("--num_folds", type=int, default=5, help="number of folds that the patients are split into")
    make.add_argument("--fold", type=int, default=0, help="the fold that becomes the validation split")
    make.add_argument("--seed", type=int, default=0, help="seed of the split into folds")
    make.add_argument(
        "--include_faulty_scans",
        action="store_true",
        help="keep the scans that the hosts of the competition call faulty",
    )
    make.add_argument(
        "--dataset_title",
        help="name of the data on the card; None: the name of the repository or of the folder if the data has "
        "labels.json, and else that of Kaggle's data",
    )
    make.add_argument(
        "--license",
        help="licence of the data as an identifier of the Hub like cc-by-4.0, for the card; None: the card says that "
        "none was stated, or names the rules of Kaggle's data",
    )
    make.add_argument(
        "--push_to_hub",
        metavar="NAMESPACE/gi_tract",
        help="also publish the dataset on the Hub, in a private repository, because the licence of the data is not "
        "established; without NAMESPACE/, it is that of the user of the token",
    )
    shown = "true: a new repository is private, and a public one is refused; false: everybody may see the dataset"
    add_publication_options(make, "true", shown, pictures=False)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m dataset_builder", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="phantom | series | convert | verify | build | export")

    phantom = commands.add_parser("phantom", help="write a synthetic Kaggle folder", formatter_class=formatter)
    add_phantom_flags(phantom)
    phantom.set_defaults(run=run_phantom)

    series = commands.add_parser(
        "series", help="write the first scan of a synthetic Kaggle folder as a DICOM series", formatter_class=formatter
    )
    series.add_argument("--output_dir", type=Path, required=True, help="folder for the files")
    series.add_argument(
        "--structures",
        action="store_true",
        help="write all scans instead, in a folder for each patient and day, with a structure set (RTSTRUCT) of what "
        "is annotated, as planning systems export them; for phantoms only",
    )
    series.set_defaults(run=run_series)

    own = commands.add_parser(
        "convert",
        help="write scans of DICOM or NIfTI, and what was drawn on them, as a Kaggle folder",
        formatter_class=formatter,
    )
    add_convert_flags(own)
    own.set_defaults(run=run_convert)

    check = commands.add_parser("verify", help="report every problem of a Kaggle folder", formatter_class=formatter)
    check.set_defaults(run=run_verify)

    export = commands.add_parser(
        "export", help="write a built dataset for another program, with its folds", formatter_class=formatter
    )
    add_export_flags(export)
    export.set_defaults(run=run_export)

    make = commands.add_parser("build", help="build the dataset from a Kaggle folder", formatter_class=formatter)
    add_build_flags(make)
    make.set_defaults(run=run_build)

    for command in (series, check):
        command.add_argument(
            "--kaggle_dir", type=Path, required=True, help="the unpacked Kaggle download, or a phantom"
        )
    for command in (phantom, check, make):
        command.add_argument("--num_proc", type=int, help="number of processes; None: one per core")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands and return the exit status."""
    arguments = parse_arguments(argv)
    with exit_on_input_error(POOL):
        return int(arguments.run(arguments))


if __name__ == "__main__":
    with leaving_no_process_behind():
        sys.exit(main())
