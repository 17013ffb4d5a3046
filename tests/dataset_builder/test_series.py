"""`python -m dataset_builder series` writes a scan that `predict` reads with the same intensities and at its place."""

from pathlib import Path

import numpy as np
import pytest

from dataset_builder.__main__ import main
from dataset_builder.series import read_first_scan
from tests.support.dicom import read_series
from tests.support.volumes import store


def test_the_series_has_the_slices_and_the_place_of_the_scan(small_kaggle_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    assert main(["series", "--kaggle_dir", str(small_kaggle_dir), "--output_dir", str(folder)]) == 0
    volume = read_series(folder.iterdir())
    # A series is read from feet to head, and a scan from head to feet.
    voxels, affine = store(*read_first_scan(small_kaggle_dir), (0, 1, 2), (2,))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.read is not None
    np.testing.assert_array_equal(volume.read(), voxels)


def test_a_folder_without_slices_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["series", "--kaggle_dir", str(tmp_path), "--output_dir", str(tmp_path / "series")])
    assert "expected slices of a scan below it, found none" in capsys.readouterr().err
