"""`labels.json` comes back as it was written, and every mistake in it is one line that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from gi_segmentation.formats.kaggle.label_file import LabelFile, ScanFacts, read_label_file, write_label_file
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.schema import OWN_COLUMNS, dataset_features

RIGHT = {"labels": ["liver", "spleen"], "scans": {"case1_day0": {"slice_spacing_mm": 2.5}}}


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_label_file(tmp_path) is None
    scans = {
        "case10_day0": ScanFacts(5),
        "case2_day1": ScanFacts(2.5, 0.25, -1024.0, ("Kidney (left)",)),
    }
    written = LabelFile(LabelSet(("Magen", "Kidney (left)", "żołądek")), scans)
    write_label_file(tmp_path, written)
    assert read_label_file(tmp_path) == written
    # Editors on Windows write a mark in front.
    (tmp_path / "labels.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "labels.json").read_bytes())
    assert read_label_file(tmp_path) == written
    (tmp_path / "labels.json").write_bytes((tmp_path / "labels.json").read_bytes()[3:])
    # By numbers, and readable by people.
    assert list(json.loads((tmp_path / "labels.json").read_text())["scans"]) == ["case2_day1", "case10_day0"]
    assert "żołądek" in (tmp_path / "labels.json").read_text(encoding="utf-8")


def scan(**facts: Any) -> dict[str, Any]:
    """Return a file with one scan."""
    return {**RIGHT, "scans": {"case1_day0": {"slice_spacing_mm": 2.5, **facts}}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected JSON"),
        (b"\xff", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"labels": ["a"], "labels": ["b"], "scans": {}}', "'labels' is there 2 times"),
        ([], "expected a JSON object, got []"),
        ({"labels": ["liver"]}, "scans missing"),
        ({**RIGHT, "label": 1}, "got 'label'"),
        ({**RIGHT, "labels": "liver"}, "expected a list of names at `labels`"),
        ({**RIGHT, "labels": []}, "expected 1 to 30 names, got 0"),
        ({**RIGHT, "labels": [f"organ{number}" for number in range(200)]}, "expected 1 to 30 names, got 200"),
        ({**RIGHT, "labels": ["liver", "background"]}, "'background' is no organ"),
        ({**RIGHT, "labels": ["liver", "Liver"]}, "differ in case only"),
        ({**RIGHT, "labels": [1]}, "got 1"),
        ({**RIGHT, "scans": []}, "expected scans by their names"),
        ({**RIGHT, "scans": {"case01_day0": {}}}, "expected a scan like case1_day0, got 'case01_day0'"),
        ({**RIGHT, "scans": {"case1_day0": {}}}, "slice_spacing_mm missing"),
        (scan(slice_thickness=3), "got 'slice_thickness'"),
        (scan(slice_spacing_mm=0), "expected a number above 0 at slice_spacing_mm, got 0"),
        (scan(slice_spacing_mm=True), "got True"),
        (scan(slice_spacing_mm=float("nan")), "got nan"),
        (scan(rescale_slope=-1), "expected a number above 0 at rescale_slope"),
        (scan(rescale_intercept="0"), "expected a number at rescale_intercept, got '0'"),
        (scan(unknown=["kidney"]), "expected a list of labels at `unknown`, got ['kidney']"),
        (scan(unknown=[["liver"]]), "expected a list of labels at `unknown`"),
        (scan(unknown=["liver", "spleen"]), "no organ is drawn in it"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, content: Any, expected: str) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "labels.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(KaggleDataError) as error:
        read_label_file(tmp_path)
    (line,) = error.value.problems
    assert expected in line
    assert line.startswith(f"{tmp_path / 'labels.json'}: ")
    assert line.endswith("; correct it, or convert the data again") and "\n" not in line


def test_all_faulty_scans_are_named(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({**RIGHT, "scans": {"case1_day0": {}, "scan2": {}}}))
    with pytest.raises(KaggleDataError) as error:
        read_label_file(tmp_path)
    assert len(error.value.problems) == 2


def test_only_own_data_has_columns_for_spacing_and_scale() -> None:
    assert dataset_features() == dataset_features(GI_TRACT) and not set(OWN_COLUMNS) & set(dataset_features())
    own = dataset_features(LabelSet(("liver",)), own=True)
    assert list(own)[-3:] == list(OWN_COLUMNS) and list(own["segmentation"]) == ["liver"]
