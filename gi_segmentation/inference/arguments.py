"""The flags of all commands that predict.

This module does not import PyTorch, so `--help` does not wait for it.
"""

import argparse

from gi_segmentation.errors import InputError


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the checkpoints, the device, and the number of slices in a forward pass."""
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="folder or Hub id of a checkpoint of this project; with several, their probabilities are averaged",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; None: its main branch")
    parser.add_argument("--batch_size", type=int, default=16, help="number of slices in a forward pass")
    parser.add_argument("--num_workers", type=int, default=2, help="number of processes that read slices")
    parser.add_argument(
        "--device", help="device for the model, for example cuda or cpu; None: the GPU if there is one"
    )


def check_prediction_flags(arguments: argparse.Namespace) -> argparse.Namespace:
    """Check the numbers among the flags of `add_prediction_flags`.

    Raises:
        InputError: If one is too small.
    """
    # With 0 workers, the slices are read in the main process.
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise InputError(
            f"expected --batch_size of at least 1 and --num_workers of at least 0, "
            f"but got {arguments.batch_size} and {arguments.num_workers}"
        )
    return arguments
