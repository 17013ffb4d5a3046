"""Names, ids and columns of the data: the one place that states them."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias

ORGANS: tuple[str, ...] = ("large_bowel", "small_bowel", "stomach")
LABELS: tuple[str, ...] = ("background", *ORGANS)
ID2LABEL: dict[int, str] = dict(enumerate(LABELS))

# What a model's channels mean. `multiclass`: every pixel gets one label, by softmax over four channels. `multilabel`:
# every organ has a channel and a mask of its own, by sigmoid, so that organs may overlap.
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
            "pixel_spacing": Sequence(Value("float64"), length=2),
        }
    )


def scan_name(case: int, day: int) -> str:
    """Name of a scan, one volume of a patient.

    Example:
        >>> scan_name(123, 20)
        'case123_day20'
    """
    return f"case{case}_day{day}"


def slice_name(scan: str, number: int) -> str:
    """Kaggle's id of a slice.

    Example:
        >>> slice_name("case123_day20", 7)
        'case123_day20_slice_0007'
    """
    return f"{scan}_slice_{number:04d}"


def find_voxel_size_mm(
    numbers: Collection[int], pixel_spacing: tuple[float, float]
) -> tuple[float, float, float] | None:
    """Size of a scan's voxels in millimetres, (z, y, x).

    Args:
        numbers: The numbers of its slices.
        pixel_spacing: Height and width of a pixel in millimetres.

    Returns:
        None where slices are missing between the first and the last: the slices that are there lie farther apart than
        their thickness, so distances along z would be wrong.

    Example:
        >>> find_voxel_size_mm([3, 4, 5], (1.5, 1.5)), find_voxel_size_mm([3, 5], (1.5, 1.5))
        ((3.0, 1.5, 1.5), None)
    """
    gap = max(numbers) - min(numbers) >= len(numbers)
    return None if gap else (SLICE_THICKNESS_MM, *pixel_spacing)


def hash_splits(scans_by_split: Mapping[str, Iterable[str]]) -> str:
    """Fingerprint of a split: which scans stand in which part.

    Args:
        scans_by_split: Scan names by split name; order and repetition do not matter.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    lines = [f"{split}: {' '.join(sorted(set(names)))}" for split, names in sorted(scans_by_split.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
