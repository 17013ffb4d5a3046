"""Names, ids and columns of the data: the one place that states them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

ORGANS: tuple[str, ...] = ("large_bowel", "small_bowel", "stomach")
LABELS: tuple[str, ...] = ("background", *ORGANS)
ID2LABEL: dict[int, str] = dict(enumerate(LABELS))

# What a model's channels mean: one label per pixel by softmax, or one yes or no per organ by sigmoid.
LabelMode: TypeAlias = Literal["multiclass", "multilabel"]
LABELS_BY_MODE: dict[LabelMode, tuple[str, ...]] = {"multiclass": LABELS, "multilabel": ORGANS}

# RGB per label id; the palette of the `annotation` PNGs and of every overlay picture.
COLOURS: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (0, 158, 115), (230, 159, 0), (86, 180, 233))

SLICE_THICKNESS_MM = 3.0
SCAN_SLICES = 144  # of most scans


def dataset_features() -> Any:
    """Columns of the `gi_tract` dataset, one row per slice.

    Returns:
        `datasets.Features`. `image` is the slice's own 16-bit grayscale PNG; `annotation` an 8-bit palette PNG whose
        pixels are label ids; `segmentation` the exact run-length encoding of each organ. Both of the latter are null
        in a split without ground truth.
    """
    from datasets import Features, Image, Sequence, Value

    return Features(
        {
            "id": Value("string"),
            "image": Image(),
            "annotation": Image(),
            "segmentation": {organ: Value("string") for organ in ORGANS},
            "case": Value("int32"),
            "day": Value("int32"),
            "slice": Value("int32"),
            "scan": Value("string"),
            "height": Value("int32"),
            "width": Value("int32"),
            "pixel_spacing": Sequence(Value("float32"), length=2),
        }
    )


def hash_splits(scans_by_split: Mapping[str, Iterable[str]]) -> str:
    """Fingerprint of a split: which scans stand in which part.

    Args:
        scans_by_split: Scan names by split name; order and repetition do not matter.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    lines = [f"{split}: {' '.join(sorted(set(names)))}" for split, names in sorted(scans_by_split.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
