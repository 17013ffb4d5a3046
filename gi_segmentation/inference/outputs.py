"""Prediction files."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gi_segmentation.data.kaggle import SliceFile
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS


def write_submission(predictions: Iterator[tuple[SliceFile, np.ndarray]], path: Path) -> None:
    """Write Kaggle's `submission.csv`, whole or not at all: a row per slice and organ, `id,class,predicted`."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "class", "predicted"])
            for slice_file, masks in predictions:
                writer.writerows([slice_file.id, organ, encode(m)] for organ, m in zip(ORGANS, masks, strict=True))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


# By `--format`: the name of the file, and what writes it.
WRITERS: dict[str, tuple[str, Callable[[Iterator[tuple[SliceFile, np.ndarray]], Path], None]]] = {
    "kaggle": ("submission.csv", write_submission)
}
