"""A zip is checked before it is unpacked, and its folder is removed afterwards."""

import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dataset_builder.series import write_series
from gi_segmentation.errors import InputError
from gi_segmentation.formats.archives import unpacked
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.predict import main
from tests.support.volumes import prediction_words


def make_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught, unpacked(path):
        pytest.fail("it was unpacked")
    return str(caught.value)


def test_a_zip_of_a_series_is_found_and_removed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voxels = np.zeros((4, 5, 3), dtype=np.uint16)
    files = {f"study/{path.name}": path.read_bytes() for path in write_series(tmp_path / "in", voxels, np.eye(4))}
    words = prediction_words(Path("nowhere"), make_zip(tmp_path / "a.ZIP", **files), tmp_path / "out", "--list")
    main(words)
    assert "3 x 5 x 4 slices x rows x columns" in capsys.readouterr().out
    with unpacked(tmp_path / "a.ZIP") as folder:
        assert len(list((folder / "study").iterdir())) == 3
    assert not folder.exists()


def test_other_paths_stay_as_they_are(tmp_path: Path) -> None:
    with unpacked(tmp_path) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_a_file_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    assert "would leave the folder" in message(make_zip(tmp_path / "a.zip", **{name: b"x"}))


def test_a_link_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "'link' would leave the folder" in message(tmp_path / "a.zip")


def test_too_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", a=bytes(1000), b=bytes(1000))
    with pytest.raises(InputError, match="expected at most 100000 files and"), unpacked(path, max_bytes=1999):
        pass
    with pytest.raises(InputError, match="got 2 and"), unpacked(path, max_files=1):
        pass
    with unpacked(path, max_files=2, max_bytes=2000) as folder:
        assert (folder / "a").stat().st_size == 1000


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", a=bytes(range(256)) * 10)
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    assert "not a whole zip" in message(path)
    path.write_bytes(b"no zip")
    assert "not a whole zip" in message(path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", a=b"x")
    data = bytearray(path.read_bytes())
    # The flags of the file stand 8 bytes after the start of its entry in the table of contents.
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted" in message(path)


def test_names_that_a_system_does_not_allow_are_changed_and_no_file_is_lost(tmp_path: Path) -> None:
    names = [
        "scan 10:23/a",
        "scan 10_23/a",
        "CON/nul.txt",
        "a. /b ",
        "x" * 300,
        "line\nbreak",
        "A/1",
        "a/1",
        "a",
        "b\\c",
    ]
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for number, name in enumerate([*names, names[0]]):
            archive.writestr(name, str(number))
    with unpacked(path) as folder:
        found = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert sorted(map(int, found.values())) == list(range(len(names) + 1))
    assert {found["scan 10_23/a"], found["2_scan 10_23/a"], found["scan 10_23/2_a"]} == {"0", "1", str(len(names))}
    assert found["_CON/_nul.txt"] == "2" and found["b/c"] == "9"
    # They differ on a system that takes capital letters for small ones, too.
    assert len({name.casefold() for name in found}) == len(found)
    for name in found:
        assert not re.search(r'[<>:"|?*\\]', name) and name.isprintable()
        assert all(len(part) <= 200 and part == part.rstrip(". ") for part in name.split("/"))


def test_names_of_scans_do_not_depend_on_where_a_zip_is_unpacked(tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.uint16).reshape(4, 5, 3)
    files = {}
    for path in write_series(tmp_path / "in", voxels, np.eye(4)):
        dataset = pydicom.dcmread(path)
        del dataset.SeriesInstanceUID
        dataset.save_as(path)
        files[path.name] = path.read_bytes()
    for _ in range(2):
        with unpacked(make_zip(tmp_path / "visit 10:23.zip", **files)) as folder:
            assert [scan.name for scan in find_scans(folder).scans] == ["visit 10_23"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_any_kind_of_compression_is_one_message(method: int, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a", bytes(range(256)) * 10)
    data = bytearray(path.read_bytes())
    data[40:90] = bytes(50)
    path.write_bytes(data)
    assert f"{path}: " in message(path)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.TGZ", "a.7z", "a.rar"])
def test_other_archives_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert message(tmp_path / name) == (
        f"{tmp_path / name}: expected a zip or a folder, got another archive; unpack it and name the folder"
    )


def test_a_message_names_the_zip_and_not_the_folder(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", **{"inner.zip": b"x", "notes.txt": b"x"})
    with pytest.raises(InputError, match=rf"--input {path}: no slices; .*; left out: 1 archive: inner\.zip") as caught:
        main(prediction_words(Path("nowhere"), path, tmp_path / "out", "--list"))
    assert "gi-segmentation-" not in str(caught.value)
