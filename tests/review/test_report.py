"""A report is one JSON and one HTML file per scan. The HTML file loads nothing, and shows text of files as text."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from dataset_builder.series import read_first_scan
from gi_segmentation.data.slices import find_dataset
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.predict import main
from gi_segmentation.training.training_ranges import find_training_ranges
from tests.support.models import save_model
from tests.support.volumes import prediction_words

# A file name may hold markup. A slash cannot be a part of it.
NAME = "<img src=x onerror=alert(1)> & 'mr'"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path) -> Path:
    """A tiny random model that has the ranges of the phantoms in its configuration."""
    folder = save_model(tmp_path_factory.mktemp("model") / "<b>checkpoint", "segformer", seed=0)
    ranges = find_training_ranges(find_dataset(str(dataset_dir), None)["train"])
    change_config(folder, training_ranges=ranges.to_config())
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory, kaggle_dir: Path) -> Path:
    """A phantom as a NIfTI file, with pixels that are twice as high as wide."""
    voxels, affine = read_first_scan(kaggle_dir)
    path = tmp_path_factory.mktemp("in") / f"{NAME}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels[:, ::2], affine @ np.diag([1, 2, 1, 1])), path)
    return path


@pytest.fixture(scope="module")
def written(model: Path, nifti: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return main(prediction_words(model, nifti, tmp_path_factory.mktemp("out"), "--test_time_flips"))


@pytest.fixture(scope="module")
def report(written: list[Path]) -> dict[str, Any]:
    return json.loads(written[1].read_text(encoding="utf-8"))


class Page(HTMLParser):
    """The tags, the attributes and the text of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_nifti_scan_has_a_report_by_default(written: list[Path]) -> None:
    assert [path.name for path in written] == [NAME + end for end in (".nii.gz", ".report.json", ".report.html")]
    assert all(path.is_file() for path in written)


def test_the_measures_are_those_of_the_label_map(written: list[Path], report: dict[str, Any]) -> None:
    labels = nibabel.load(written[0])
    voxel_ml = np.prod(labels.header.get_zooms()) / 1000
    for label, organ in enumerate(GI_TRACT.names, start=1):
        mask, one = np.asarray(labels.dataobj) == label, report["organs"][organ]
        assert mask.any() and one["volume_ml"] == pytest.approx(mask.sum() * voxel_ml, rel=1e-3)
        # The axes of the file are columns, rows and slices.
        places = [np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 1), (0, 2), (1, 2))]
        lengths = [place[-1] - place[0] + 1 for place in places]
        assert one["extent_mm"] == pytest.approx(np.multiply(lengths, report["geometry"]["spacing_mm"]), rel=1e-3)
        assert (one["first_slice"], one["last_slice"]) == (places[0][0] + 1, places[0][-1] + 1)
        assert 0.25 < one["confidence"] < 1 and 0 <= one["agreement"] < 1
    assert report["geometry"]["shape"] == list(labels.shape[::-1])


def test_a_random_model_is_no_good(report: dict[str, Any]) -> None:
    assert report["verdict"] == "fail"
    assert {"confidence", "agreement"} <= {reason["check"] for reason in report["reasons"]}


def test_the_page_loads_nothing_and_runs_nothing(written: list[Path], report: dict[str, Any]) -> None:
    text = written[2].read_text(encoding="utf-8")
    page = Page(text)
    assert NAME in page.text and "<b>checkpoint" in page.text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(not key.startswith("on") and key != "href" for _, attributes in page.tags for key in attributes)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("http-equiv", "")
    for part in (report["verdict"], *(reason["text"] for reason in report["reasons"])):
        assert part in page.text


def test_pictures_have_true_proportions(written: list[Path], report: dict[str, Any]) -> None:
    (source, *_) = [attributes["src"] or "" for tag, attributes in Page(written[2].read_text()).tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    _, height_mm, width_mm = report["geometry"]["field_mm"]
    assert width / height == pytest.approx(width_mm / height_mm, rel=0.02)
    # The slice is gray, and the outlines are not.
    assert np.ptp(pixels, axis=-1).max() > 80


def test_without_ranges_the_report_says_so(model: Path, nifti: Path, written: list[Path], tmp_path: Path) -> None:
    plain = Path(shutil.copytree(model, tmp_path / "model"))
    change_config(plain, training_ranges=None)
    paths = main(prediction_words(plain, nifti, tmp_path / "out", "--format", "report"))
    report = json.loads(paths[0].read_text(encoding="utf-8"))
    assert report["training"] is None and len(report["unchecked"]) == 2
    assert all(sentence in Page(paths[1].read_text()).text for sentence in report["unchecked"])


def test_malformed_ranges_stop_before_the_first_scan(model: Path, nifti: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    change_config(broken, training_ranges={"scans": 1, "ranges": {"p50": "high"}})
    with pytest.raises(
        InputError, match=r"config\.json: training_ranges\.p50: expected .* leave report out of --format"
    ):
        main(prediction_words(broken, nifti, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.n*"))
    main(prediction_words(broken, nifti, tmp_path / "out", "--format", "nifti"))


def test_slices_of_kaggle_have_a_report_on_demand(model: Path, kaggle_dir: Path, tmp_path: Path) -> None:
    scans = [path for path in sorted((kaggle_dir / "train").glob("*/*")) if path.is_dir()]
    paths = main(prediction_words(model, scans[0], tmp_path, "--format", "kaggle", "report"))
    name = scans[0].name
    assert [path.name for path in paths] == ["submission.csv", f"{name}.report.json", f"{name}.report.html"]
    report = json.loads(paths[1].read_text(encoding="utf-8"))
    assert report["scan"] == name and report["geometry"]["shape"][0] == 12
    # Its slices are like those of the training, whatever a random model makes of them.
    odd = {reason["check"] for reason in report["reasons"]}
    assert not odd & {"slice_distance_mm", "length_mm"}
