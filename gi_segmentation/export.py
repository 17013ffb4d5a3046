"""`python -m gi_segmentation.export`: write a checkpoint as an ONNX file, which runs without PyTorch."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind

# The packages of the extra `onnx`: the format, PyTorch's way to it, and the runtime that checks the result.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: If a folder is to be published, or if a package is missing.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.export",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint of this project")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; None: its main branch")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for onnx/model.onnx")
    parser.add_argument(
        "--push_to_hub",
        action="store_true",
        help="add onnx/model.onnx to the repository --model, with a section on its model card, in one commit",
    )
    arguments = parser.parse_args(argv)
    if arguments.push_to_hub and Path(arguments.model).is_dir():
        raise InputError(
            f"--push_to_hub: expected a Hub id as --model, got the folder {arguments.model}; publish the checkpoint "
            f"first, and name its repository"
        )
    for package in ONNX_PACKAGES:
        if find_spec(package) is None:
            raise InputError(f"needs {package}, which is not installed; run `pip install -e .[onnx]`")
    return arguments


def main(argv: list[str] | None = None) -> Path:
    """Export a checkpoint.

    Returns:
        The path of the ONNX file.

    Raises:
        InputError: If the checkpoint cannot be used, the ONNX file does not compute the same, or the Hub refuses.
    """
    arguments = parse_arguments(argv)
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.publishing.onnx_model import export_model

    return export_model(arguments.model, arguments.revision, arguments.output_dir, arguments.push_to_hub)


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error():
        main()
