"""Scans of a phantom as volumes of any orientation, and the masks that the Kaggle path predicts for them."""

import csv
import itertools
from pathlib import Path

import numpy as np

from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from gi_segmentation.rle import decode

# All 48 ways to store a volume: the order of its axes, and the axes that are flipped.
ORIENTATIONS = [
    (order, flipped)
    for order in itertools.permutations(range(3))
    for number in range(4)
    for flipped in itertools.combinations(range(3), number)
]


def store(
    voxels: np.ndarray, affine: np.ndarray, order: tuple[int, ...], flipped: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Swap and flip the axes of a volume, and change its affine so that each voxel keeps its place."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, old in enumerate(order):
        sign = -1 if new in flipped else 1
        change[old, new] = sign
        if sign < 0:
            change[old, 3] = voxels.shape[old] - 1
    return np.flip(voxels.transpose(order), flipped), affine @ change


def rotation(rng: np.random.Generator, degrees: float) -> np.ndarray:
    """A rotation by an angle around a random axis (Rodrigues' formula)."""
    x, y, z = (axis := rng.normal(size=3)) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def predict_kaggle(model: Path, folder: Path, output_dir: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Predict a Kaggle scan, and return label ids: uint8, shape `(columns, rows, slices)`."""
    (path,) = main(prediction_words(model, folder, output_dir))
    labels = np.zeros(shape, dtype=np.uint8)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            mask = decode(row["predicted"], shape[1], shape[0])
            labels[:, :, int(row["id"][-4:]) - 1][mask.T] = GI_TRACT.names.index(row["class"]) + 1
    return labels


def prediction_words(model: Path, folder: Path, output_dir: Path, *flags: str) -> list[str]:
    words = ["--model", str(model), "--input", str(folder), "--output_dir", str(output_dir), "--device", "cpu"]
    return [*words, "--precision", "fp32", "--num_workers", "0", *flags]
