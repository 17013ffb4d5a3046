"""`python -m gi_segmentation.cross_validate`: train every fold of a recipe, and score each patient once.

Each fold is trained by `accelerate launch run_segmentation.py`, and predicts the patients that it held back. So each
patient is scored once, by a model that never saw this patient. The same command goes on where an earlier one stopped.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gi_segmentation.errors import InputError, check_repo_id, exit_on_input_error
from gi_segmentation.memory import keep_freed_memory
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.publishing.options import (
    PublicationOptions,
    add_publication_options,
    find_publication_options,
    read_publication_options,
)
from gi_segmentation.schema import ALL_FOLDS
from gi_segmentation.shortages import CROSS_VALIDATION

if TYPE_CHECKING:
    from gi_segmentation.arguments import RunArguments

# These flags are set for each fold, or belong to the cross-validation as a whole.
RESERVED_FLAGS = ("--config", "--fold", "--output_dir", "--push_to_hub", "--hub_model_id")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: If flags for the training are among those of this command's own.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.cross_validate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Everything after -- goes to run_segmentation.py, for example: -- --image_size 224 --seed 1",
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe of all folds, such as recipes/demo.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder with a folder fold-K for each fold")
    parser.add_argument("--config_file", type=Path, help="configuration of accelerate; None: accelerate's default")
    parser.add_argument(
        "--fold",
        help="train only this fold, and pool nothing. Several machines can take a fold each. "
        f"{ALL_FOLDS}: train on all patients, for the weights to publish; None: train every fold and pool",
    )
    parser.add_argument(
        "--collect", action="store_true", help="train nothing, and pool the folds that are in --output_dir"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        help="--output_dir of another cross-validation, to compare with over the same patients",
    )
    parser.add_argument(
        "--postprocessing",
        action="store_true",
        help="learn from the held-back patients which faint pixels of an organ to add, and which slices and "
        "components to remove; if a step helps beyond its interval, the published configuration has its limits, and "
        "predict applies them",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="NAMESPACE/NAME",
        help="publish the pooled results on the branch main, and each fold on a branch fold-K; without NAMESPACE/, it "
        "is that of the user of the token",
    )
    add_publication_options(
        parser, None, "whether a new repository is private; None: as the recipe says, else private"
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more flags for run_segmentation.py")
    arguments = parser.parse_args(argv)
    for word in arguments.flags:
        if word.split("=")[0] in RESERVED_FLAGS:
            raise InputError(f"{word} after --: this flag belongs to this command itself, before --")
    if arguments.fold is not None and (arguments.collect or arguments.baseline or arguments.push_to_hub):
        raise InputError("--fold trains one fold and pools nothing; leave out --collect, --baseline and --push_to_hub")
    return arguments


def merge_publication_options(arguments: argparse.Namespace, run_args: "RunArguments") -> PublicationOptions:
    """Return what this command line and the arguments of the trainings say about the publication."""
    trained, wanted = find_publication_options(run_args), read_publication_options(arguments)
    return PublicationOptions(
        private=trained.private if wanted.private is None else wanted.private,
        overwrite=trained.overwrite or wanted.overwrite,
        pictures=trained.pictures or wanted.pictures,
    )


def main(argv: list[str] | None = None) -> None:
    """Train the folds that are not finished yet, pool their scores, and publish them.

    Raises:
        InputError: If an argument cannot be used, a training fails, or the folds do not belong together.
        StoppedError: If the time of `--max_hours` ended a training. It is the time of all folds together.
    """
    started_s = time.monotonic()
    arguments = parse_arguments(argv)
    if arguments.push_to_hub:
        check_repo_id("--push_to_hub", arguments.push_to_hub)
    keep_freed_memory()
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.command_line import parse_arguments as parse_training_arguments
    from gi_segmentation.cross_validation.report import format_compared_folds, format_pooled, pool_runs, publish_folds
    from gi_segmentation.cross_validation.runs import check_folds_dir, fold_folder, list_folds, read_fold, train_folds
    from gi_segmentation.publishing.hub import prepare_repository
    from gi_segmentation.publishing.repository import find_repository

    output_dir = arguments.output_dir
    # The recipe and the flags are read here too, because a mistake must be found before hours of training.
    words = ["--config", str(arguments.config), *arguments.flags, "--output_dir", str(output_dir)]
    _, data_args, run_args = parse_training_arguments(words)
    if run_args.push_to_hub:
        raise InputError(f"{arguments.config}: push_to_hub would publish each fold alone; use --push_to_hub here")
    check_folds_dir(output_dir)
    folds = list_folds(data_args)
    if arguments.fold is not None and arguments.fold not in (*folds, ALL_FOLDS):
        raise InputError(
            f"--fold {arguments.fold}: the dataset has the folds {', '.join(folds)}; name one of them, or {ALL_FOLDS}"
        )
    baseline = [read_fold(arguments.baseline, fold) for fold in folds] if arguments.baseline else []
    if arguments.push_to_hub:
        options = merge_publication_options(arguments, run_args)
        repo_id = find_repository("--push_to_hub", arguments.push_to_hub)
        branches = [None, *(fold_folder(output_dir, fold).name for fold in folds)]
        prepare_repository(repo_id, options.private, overwrite=options.overwrite, branches=branches)

    wanted = [arguments.fold] if arguments.fold is not None else [] if arguments.collect else folds
    ends_s = started_s + run_args.max_hours * 3600 if run_args.max_hours else None
    train_folds(wanted, output_dir, arguments.config, arguments.flags, arguments.config_file, ends_s)
    if arguments.fold is not None:
        print("when all folds are trained, --collect pools their scores")
        return
    runs = [read_fold(output_dir, fold) for fold in folds]
    pooled = pool_runs(output_dir, runs, data_args, run_args, arguments.postprocessing)
    print(format_pooled(output_dir, pooled))
    if baseline:
        print(format_compared_folds(runs, baseline))
    if arguments.push_to_hub:
        print(publish_folds(output_dir, runs, repo_id, run_args, options).describe())


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(CROSS_VALIDATION):
        main()
