"""Contours and segments come back as the masks that they were made of, on the scan that they name."""

from pathlib import Path

import numpy as np
import pytest

from gi_segmentation.formats.dicom.read_structures import find_dicom_structures
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.dicom.series import FoundSeries
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from tests.support.round_trips import ALGORITHM, KINDS, make_masks, make_volume


def found_series(*volumes: Volume) -> FoundSeries:
    """What was found in some files: volumes and no problems."""
    return FoundSeries([*volumes], {}, [], {})


@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_back_to_the_voxel(kind: str, tmp_path: Path) -> None:
    volume = make_volume(kind, tmp_path / "series")
    masks = make_masks(volume)
    # The names of files say nothing.
    write_dicom_seg(volume, masks, tmp_path / "7", ALGORITHM, GI_TRACT)
    write_rtstruct(volume, masks, tmp_path / "IM8.dcm", ALGORITHM, GI_TRACT)

    paths = [*volume.origin.paths, tmp_path / "7", tmp_path / "IM8.dcm"]
    segments, contours = sorted(
        find_dicom_structures(paths, found_series(volume)).structures, key=lambda one: one.paths
    )

    assert (segments.kind, contours.kind, contours.approved) == ("seg", "rtstruct", False)
    for one in (segments, contours):
        assert one.volume is volume
        # In another order, and not all of them.
        np.testing.assert_array_equal(one.read(["stomach", "large_bowel"]), masks[[2, 0]])
