"""A built dataset has the content of the Kaggle folder, splits by patient, and is the same in all ways of loading."""

import csv
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import HfApi
from PIL import Image

import dataset_builder  # noqa: F401 (registers the name gi_tract with load_dataset)
from dataset_builder.__main__ import main
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig, read_splits
from dataset_builder.splits import assign_folds, organ_presence
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.annotations import Annotation, read_annotations
from gi_segmentation.formats.kaggle.folder import find_slices, group_scans
from gi_segmentation.formats.kaggle.names import ID_PATTERN, KaggleDataError, SliceFile
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.publishing.eval_results import list_tasks
from gi_segmentation.rle import decode, encode
from gi_segmentation.schema import dataset_features
from loopback_hub import Fault, LoopbackHub, check_card
from tests.support.kaggle import copy_patients, list_patients
from tests.support.processes import RunPython, hold, processes_of

HALVES = GiTractConfig(num_folds=2)


def describe(dataset):  # type: ignore[no-untyped-def]
    """Return the rows of each split in a form for JSON, with pictures as hashes of their bytes.

    Other processes run the source code of this function. So it uses only what `describe_elsewhere` imports there.
    """
    rows = {}
    for split, part in dataset.items():
        for column in ("image", "annotation"):
            part = part.cast_column(column, datasets.Image(decode=False))
        rows[split] = []
        for row in part:
            for column in ("image", "annotation"):
                row[column] = row[column] and hashlib.sha256(row[column]["bytes"]).hexdigest()
            rows[split].append(row)
    return rows


def load_raw(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split, with pictures as bytes."""
    loaded = datasets.load_dataset(str(folder))
    for column in ("image", "annotation"):
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    return {split: part.to_list() for split, part in loaded.items()}


def describe_elsewhere(run_python: RunPython, cwd: Path, statements: str, env: dict[str, str] | None = None) -> Any:
    """Run statements in another process, and return what they print as JSON."""
    imports = "import datasets, hashlib, json\nfrom datasets import load_dataset"
    script = "\n".join([imports, inspect.getsource(describe), statements])
    result = run_python(["-c", script], cwd, env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def read_truth(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "train.csv").open(newline="") as file:
        truth: dict[str, dict[str, str]] = {}
        for row in csv.DictReader(file):
            truth.setdefault(row["id"], {})[row["class"]] = row["segmentation"]
    return truth


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_rows(rows: list[dict[str, Any]], kaggle_dir: Path) -> None:
    """Compare every column with the Kaggle folder, without using the code under test."""
    truth = read_truth(kaggle_dir)
    for row in rows:
        number, scan = f"{row['slice']:04d}", f"case{row['case']}_day{row['day']}"
        (path,) = (kaggle_dir / "train").glob(f"**/{scan}/scans/slice_{number}_*.png")
        _, _, width, height, column_mm, row_mm = path.stem.split("_")
        assert row["image"]["bytes"] == path.read_bytes()
        assert (row["id"], row["scan"]) == (f"{scan}_slice_{number}", scan)
        assert (row["width"], row["height"]) == (int(width), int(height))
        assert row["pixel_spacing"] == pytest.approx([float(row_mm), float(column_mm)])
        assert row["segmentation"] == truth[row["id"]]


def test_rows_equal_the_kaggle_folder(dataset_dir: Path, kaggle_dir: Path) -> None:
    splits = load_raw(dataset_dir)
    assert list(splits) == ["train", "validation"]
    for rows in splits.values():
        check_rows(rows, kaggle_dir)
        assert rows == sorted(rows, key=lambda row: (row["case"], row["day"], row["slice"]))
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert sorted(ids) == sorted(read_truth(kaggle_dir))
    assert not {row["case"] for row in splits["train"]} & {row["case"] for row in splits["validation"]}


def test_annotations_are_palette_pngs_painted_in_the_order_of_ids(dataset_dir: Path) -> None:
    shown, overlapping = set(), 0
    for part in datasets.load_dataset(str(dataset_dir)).values():
        for row in part:
            # The expected map is made here by hand. An encoding is start, length, start, length, ...; it starts at 1
            # and runs along the rows. Later organs overwrite earlier ones.
            expected = np.zeros(row["height"] * row["width"], dtype=np.uint8)
            covered = np.zeros_like(expected)
            for organ in ("large_bowel", "small_bowel", "stomach"):
                numbers = [int(word) for word in row["segmentation"][organ].split()]
                for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
                    expected[start - 1 : start - 1 + length] = GI_TRACT.labels.index(organ)
                    covered[start - 1 : start - 1 + length] += 1
            labels = np.array(row["annotation"])
            assert (row["annotation"].mode, labels.dtype) == ("P", np.uint8)
            np.testing.assert_array_equal(labels, expected.reshape(row["height"], row["width"]))
            palette = [channel for colour in GI_TRACT.palette for channel in colour]
            assert row["annotation"].getpalette()[:12] == palette
            assert row["image"].mode == "I;16"
            shown |= set(np.unique(labels).tolist())
            overlapping += bool((covered > 1).any())
    assert (shown, overlapping > 0) == ({0, 1, 2, 3}, True)


def test_columns_and_types_equal_the_schema(dataset_dir: Path) -> None:
    integers = ("case", "day", "slice", "fold", "height", "width")
    text, integer, image = datasets.Value("string"), datasets.Value("int32"), datasets.Image()
    assert dict(dataset_features()) == {
        **{"id": text, "scan": text, "image": image, "annotation": image},
        "segmentation": dict.fromkeys(GI_TRACT.names, text),
        **dict.fromkeys(integers, integer),
        "pixel_spacing": datasets.Sequence(datasets.Value("float64"), length=2),
    }
    for part in datasets.load_dataset(str(dataset_dir)).values():
        assert part.features == dataset_features()
        assert part.column_names == list(dataset_features())


def test_the_real_sample_is_built_unchanged(test_data: Path, tmp_path: Path) -> None:
    kaggle_dir = test_data / "uwmgi_sample"
    report = build(kaggle_dir, tmp_path / "gi_tract", HALVES, num_proc=2)
    splits = load_raw(tmp_path / "gi_tract")
    for rows in splits.values():
        check_rows(rows, kaggle_dir)
    # The sample has 300 slices of six patients.
    assert sum(map(len, splits.values())) == 300
    assert sum(counts["slices"] for counts in report.counts.values()) == 300
    assert {row["case"] for rows in splits.values() for row in rows} == {6, 16, 101, 107, 110, 117}


def test_the_number_of_processes_does_not_change_the_rows(dataset_dir: Path, kaggle_dir: Path, tmp_path: Path) -> None:
    build(kaggle_dir, tmp_path / "gi_tract", HALVES, num_proc=2)
    assert len(list((tmp_path / "gi_tract" / "data").glob("train-*-of-00002.parquet"))) == 2
    assert load_raw(tmp_path / "gi_tract") == load_raw(dataset_dir)


def test_the_size_of_files_and_groups_does_not_change_the_rows(
    dataset_dir: Path, kaggle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two scans of 12 slices in each split: a file takes one of them, and a group of rows takes 5, 5 and 2 slices.
    monkeypatch.setattr("dataset_builder.build.MAX_SLICES_PER_FILE", 12)
    monkeypatch.setattr("dataset_builder.build.SLICES_PER_GROUP", 5)
    report = build(kaggle_dir, tmp_path / "gi_tract", HALVES, num_proc=1)
    paths = sorted((tmp_path / "gi_tract" / "data").iterdir())
    assert [path.name for path in paths] == [
        f"{split}-0000{index}-of-00002.parquet" for split in ("train", "validation") for index in (0, 1)
    ]
    groups = pq.read_metadata(paths[0])
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [5, 5, 2]
    assert load_raw(tmp_path / "gi_tract") == load_raw(dataset_dir)
    assert [counts["scans"] for counts in report.counts.values()] == [2, 2]


def test_every_fold_separates_the_patients_and_each_patient_validates_once(kaggle_dir: Path) -> None:
    validated: Counter[int] = Counter()
    for fold in range(4):
        splits = read_splits(kaggle_dir, GiTractConfig(num_folds=4, fold=fold))
        patients = {split: {scan.case for scan in scans} for split, scans in splits.items()}
        assert not patients["train"] & patients["validation"]
        assert len(patients["train"] | patients["validation"]) == 4
        validated.update(patients["validation"])
    assert set(validated.values()) == {1} and len(validated) == 4


def test_folds_of_the_real_annotations_show_each_organ_about_equally_often(test_data: Path) -> None:
    annotations, problems = read_annotations(test_data / "uwmgi_rle" / "train.csv", GI_TRACT.names)
    assert problems == []
    keys = [(slice_id, *map(int, ID_PATTERN.fullmatch(slice_id).groups())) for slice_id in annotations]  # type: ignore
    slices = [SliceFile(Path(name), case, day, number, 266, 266, (1.5, 1.5)) for name, case, day, number in keys]
    scans = group_scans(slices, annotations)
    for num_folds, seed in ((2, 0), (3, 1), (4, 2)):
        folds = assign_folds(scans, num_folds, seed)
        assert set(folds) == {scan.case for scan in scans}
        assert set(folds.values()) == set(range(num_folds))
        assert folds == assign_folds(scans, num_folds, seed)
        presence = [np.concatenate([organ_presence(s) for s in scans if folds[s.case] == k]) for k in range(num_folds)]
        for bit in range(len(GI_TRACT)):
            overall = np.mean(np.concatenate(presence) >> bit & 1)
            shares = [np.mean(fold >> bit & 1) / overall for fold in presence]
            # Nine patients cannot be divided exactly, so a fold may show an organ up to 30 % less or 40 % more often.
            assert min(shares) > 0.7 and max(shares) < 1.4, (GI_TRACT.names[bit], shares)


def test_folds_balance_patients_with_and_without_organs() -> None:
    """Four of eight patients show no organ. Each of four folds must get one of them, which chance would rarely do."""
    scans = []
    for case in range(8):
        slices = [SliceFile(Path(), case, 0, number, 9, 9, (1.5, 1.5)) for number in range(10)]
        rle = "1 1" if case % 2 else ""
        scans += group_scans(slices, {s.id: dict.fromkeys(GI_TRACT.names, Annotation(rle, 2)) for s in slices})
    deals = {tuple(sorted(assign_folds(scans, 4, seed).items())) for seed in range(5)}
    assert len(deals) > 1, "the seed changes the deal"
    for deal in deals:
        assert Counter((fold, case % 2) for case, fold in deal) == Counter((f, k) for f in range(4) for k in range(2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GiTractConfig(num_folds=5), "--num_folds: expected 2 to 4, the number of patients; got 5"),
        (GiTractConfig(num_folds=1), "--num_folds: expected 2 to 4, the number of patients; got 1"),
        (GiTractConfig(num_folds=2, fold=2), "--fold: expected 0 to 1, got 2"),
        (GiTractConfig(num_folds=2, fold=-1), "--fold: expected 0 to 1, got -1"),
    ],
)
def test_folds_that_do_not_exist_are_refused(
    config: GiTractConfig, message: str, kaggle_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(KaggleDataError, match=re.escape(message)):
        build(kaggle_dir, tmp_path / "gi_tract", config, num_proc=1)
    assert list(tmp_path.iterdir()) == []


def test_faulty_scans_are_left_out_unless_the_flag_keeps_them(
    kaggle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(kaggle_dir, tmp_path / "kaggle"))
    scan = next((folder / "train").glob("*/*"))
    (folder / "train" / "case7").mkdir()
    scan.rename(folder / "train" / "case7" / "case7_day0")
    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(text.replace(f"{scan.name}_", "case7_day0_"))
    command = ["build", "--kaggle_dir", str(folder), "--num_folds", "2", "--num_proc", "1", "--output_dir"]
    for flags, expected in (
        ([], {"slices": 36, "case7": False}),
        (["--include_faulty_scans"], {"slices": 48, "case7": True}),
    ):
        name = tmp_path / f"built{len(flags)}"
        assert main([*command, str(name), *flags]) == 0
        ids = [row["id"] for rows in load_raw(name).values() for row in rows]
        found = {"slices": len(ids), "case7": any(slice_id.startswith("case7_day0_") for slice_id in ids)}
        assert found == expected
        assert ("left out: nothing" in capsys.readouterr().out) == expected["case7"]
        assert ("hosts call them faulty: case7_day0." in (name / "README.md").read_text()) != expected["case7"]


def test_the_column_fold_says_which_patients_a_build_would_hold_back(kaggle_dir: Path, tmp_path: Path) -> None:
    held_back: dict[int, set[int]] = {}
    for fold in range(3):
        config = GiTractConfig(num_folds=3, fold=fold)
        splits = load_raw(build(kaggle_dir, tmp_path / f"fold{fold}", config, num_proc=1).output_dir)
        held_back[fold] = {row["case"] for row in splits["validation"]}
        assert {row["fold"] for row in splits["validation"]} == {fold}
        assert fold not in {row["fold"] for row in splits["train"]}
        card = (tmp_path / f"fold{fold}" / "README.md").read_text()
        assert "| `fold` | the fold of the patient, int32, from 0 to 2." in card
    # The folds are the same in every build of this folder.
    for rows in splits.values():
        assert all(row["case"] in held_back[row["fold"]] for row in rows)


def test_a_test_split_has_neither_annotation_nor_segmentation(kaggle_copy: Path, tmp_path: Path) -> None:
    shutil.copytree(kaggle_copy / "train", kaggle_copy / "test")
    report = build(kaggle_copy, tmp_path / "gi_tract", HALVES, num_proc=1)
    splits = load_raw(tmp_path / "gi_tract")
    assert list(splits) == ["train", "validation", "test"]
    assert len(splits["test"]) == report.counts["test"]["slices"] == 6
    for row in splits["test"]:
        assert row["annotation"] is None and row["segmentation"] is None and row["fold"] is None
    images = {row["id"]: row["image"]["bytes"] for row in splits["test"]}
    assert images == {row["id"]: row["image"]["bytes"] for row in splits["train"] + splits["validation"]}


def test_several_folders_give_the_dataset_of_one_with_all_patients(kaggle_dir: Path, tmp_path: Path) -> None:
    first, second, third, fourth = list_patients(kaggle_dir)
    # Not in the order of the patients.
    copy_patients(kaggle_dir, tmp_path / "a", (second, third))
    copy_patients(kaggle_dir, tmp_path / "b", (first, fourth))
    words = ["--num_folds", "2", "--num_proc", "1", "--output_dir", str(tmp_path / "several")]
    assert main(["build", "--kaggle_dir", str(tmp_path / "a"), str(tmp_path / "b"), *words]) == 0
    build(kaggle_dir, tmp_path / "one", HALVES, num_proc=1)
    assert contents(tmp_path / "several" / "data") == contents(tmp_path / "one" / "data")


def test_a_patient_in_two_folders_is_refused(
    kaggle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = list_patients(kaggle_copy)[0]
    again = tmp_path / "again"
    copy_patients(kaggle_copy, again, [patient])
    with pytest.raises(SystemExit, match="1"):
        main(["build", "--kaggle_dir", str(kaggle_copy), str(again), "--output_dir", str(tmp_path / "built")])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line == (
        f"error: {again}: train has patient {patient}, which is in {kaggle_copy}, too; remove the patient from one of "
        f"the folders, or give it another number if it is another one"
    )
    assert not (tmp_path / "built").exists()


def test_the_summary_and_the_card_state_the_right_counts(
    kaggle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (kaggle_copy / "train.csv").read_text().splitlines()
    lines[1:4] = [line.rsplit(",", 1)[0] + f",{rle}" for line, rle in zip(lines[1:4], ["1 9", "5 9", ""], strict=True)]
    (kaggle_copy / "train.csv").write_text("\n".join(lines))
    folder = tmp_path / "gi_tract"
    command = ["build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2", "--output_dir", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for split, rows in load_raw(folder).items():
        masks = [[decode(row["segmentation"][o], row["height"], row["width"]) for o in GI_TRACT.names] for row in rows]
        shown = np.array([[mask.any() for mask in organs] for organs in masks])
        overlap = sum(int((np.sum(organs, axis=0) > 1).sum()) for organs in masks)
        numbers = [1, 1, 3, int((~shown.any(axis=1)).sum()), *shown.sum(axis=0).tolist(), overlap]
        (line,) = (line for line in printed.splitlines() if line.startswith(split))
        assert line.split()[1:] == [str(number) for number in numbers]
        assert f"| {split} | {' | '.join(map(str, numbers))} |" in (folder / "README.md").read_text()
    assert re.search(r"overlap px\n.* [1-9]\d*\n|\n.* [1-9]\d*\nleft out", printed), "some pixels overlap"
    assert "left out: nothing\nfold 0 of 2, seed 0; split hash" in printed
    assert printed.endswith(f"written to {folder}\n")
    assert check_card((folder / "README.md").read_text(), "dataset")[0] == []


def test_an_output_dir_with_other_files_is_refused_and_not_changed(
    kaggle_copy: Path, tmp_path: Path, dataset_dir: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_bytes(b"# mine\xff")
    (tmp_path / "file").write_text("mine")
    mixed = Path(shutil.copytree(dataset_dir, tmp_path / "mixed"))
    (mixed / "data" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    for name in ("notes", "file", "mixed", "kaggle"):
        with pytest.raises(KaggleDataError, match=f"{name}: .*; name another --output_dir or remove it"):
            build(kaggle_copy, tmp_path / name, HALVES, num_proc=1)
    assert contents(tmp_path) == before


def test_an_earlier_build_is_replaced_and_an_empty_folder_filled(
    kaggle_copy: Path, tmp_path: Path, dataset_dir: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(dataset_dir, tmp_path / "earlier")
    for name in ("empty", "earlier"):
        build(kaggle_copy, tmp_path / name, HALVES, num_proc=1)
        assert sum(map(len, load_raw(tmp_path / name).values())) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "empty", "kaggle"]


def test_an_output_folder_that_cannot_be_made_is_one_error(
    kaggle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    command = ["build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2", "--output_dir"]
    with pytest.raises(SystemExit, match="1"):
        main([*command, str(tmp_path / "file" / "gi_tract")])
    assert "error: --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("earlier", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_killed_build_leaves_no_incomplete_dataset(
    earlier: bool, kaggle_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "gi_tract"
    if earlier:
        shutil.copytree(dataset_dir, target)
    before = contents(tmp_path)
    command = [sys.executable, "-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_dir), "--num_folds", "4"]
    command += ["--output_dir", str(target)]
    with subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if next(tmp_path.glob(".gi_tract.building-*/dataset/data/*"), None):
                break
            time.sleep(0.002)
        # Only the main process is killed, as by a system without memory. Its workers end with it.
        process.kill()
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(tmp_path)
    assert list(tmp_path.glob(".gi_tract.building-*")), "the build had begun to write"
    kept = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".gi_tract.")}
    assert kept == before
    assert target.exists() == earlier
    build(kaggle_dir, target, HALVES, num_proc=1)
    assert load_raw(target) == load_raw(dataset_dir)
    assert not list(tmp_path.glob(".gi_tract.*")), "the next build cleans up"


def test_an_interrupted_build_says_so_in_one_line(kaggle_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_dir), "--num_folds", "2"]
    # Tests in the background of a script ignore Ctrl-C, and the process would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not next(tmp_path.glob(".gi_tract.building-*/dataset/data/*"), None) and time.monotonic() < deadline:
            time.sleep(0.002)
        # As Ctrl-C in a terminal, it reaches the workers too.
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert printed.splitlines()[-1] == "interrupted; what is written is whole, and the same command goes on"
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_second_build_into_the_same_folder_ends_before_it_changes_anything(
    kaggle_copy: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset_dir, tmp_path / "gi_tract")
    with hold(tmp_path / ".gi_tract.lock") as pid:
        # The folder of the first build, which is not a leftover.
        (tmp_path / ".gi_tract.building-abc").mkdir()
        before = contents(tmp_path)
        with pytest.raises(InputError, match=rf"gi_tract: process {pid} on \S+ writes to this folder"):
            build(kaggle_copy, tmp_path / "gi_tract", HALVES, num_proc=1)
        assert contents(tmp_path) == before and (tmp_path / ".gi_tract.building-abc").exists()
    build(kaggle_copy, tmp_path / "gi_tract", HALVES, num_proc=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gi_tract", "kaggle"]


def test_a_build_killed_while_replacing_a_dataset_gives_it_back(
    kaggle_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    # This is what is left if a build is killed after the earlier dataset was moved away and before the new one got its
    # name. The next build fails too, but it moves the earlier dataset back first.
    shutil.copytree(dataset_dir, tmp_path / ".gi_tract.building-abc" / "replaced")
    with pytest.raises(KaggleDataError, match="num_folds"):
        build(kaggle_dir, tmp_path / "gi_tract", GiTractConfig(num_folds=9), num_proc=1)
    assert load_raw(tmp_path / "gi_tract") == load_raw(dataset_dir)


def test_all_ways_of_loading_give_the_same_rows(
    dataset_dir: Path, kaggle_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    expected = describe(datasets.load_dataset(str(dataset_dir)))
    assert [len(rows) for rows in expected.values()] == [24, 24]
    assert {split: {row["fold"] for row in rows} for split, rows in expected.items()} == {
        "train": {1},
        "validation": {0},
    }

    folder = describe_elsewhere(
        run_python, dataset_dir.parent, 'print(json.dumps(describe(load_dataset("gi_tract"))))'
    )
    assert folder == expected, "way 1: the folder ./gi_tract"
    parquet = {split: str(dataset_dir / "data" / f"{split}-*.parquet") for split in expected}
    assert describe(datasets.load_dataset("parquet", data_files=parquet)) == expected, "its files without the card"

    elsewhere = describe_elsewhere(
        run_python,
        dataset_dir.parent,
        "import dataset_builder\n"
        f"kaggle = load_dataset('gi_tract', data_dir={str(kaggle_dir)!r}, num_folds=2)\n"
        f"streamed = load_dataset('gi_tract', data_dir={str(kaggle_dir)!r}, num_folds=2, streaming=True)\n"
        "print(json.dumps([describe(kaggle), describe(streamed), describe(load_dataset('gi_tract'))]))",
    )
    assert elsewhere == [expected] * 3, "way 2: the registered builder, and ./gi_tract where no data_dir is given"

    command = ["build", "--kaggle_dir", str(kaggle_dir), "--num_folds", "2", "--push_to_hub", "user/gi_tract"]
    pushed = run_python(["-m", "dataset_builder", *command], tmp_path, hub.environment())
    assert pushed.returncode == 0, pushed.stderr
    assert f"published as {hub.endpoint}/datasets/user/gi_tract, tag fold-0-of-2-" in pushed.stdout
    info = HfApi(endpoint=hub.endpoint, token="any").dataset_info("user/gi_tract")
    assert info.private
    assert {file.rfilename for file in info.siblings or []} - {".gitattributes"} == {
        "README.md",
        "eval.yaml",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00002.parquet",
        "data/validation-00001-of-00002.parquet",
    }
    remote = describe_elsewhere(
        run_python,
        tmp_path,
        "loaded = [load_dataset('user/gi_tract', streaming=streaming) for streaming in (False, True)]\n"
        "print(json.dumps([describe(dataset) for dataset in loaded]))",
        hub.environment(),
    )
    assert remote == [expected] * 2, "way 3: from the Hub, stored and streamed"


def test_the_dataset_is_a_benchmark_as_the_hub_documents_it(
    kaggle_copy: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    command = ["build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2", "--push_to_hub", "user/gi_tract"]
    result = run_python(["-m", "dataset_builder", *command], tmp_path, hub.environment())
    assert result.returncode == 0, result.stderr
    api = HfApi(endpoint=hub.endpoint, token="any")
    path = api.hf_hub_download("user/gi_tract", "eval.yaml", repo_type="dataset", local_dir=tmp_path / "copy")
    # The client has no parser for this file. These are the fields of https://huggingface.co/docs/hub/eval-results.
    content = yaml.safe_load(Path(path).read_text())
    assert content.keys() == {"name", "description", "evaluation_framework", "tasks"}
    assert all(isinstance(content[key], str) and content[key] for key in ("name", "description"))
    assert content["evaluation_framework"] == "gi-segmentation"
    tasks = content["tasks"]
    assert [task["id"] for task in tasks] == list_tasks(GI_TRACT) and "dice" in list_tasks(GI_TRACT)
    # The config and the split exist, and the split has outlines.
    (place,) = {(task["config"], task["split"]) for task in tasks}
    rows = datasets.load_dataset(str(tmp_path / "gi_tract"), place[0], split=place[1])
    assert all(row["segmentation"] for row in rows)
    card = (tmp_path / "gi_tract" / "README.md").read_text()
    split_hash = re.search(r"Split hash: `(\w+)`", card)
    assert split_hash and f"fold 0 of 2, split hash {split_hash[1][:12]}" in content["description"]


def test_a_refused_push_ends_in_one_error_and_keeps_the_build(
    kaggle_copy: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    command = ["build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2", "--push_to_hub", "user/gi_tract"]
    result = run_python(["-m", "dataset_builder", *command], tmp_path, hub.environment(token="invalid"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: publishing" in result.stderr and "check HF_TOKEN" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("is complete; to publish it, run the same command again")
    assert sum(map(len, load_raw(tmp_path / "gi_tract").values())) == 6


def test_a_push_that_broke_after_the_upload_is_completed_by_the_same_command(
    kaggle_copy: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    command = ["build", "--kaggle_dir", str(kaggle_copy), "--num_folds", "2", "--push_to_hub", "user/gi_tract"]
    # The large files arrive, and the commit that names them is refused.
    hub.faults.set([Fault("POST", "/commit/", status=403)])
    broken = run_python(["-m", "dataset_builder", *command], tmp_path, hub.environment())
    assert broken.returncode == 1 and broken.stderr.splitlines()[-1].startswith("error: publishing user/gi_tract")
    api = HfApi(endpoint=hub.endpoint, token="any")
    assert api.list_repo_files("user/gi_tract", repo_type="dataset") == [".gitattributes"]
    # From now on, this server takes no large file. The second run must need none.
    hub.faults.set([Fault("PUT", "/lfs/", status=403, times=math.inf)])
    again = run_python(["-m", "dataset_builder", *command], tmp_path, hub.environment())
    assert again.returncode == 0, again.stderr[-2000:]
    published = set(api.list_repo_files("user/gi_tract", repo_type="dataset")) - {".gitattributes"}
    built = tmp_path / "gi_tract"
    assert published == {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert len(api.list_repo_refs("user/gi_tract", repo_type="dataset").tags) == 1


def test_load_dataset_sees_a_new_build_under_the_same_name(kaggle_copy: Path, tmp_path: Path) -> None:
    validated = []
    for folder, fold in (("one", 0), ("one", 1), ("two", 0)):
        report = build(kaggle_copy, tmp_path / folder / "gi_tract", GiTractConfig(num_folds=2, fold=fold), num_proc=1)
        loaded = datasets.load_dataset(str(report.output_dir))["validation"]
        validated.append(set(loaded["case"]))
    # Fold 1 replaced fold 0 in the same folder, and another folder of the same name has fold 0. Each was read as it
    # is.
    assert validated[0] == validated[2] != validated[1]
    before = next(row["segmentation"]["stomach"] for row in loaded if row["segmentation"]["stomach"])
    text = (kaggle_copy / "train.csv").read_text()
    # The outline changes, but the slice still shows the organ. So the split stays the same, and only the rows differ.
    (kaggle_copy / "train.csv").write_text(text.replace(before, "1 7"))
    build(kaggle_copy, tmp_path / "two" / "gi_tract", HALVES, num_proc=1)
    again = datasets.load_dataset(str(tmp_path / "two" / "gi_tract"))["validation"]
    assert again["id"][:] == loaded["id"][:]
    assert "1 7" in [organs["stomach"] for organs in again["segmentation"]]


def test_load_dataset_sees_an_edit_of_the_kaggle_folder(kaggle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kaggle_copy.parent)

    def load() -> dict[str, dict[str, Any]]:
        loaded = datasets.load_dataset("gi_tract", data_dir="kaggle", num_folds=2)
        return {row["id"]: row for part in loaded.values() for row in part}

    first = load()
    edited = next(iter(first))
    mask = np.zeros((first[edited]["height"], first[edited]["width"]), dtype=bool)
    mask[3:5, 2:9] = True
    text = (kaggle_copy / "train.csv").read_text()
    text = re.sub(rf"{edited},stomach,.*", f"{edited},stomach,{encode(mask)}", text)
    (kaggle_copy / "train.csv").write_text(text)
    second = load()
    assert second[edited]["segmentation"]["stomach"] == encode(mask)
    np.testing.assert_array_equal(np.array(second[edited]["annotation"]) == GI_TRACT.labels.index("stomach"), mask)
    path = next(s.path for s in find_slices(kaggle_copy)[0] if s.id == edited)
    Image.fromarray(np.full(mask.shape, 777, dtype=np.uint16)).save(path)
    assert np.unique(np.array(load()[edited]["image"])).tolist() == [777]


def test_load_dataset_reads_an_unchanged_kaggle_folder_once(kaggle_dir: Path) -> None:
    files = [
        datasets.load_dataset("gi_tract", data_dir=str(kaggle_dir), num_folds=num_folds)["train"].cache_files
        for num_folds in (2, 2, 4)
    ]
    assert files[0] == files[1] != files[2]


def test_the_bare_name_without_any_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KaggleDataError, match=r"no folder \./gi_tract here; pass data_dir=KAGGLE_DIR, or run"):
        datasets.load_dataset("gi_tract")
    with pytest.raises(KaggleDataError, match="nowhere: no such folder; expected the unpacked Kaggle download"):
        datasets.load_dataset("gi_tract", data_dir="nowhere")


def test_other_datasets_load_as_before(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    for arguments in ({"path": str(tmp_path)}, {"path": "csv", "data_files": str(tmp_path / "table.csv")}):
        assert datasets.load_dataset(**arguments)["train"].to_list() == [{"a": 1, "b": 2}]
    assert datasets.load_dataset("csv", data_dir=str(tmp_path))["train"].to_list() == [{"a": 1, "b": 2}]
