"""Which rows of a dataset form a scan. Imports no PyTorch, so scoring can use it."""

from typing import NamedTuple

from datasets import Dataset

from gi_segmentation.errors import InputError
from gi_segmentation.schema import find_voxel_size_mm


class DatasetScan(NamedTuple):
    """The slices of a scan, and their size.

    Attributes:
        case: Number of the patient.
        rows: Row of each slice in the dataset, by the number of the slice.
        size: Height and width of the slices in pixels.
        spacing_mm: Voxel size (z, y, x) in millimetres; None if slices are missing between the first and the last.
    """

    case: int
    rows: dict[int, int]
    size: tuple[int, int]
    spacing_mm: tuple[float, float, float] | None


def list_dataset_scans(dataset: Dataset) -> dict[str, DatasetScan]:
    """Return the scans of a split by name, sorted by case and day.

    Raises:
        InputError: If a scan has slices of several sizes, or a slice twice. The message has the first such scan and
            their number.
    """
    # Only these columns are read, because decoding all images would take minutes.
    columns = ["case", "day", "scan", "slice", "height", "width", "pixel_spacing"]
    table = dataset.with_format(None).select_columns(columns).to_pandas()
    # A list cannot be an element of a set, a tuple can.
    table["pixel_spacing"] = table["pixel_spacing"].map(tuple)
    plans: dict[str, DatasetScan] = {}
    problems = []
    for (case, _, scan), slices in table.groupby(["case", "day", "scan"]):
        rows = dict(zip(slices["slice"].tolist(), slices.index.tolist(), strict=True))
        # A volume needs one size and one spacing. Slices of several sizes cannot be stacked.
        grids = set(zip(slices["height"], slices["width"], slices["pixel_spacing"], strict=True))
        if len(grids) > 1:
            problems.append(f"{scan}: expected slices of one size and spacing, but got {len(grids)}")
        elif len(rows) < len(slices):
            problems.append(f"{scan}: expected each slice once, but {len(slices) - len(rows)} come again")
        # A scan without a problem has one grid. After a problem any will do, because the plans are not returned.
        height, width, pixel_spacing = min(grids)
        plans[scan] = DatasetScan(int(case), rows, (height, width), find_voxel_size_mm(rows, pixel_spacing))
    if problems:
        raise InputError(f"{problems[0]} ({len(problems)} such scans of {len(plans)}); correct the dataset")
    return plans
