"""What is written for a planning system comes back from programs that have no code in common with ours."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.labels import GI_TRACT
from tests.support.masks import check_dicom
from tests.support.round_trips import (
    ALGORITHM,
    DCMQI,
    KINDS,
    REAL,
    fill_with_plastimatch,
    make_masks,
    make_volume,
    organ_dice,
    read_with_dcmqi,
    read_with_highdicom,
)

# Each of these shows what one or two of the others show too.
OFTEN_SHOWN = (
    "axial",
    "axial, from feet to head",
    "sagittal",
    "coronal",
    "tilted by 12°",
    "one file (enhanced)",
    REAL,
)


@pytest.fixture(
    params=[pytest.param(kind, marks=[pytest.mark.long] * (kind in OFTEN_SHOWN)) for kind in (*KINDS, REAL)]
)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of series; the real one only where it is."""
    if request.param == REAL:
        request.getfixturevalue("test_data")
    return str(request.param)


def test_a_segmentation_comes_back_to_the_voxel(kind: str, tmp_path: Path) -> None:
    volume, path = make_volume(kind, tmp_path / "series"), tmp_path / "seg.dcm"
    masks = make_masks(volume)
    write_dicom_seg(volume, masks, path, ALGORITHM, GI_TRACT)
    check_dicom(path)
    np.testing.assert_array_equal(read_with_highdicom(path, volume), masks)
    if DCMQI is None:
        pytest.skip("dcmqi is not installed: pip install dcmqi")
    np.testing.assert_array_equal(read_with_dcmqi(path, volume, tmp_path), masks)


@pytest.mark.skipif(
    shutil.which("plastimatch") is None, reason="plastimatch is not installed: apt-get install plastimatch"
)
def test_contours_are_filled_to_the_same_masks(kind: str, tmp_path: Path) -> None:
    volume, path = make_volume(kind, tmp_path / "series"), tmp_path / "rtstruct.dcm"
    masks = make_masks(volume)
    write_rtstruct(volume, masks, path, ALGORITHM, GI_TRACT)
    check_dicom(path)
    assert min(organ_dice(fill_with_plastimatch(path, volume, tmp_path), masks)) >= 0.99
    # A shift by one pixel would be seen.
    shifted = volume.affine.copy()
    shifted[:3, 3] += volume.affine[:3, 0]
    assert max(organ_dice(fill_with_plastimatch(path, replace(volume, affine=shifted), tmp_path), masks)) < 0.95
