"""A folder with `labels.json` is verified, built and loaded by its own labels, and its card has nothing of Kaggle."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import dataset_builder  # noqa: F401 (registers the name gi_tract with load_dataset)
from dataset_builder.__main__ import main
from dataset_builder.build import BuildReport, CardOptions, build, dataset_card
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom
from dataset_builder.splits import assign_folds
from dataset_builder.verify import verify
from gi_segmentation.formats.kaggle.annotations import Annotation
from gi_segmentation.formats.kaggle.folder import group_scans
from gi_segmentation.formats.kaggle.label_file import LabelFile, ScanFacts, read_label_file, write_label_file
from gi_segmentation.formats.kaggle.names import KaggleDataError, SliceFile
from gi_segmentation.labels import LabelSet, find_labels
from gi_segmentation.publishing.eval_results import list_tasks
from gi_segmentation.rle import decode
from loopback_hub import check_card

ORGANS = ("stomach", "Liver (whole)", "spleen", "large_bowel", "small_bowel")
HALVES = GiTractConfig(num_folds=2)


@pytest.fixture(scope="module")
def own_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scans of two patients with five organs; two of the organs are not drawn in two scans.

    One scan has the name of a scan that Kaggle's hosts call faulty.
    """
    folder = tmp_path_factory.mktemp("own") / "kaggle"
    write_phantom(folder, 2, 2, 3, num_proc=1, num_labels=5, undrawn=("spleen", "small_bowel"), slice_spacing_mm=40.0)
    first = sorted((folder / "train").glob("*/*"))[0]
    (folder / "train" / "case7").mkdir()
    first.rename(folder / "train" / "case7" / "case7_day0")
    for name in ("train.csv", "labels.json"):
        text = (folder / name).read_text()
        text = re.sub(rf"{first.name}\b|{first.name}(?=_slice)", "case7_day0", text)
        (folder / name).write_text(re.sub(r"\bliver\b", ORGANS[1], text))
    return folder


@pytest.fixture(scope="module")
def built(own_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The dataset of `own_dir`, in a folder with a name of its own."""
    return build(own_dir, tmp_path_factory.mktemp("built") / "my_clinic", HALVES, num_proc=1)


def load_rows(loaded: datasets.DatasetDict) -> list[dict[str, Any]]:
    """Return the rows of all splits, with pictures as bytes."""
    for column in ("image", "annotation"):
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    rows = [row for part in loaded.values() for row in part.to_list()]
    for row in rows:
        row["image"], row["annotation"] = row["image"]["bytes"], row["annotation"]["bytes"]
    return sorted(rows, key=lambda row: str(row["id"]))


def test_rows_have_the_labels_the_spacing_and_null_for_unknown_organs(own_dir: Path, built: BuildReport) -> None:
    loaded = datasets.load_dataset(str(built.output_dir))
    labels = find_labels(loaded["train"].features)
    assert labels.names == ORGANS
    facts = json.loads((own_dir / "labels.json").read_text())["scans"]
    assert len(facts) == 4 and sum(bool(one["unknown"]) for one in facts.values()) == 2
    scans = set()
    for row in (row for part in loaded.values() for row in part):
        scans.add(row["scan"])
        unknown = {organ for organ, text in row["segmentation"].items() if text is None}
        assert unknown == set(facts[row["scan"]]["unknown"])
        assert (row["slice_spacing"], row["rescale_slope"], row["rescale_intercept"]) == (40.0, 1.0, 0.0)
        expected = np.zeros((row["height"], row["width"]), dtype=np.uint8)
        for label_id, organ in enumerate(ORGANS, start=1):
            expected[decode(row["segmentation"][organ] or "", *expected.shape)] = label_id
        np.testing.assert_array_equal(np.array(row["annotation"]), expected)
        palette = [channel for colour in labels.palette for channel in colour]
        assert row["annotation"].getpalette()[: len(palette)] == palette
    assert scans == set(facts) and "case7_day0" in scans, "Kaggle's list of faulty scans is about Kaggle's patients"
    assert load_rows(datasets.load_dataset("gi_tract", data_dir=str(own_dir), num_folds=2)) == load_rows(loaded)


def test_kaggles_own_folder_gives_the_columns_that_it_always_gave(dataset_dir: Path) -> None:
    # With the bytes of the rows, which other tests compare with the folder, these lines decide the bytes of the file.
    schema = pq.read_schema(next((dataset_dir / "data").iterdir()))
    organs = "large_bowel: string, small_bowel: string, stomach: string"
    image = "struct<bytes: binary, path: string>"
    assert schema.remove_metadata().to_string().splitlines() == [
        "id: string", f"image: {image}", "  child 0, bytes: binary", "  child 1, path: string",
        f"annotation: {image}", "  child 0, bytes: binary", "  child 1, path: string",
        f"segmentation: struct<{organs}>",
        *(f"  child {index}, {organ}" for index, organ in enumerate(organs.split(", "))),
        "case: int32", "day: int32", "slice: int32", "scan: string", "fold: int32", "height: int32", "width: int32",
        "pixel_spacing: fixed_size_list<element: double>[2]", "  child 0, element: double",
    ]  # fmt: skip
    assert list(schema.metadata) == [b"huggingface"]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["segmentation"]["stomach"] == {"dtype": "string", "_type": "Value"}


Edit = Callable[[Path], None]


def edit_csv(pattern: str, replacement: str, count: int = 0) -> Edit:
    def edit(folder: Path) -> None:
        text = (folder / "train.csv").read_text()
        (folder / "train.csv").write_text(re.sub(pattern, replacement, text, count=count, flags=re.MULTILINE))

    return edit


def edit_labels(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "labels.json").read_text())
        change(content)
        (folder / "labels.json").write_text(json.dumps(content))

    return edit


def rename_scan(content: dict[str, Any]) -> None:
    content["scans"]["case901_day0"] = content["scans"].pop("case7_day0")


EDITS: dict[str, tuple[Edit, list[str]]] = {
    "a class that the labels do not have": (
        edit_csv(",spleen,", ",Milz,"),
        [
            "labels.json has no label 'Milz'; add it there, or remove all rows of this class",
            # Two of the scans know no spleen in any case.
            *2 * ["no row of spleen on any slice of case"],
        ],
    ),
    "a label without rows in a scan": (
        edit_csv(r"^case7_day0_.*,stomach,.*\n", ""),
        ["no row of stomach on any slice of case7_day0; add a row for each slice, or add stomach to its `unknown`"],
    ),
    "a label without a row on one slice": (
        edit_csv(r"^case7_day0_slice_0002,stomach,.*\n", ""),
        ["case7_day0_slice_0002 has no row for stomach; add one"],
    ),
    "a row of an unknown organ": (
        edit_labels(lambda content: content["scans"]["case7_day0"].update(unknown=["stomach"])),
        ["labels.json calls stomach unknown in case7_day0, but 3 of its 3 slices have a row of it; remove these rows"],
    ),
    "a scan without slices, and one without facts": (
        edit_labels(rename_scan),
        [
            "labels.json: nothing about case7_day0 of train; add it",
            "labels.json: no slices of case901_day0 under ",
        ],
    ),
    "a fault of the file": (
        edit_labels(lambda content: content.update(labels=["stomach", "Stomach"])),
        ["differ in case only"],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_problem_of_own_data_is_one_line(name: str, own_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own_dir, tmp_path / "kaggle"))
    edit, expected = EDITS[name]
    edit(folder)
    problems = verify(folder, num_proc=1).problems
    assert len(problems) == len(expected), problems
    for words in expected:
        assert any(words in problem and "\n" not in problem for problem in problems), problems
    with pytest.raises(KaggleDataError):
        build(folder, tmp_path / "gi_tract", HALVES, num_proc=1)
    assert [path.name for path in tmp_path.iterdir()] == ["kaggle"]


def test_an_undamaged_folder_has_no_problems(own_dir: Path) -> None:
    assert verify(own_dir, num_proc=1).problems == []


def test_folders_with_other_organs_are_refused(own_dir: Path, kaggle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(KaggleDataError) as error:
        build([own_dir, kaggle_dir], tmp_path / "built", HALVES, num_proc=1)
    assert error.value.problems[-1] == (
        f"{own_dir}, {kaggle_dir}: expected the same organs in all folders, and labels.json in all or in none of them"
    )


def test_data_of_a_single_patient_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantom(tmp_path / "kaggle", 1, 2, 2, num_proc=1, num_labels=1)
    with pytest.raises(SystemExit, match="1"):
        main(["build", "--kaggle_dir", str(tmp_path / "kaggle"), "--output_dir", str(tmp_path / "built")])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line == (
        "error: expected scans of at least two patients, to train on one and to validate on the other, got 1; add the "
        "scans of another patient"
    )


def spread_between_folds(seed: int) -> float:
    """Divide 24 patients, each with about 7 of 12 organs, into 4 folds.

    Returns:
        How much the number of slices with an organ differs between folds: standard deviation by mean, over all organs.
    """
    labels = LabelSet(tuple(f"organ{number}" for number in range(12)))
    rng, scans, counts = np.random.default_rng(seed), [], {}
    for case in range(24):
        slices = [SliceFile(Path(), case, 0, number, 9, 9, (1.5, 1.5)) for number in range(40)]
        shown = (rng.random((40, 12)) < 0.3) & (rng.random(12) < 0.6)
        counts[case] = shown.sum(axis=0)
        rows = {
            one.id: {organ: Annotation("1 1" if seen[k] else "", 2) for k, organ in enumerate(labels.names)}
            for one, seen in zip(slices, shown, strict=True)
        }
        scans += group_scans(slices, rows, LabelFile(labels, {slices[0].scan: ScanFacts()}))
    folds = assign_folds(scans, 4, seed=0)
    sums = np.array([sum(counts[case] for case in counts if folds[case] == fold) for fold in range(4)])
    return float((sums.std(axis=0) / sums.mean(axis=0)).mean())


def test_many_organs_are_balanced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Almost every slice has a combination of organs that no other patient has.
    one_by_one = [spread_between_folds(seed) for seed in range(6)]
    monkeypatch.setattr("dataset_builder.splits.MAX_COMBINED", 12)
    combined = [spread_between_folds(seed) for seed in range(6)]
    assert np.mean(one_by_one) < 0.9 * np.mean(combined)


@pytest.mark.parametrize("synthetic", [True, False])
@pytest.mark.parametrize(
    ("options", "title", "license_name"),
    [
        (CardOptions(), "my_clinic", None),
        (CardOptions("A *bold* title: 1", "cc-by-4.0", "lab/livers"), "A *bold* title: 1", "cc-by-4.0"),
        (CardOptions(repo_id="lab/livers"), "livers", None),
    ],
)
def test_the_card_has_its_own_title_and_licence_and_nothing_of_kaggle(
    options: CardOptions, title: str, license_name: str | None, synthetic: bool, built: BuildReport
) -> None:
    card = dataset_card(replace(built, card=options, synthetic=synthetic), "0" * 16)
    assert check_card(card, "dataset") == ([], [])
    assert not re.search("kaggle|madison|competition|MR-Linac|gi_tract|mri", card, re.IGNORECASE)
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["pretty_name"] == title + (" (synthetic patients)" if synthetic else "")
    assert facts["license"] == (license_name or ("apache-2.0" if synthetic else "other"))
    assert ("Keep it private" in card) == (not synthetic and license_name is None)
    assert 'load_dataset("my_clinic")' in card and f'"{options.repo_id or "NAMESPACE/my_clinic"}"' in card
    # Two patients are in one split and one is in the other. The spleen is drawn on one day of two patients.
    lines = [line for line in card.splitlines() if re.match(r"\| [23] \| `", line)]
    drawn = [sorted(re.findall(r"(\d) of (\d)", line)) for line in lines]
    assert [line.split(" | ")[1] for line in lines] == ["`Liver (whole)`", "`spleen`"]
    assert drawn[0] == [("1", "1"), ("2", "2")] and sum(int(count) for count, _ in drawn[1]) == 2
    assert "Null: nobody has drawn it in the scan" in card


def test_the_benchmark_has_its_labels(built: BuildReport) -> None:
    content = yaml.safe_load((built.output_dir / "eval.yaml").read_text())
    assert content["name"] == "my_clinic (synthetic patients)"
    assert "Segmentation of stomach, Liver (whole), spleen, large bowel and small bowel on" in content["description"]
    assert [task["id"] for task in content["tasks"]] == list_tasks(LabelSet(ORGANS))


def test_an_earlier_build_of_any_title_is_replaced(own_dir: Path, tmp_path: Path) -> None:
    command = ["build", "--kaggle_dir", str(own_dir), "--num_folds", "2", "--output_dir", str(tmp_path / "any")]
    for title in ("One", "Another"):
        assert main([*command, "--num_proc", "1", "--dataset_title", title, "--license", "cc-by-4.0"]) == 0
        assert f'pretty_name: "{title} (synthetic patients)"\nlicense: cc-by-4.0\n' in (
            tmp_path / "any" / "README.md"
        ).read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="1"):
        main([*command, "--license", "my own!"])


def test_the_pictures_are_the_same_with_any_labels(tmp_path: Path) -> None:
    for name, arguments in (("three", {}), ("all", {"num_labels": 19})):
        write_phantom(tmp_path / name, 1, 1, 9, num_proc=1, **arguments)  # type: ignore[arg-type]
    for path in (tmp_path / "three").rglob("*.png"):
        assert (tmp_path / "all" / path.relative_to(tmp_path / "three")).read_bytes() == path.read_bytes()
    three, everything = (set((tmp_path / name / "train.csv").read_text().splitlines()) for name in ("three", "all"))
    assert three < everything
    label_file = read_label_file(tmp_path / "all")
    assert label_file is not None and read_label_file(tmp_path / "three") is None
    shown = {line.split(",")[1] for line in everything if re.search(r",\d", line)}
    assert shown == set(label_file.labels.names)
    (facts,) = label_file.scans.values()
    assert facts == ScanFacts(slice_spacing_mm=432 / 9)
    write_label_file(tmp_path, label_file)
    assert (tmp_path / "labels.json").read_bytes() == (tmp_path / "all" / "labels.json").read_bytes()


def test_data_of_which_nobody_states_a_licence_does_not_become_public(
    own_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", "--kaggle_dir", str(own_dir), "--output_dir", str(tmp_path / "own"), "--push_to_hub", "a/own"]
    with pytest.raises(SystemExit):
        main([*words, "--hub_private_repo", "false"])
    assert not (tmp_path / "own").exists()
    assert "nobody has stated a licence of this data" in capsys.readouterr().err
