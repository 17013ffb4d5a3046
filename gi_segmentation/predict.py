"""`python -m gi_segmentation.predict`: predict a folder of slices with one or several checkpoints."""

import argparse
from pathlib import Path

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.inference.arguments import Computation, add_prediction_flags, check_prediction_flags


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
    parser.add_argument("--input", type=Path, required=True, help="folder of scans: caseN_dayN/scans/slice_*.png")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the prediction file")
    parser.add_argument("--format", choices=["kaggle"], default="kaggle", help="kaggle writes submission.csv")
    arguments = check_prediction_flags(parser.parse_args(argv))
    if arguments.folds and (len(arguments.model) > 1 or arguments.revision):
        raise InputError("--folds takes all folds of one --model; leave out the other ones, and --revision")
    return arguments


def main(argv: list[str] | None = None) -> Path:
    """Predict a folder of slices.

    Returns:
        The path of the file that was written.

    Raises:
        InputError: If a checkpoint or the input cannot be used, or if the output exists.
    """
    arguments = parse_arguments(argv)
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.data.kaggle import find_input
    from gi_segmentation.inference.outputs import WRITERS
    from gi_segmentation.inference.predictor import (
        describe_computation,
        find_postprocessing,
        load_folds,
        load_members,
        predict_slices,
    )

    file_name, write = WRITERS[arguments.format]
    path: Path = arguments.output_dir / file_name
    # This check comes first, because a prediction may take an hour and must not overwrite an earlier one.
    if path.exists():
        raise InputError(f"{path}: exists; remove it or name another --output_dir")
    slices = find_input(arguments.input)
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
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    # `predict_slices` gives one slice after the other, and `write` writes each at once. So the memory does not grow
    # with the number of slices.
    settings = (arguments.batch_size, arguments.num_workers, arguments.test_time_flips, postprocessing)
    write(predict_slices(members, slices, *settings), path)
    print(f"{len(slices)} slices of {len({s.scan for s in slices})} scans: {path}")
    return path


if __name__ == "__main__":
    with exit_on_input_error():
        main()
