"""The notebook runs from top to bottom, shows pictures, and prints the scores of the Trainer."""

import base64
import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from gi_segmentation.inference.splits import count_slice_pixels
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.publishing.figures import ShownSlice, compare_slice
from gi_segmentation.scoring.dice import count_pixels
from tests.support.models import MAX_TIES, save_model
from tests.support.training import arguments, make_trainer

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "visualisation.ipynb"
SECTIONS = ["The dataset", "Augmentations", "Predictions against truth", "Worst slices"]


@dataclass(frozen=True)
class Execution:
    """The executed notebook, and the scores of the same checkpoint without the notebook."""

    notebook: NotebookNode
    scores: dict[str, float]
    shown: list[ShownSlice]
    counts: np.ndarray


def execute(dataset: Path, model: Path, scratch: Path) -> NotebookNode:
    """Run the notebook in a new kernel, without settings and caches of the user."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folders = {name: str(scratch / name) for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_DATA_DIR")}
    settings = {"GI_DATASET": str(dataset), "GI_MODEL": str(model), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    return client.execute(env={**os.environ, **folders, **settings})


@pytest.fixture(scope="module")
def execution(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Execution:
    label_mode, slice_context, seed = "multilabel", 1, 5
    scratch = tmp_path_factory.mktemp("notebook")
    folder = save_model(scratch / "model", "segformer", seed, label_mode, slice_context)
    flags = {"model_type": None, "config_overrides": None, "max_eval_samples": None, "model_name_or_path": folder}
    flags |= {"label_mode": label_mode, "slice_context": slice_context}
    trainer, samples = make_trainer(arguments(dataset_dir, scratch / "run", **flags))
    scores = trainer.evaluate()
    model, validation = trainer.model.eval(), trainer.eval_dataset
    shown = [compare_slice(model, validation, index) for index in range(len(samples["validation"]))]
    counts = count_slice_pixels(model, validation, batch_size=5)
    return Execution(execute(dataset_dir, folder, scratch), scores, shown, counts)


def outputs(notebook: NotebookNode, kind: str) -> dict[str, list[str]]:
    """Return the outputs of one kind for each section: printed text (`stdout`), or the data of a MIME type."""
    found: dict[str, list[str]] = {"": []}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            found[section := cell.source.splitlines()[0].removeprefix("## ")] = []
        for output in cell.get("outputs", []):
            text = output.text if output.get("name") == kind else output.get("data", {}).get(kind)
            if text is not None:
                found[section if len(found) > 1 else ""].append(text)
    return found


def table(text: str) -> dict[str, list[float]]:
    """Return the numbers of a printed table, by the name of their line."""
    lines = [re.fullmatch(r"(\S.*?)\s+([\d. ]+)", line) for line in text.splitlines()]
    return {line[1]: [float(number) for number in line[2].split()] for line in lines if line}


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(cell.metadata for cell in notebook.cells)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_every_section_shows_pictures(execution: Execution) -> None:
    pictures = outputs(execution.notebook, "image/png")
    assert [section for section in pictures if section] == SECTIONS
    assert [len(pictures[section]) for section in SECTIONS] == [2, 1, 1, 2]
    for data in itertools.chain(*pictures.values()):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert min(picture.size) > 100 and np.array(picture.convert("L")).std() > 10


def test_no_picture_is_blank(execution: Execution) -> None:
    pictures = outputs(execution.notebook, "image/png")
    for section, number, data in ((name, *one) for name in SECTIONS for one in enumerate(pictures[name])):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            grey = np.array(picture.convert("L"))
        commonest = np.bincount(grey.ravel()).max() / grey.size
        assert commonest < 0.95, f"{section}, picture {number}: nearly all of it has one colour"
        # The histograms have no slices. In all other pictures, slices are neither white nor black.
        if (section, number) != ("Worst slices", 0):
            share = np.mean((grey > 20) & (grey < 235))
            assert share > 0.25, f"{section}, picture {number}: {share:.0%} of it are grey, so the slices are blank"


def test_the_sizes_equal_those_of_the_dataset(execution: Execution) -> None:
    (sizes,) = outputs(execution.notebook, "text/plain")["The dataset"][:1]
    shown = np.array([truth.masks.any(axis=(1, 2)) for truth, *_ in execution.shown])
    counted = {name: numbers[1] for name, numbers in table(sizes).items()}
    assert counted == {
        "patients": 2,
        "scans": 2,
        "slices": 24,
        "slices without any organ": np.count_nonzero(~shown.any(axis=1)),
        **{f"slices with {organ}": number for organ, number in zip(GI_TRACT.names, shown.sum(axis=0), strict=True)},
    }


def test_the_scores_equal_the_trainers(execution: Execution) -> None:
    (printed,) = outputs(execution.notebook, "stdout")["Worst slices"]
    assert f"mean Dice {execution.scores['eval_dice']:.4f} over" in printed
    rows = table(outputs(execution.notebook, "text/plain")["Worst slices"][0])
    for organ in GI_TRACT.names:
        assert rows[organ][0] == pytest.approx(execution.scores[f"eval_dice_{organ}"], abs=1e-4)


def test_missed_organs_and_false_alarms_are_counted(execution: Execution) -> None:
    shown, outlined = (
        np.array([pair[which].masks.any(axis=(1, 2)) for pair in execution.shown]).T for which in (0, 1)
    )
    rows = table(outputs(execution.notebook, "text/plain")["Worst slices"][0])
    for organ, true, predicted in zip(GI_TRACT.names, shown, outlined, strict=True):
        alarms = [true.sum(), (true & ~predicted).sum(), (~true).sum(), (~true & predicted).sum()]
        assert rows[organ][1:] == alarms
    assert (~shown & outlined).any()


def test_slices_scored_in_batches_equal_those_predicted_one_by_one(execution: Execution) -> None:
    alone = [count_pixels(predicted.masks, truth.masks) for truth, predicted, *_ in execution.shown]
    pixels = sum(truth.masks.size for truth, *_ in execution.shown)
    # A pixel that is a tie changes at most two counts: it leaves one organ and comes to another.
    assert execution.counts.shape == (24, len(GI_TRACT.names), 3)
    assert np.abs(execution.counts - alone).sum() <= 2 * MAX_TIES * pixels
