"""Files for planning systems have any number of organs, with their names, colours and codes."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from dataset_builder.series import write_series
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from tests.support.dicom import read_series
from tests.support.masks import check_dicom

ALGORITHM = Algorithm({"name/model": "c0ffee"})
NAMES = (
    "stomach", "Lung (left)", "PTV 50", "Body", "Größe", "胃", "肝", "L" * 64, "Lunge re", "A&B", "C", "D'E",
)  # fmt: skip


def write_both(folder: Path, names: tuple[str, ...], character_set: str = "") -> tuple[Volume, np.ndarray, list[Path]]:
    """Write masks of organs for a series. With a character set, the name of the patient needs it."""
    paths = write_series(folder / "in", np.zeros((31, 26, 7), np.uint16), np.diag([-1.5, -1.4, 3.0, 1.0]))
    for path in paths if character_set else ():
        dataset = pydicom.dcmread(path)
        dataset.SpecificCharacterSet, dataset.PatientName = character_set, "Müller^Jörg"
        dataset.save_as(path)
    volume, labels = read_series(paths), LabelSet(names)
    masks = np.zeros((len(names), *volume.shape), dtype=bool)
    for number, mask in enumerate(masks):
        # They overlap, and the last one is empty if there are several.
        mask[number : number + 9, 3:12, number % 5 : number % 5 + 2] = number == 0 or number < len(names) - 1
    written = [folder / "seg.dcm", folder / "rtstruct.dcm"]
    for write, path in zip((write_dicom_seg, write_rtstruct), written, strict=True):
        write(volume, masks, path, ALGORITHM, labels)
        check_dicom(path)
    return volume, masks, written


def read_code(code: pydicom.Dataset) -> tuple[str, str, str | None]:
    """Return the value, the scheme, and the side of a code."""
    sides = [one.CodeMeaning for one in code.get("SegmentedPropertyTypeModifierCodeSequence", ())]
    return code.CodeValue, code.CodingSchemeDesignator, sides[0] if sides else None


@pytest.mark.parametrize("number", [1, 12])
def test_any_number_of_organs_comes_back(number: int, tmp_path: Path) -> None:
    names = NAMES[:number]
    volume, masks, written = write_both(tmp_path, names)
    segmentation, structures = highdicom.seg.segread(written[0]), pydicom.dcmread(written[1])
    frames = [frame.instance_uid for frame in volume.origin.frames]
    read = segmentation.get_pixels_by_source_instance(frames, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(read.transpose(3, 2, 1, 0), masks)
    described = [segmentation.get_segment_description(one) for one in range(1, number + 1)]
    assert [one.segment_label for one in described] == list(names)
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == list(names)
    colours = LabelSet(names).colours
    assert [tuple(roi.ROIDisplayColor) for roi in structures.ROIContourSequence] == list(colours)
    codes = [read_code(one.SegmentedPropertyTypeCodeSequence[0]) for one in described]
    assert codes == [read_code(one.RTROIIdentificationCodeSequence[0]) for one in structures.RTROIObservationsSequence]
    assert codes[0] == ("69695003", "SCT", None)
    # No two organs share a code and a side.
    assert len(set(codes)) == number
    if number > 1:
        assert (codes[1], codes[8]) == (("39607008", "SCT", "Left"), ("39607008", "SCT", "Right"))
        assert {scheme for place, (_, scheme, _) in enumerate(codes) if place not in (0, 1, 8)} == {"99GISEG"}
    title = {1: "stomach, predicted", 12: "12 structures, predicted"}[number]
    assert segmentation.SeriesDescription == structures.SeriesDescription == title
    if number > 1:
        kinds = [one.RTROIInterpretedType for one in structures.RTROIObservationsSequence]
        assert kinds[:5] == ["ORGAN", "ORGAN", "PTV", "EXTERNAL", "ORGAN"]


def test_names_that_the_character_set_of_the_patient_cannot_have_stay_distinct(tmp_path: Path) -> None:
    _, _, written = write_both(tmp_path, NAMES, "ISO_IR 100")
    structures = pydicom.dcmread(written[1])
    assert structures.SpecificCharacterSet == "ISO_IR 100" and structures.PatientName == "Müller^Jörg"
    names = [roi.ROIName for roi in structures.StructureSetROISequence]
    assert names[4:7] == ["Größe", "? 6", "? 7"] and len(set(names)) == len(NAMES)
