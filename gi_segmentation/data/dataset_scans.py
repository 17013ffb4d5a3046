"""Which rows of a dataset form a scan, and what is known of it. Imports no PyTorch, so scoring can use it."""

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from gi_segmentation.errors import InputError
from gi_segmentation.labels import find_labels
from gi_segmentation.schema import SLICE_THICKNESS_MM, find_voxel_size_mm

# What all slices of a scan have in common.
GRID_COLUMNS = ("height", "width", "pixel_spacing", "slice_spacing")


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


def list_slice_spacings(dataset: Dataset) -> np.ndarray:
    """Return the distance to the next slice of its scan for each slice, in millimetres: float64, shape `(slices,)`.

    It is that of Kaggle's scans if the dataset does not say it.

    Raises:
        InputError: If it is not a length.
    """
    if "slice_spacing" not in dataset.column_names:
        return np.full(len(dataset), SLICE_THICKNESS_MM)
    spacings = np.array(dataset.with_format(None)["slice_spacing"], dtype=np.float64)
    wrong = spacings[~(np.isfinite(spacings) & (spacings > 0))]
    if len(wrong):
        raise InputError(f"slice_spacing: expected millimetres above 0, but got {wrong[0]}; build the dataset again")
    return spacings


def find_known_organs(dataset: Dataset) -> np.ndarray | None:
    """Return which organs were drawn in each slice, shown or not; an organ without an encoding is unknown.

    Returns:
        bool, shape `(slices, organs)`; None if all organs are known in all slices.
    """
    # As columns of Arrow, because texts of Python would take seconds for a large dataset. In parts, because a dataset
    # that was divided anew copies what it gives.
    tables = dataset.with_format("arrow").select_columns(["segmentation"]).iter(batch_size=10_000)
    parts = [
        np.column_stack([one.is_valid().to_numpy() for one in table.column("segmentation").flatten()])
        for table in tables
    ]
    return None if all(part.all() for part in parts) else np.concatenate(parts)


def find_missing_organs(dataset: Dataset) -> list[str]:
    """Return the organs that no slice shows, because they are nowhere or because nobody has drawn them."""
    missing = list(find_labels(dataset.features).names)
    for table in dataset.with_format("arrow").select_columns(["segmentation"]).iter(batch_size=10_000):
        encodings = zip(table.column("segmentation").type, table.column("segmentation").flatten(), strict=True)
        lengths = {field.name: pc.max(pc.binary_length(one)).as_py() for field, one in encodings}
        missing = [organ for organ in missing if not lengths[organ]]
        if not missing:
            break
    return missing


def list_dataset_scans(dataset: Dataset) -> dict[str, DatasetScan]:
    """Return the scans of a split by name, sorted by case and day.

    Raises:
        InputError: If a scan has slices of several sizes, or a slice twice. The message has the first such scan and
            their number. Also as `list_slice_spacings`.
    """
    # Only these columns are read, because decoding all images would take minutes.
    columns = ["case", "day", "scan", "slice", "height", "width", "pixel_spacing"]
    table = dataset.with_format(None).select_columns(columns).to_pandas()
    # A list cannot be an element of a set, a tuple can.
    table["pixel_spacing"] = table["pixel_spacing"].map(tuple)
    table["slice_spacing"] = list_slice_spacings(dataset)
    plans: dict[str, DatasetScan] = {}
    problems = []
    for (case, _, scan), slices in table.groupby(["case", "day", "scan"]):
        rows = dict(zip(slices["slice"].tolist(), slices.index.tolist(), strict=True))
        # A volume needs one size and one spacing. Slices of several sizes cannot be stacked.
        grids = set(zip(*(slices[name] for name in GRID_COLUMNS), strict=True))
        if len(grids) > 1:
            problems.append(f"{scan}: expected slices of one size and spacing, but got {len(grids)}")
        elif len(rows) < len(slices):
            problems.append(f"{scan}: expected each slice once, but {len(slices) - len(rows)} come again")
        # A scan without a problem has one grid. After a problem any will do, because the plans are not returned.
        height, width, pixel_spacing, slice_spacing = min(grids)
        spacing_mm = find_voxel_size_mm(rows, pixel_spacing, slice_spacing)
        plans[scan] = DatasetScan(int(case), rows, (height, width), spacing_mm)
    if problems:
        raise InputError(f"{problems[0]} ({len(problems)} such scans of {len(plans)}); correct the dataset")
    return plans
