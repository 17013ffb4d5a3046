"""Export a model of each family as an ONNX file, and compare it with PyTorch: logits, labels, size and speed.

The models have the size of the recipes and random weights. Both ways compute the same batch on the CPU, in turns, in
one process, with the same number of threads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import PreTrainedModel, TimmBackboneConfig

from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.configuration import Task
from gi_segmentation.models.loading import new_processor
from gi_segmentation.models.random import build_model, random_config
from gi_segmentation.publishing.onnx_model import compare_onnx, write_onnx
from tests.support.architectures import ARCHITECTURES

# The encoder of this recipe is from timm, so its model needs the extra `timm`.
LITE0 = "upernet-efficientnet-lite0"
LITE0_ENCODER = {"backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
# One model of each family.
RECIPES = ["segformer-b0", "upernet-convnext-small", "beit-base", "dpt-large"]


def make_model(recipe: str, image_size: int) -> PreTrainedModel:
    """Return the model of a recipe with random weights, as it is published: without an auxiliary head."""
    family, overrides = "upernet", {"backbone_config": TimmBackboneConfig.from_dict(LITE0_ENCODER), "hidden_size": 64}
    if recipe != LITE0:
        family, overrides, _ = ARCHITECTURES[recipe]
    changes: dict[str, Any] = {"use_auxiliary_head": False} if family != "segformer" else {}
    config = random_config(family, {**overrides, **changes, **sized(overrides, image_size)}, image_size)
    torch.manual_seed(0)
    return build_model(config, Task(GI_TRACT, "multiclass"), 0).eval()


def sized(overrides: dict[str, Any], image_size: int) -> dict[str, int]:
    """Return the input size as a value of the configuration, for a family that has this value."""
    return {"image_size": image_size} if "image_size" in overrides else {}


def take_turns(ways: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Measure several ways in turn, and return the median seconds of each. The first round does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for times, way in zip(seconds, ways, strict=True):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]


def measure(recipe: str, image_size: int, batch_size: int, rounds: int, path: Path) -> str:
    """Export the model of a recipe, and return its row of the table."""
    model, processor = make_model(recipe, image_size), new_processor(image_size)
    write_onnx(model, processor, path)
    check = compare_onnx(model, processor, path)
    options = onnxruntime.SessionOptions()
    # ONNX Runtime takes all cores by default, and PyTorch may have been given fewer.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(batch_size, 3, image_size, image_size)
    with torch.inference_mode():
        ours, theirs = take_turns(
            [
                lambda: session.run(["logits"], {"pixel_values": pixel_values.numpy()}),
                lambda: model(pixel_values=pixel_values),
            ],
            rounds,
        )
    return (
        f"| {recipe} | {check.difference:.1e} | {check.differing} of {check.pixels:,} | "
        f"{path.stat().st_size / 1e6:.0f} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |"
    )


def main() -> None:
    """Measure each model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    choices = [LITE0, *ARCHITECTURES]
    parser.add_argument("--recipes", nargs="+", choices=choices, default=RECIPES, help="recipes of the models")
    parser.add_argument("--image_size", type=int, default=288, help="height and width of the model's input")
    parser.add_argument("--batch_size", type=int, default=4, help="number of slices in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each way")
    arguments = parser.parse_args()
    sizes = arguments.image_size, arguments.batch_size, arguments.rounds
    print(
        "| recipe | largest logit difference | pixels with another label | file, MB | PyTorch, s | ONNX Runtime, s | "
        "speed / PyTorch |\n|---|---|---|---|---|---|---|"
    )
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            print(measure(recipe, *sizes, Path(scratch) / "model.onnx"), flush=True)


if __name__ == "__main__":
    main()
