"""Measure the scans of a training, so that a later prediction can say whether a scan is like them."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from gi_segmentation.data.dataset_scans import DatasetScan, list_dataset_scans, list_slice_spacings
from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.data.prepared import read_image, select_sources
from gi_segmentation.data.streaming import StreamedRows
from gi_segmentation.labels import find_labels
from gi_segmentation.review.measures import ScanMeasures, measure_scan, pick_intensity_slices
from gi_segmentation.review.ranges import TrainingRanges, find_ranges
from gi_segmentation.rle import find_unknown, organ_masks

# More scans hardly change a range, and a scan of 144 slices takes half a second.
MAX_SCANS = 60


def find_training_ranges(dataset: Dataset) -> TrainingRanges:
    """Measure the annotated scans of a split.

    Args:
        dataset: The split. Of many scans, `MAX_SCANS` are measured, evenly by patient and day.

    Returns:
        The ranges, for `model.config.training_ranges`.

    Raises:
        InputError: If the slices of a scan do not form a volume.
    """
    plans = list(list_dataset_scans(dataset).values())
    positions = np.unique(np.linspace(0, len(plans) - 1, min(len(plans), MAX_SCANS)).round().astype(int))
    # For a streamed dataset, this looks up where all rows are. So it is done once.
    sources = select_sources(dataset)
    measured = [measure_annotated_scan(dataset, sources, plans[position]) for position in positions]
    return find_ranges(measured, find_labels(dataset.features).names)


def find_field_mm(dataset: Dataset) -> list[list[float]] | None:
    """Return the field of view of the slices of a split, for `model.config.field_mm`.

    Returns:
        The smallest and the largest height, and the smallest and the largest width, in millimetres. None for Kaggle's
        slices: `formats.volumes.FIELD_MM` has that of all of them.
    """
    if "slice_spacing" not in dataset.column_names:
        return None
    plain = dataset.with_format("numpy").select_columns(["height", "width", "pixel_spacing"])[:]
    fields = np.stack([plain["height"], plain["width"]], axis=1) * plain["pixel_spacing"]
    return [[round(float(end), 1) for end in (axis.min(), axis.max())] for axis in fields.T]


def measure_annotated_scan(dataset: Dataset, sources: Dataset | StreamedRows, plan: DatasetScan) -> ScanMeasures:
    """Measure a scan of the dataset with its annotations; `sources` has its images. Unknown organs are left out."""
    numbers = sorted(plan.rows)
    rows = [plan.rows[number] for number in numbers]
    scan = dataset.with_format(None).select(rows)
    annotated = scan.select_columns(["segmentation", "pixel_spacing"])
    images = [sources[rows[place]] for place in pick_intensity_slices(len(rows))]
    masks = np.stack([organ_masks(row["segmentation"], *plan.size) for row in annotated], axis=1)
    scaled = np.stack([scale_intensity(read_image(row)) for row in images])
    spacing_mm = float(list_slice_spacings(scan)[0]), *annotated[0]["pixel_spacing"]
    organs = find_labels(dataset.features).names
    unknown = find_unknown(annotated["segmentation"])
    measured = measure_scan(masks, scaled, spacing_mm, numbers, organs)
    return replace(measured, organs={organ: measured.organs[organ] for organ in organs if organ not in unknown})
