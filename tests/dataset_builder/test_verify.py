"""Every damage to a Kaggle folder is reported as one problem, and a damaged folder is never built.

A problem names the file, the row and what to do. Each damage below changes a folder and returns the words that its
problem must contain.
"""

import csv
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dataset_builder.__main__ import main
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.verify import verify
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.formats.kaggle.folder import find_slices, list_splits, read_kaggle_scans
from gi_segmentation.formats.kaggle.images import read_slice
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.labels import GI_TRACT
from tests.support.processes import RunPython

EXPECTED_NAME = "expected caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png; rename or remove it"

# Damages the slice with this number in a folder, and returns the words that its problem must contain.
Damage = Callable[[Path, int], list[str]]


def read_rows(folder: Path) -> list[list[str]]:
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.reader(file))


def write_rows(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def image_of(folder: Path, index: int) -> Path:
    slice_id = read_rows(folder)[1 + len(GI_TRACT) * index][0]
    return next(s.path for s in find_slices(folder)[0] if s.id == slice_id)


def change_cell(column: int, text: str, *words: str, organ: int = 1) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        rows = read_rows(folder)
        line = 1 + len(GI_TRACT) * index + organ
        rows[line][column] = text
        write_rows(folder, rows)
        return [f"{folder}/train.csv, row {line + 1}: ", *words]

    return damage


def drop_rows(organs: list[int], *words: str, names_csv_first: bool = True) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        rows, path = read_rows(folder), image_of(folder, index)
        gone = {1 + len(GI_TRACT) * index + organ for organ in organs}
        slice_id = rows[min(gone)][0]
        write_rows(folder, [row for line, row in enumerate(rows) if line not in gone])
        return [f"{folder}/train.csv" if names_csv_first else str(path), slice_id, *words]

    return damage


def repeat_row(folder: Path, index: int) -> list[str]:
    rows = read_rows(folder)
    line = 1 + len(GI_TRACT) * index
    write_rows(folder, [*rows, rows[line]])
    return [f"{folder}/train.csv, row {len(rows) + 1}: {rows[line][0]}", f"in row {line + 1} already; remove one"]


def remove_image(folder: Path, index: int) -> list[str]:
    image_of(folder, index).unlink()
    line = 1 + len(GI_TRACT) * index
    slice_id = read_rows(folder)[line][0]
    return [f"{folder}/train.csv, row {line + 1}: no PNG for {slice_id}", "add the file or remove its rows"]


def cut_image(length: int) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        path = image_of(folder, index)
        path.write_bytes(path.read_bytes()[:length])
        return [f"{path}: not a whole PNG", "download it again"]

    return damage


def replace_image(image: Image.Image, *words: str) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        path = image_of(folder, index)
        size = Image.open(path).size
        image.resize(size).save(path, format="PNG")
        return [f"{path}: ", *words]

    return damage


def claim_size(width: int, height: int) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        path = image_of(folder, index)
        size = "{}x{}".format(*Image.open(path).size)
        new = path.with_name(re.sub(r"_\d+_\d+(?=_\d+\.)", f"_{width}_{height}", path.name))
        path.rename(new)
        return [f"{new}: its name says {width}x{height}, the image has {size}; correct the name"]

    return damage


def rename_image(name: str) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        path = image_of(folder, index)
        number = path.name.split("_")[1]
        new = path.with_name(name.format(number=number))
        path.rename(new)
        return [f"{new}: expected caseN_dayN/scans/slice_NUMBER_WIDTH_HEIGHT_SPACING_SPACING.png; rename or remove it"]

    return damage


SLICE_DAMAGES: dict[str, Damage] = {
    "name without number": rename_image("scan.png"),
    "a row too few": drop_rows([1], "has no row for small_bowel; add one"),
    "an image without rows": drop_rows([0, 1, 2], "no rows for", "or remove the file", names_csv_first=False),
    "unknown class": change_cell(1, "colon", "large_bowel, small_bowel, stomach", "got 'colon'; correct it"),
    "class in capitals": change_cell(1, "Stomach", "got 'Stomach'"),
    "no class": change_cell(1, "", "got ''"),
    "repeated row": repeat_row,
    "malformed id": change_cell(0, "case1-day2-slice_0001", "like case123_day20_slice_0001", "got 'case1-day2"),
    "malformed first id": change_cell(0, "?", "like case123_day20_slice_0001, got '?'; correct it", organ=0),
    "malformed last id": change_cell(0, "", "like case123_day20_slice_0001, got ''; correct it", organ=2),
    "id with zeros too many": change_cell(0, "case01_day2_slice_00001", "got 'case01"),
    "id in other digits": change_cell(0, "case١_day2_slice_0001", "got 'case١"),
    "odd count": change_cell(2, "1 2 3", "small_bowel: expected pairs", "odd count of 3", "correct the segmentation"),
    "not numeric": change_cell(2, "1 two", "whole positive numbers, got 'two'; correct the segmentation"),
    "negative": change_cell(2, "-1 2", "whole positive numbers, got '-1'; correct the segmentation"),
    "overlapping itself": change_cell(2, "5 4 7 2", "runs at 5 and 7 overlap; correct the segmentation"),
    "past the image": change_cell(2, "9999998 2", "pixel 9999999, past the image's", "correct the segmentation"),
    "no image": remove_image,
    "half an image": cut_image(2000),
    "empty image": cut_image(0),
    "image without its last byte": cut_image(-1),
    "image without its last 20 bytes": cut_image(-20),
    "8 bits": replace_image(Image.new("L", (1, 1), 9), "expected 16-bit grayscale, got mode L; use the original"),
    "colours": replace_image(Image.new("RGB", (1, 1)), "expected 16-bit grayscale, got mode RGB; use the original"),
    "too large a name": claim_size(999, 999),
    "too small a name": claim_size(2, 3),
    "an endless name": claim_size(10**11, 10**11),
    "name without size": rename_image("slice_{number}.png"),
    "name of another kind": rename_image("IMG_{number}_266_266.png"),
}


# One mistake may show twice: the row or the image that cannot be read is missing elsewhere.
ECHOES = {
    **dict.fromkeys(["unknown class", "class in capitals", "no class"], "has no row for small_bowel; add one"),
    **dict.fromkeys(["malformed id", "id with zeros too many", "id in other digits"], "has no row for small_bowel"),
    "malformed first id": "has no row for large_bowel",
    "malformed last id": "has no row for stomach",
    **dict.fromkeys(["name without number", "name without size", "name of another kind"], "no PNG for case"),
}


def write_csv(data: bytes | None, *words: str) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        (folder / "train.csv").unlink()
        if data is not None:
            (folder / "train.csv").write_bytes(data)
        return [f"{folder}/train.csv: ", *words]

    return damage


def remove_folder(name: str, *words: str) -> Damage:
    def damage(folder: Path, index: int) -> list[str]:
        shutil.rmtree(folder / name)
        return [f"{folder / name}: ", *words]

    return damage


FOLDER_DAMAGES: dict[str, Damage] = {
    "no such folder": remove_folder("", "no such folder; expected the unpacked Kaggle download"),
    "no train folder": remove_folder("train", "no slices; expected caseN/caseN_dayN/scans", "unpack them there"),
    "no CSV": write_csv(None, "no such file; expected Kaggle's CSV"),
    "no bytes": write_csv(b"", "not readable (it is empty", "download it again"),
    "no rows": write_csv(b"id,class,segmentation\n", "no rows below the header; download it again"),
    "other columns": write_csv(b"id,organ,rle\na,b,c\n", "segmentation missing or given twice, got id, organ, rle"),
    "semicolons": write_csv(b"id;class;segmentation\r\na;b;c\r\n", "separated by commas, got ';'"),
    "tabs": write_csv(b"\xef\xbb\xbfid\tclass\tsegmentation\na\tb\tc\n", r"separated by commas, got '\t'"),
    "not UTF-8": write_csv("id,class,segmentation\né,b,c\n".encode("latin-1"), "in UTF-8", "download it again"),
    "UTF-16": write_csv("id,class,segmentation\na,b,c\n".encode("utf-16"), "in UTF-8", "download it again"),
    "a value too few": write_csv(
        b"id,class,segmentation\ncase1_day1_slice_0001,stomach\n", "3 values in line 2, got 2"
    ),
    "a quote without end": write_csv(b'id,class,segmentation\na,b,"1 2\n', "not readable (unexpected end"),
    "a column twice": write_csv(b"id,class,segmentation,class\na,b,c,d\n", "class missing or given twice"),
    "a column too many": write_csv(b"id,class,segmentation\na,b,c\na,b,c,d\n", "line 3", "download it again"),
    "a PNG": write_csv(b"\x89PNG\r\n\x1a\n\0\0", "in UTF-8", "download it again"),
}


def link_each(pattern: str, store: str = "../store") -> Callable[[Path], None]:
    def arrange(folder: Path) -> None:
        # The folder is moved away, and a link to it takes its place.
        for number, path in enumerate(sorted(folder.glob(pattern))):
            target = folder / store / str(number)
            target.parent.mkdir(exist_ok=True, parents=True)
            path.rename(target)
            path.symlink_to(target.resolve())

    return arrange


def link_to_itself(folder: Path) -> None:
    scan = next(folder.glob("train/*/*"))
    for link, target in ((folder / "train/again", "."), (scan / "up", ".."), (scan / "latest", "scans")):
        link.symlink_to(target)
    (folder / "train/latest").symlink_to(scan.relative_to(folder / "train"))


def link_within(folder: Path) -> None:
    # The slices are also found under a name that is no scan.
    (folder / "train/store").mkdir()
    link_each("train/case*/*", "train/store")(folder)


def add_hidden(folder: Path) -> None:
    slice_path = next(folder.glob("train/*/*/scans/*.png"))
    names = (f"._{slice_path.name}", f".ipynb_checkpoints/{slice_path.name}", "__MACOSX/._a.png", ".git/annex/b.png")
    for path in (slice_path.parent / name for name in names):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"\0\5\x16\7")
    (folder / "test").mkdir()
    (folder / "test" / "._slice_0001_1_1_1.00_1.00.png").touch()


ARRANGEMENTS: dict[str, Callable[[Path], None]] = {
    "the folder train is a link": link_each("train"),
    "the folders of patients are links": link_each("train/case*"),
    "the folders of scans are links": link_each("train/*/case*"),
    "the folders scans are links": link_each("train/*/*/scans"),
    "each slice is a link": link_each("train/*/*/scans/*.png"),
    "each slice is a link as of git-annex": link_each("train/*/*/scans/*.png", ".git/annex/objects"),
    "train.csv is a link": link_each("train.csv"),
    "links within the folder": link_within,
    "links in circles": link_to_itself,
    "hidden files and folders": add_hidden,
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_links_are_followed_and_hidden_files_passed_over(name: str, kaggle_copy: Path) -> None:
    expected = [(scan.name, [one.id for one in scan.slices]) for scan in read_kaggle_scans(kaggle_copy)[0]]
    ARRANGEMENTS[name](kaggle_copy)
    assert list_splits(kaggle_copy) == ["train"]
    scans, problems = read_kaggle_scans(kaggle_copy)
    assert problems == []
    assert [(scan.name, [one.id for one in scan.slices]) for scan in scans] == expected
    assert all(read_slice(one) for scan in scans for one in scan.slices)
    found = find_scans(kaggle_copy).scans
    assert [(scan.name, [one.id for one in scan.slices]) for scan in found] == expected, "for a prediction"


def test_a_link_with_the_name_of_another_scan_is_another_scan(kaggle_copy: Path) -> None:
    (path,) = (kaggle_copy / "train").glob(f"*/{read_kaggle_scans(kaggle_copy)[0][0].name}")
    (kaggle_copy / "train/case900_day0").symlink_to(path)
    (kaggle_copy / "train/case900_day1").mkdir()
    (kaggle_copy / "train/case900_day1/scans").symlink_to(path / "scans")
    slices, problems = find_slices(kaggle_copy / "train")
    assert [one for scan in find_scans(kaggle_copy / "train").scans for one in scan.slices] == slices
    assert not problems and [one.id for one in slices[-6:]] == [
        f"case900_day{day}_slice_{number:04d}" for day in (0, 1) for number in (1, 2, 3)
    ]


def test_a_broken_link_is_a_problem(kaggle_copy: Path) -> None:
    slice_path = next(kaggle_copy.glob("train/*/*/scans/*.png"))
    slice_path.unlink()
    slice_path.symlink_to("nowhere")
    (kaggle_copy / "train/case900").symlink_to("nowhere")
    (kaggle_copy / "train/notes").symlink_to("nowhere")
    (kaggle_copy / "test").symlink_to("nowhere")
    found = {scan.name: scan.problem for scan in find_scans(kaggle_copy / "train").scans}
    assert [name for name, problem in found.items() if problem] == ["case900"] and len(found) == 3
    missing, unreadable, test = verify(kaggle_copy, num_proc=1).problems
    assert missing.endswith("train/case900: a link to nowhere, which is missing; correct the link or remove it")
    assert f"{slice_path}: not readable" in unreadable
    assert test.endswith("test: a link to nowhere, which is missing; correct the link or remove it")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_folder_name_in_another_encoding_is_named_in_one_line(
    encoding: str, kaggle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kaggle_copy.rename(kaggle_copy.with_name(os.fsdecode(b"caf\xe9")))
    (folder / "train" / os.fsdecode(b"\xe9tude \xe8\x85\xb9.png")).touch()
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding, write_through=True))
    assert main(["verify", "--num_proc", "1", "--kaggle_dir", str(folder)]) == 1
    (line,) = printed.getvalue().decode(encoding).splitlines()
    letter = "\u8179" if encoding == "utf-8" else r"\u8179"
    assert line.endswith(rf"caf\udce9/train/\udce9tude {letter}.png: {EXPECTED_NAME}")


def contents(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [*SLICE_DAMAGES, *FOLDER_DAMAGES])
def test_each_damage_is_found_and_stops_the_build(name: str, kaggle_copy: Path, tmp_path: Path) -> None:
    words = (SLICE_DAMAGES | FOLDER_DAMAGES)[name](kaggle_copy, 1)
    before = contents(tmp_path)
    problem, *echo = verify(kaggle_copy, num_proc=1).problems
    assert "\n" not in problem
    assert [word for word in words if word not in problem] == [], problem
    assert [line for line in echo if ECHOES.get(name, "nothing") in line] == echo, echo
    assert len(echo) == (name in ECHOES), echo
    with pytest.raises(KaggleDataError) as caught:
        build(kaggle_copy, tmp_path / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
    # Wrong names and a wrong CSV stop the build before it reads a slice.
    assert caught.value.problems in ([problem], [problem, *echo])
    assert contents(tmp_path) == before


def test_many_damages_at_once_are_all_found(kaggle_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kaggle_dir, tmp_path / "kaggle"))
    # Each damage is on a slice of its own. It starts with a late slice and goes backwards, so a removed row does not
    # change the row numbers of the damages before it.
    expected = [damage(folder, len(SLICE_DAMAGES) - place) for place, damage in enumerate(SLICE_DAMAGES.values())]
    problems = verify(folder, num_proc=2).problems
    for words in expected:
        assert len([problem for problem in problems if all(word in problem for word in words)]) == 1, (words, problems)
    assert len(problems) == len(expected) + len(ECHOES), problems


def test_an_unreadable_csv_does_not_hide_what_is_wrong_with_the_images(kaggle_copy: Path) -> None:
    path = image_of(kaggle_copy, 0)
    path.write_bytes(path.read_bytes()[:500])
    (kaggle_copy / "train.csv").write_bytes(b"a,b\n")
    problems = verify(kaggle_copy, num_proc=1).problems
    assert [problem.split(": ")[0] for problem in problems] == [f"{kaggle_copy}/train.csv", str(path)]


def test_all_rows_of_a_slice_in_an_unknown_class_are_named(kaggle_copy: Path) -> None:
    for organ in range(3):
        change_cell(1, "organ", organ=organ)(kaggle_copy, 1)
    problems = verify(kaggle_copy, num_proc=1).problems
    rows = [re.findall(r"row (\d+): expected a class", problem) for problem in problems]
    assert rows == [["5"], ["6"], ["7"], []]
    assert "no rows for case" in problems[-1]


def test_blank_lines_are_no_problem_and_do_not_shift_the_rows(kaggle_copy: Path) -> None:
    lines = (kaggle_copy / "train.csv").read_text().splitlines()
    (kaggle_copy / "train.csv").write_text("\n".join(["\ufeff" + lines[0], "", *lines[1:], "", ""]))
    assert verify(kaggle_copy, num_proc=1).problems == []
    lines[4] = lines[4].split(",")[0] + ",large_bowel,7"
    (kaggle_copy / "train.csv").write_text("\r\n".join([lines[0], "", *lines[1:]]))
    (problem,) = verify(kaggle_copy, num_proc=1).problems
    assert "train.csv, row 6: " in problem


def test_a_second_file_of_a_slice_is_a_problem(kaggle_copy: Path) -> None:
    path = image_of(kaggle_copy, 2)
    copy = path.with_name(path.name.replace("_1.", "_2."))
    shutil.copy(path, copy)
    (problem,) = verify(kaggle_copy, num_proc=1).problems
    assert str(path) in problem and str(copy) in problem and "remove one of them" in problem


def test_a_damaged_image_of_the_test_split_is_a_problem(kaggle_copy: Path, tmp_path: Path) -> None:
    shutil.copytree(kaggle_copy / "train", kaggle_copy / "test")
    assert verify(kaggle_copy, num_proc=1).problems == []
    path = find_slices(kaggle_copy / "test")[0][0].path
    path.write_bytes(path.read_bytes()[:500])
    (problem,) = verify(kaggle_copy, num_proc=1).problems
    assert problem.startswith(f"{path}: not a whole PNG")
    with pytest.raises(KaggleDataError, match=re.escape(str(path))):
        build(kaggle_copy, tmp_path / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)


def test_an_undamaged_folder_has_no_problems_and_right_counts(kaggle_dir: Path) -> None:
    found = verify(kaggle_dir, num_proc=1)
    shown: dict[str, set[str]] = {}
    for slice_id, organ, rle in read_rows(kaggle_dir)[1:]:
        shown.setdefault(slice_id, set()).update([organ] if rle else [])
    assert found.problems == []
    assert (found.counts["scans"], found.counts["slices"], found.counts["empty"]) == (
        4,
        48,
        sum(not organs for organs in shown.values()),
    )
    assert [found.shown[organ] for organ in GI_TRACT.names] == [
        sum(organ in organs for organs in shown.values()) for organ in GI_TRACT.names
    ]


@pytest.mark.parametrize("name", ["no such folder", "not UTF-8", "8 bits"])
def test_the_command_build_ends_in_one_error_and_writes_nothing(
    name: str, kaggle_copy: Path, tmp_path: Path, run_python: RunPython
) -> None:
    words = (SLICE_DAMAGES | FOLDER_DAMAGES)[name](kaggle_copy, 1)
    before = contents(tmp_path)
    result = run_python(
        ["-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2"], tmp_path
    )
    (message,) = (line for line in result.stderr.splitlines() if "error" in line.lower())
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    assert message.startswith("error: ") and all(word in message for word in words), result.stderr
    assert contents(tmp_path) == before


def test_the_command_verify_lists_the_problems_and_fails(kaggle_copy: Path, run_python: RunPython) -> None:
    command = ["verify", "--kaggle_dir", str(kaggle_copy)]
    assert main(command) == 0
    damages = [SLICE_DAMAGES[name](kaggle_copy, index) for index, name in enumerate(["negative", "no image"])]
    result = run_python(["-m", "dataset_builder", *command], kaggle_copy)
    lines = result.stdout.splitlines()
    assert (result.returncode, len(lines)) == (1, 2)
    assert all(any(all(word in line for word in words) for line in lines) for words in damages), lines
    assert "Traceback" not in result.stderr
