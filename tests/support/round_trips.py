"""Write masks as DICOM for many kinds of series, read them with programs of others, and compare.

`python -m tests.support.round_trips` prints a table; docs/clinic.md says what it shows. It needs dicom3tools,
plastimatch and dcmqi.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import highdicom
import nibabel
import numpy as np

from dataset_builder.series import TO_LPS, write_series
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from tests.support.dicom import leave_gaps, read_series, write_enhanced, write_with_uids
from tests.support.masks import find_dicom_errors, shapes
from tests.support.processes import TEST_DATA
from tests.support.volumes import rotation, store

ALGORITHM = Algorithm({"name/model": "c0ffee" * 6 + "beef"})
# The command of dcmqi that reads a segmentation. pip puts it beside Python.
DCMQI = shutil.which("segimage2itkimage", path=Path(sys.executable).parent)
REAL = "a real CT"
# Voxels along an axis that may be in a mask.
MAX_LENGTH = 40


@dataclass(frozen=True)
class Kind:
    """A kind of series. File names and instance numbers tell the order of the slices in none of them.

    Attributes:
        order: Which axes of the patient the columns, rows and slices follow: 0 right to left, 1 front to back, 2 head
            to feet.
        flipped: The axes that run the other way.
        degrees: Tilt around an axis that is none of the patient's.
        shape: Voxels along the axes of the patient.
        spacing_mm: Size of a voxel along the axes of the patient.
        enhanced: Whether one file has all slices.
        gaps: Whether the slices are thinner than their distance.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[int, ...] = ()
    degrees: float = 0
    shape: tuple[int, int, int] = (31, 26, 7)
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 3)
    enhanced: bool = False
    gaps: bool = False


KINDS = {
    "axial": Kind(),
    "axial, from feet to head": Kind(flipped=(2,)),
    "axial, all axes reversed": Kind(flipped=(0, 1, 2)),
    "sagittal": Kind(order=(1, 2, 0)),
    "coronal": Kind(order=(0, 2, 1)),
    "tilted by 12°": Kind(degrees=12),
    "sagittal, reversed, tilted by 12°": Kind(order=(1, 2, 0), flipped=(0, 2), degrees=12),
    "voxels of 0.8 x 1.9 x 5 mm": Kind(spacing_mm=(0.8, 1.9, 5)),
    "gaps between the slices": Kind(gaps=True),
    "one slice": Kind(shape=(31, 26, 1)),
    "one file (enhanced)": Kind(enhanced=True),
    "one file, coronal, tilted by 12°": Kind(order=(0, 2, 1), degrees=12, enhanced=True),
}


def make_volume(name: str, folder: Path) -> Volume:
    """Write a series of a kind, or the real series with identifiers, and read it."""
    if name == REAL:
        return read_series(write_with_uids(TEST_DATA / "totalsegmentator" / "example_ct_dicom", folder))
    kind = KINDS[name]
    affine = np.diag([*(-length for length in kind.spacing_mm), 1.0])
    affine[:3, :3] = rotation(np.random.default_rng(0), kind.degrees) @ affine[:3, :3]
    affine[:3, 3] = 55.5, -20, 130
    stored, affine = store(np.zeros(kind.shape, dtype=np.uint16), affine, kind.order, kind.flipped)
    if kind.enhanced:
        return read_series([write_enhanced(folder / "file", stored, affine)])
    volume = read_series(write_series(folder, stored, affine))
    return leave_gaps(volume) if kind.gaps else volume


def make_masks(volume: Volume) -> np.ndarray:
    """Return masks in one corner of a volume, bool, shape `(organs, i, j, k)`."""
    corner = shapes(tuple(min(length, MAX_LENGTH) for length in volume.shape))
    return np.pad(corner, [(0, 0), *((0, max(length - MAX_LENGTH, 0)) for length in volume.shape)])


def on_grid(volume: Volume, voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a mask of any grid on the grid of a volume: a voxel goes to where its centre lies in the patient."""
    index = np.argwhere(voxels) @ affine[:3, :3].T + affine[:3, 3]
    to_volume = np.linalg.inv(volume.affine)
    index = index @ to_volume[:3, :3].T + to_volume[:3, 3]
    # Coordinates in files have few digits.
    np.testing.assert_allclose(index, index.round(), atol=0.05)
    mask = np.zeros(volume.shape, dtype=bool)
    mask[tuple(index.round().astype(int).T)] = True
    return mask


def read_with_highdicom(path: Path, volume: Volume) -> np.ndarray:
    """Read a segmentation by its geometry alone: bool, shape `(organs, i, j, k)`."""
    found = highdicom.seg.segread(path).get_volume()
    affine = np.linalg.inv(TO_LPS) @ found.affine
    return np.stack([on_grid(volume, found.array[..., organ] > 0, affine) for organ in range(len(GI_TRACT.names))])


def read_with_dcmqi(path: Path, volume: Volume, folder: Path) -> np.ndarray:
    """Read a segmentation with dcmqi, which has no code in common with highdicom; result as `read_with_highdicom`."""
    words = ["--inputDICOM", path, "--outputDirectory", folder, "--prefix", "read", "-t", "nii"]
    done = subprocess.run([str(DCMQI), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    masks = np.zeros((len(GI_TRACT.names), *volume.shape), dtype=bool)
    for image in map(nibabel.load, folder.glob("read*.nii.gz")):
        for label in set(np.unique(image.dataobj).astype(int)) - {0}:
            masks[label - 1] |= on_grid(volume, np.asarray(image.dataobj) == label, image.affine)
    return masks


def fill_with_plastimatch(path: Path, volume: Volume, folder: Path) -> np.ndarray:
    """Fill the contours of a structure set with plastimatch; result as `read_with_highdicom`."""
    nibabel.save(nibabel.Nifti1Image(np.zeros(volume.shape, dtype=np.int16), volume.affine), folder / "grid.nii.gz")
    words = ["--input", path, "--fixed", folder / "grid.nii.gz", "--prefix-format", "nii.gz"]
    command = ["plastimatch", "convert", *map(str, words), "--output-prefix", str(folder / "filled")]
    subprocess.run(command, check=True, capture_output=True)
    return np.stack(
        [np.asarray(nibabel.load(folder / "filled" / f"{organ}.nii.gz").dataobj) > 0 for organ in GI_TRACT.names]
    )


def organ_dice(found: np.ndarray, masks: np.ndarray) -> list[float]:
    """Return the Dice of each organ."""
    return [2 * (one & mask).sum() / (one.sum() + mask.sum()) for one, mask in zip(found, masks, strict=True)]


def make_rows() -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| series | voxels | errors in SEG | in RTSTRUCT | highdicom: SEG | dcmqi: SEG | plastimatch: RTSTRUCT |"
    yield "|---|---|---|---|---|---|---|"
    for name in [*KINDS, *([REAL] if TEST_DATA.is_dir() else [])]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            volume = make_volume(name, folder / "series")
            masks, segmentation, structures = make_masks(volume), folder / "seg.dcm", folder / "rtstruct.dcm"
            write_dicom_seg(volume, masks, segmentation, ALGORITHM, GI_TRACT)
            write_rtstruct(volume, masks, structures, ALGORITHM, GI_TRACT)
            errors = [len(find_dicom_errors(path)) for path in (segmentation, structures)]
            read = read_with_highdicom(segmentation, volume), read_with_dcmqi(segmentation, volume, folder)
            differing = [int((one != masks).sum()) for one in read]
            dice = min(organ_dice(fill_with_plastimatch(structures, volume, folder), masks))
            cells = [name, " x ".join(map(str, volume.shape)), *errors, *differing, f"{dice:.4f}"]
            yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table, row by row."""
    for row in make_rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
