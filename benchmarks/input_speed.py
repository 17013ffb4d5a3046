"""Compare the input pipeline of a training with the augmentation alone, on one core.

A process that loads slices reads them, augments them and stacks them to batches. Augmenting is the part that cannot be
done once for all. So the limit is the speed of albumentations on arrays that lie in memory: a ratio of 1 means that
everything else costs nothing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import default_collate

from benchmarks.training import write_phantom_dataset
from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.augmentation import build_augmentation
from gi_segmentation.data.slices import load_slices, transform_splits
from gi_segmentation.models.loading import new_processor

BATCH = 32


def read_batch(dataset: Dataset, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Read a batch of slices, as a process of a `DataLoader` does."""
    return default_collate(dataset.__getitems__(rows.tolist()))


def augment_arrays(channels: int, image_size: int) -> Callable[[np.ndarray], None]:
    """Return a function that augments as many arrays in memory as it gets rows."""
    augmentation, random = build_augmentation(), np.random.default_rng(0)
    images = random.random((BATCH, image_size, image_size, channels), dtype=np.float32)
    labels = random.integers(0, 4, (BATCH, image_size, image_size), dtype=np.uint8)

    def run(rows: np.ndarray) -> None:
        for image, mask in zip(images[: len(rows)], labels, strict=False):
            augmentation(image=image, mask=mask)

    return run


def slices_per_second(ways: dict[str, Callable[[np.ndarray], object]], number: int, batches: int) -> dict[str, float]:
    """Measure several ways in turn, with the same rows.

    Args:
        ways: Functions of the rows of a batch.
        number: Number of slices from which the rows are drawn.
        batches: Number of batches for each way.

    Returns:
        Slices in a second of one core, the median over the batches.
    """
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(batches):
        rows = random.permutation(number)[:BATCH]
        for name, way in ways.items():
            # The time of this process alone. Other programs on the machine have less influence on it.
            start = time.process_time()
            way(rows)
            seconds[name].append((time.process_time() - start) / len(rows))
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def measure(dataset_dir: Path, image_size: int, slice_context: int, batches: int) -> dict[str, float]:
    """Measure albumentations alone, and the pipeline with and without the cache."""
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "alone": augment_arrays(3 if slice_context else 1, image_size),
    }
    for name, cache in (("cached", True), ("decoded", False)):
        data_args = DataArguments(
            dataset_name=str(dataset_dir), image_size=image_size, slice_context=slice_context, cache_slices=cache
        )
        slices = load_slices(data_args)
        train, _ = transform_splits(slices, slices, new_processor(image_size), ModelArguments(), data_args, seed=0)
        # `train=train` binds the dataset of this round. Without it, both functions would read the last one.
        ways[name] = lambda rows, train=train: read_batch(train, rows)  # type: ignore[misc]
    return slices_per_second(ways, len(train), batches)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image_size", type=int, default=288, help="height and width of the model's input")
    parser.add_argument("--batches", type=int, default=40, help="number of batches of 32 slices for each row")
    arguments = parser.parse_args()
    # A process of a `DataLoader` has one thread.
    torch.set_num_threads(1)
    print("| input of the model | albumentations alone, slices/s | pipeline, slices/s | ratio | without cache |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        dataset_dir = write_phantom_dataset(Path(scratch), 4, days_per_case=1, slices_per_scan=48, num_folds=2)
        for name, slice_context in (("a slice", 0), ("three neighbouring slices", 1)):
            speed = measure(dataset_dir, arguments.image_size, slice_context, arguments.batches)
            alone, cached, decoded = (speed[way] for way in ("alone", "cached", "decoded"))
            row = f"{alone:.0f} | {cached:.0f} | {cached / alone:.2f} | {decoded / alone:.2f}"
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
