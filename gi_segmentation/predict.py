"""`python -m gi_segmentation.predict`: predict slices or volumes with one or several checkpoints."""

import argparse
from pathlib import Path

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.inference.arguments import FORMATS, Computation, add_prediction_flags, check_prediction_flags


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: If a number is too small, or if flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_prediction_flags(parser)
    parser.add_argument(
        "--test_time_flips",
        action="store_true",
        help="average over flipped slices in four forward passes; for a model that was trained with flips",
    )
    parser.add_argument(
        "--folds",
        action="store_true",
        help="average the models of all folds of --model: branches fold-K on the Hub, or folders fold-K",
    )
    parser.add_argument(
        "--no_postprocessing",
        action="store_true",
        help="keep every component, even if the checkpoint has limits for the volume and confidence of components",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="Kaggle's slices (caseN_dayN/scans/slice_*.png), NIfTI files, or DICOM series; a file, a folder or a zip",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the prediction files")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        help="kaggle writes submission.csv, nifti a label map per scan, dicom-seg a segmentation and "
        "rtstruct a structure set per series; None: what fits the input",
    )
    parser.add_argument("--list", action="store_true", help="say what was found and what would be written, and stop")
    arguments = check_prediction_flags(parser.parse_args(argv))
    if arguments.folds and (len(arguments.model) > 1 or arguments.revision):
        raise InputError("--folds takes all folds of one --model; leave out the other ones, and --revision")
    return arguments


def main(argv: list[str] | None = None) -> list[Path]:
    """Predict slices or volumes.

    Returns:
        The paths of the files that were written; with `--list`, of those that would be written.

    Raises:
        InputError: If a checkpoint or the input cannot be used, or if the output exists.
    """
    arguments = parse_arguments(argv)
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.inference.archives import unpacked

    with unpacked(arguments.input) as path:
        return predict(arguments, path)


def predict(arguments: argparse.Namespace, path: Path) -> list[Path]:
    """Predict what lies at a path; see `main`."""
    from gi_segmentation.inference.algorithm import Algorithm
    from gi_segmentation.inference.inputs import describe_scans, find_scans
    from gi_segmentation.inference.outputs import choose_formats, list_outputs, unfinished_folder, write_predictions

    scans = find_scans(path)
    formats = choose_formats(scans, arguments.format)
    paths = [arguments.output_dir / name for name in list_outputs(scans, formats)]
    # This check comes first, because a prediction may take an hour and must not overwrite an earlier one.
    if existing := [path for path in paths if path.exists()]:
        raise InputError(f"{existing[0]}: exists; remove it or name another --output_dir")
    if arguments.list:
        print("\n".join([*describe_scans(scans), *(f"would write {path}" for path in paths)]))
        return paths
    from gi_segmentation.inference.predictor import (
        describe_computation,
        find_postprocessing,
        load_folds,
        load_members,
        predict_slices,
    )

    computation = Computation.from_flags(arguments)
    if arguments.folds:
        members = load_folds(arguments.model[0], computation)
        print(f"averages {len(members)} models: {', '.join(member.name for member in members)}")
    else:
        members = load_members(arguments.model, arguments.revision, computation)
    print(describe_computation(members))
    # With --no_postprocessing, the configuration is not even read, because it may be malformed.
    postprocessing, remark = (None, "") if arguments.no_postprocessing else find_postprocessing(members)
    if remark:
        print(remark)
    # `predict_slices` gives one slice after the other, and each is written at once. So the memory does not grow with
    # the number of scans.
    settings = (arguments.batch_size, arguments.num_workers, arguments.test_time_flips, postprocessing)
    algorithm = Algorithm({member.name: member.commit for member in members})
    with unfinished_folder(arguments.output_dir) as folder:
        write_predictions(predict_slices(members, scans.slices, *settings), formats, folder, algorithm)
    shown = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {arguments.output_dir}"
    print(f"{len(scans.slices)} slices of {len(scans.names)} scans: {shown}")
    return paths


if __name__ == "__main__":
    with exit_on_input_error():
        main()
