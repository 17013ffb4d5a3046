"""`python -m dataset_builder series` writes a scan that `predict` reads with the same intensities and at its place."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from dataset_builder.__main__ import main
from dataset_builder.clinic_export import name_roi, read_masks
from dataset_builder.phantom import STRUCTURES, write_phantom
from dataset_builder.series import read_first_scan
from gi_segmentation.data.synthetic import SOURCE
from gi_segmentation.formats.dicom.read_structures import find_dicom_structures
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.kaggle.folder import read_kaggle_scans
from gi_segmentation.known_organs import KNOWN_ORGANS, find_organ
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


def test_patients_with_structure_sets_come_back_voxel_by_voxel(tmp_path: Path) -> None:
    write_phantom(tmp_path / "phantom", 2, 1, slices_per_scan=5, num_proc=1, num_labels=4, undrawn=["liver"])
    words = [
        "series",
        "--structures",
        "--kaggle_dir",
        str(tmp_path / "phantom"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0

    scans, _ = read_kaggle_scans(tmp_path / "phantom")
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    series = find_series(paths)
    found = find_dicom_structures(paths, series)
    assert not series.problems and not found.problems
    by_patient = {dcmread(one.paths[0]).PatientID: one for one in found.structures}
    assert len(by_patient) == len(series.volumes) == len(scans) == 2
    for scan in scans:
        one = by_patient[f"PHANTOM-{scan.case:03d}"]
        assert dcmread(one.volume.origin.paths[0]).ImageComments == SOURCE
        # A target volume, and a ROI that nobody has drawn: the liver, which is unknown, or one of a template.
        names = [name_roi(organ, scan.case % 2 == 1) for organ in scan.drawn]
        assert one.names == (*names, "PTV") and one.approved
        assert one.empty == (("Duodenum",) if "liver" in scan.drawn else ("Liver",))
        masks = [one.volume.to_native(read_masks(scan, organ)) for organ in scan.drawn]
        np.testing.assert_array_equal(one.read(names), masks)


def test_the_names_of_clinics_are_known() -> None:
    for organ in STRUCTURES:
        if organ in KNOWN_ORGANS:
            assert {find_organ(name_roi(organ, second)) for second in (True, False)} == {organ}


def test_patients_never_become_phantoms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slice without the mark of a phantom is that of a patient."""
    write_phantom(tmp_path / "phantom", 1, 1, slices_per_scan=2, num_proc=1)
    path = next((tmp_path / "phantom").rglob("*.png"))
    Image.open(path).save(path)
    words = ["series", "--kaggle_dir", str(tmp_path / "phantom"), "--output_dir"]
    with pytest.raises(SystemExit, match="1"):
        main([*words, str(tmp_path / "out"), "--structures"])
    assert f"{path}: expected a slice of a phantom, got one without its mark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([*words, str(tmp_path / "series")])
    assert {dcmread(one).ImageComments for one in (tmp_path / "series").iterdir()} == {""}
