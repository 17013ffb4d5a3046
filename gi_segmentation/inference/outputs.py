"""Write prediction files."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gi_segmentation.data.kaggle import SliceFile
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS


def write_submission(predictions: Iterator[tuple[SliceFile, np.ndarray]], path: Path) -> None:
    """Write Kaggle's `submission.csv`: a row `id,class,predicted` for each slice and organ.

    Args:
        predictions: Slices and their masks, bool, shape `(organs, height, width)`.
        path: The file to write.
    """
    # The rows go to a hidden file, which gets its name at the end. A run that fails leaves no file that looks
    # complete.
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


# For each value of `--format`: the name of the file, and the function that writes it.
WRITERS: dict[str, tuple[str, Callable[[Iterator[tuple[SliceFile, np.ndarray]], Path], None]]] = {
    "kaggle": ("submission.csv", write_submission)
}
