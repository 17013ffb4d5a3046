"""The flags of all commands that predict.

This module does not import PyTorch, so `--help` does not wait for it.
"""

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

from gi_segmentation.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# What becomes of a slice of Kaggle's that cannot be read.
OnError = Literal["stop", "empty"]
# The formats of prediction files that can be chosen, see `inference.outputs`.
FORMAT_NAMES = ("kaggle", "nifti", "dicom-seg", "rtstruct", "report")


@dataclass(frozen=True)
class Computation:
    """How checkpoints are computed.

    Attributes:
        device: Device for the models; None: the GPU if there is one.
        precision: `fp32` computes in 32 bits, and `bf16` and `fp16` in 16 bits where PyTorch's autocast does so.
            `auto` takes `bf16` where the device has units for it, and else `fp16` on a GPU that has units for that.
        fast_head: Whether to compute the head of a SegFormer in another order, which is faster.
    """

    device: str | None = None
    precision: Precision = "fp32"
    fast_head: bool = True

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> "Computation":
        """Return what the flags of `add_prediction_flags` say."""
        return cls(arguments.device, arguments.precision, not arguments.no_fast_head)


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
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="compute in 32 or in 16 bits, which is faster and changes some masks; "
        "fp16 is for GPUs without bfloat16, such as a T4 or P100; auto: bf16 or fp16 where the GPU or the processor "
        "has units for it (AMX)",
    )
    parser.add_argument(
        "--no_fast_head",
        action="store_true",
        help="compute the head of a SegFormer in the same order as transformers; the logits differ only by rounding",
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
