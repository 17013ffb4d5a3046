"""One odd attribute of a patient or a study costs no file, and the patient's name and ID keep every byte."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dataset_builder.series import write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.header import check_uid_forms, read_series_header
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from tests.support.dicom import read_series, set_bytes
from tests.support.masks import find_dicom_errors

# The folder of a checkpoint may have letters that the files of a series cannot have.
ALGORITHM = Algorithm({"/Größe/模型": "c0ffee" * 6 + "beef"})
AFFINE = np.diag([-1.5, -1.4, -3.0, 1.0])

# Person names of the standard's annexes H, I, J and K of PS3.5, and others, as the bytes of a file.
NAMES = {
    "Japanese": (
        rb"\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    "Japanese, half-width": (
        rb"ISO 2022 IR 13\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    ),
    "Japanese, first value written out": (
        rb"ISO 2022 IR 6\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        "Yamada^Tarou=山田^太郎",
    ),
    "Korean": (
        rb"\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    "Chinese": (b"GB18030", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab", "Wang^XiaoDong=王^小东"),
    "UTF-8": (b"ISO_IR 192", "Yamada^Tarou=山田^太郎=やまだ^たろう".encode(), "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "Greek": (b"ISO_IR 126", "Διονυσιος".encode("iso8859_7"), "Διονυσιος"),
    "Greek beside Latin": (
        rb"ISO 2022 IR 100\ISO 2022 IR 126",
        b"Dionysios=\x1b-F" + "Διονυσιος".encode("iso8859_7"),
        "Dionysios=Διονυσιος",
    ),
    "Cyrillic": (b"ISO_IR 144", "Люксембург".encode("iso8859_5"), "Люксембург"),
    "Western": (b"ISO_IR 100", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
    "misspelled": (b"ISO IR 100", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
    "plain": (None, b"Phantom^Case", "Phantom^Case"),
}
# Attributes of clinics, and what is said about each. What is odd is left out.
ODD = [
    ("PatientSex", b"UNKNOWN", "PatientSex is not a valid value and was left empty"),
    ("PatientBirthDate", b"1990/01/", "PatientBirthDate is not a valid date and was left empty"),
    ("PatientBirthDate", b"1990", "PatientBirthDate is not a valid date and was left empty"),
    ("PatientBirthDate", b"19901399", "PatientBirthDate is not a valid date and was left empty"),
    ("StudyDate", b"2026-01-02", "StudyDate is not a valid date and was left empty"),
    ("StudyTime", b"10:11:12", "StudyTime is not a valid time and was left empty"),
    ("StudyTime", b"noon", "StudyTime is not a valid time and was left empty"),
    ("StudyID", b"a study with a long ID", "StudyID is not a valid value and was left empty"),
    ("AccessionNumber", b"A" * 20, "AccessionNumber is not a valid value and was left empty"),
    ("AccessionNumber", b"1\\2", "AccessionNumber is not a valid value and was left empty"),
    ("ReferringPhysicianName", b"X" * 70, "ReferringPhysicianName is not a valid value and was left empty"),
    ("ReferringPhysicianName", b"A^B^C^D^E^F^G", "ReferringPhysicianName is not a valid value and was left empty"),
    (
        "ReferringPhysicianName",
        b"M\xfcller",
        "ReferringPhysicianName has letters, but the file names no character set and was left empty",
    ),
    ("PatientWeight", b"abc", "PatientWeight is not a valid number and was left out"),
    ("PatientAge", b"45", "PatientAge is not a valid age and was left out"),
    ("StudyDescription", b"D" * 70, "StudyDescription is not a valid value and was left out"),
    ("StudyDescription", b"a\nb", "StudyDescription is not a valid value and was left out"),
    ("SpecificCharacterSet", b"ISO_IR 999", "SpecificCharacterSet 'ISO_IR 999' is not known and was left out; "),
    ("StudyID", None, "StudyID: not in the files, and left empty"),
    ("PatientSex", None, "PatientSex: not in the files, and left empty"),
    ("SliceThickness", None, "SliceThickness is missing or no number, and the distance of the slices stands for it"),
    ("SliceThickness", b"abc", "SliceThickness is missing or no number, and the distance of the slices stands for it"),
    ("PatientName", None, None),
    ("PatientID", b"", None),
    ("OtherPatientNames", b"A\\B", None),
    ("Manufacturer", None, None),
    ("ImageType", None, None),
]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("series"), np.ones((6, 5, 3), np.uint16), AFFINE)


def change(series: list[Path], folder: Path, **values: bytes | None) -> Volume:
    """A copy of the series in which each file has other attributes."""
    for path in series:
        set_bytes(Path(shutil.copy(path, folder)), **values)
    return read_series(folder.iterdir())


def write_both(volume: Volume, folder: Path) -> list[Path]:
    """Write a segmentation and a structure set. No file has an error that the standard's checker finds."""
    masks = np.zeros((3, *volume.shape), dtype=bool)
    masks[:2, 2:4, 1:3, 1:] = True
    written = [folder / "seg.dcm", folder / "rtstruct.dcm"]
    for write, path in zip((write_dicom_seg, write_rtstruct), written, strict=True):
        write(volume, masks, path, ALGORITHM, GI_TRACT)
        if shutil.which("dciodvfy"):
            assert find_dicom_errors(path) == []
    return written


def stored(path: Path, name: str) -> bytes:
    """The bytes of an attribute."""
    element = pydicom.dcmread(path, specific_tags=[name]).get_item(name)
    return b"" if element is None else bytes(element.value or b"")


@pytest.mark.parametrize("name", NAMES)
def test_names_keep_every_byte(name: str, series: list[Path], tmp_path: Path) -> None:
    character_set, name_bytes, text = NAMES[name]
    values = {"PatientName": name_bytes, "PatientID": name_bytes.partition(b"=")[0]}
    (tmp_path / "in").mkdir()
    volume = change(series, tmp_path / "in", SpecificCharacterSet=character_set, **values)
    for path in write_both(volume, tmp_path):
        assert pydicom.dcmread(path).PatientName == text
        for one, value in values.items():
            assert stored(path, one) == stored(volume.origin.paths[0], one) == value + b" " * (len(value) % 2)
    remarks = ("SpecificCharacterSet was misspelled and is now ISO_IR 100",) * (name == "misspelled")
    assert read_series_header(volume.origin).remarks == remarks


@pytest.mark.parametrize(("name", "value", "remark"), ODD)
def test_an_odd_attribute_costs_no_file(
    name: str, value: bytes | None, remark: str | None, series: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    volume = change(series, tmp_path / "in", **{name: value})
    source = pydicom.dcmread(volume.origin.paths[0])
    for path in write_both(volume, tmp_path):
        for one in ("PatientName", "PatientID"):
            assert stored(path, one) == stored(volume.origin.paths[0], one)
        dataset = pydicom.dcmread(path)
        assert dataset.StudyInstanceUID == source.StudyInstanceUID
        assert dataset.FrameOfReferenceUID == source.FrameOfReferenceUID
        if remark and name != "SliceThickness":
            assert not dataset.get(name)
    remarks = read_series_header(volume.origin).remarks
    assert len(remarks) == (remark is not None) and (remark or "") in " ".join(remarks)
    # Values of the patient go nowhere but into the file.
    assert (
        value is None or name == "SpecificCharacterSet" or not any(value.decode("latin-1") in one for one in remarks)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("PatientName", b"N" * 70), ("PatientName", b"M\xfcller"), ("PatientName", b"A\nB"), ("PatientID", b"9" * 70)],
)
def test_an_odd_name_is_copied_and_named(name: str, value: bytes, series: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    volume = change(series, tmp_path / "in", **{name: value})
    masks = np.ones((3, *volume.shape), dtype=bool)
    for write in (write_dicom_seg, write_rtstruct):
        write(volume, masks, tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
        assert stored(tmp_path / "out.dcm", name) == value + b" " * (len(value) % 2)
    (remark,) = read_series_header(volume.origin).remarks
    assert remark.startswith(name) and remark.endswith("copied as it is, because programs find the patient by it")


@pytest.mark.parametrize(("ratio", "read"), [(b"12.5", 12.5), (b"2\\3", [2, 3]), (b"abc", None), (None, None)])
def test_a_segmentation_says_that_its_slices_were_compressed(
    ratio: bytes | None, read: object, series: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    values = {"LossyImageCompression": b"01", "LossyImageCompressionRatio": ratio}
    volume = change(series, tmp_path / "in", **values)
    write_dicom_seg(volume, np.ones((3, *volume.shape), dtype=bool), tmp_path / "out.dcm", ALGORITHM, GI_TRACT)
    dataset = pydicom.dcmread(tmp_path / "out.dcm")
    assert (dataset.LossyImageCompression, dataset.get("LossyImageCompressionRatio")) == ("01", read)


@pytest.mark.parametrize("value", [b"1.2.x", b"study 7", b"1." + b"2" * 70, b"../1"])
def test_what_is_no_uid_is_named(value: bytes, series: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    volume = change(series, tmp_path / "in", StudyInstanceUID=value)
    with pytest.raises(InputError, match=r"expected digits and dots, at most 64, as StudyInstanceUID, got '.*nifti$"):
        check_uid_forms(volume.origin)
