"""The package for Kaggle: what its client checks, what is in it and what is not, one clear error for each mistake."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from kaggle.api.kaggle_api_extended import KaggleApi
from kagglesdk.datasets.types.dataset_api_service import ApiCreateDatasetResponse
from requests.exceptions import HTTPError

from gi_segmentation.errors import InputError
from gi_segmentation.kaggle_package import parse_arguments
from gi_segmentation.publishing.kaggle import (
    IMAGE_PACKAGES,
    PackagePlan,
    check_names,
    describe_dataset,
    pack_models,
    pack_recipe,
    write_notebook,
    write_package,
)
from gi_segmentation.publishing.wheels import SOURCES, read_packages
from tests.support.models import save_model, write_base
from tests.support.processes import ROOT

RECIPE = ROOT / "recipes" / "segformer-b0.yaml"


class OfflineClient(KaggleApi):
    """Kaggle's client, whose requests are kept and not sent."""

    def __init__(self) -> None:
        super().__init__()
        self.config_values = {self.CONFIG_NAME_USER: "someone"}
        self.requests: list[Any] = []

    @contextmanager
    def build_kaggle_client(self) -> Iterator[Any]:
        kernels = SimpleNamespace(kernels_api_client=SimpleNamespace(save_kernel=self.requests.append))
        datasets = SimpleNamespace(dataset_api_client=SimpleNamespace(create_dataset=self.create))
        yield SimpleNamespace(kernels=kernels, datasets=datasets)

    def create(self, request: Any) -> ApiCreateDatasetResponse:
        self.requests.append(request)
        return ApiCreateDatasetResponse()

    def dataset_status(self, *words: Any) -> None:
        raise HTTPError("404: there is no such dataset yet")

    def upload_files(self, *words: Any, **settings: Any) -> None: ...


def make_plan(**changes: Any) -> PackagePlan:
    values = {"user": "someone", "title": "GI tract segmentation", "models": (), "recipe": RECIPE}
    return PackagePlan(**{**values, "image_packages": IMAGE_PACKAGES, "python_version": "3.12", **changes})


@pytest.mark.parametrize("kind", ["training", "submission"])
def test_the_client_pushes_the_notebook(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    write_notebook(plan, kind, tmp_path / kind)
    client = OfflineClient()
    client.kernels_push(str(tmp_path / kind))
    # It prints nothing about a title that is not like the name, or about a GPU that Kaggle has no more.
    assert capsys.readouterr() == ("", "")
    (request,) = client.requests
    assert request.slug == f"someone/gi-tract-segmentation-{kind}"
    assert request.is_private and request.enable_gpu and not request.enable_internet
    assert request.dataset_data_sources == [describe_dataset(plan)["id"]]
    assert request.competition_data_sources == ["uw-madison-gi-tract-image-segmentation"]
    assert request.kernel_data_sources == ["someone/gi-tract-segmentation-training"]


def test_the_client_creates_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "dataset-metadata.json").write_text(json.dumps(describe_dataset(make_plan())))
    client = OfflineClient()
    client.dataset_create_new(str(tmp_path), dir_mode="zip")
    (request,) = client.requests
    assert request.is_private and request.license_name == "other"
    assert f"{request.owner_slug}/{request.slug}" == describe_dataset(make_plan())["id"]


def test_a_submission_with_models_takes_no_output_of_a_training(tmp_path: Path) -> None:
    plan = make_plan(models=("runs/a",))
    write_notebook(plan, "submission", tmp_path / "submission")
    metadata = json.loads((tmp_path / "submission" / "kernel-metadata.json").read_text())
    assert metadata["kernel_sources"] == []
    assert metadata["dataset_sources"] == ["someone/gi-tract-segmentation-models"]


@pytest.mark.parametrize("kind", ["training", "submission"])
def test_a_notebook_is_valid_and_has_no_outputs(kind: str, tmp_path: Path) -> None:
    write_notebook(make_plan(), kind, tmp_path / kind)
    notebook = nbformat.read(tmp_path / kind / f"{kind}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert any(cell.source.startswith("%env ") for cell in cells)


def test_a_checkpoint_is_packed_without_what_a_prediction_does_not_read(tmp_path: Path) -> None:
    model = save_model(tmp_path / "Run 1", "segformer", seed=0)
    for name in ("README.md", "scan_scores.csv", "overlay.png", "run.json"):
        (model / name).write_text("about patients")
    (model / "checkpoint-5").mkdir()
    pack_models([str(model)], tmp_path / "models")
    (packed,) = (tmp_path / "models").iterdir()
    assert packed.name == "1-run-1"
    assert sorted(path.name for path in packed.iterdir()) == [
        *("config.json", "model.safetensors", "preprocessor_config.json")
    ]


def test_the_recipe_and_its_pretrained_checkpoint_are_packed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "segformer")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.read_text().replace("nvidia/segformer-b0-finetuned-ade-512-512", str(base)))
    (tmp_path / "dataset").mkdir()
    pack_recipe(recipe, tmp_path / "dataset")
    assert (tmp_path / "dataset" / "recipe.yaml").read_text() == recipe.read_text()
    assert (tmp_path / "dataset" / "start" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "some one"}, "expected the name in the address of your profile"),
        ({"user": ""}, "expected the name in the address of your profile"),
        ({"title": "x" * 45}, "--title: expected a text with which"),
    ],
)
def test_what_kaggle_refuses_is_refused_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_names(make_plan(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [str(ROOT / "docs")]}, "docs: not a checkpoint of this project"),
        ({"recipe": Path("no_such_recipe.yaml")}, "no_such_recipe.yaml"),
        ({"image_packages": Path("no_such_list.txt")}, "no_such_list.txt: not a readable text file"),
        ({"image_packages": ROOT / "LICENSE"}, "no line torch==VERSION among its 0 packages"),
    ],
)
def test_nothing_is_written_after_a_mistake(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_package(make_plan(**changes), tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="expected a new folder"):
        write_package(make_plan(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_pytorch_that_is_too_old_for_us_is_named(tmp_path: Path) -> None:
    (tmp_path / "freeze.txt").write_text("numpy==2.0.2\ntorch==2.1.0+cu121\n")
    with pytest.raises(InputError, match=r"expected torch.*>=.*but the image has 2\.1\.0"):
        write_package(make_plan(image_packages=tmp_path / "freeze.txt"), tmp_path / "package")


def test_packages_are_read_from_the_output_of_pip(tmp_path: Path) -> None:
    (tmp_path / "freeze.txt").write_text("# a comment\nTyping_Extensions==4.15.0\nx @ file:///y.whl\ntorch==2.11.0\n")
    assert read_packages(tmp_path / "freeze.txt") == {"typing-extensions": "4.15.0", "torch": "2.11.0"}
    assert read_packages(IMAGE_PACKAGES)["torch"] == "2.11.0+cu128"


@pytest.mark.long
def test_the_wheel_has_every_module(tmp_path: Path) -> None:
    from gi_segmentation.publishing.wheels import build_own_wheel

    names = set(zipfile.ZipFile(build_own_wheel(tmp_path)).namelist())
    sources = {path.relative_to(ROOT).as_posix() for name in SOURCES for path in (ROOT / name).rglob("*.py")}
    assert sources | {"run_segmentation.py", "model_cards/model_card.md"} <= names


def test_a_recipe_is_for_a_package_that_trains(tmp_path: Path) -> None:
    words = ["--user", "someone", "--output_dir", str(tmp_path / "package"), "--model", "runs/a"]
    with pytest.raises(InputError, match="--recipe is for a package that trains"):
        parse_arguments([*words, "--recipe", str(RECIPE)])
    assert parse_arguments(words[:4]).recipe.is_file()
