"""A folder of own patients with any labels, in Kaggle's layout and with `labels.json`, and its dataset."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from gi_segmentation.rle import encode

SIDE, SLICES = 64, 6
# Not that of Kaggle's scans.
SLICE_SPACING_MM = 1.5


def organ_square(index: int) -> tuple[slice, slice]:
    """Return rows and columns of the organ with this place in the label set, on each slice but the first."""
    row, column = divmod(index, 6)
    return slice(4 + 12 * row, 14 + 12 * row), slice(2 + 10 * column, 10 + 10 * column)


def build_own_dataset(
    folder: Path, organs: Sequence[str], unknown: Mapping[int, Collection[str]] | None = None, patients: int = 4
) -> Path:
    """Write a folder of patients with one scan each, and build a dataset from it.

    Args:
        folder: Where both are written.
        organs: Names of the organs, at most 30.
        unknown: Organs that nobody has drawn, by the number of the patient.
        patients: Number of patients.

    Returns:
        The folder of the dataset.
    """
    source, generator = folder / "source", np.random.default_rng(0)
    rows, scans = ["id,class,segmentation"], {}
    for case in range(1, patients + 1):
        scan, not_drawn = f"case{case}_day0", list((unknown or {}).get(case, ()))
        scans[scan] = {
            **{"slice_spacing_mm": SLICE_SPACING_MM, "rescale_slope": 1.0, "rescale_intercept": 0.0},
            "unknown": not_drawn,
        }
        (source / "train" / f"case{case}" / scan / "scans").mkdir(parents=True)
        for number in range(1, SLICES + 1):
            image = generator.integers(0, 200, (SIDE, SIDE)).astype(np.uint16)
            for index, organ in enumerate(organs):
                mask = np.zeros((SIDE, SIDE), dtype=bool)
                mask[organ_square(index)] = number > 1
                image[mask] += np.uint16(300 + 100 * index)
                if organ not in not_drawn:
                    rows.append(f"{scan}_slice_{number:04d},{organ},{encode(mask)}")
            path = (
                source / "train" / f"case{case}" / scan / "scans" / f"slice_{number:04d}_{SIDE}_{SIDE}_1.50_1.50.png"
            )
            Image.fromarray(image).save(path)
    (source / "train.csv").write_text("\n".join([*rows, ""]))
    (source / "labels.json").write_text(json.dumps({"labels": list(organs), "scans": scans}))
    build(source, folder / "dataset", GiTractConfig(num_folds=2), num_proc=1)
    return folder / "dataset"
