"""Masks that are hard to turn into contours, and the programs that check DICOM files."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter


def shapes(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth random pieces with holes, bool, shape `(3, i, j, k)`. The second organ has single voxels, too."""
    rng = np.random.default_rng(seed)
    masks = np.stack([gaussian_filter(rng.normal(size=shape), 1.5) > 0.02 for _ in range(3)])
    masks[1] ^= rng.random(shape) > 0.98
    # A ring with an island in its hole, on the last slice of each axis too.
    masks[2] = False
    masks[2, 2:12, 2:12], masks[2, 4:10, 4:10], masks[2, 6:8, 6:8] = True, False, True
    return masks


def label_map(masks: np.ndarray) -> np.ndarray:
    """Masks, shape `(organs, i, j, k)`, as one label map. No label reaches the border of a slice."""
    labels = np.max(masks * np.arange(1, len(masks) + 1)[:, None, None, None], axis=0)
    return np.pad(labels[1:-1, 1:-1], [(1, 1), (1, 1), (0, 0)]).astype(np.uint8)


def find_dicom_errors(path: Path) -> list[str]:
    """Check a file against the standard with `dciodvfy` of dicom3tools, and return its error lines."""
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert lines, "dciodvfy names what it has checked"
    return [line for line in lines if line.startswith("Error")]


def check_dicom(path: Path) -> None:
    """Check that a file follows the standard; skip the test where the program is missing."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    assert find_dicom_errors(path) == []
