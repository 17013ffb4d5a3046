"""Columns and names of the data.

No other module states them a second time.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from gi_segmentation.labels import GI_TRACT, LabelSet

# The file names have the size of a pixel only. The thickness is the same in all scans of the competition.
SLICE_THICKNESS_MM = 3.0
# Height and width of a slice in millimetres, each from the smallest to the largest of a training.
FieldOfView: TypeAlias = tuple[tuple[float, float], tuple[float, float]]
# Most scans have this number of slices. It is used to state times for a typical scan.
SCAN_SLICES = 144

# Columns that only a dataset of a folder with `labels.json` has.
OWN_COLUMNS = ("slice_spacing", "rescale_slope", "rescale_intercept")

# With this value instead of the number of a fold, no patient is held back from the training.
ALL_FOLDS = "all"


def dataset_features(labels: LabelSet = GI_TRACT, own: bool = False) -> Any:
    """Return the columns of a dataset, which has one row per slice.

    Args:
        labels: Its organs.
        own: Whether the folder that it was built from has `labels.json`. Then it has three more columns: the distance
            between slices in millimetres, and the scale of the intensities, both of the scan.

    Returns:
        `datasets.Features`. `image` is the 16-bit grayscale PNG of the slice. `annotation` is an 8-bit palette PNG
        whose pixels are label ids. `segmentation` has the exact run-length encoding of each organ; it is null for an
        organ that nobody has drawn in the scan. In a split without ground truth, `annotation` and `segmentation` are
        null.
    """
    # Imported here, because every module imports this one, and `datasets` takes a second.
    from datasets import Features, Image, Sequence, Value

    columns = {
        "id": Value("string"),
        "image": Image(),
        "annotation": Image(),
        "segmentation": {organ: Value("string") for organ in labels.names},
        "case": Value("int32"),
        "day": Value("int32"),
        "slice": Value("int32"),
        "scan": Value("string"),
        "fold": Value("int32"),
        "height": Value("int32"),
        "width": Value("int32"),
        "pixel_spacing": Sequence(Value("float64"), length=2),
    }
    return Features({**columns, **{name: Value("float64") for name in OWN_COLUMNS}} if own else columns)


def scan_name(case: int, day: int) -> str:
    """Return the name of a scan.

    Example:
        >>> scan_name(123, 20)
        'case123_day20'
    """
    return f"case{case}_day{day}"


def slice_name(scan: str, number: int) -> str:
    """Return Kaggle's id of a slice.

    Example:
        >>> slice_name("case123_day20", 7)
        'case123_day20_slice_0007'
    """
    return f"{scan}_slice_{number:04d}"


def find_voxel_size_mm(
    numbers: Collection[int], pixel_spacing: tuple[float, float], slice_spacing: float = SLICE_THICKNESS_MM
) -> tuple[float, float, float] | None:
    """Find the size of the voxels of a scan.

    Args:
        numbers: Numbers of its slices.
        pixel_spacing: Height and width of a pixel in millimetres.
        slice_spacing: Distance between slices in millimetres.

    Returns:
        Voxel size (z, y, x) in millimetres; None if slices are missing between the first and the last.

    Example:
        >>> find_voxel_size_mm([3, 4, 5], (1.5, 1.5)), find_voxel_size_mm([3, 5], (1.5, 1.5))
        ((3.0, 1.5, 1.5), None)
    """
    # Across a gap, two slices that follow each other are more than one thickness apart. No single voxel size is right
    # then, and distances along z would be too small.
    gap = max(numbers) - min(numbers) >= len(numbers)
    return None if gap else (slice_spacing, *pixel_spacing)


def hash_splits(scans_by_split: Mapping[str, Iterable[str]]) -> str:
    """Compute a fingerprint of a split. Two splits with the same scans in each part have the same fingerprint.

    Args:
        scans_by_split: Names of scans by the name of the split, in any order; a name may come several times.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    lines = [f"{split}: {' '.join(sorted(set(names)))}" for split, names in sorted(scans_by_split.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
