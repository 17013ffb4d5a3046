"""A synthetic folder in the layout of the Kaggle data, for tests and the demo."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
from scipy.interpolate import CubicSpline
from tqdm.auto import tqdm

from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS

Array: TypeAlias = np.ndarray
Rngs: TypeAlias = tuple[np.random.Generator, np.random.Generator]

# Width and height in pixels, spacing in mm, slices: the four kinds of real scans.
SCAN_KINDS = ((266, 266, 1.50, 144), (360, 310, 1.50, 144), (276, 276, 1.63, 80), (234, 234, 1.50, 144))
# Real scans that their hosts list as faulty; a phantom of the same name would be dropped by whoever drops those.
FAULTY_SCANS = {
    *((61, 14), (9, 27), (7, 0), (81, 30), (43, 18), (138, 0)),
    *((34, 20), (43, 26), (124, 19), (144, 15), (83, 11), (13, 0)),
}
NUM_REAL_CASES = 156
NUM_DAYS = 40

BODY_LENGTH_MM = 432.0
PATH_STEP_MM = 2.0
MIN_ORGAN_MM2 = 150.0
DAY_SHARE = 0.15  # how much a day differs, of how much a patient differs
TOUCHING_SHARE = 0.5  # of the slices: where two organs touch, their outlines share a rim
SUBPIXEL_BITS = 4

# Intensities relative to subcutaneous fat, each with the strength of its texture.
FAT, VISCERAL_FAT, MUSCLE, AIR = (1.0, 0.04), (0.62, 0.06), (0.24, 0.25), (0.02, 0.0)


@dataclass(frozen=True)
class PhantomSummary:
    """What was written: counts of cases, scans and slices, and of pixels in two organs at once."""

    cases: int
    scans: int
    slices: int
    empty_slices: int
    multi_organ_slices: int
    overlapping_slices: int
    overlap_pixels: int


@dataclass(frozen=True)
class _Scan:
    case: int
    day: int
    num_slices: int
    width: int
    height: int
    spacing_mm: float

    @property
    def name(self) -> str:
        return f"case{self.case}_day{self.day}"


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid; centre and radii in mm as (z, y, x), zero at the middle of the body."""

    centre_mm: Array
    radii_mm: Array
    look: tuple[float, float]


@dataclass(frozen=True)
class _Tube:
    """Balls along a path: a wall around contents whose intensity swings along the path, as folds do."""

    centres_mm: Array
    radii_mm: Array
    wall_mm: float
    wall_look: tuple[float, float]
    contents: Array
    contents_texture: float


@dataclass(frozen=True)
class _Anatomy:
    torso_mm: Array
    rim_mm: Array
    blobs: list[_Blob]
    spine: list[_Blob]
    tubes: dict[str, _Tube]
    offset_mm: Array
    fat_intensity: float
    noise: float


def write_phantom(
    output_dir: Path,
    num_cases: int = 6,
    days_per_case: int = 2,
    slices_per_scan: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> PhantomSummary:
    """Write synthetic scans and their masks as the Kaggle folder has them: `train.csv` and `train/`.

    The same arguments give the same bytes, whatever `num_proc`. The folder appears under its name only when complete.

    Args:
        output_dir: Folder to create; may exist if empty.
        num_cases: Patients.
        days_per_case: Scans of each patient.
        slices_per_scan: Slices that the body is divided into; None for 144 or 80 as in the real scans.
        seed: Not negative; another one gives other patients.
        num_proc: Processes; None for one per core. More than one needs an importable main module, as
            `multiprocessing` with spawn does.

    Returns:
        Counts of what was written.

    Raises:
        FileExistsError: If `output_dir` is a file or a folder that is not empty.
        ValueError: If a size is below 1 or the seed below 0.
    """
    sizes = {"num_cases": num_cases, "days_per_case": days_per_case}
    sizes |= {"slices_per_scan": slices_per_scan or 1, "num_proc": num_proc or 1}
    raise NotImplementedError(sizes)
