"""The `evaluate` metric: by hand, the same whatever the order, the batches or the process, and as the Trainer's."""

import json
import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

from gi_segmentation import metrics
from gi_segmentation.metrics import GiTractScores
from gi_segmentation.publishing.figures import compare_slice
from gi_segmentation.rle import organ_masks
from gi_segmentation.rules import PRESETS
from tests.support.processes import ROOT
from tests.support.training import arguments, make_trainer

METRIC_FILE = Path(metrics.__file__)


def random_slices(number: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Predictions, references and scans: label maps of a size each scan, related, many of them empty."""
    rng = np.random.default_rng(seed)
    predictions, references, scans = [], [], []
    for index in range(number):
        size = (3 + index * 7 % 23 % 5, 3 + index * 7 % 23 % 6)
        reference = rng.integers(0, 4, size) * (rng.random(size) < rng.choice([0, 0.1, 0.6]))
        prediction = np.where(rng.random(size) < 0.7, reference, rng.integers(0, 4, size) * (rng.random() < 0.5))
        predictions.append(prediction)
        references.append(reference)
        scans.append(f"scan{index * 7 % 23}")
    return predictions, references, scans


def organ_stack(*organs: list[list[int]]) -> np.ndarray:
    return np.array(organs, dtype=np.uint8)


@pytest.fixture
def metric() -> GiTractScores:
    return GiTractScores()


class TestByHand:
    def test_dice_is_the_mean_over_slices_and_organs(self, metric: GiTractScores) -> None:
        # Slice one: organ 1 has 1 common pixel of 2 and 1: 2/3; organ 3 of 1 and 1: 1. Slice two: organ 1: 2/4.
        predictions = [[[1, 1, 3]], [[1, 1, 0]]]
        references = [[[1, 0, 3]], [[1, 0, 1]]]
        scores = metric.compute(predictions=predictions, references=references)
        assert scores["dice"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
        assert scores["dice_large_bowel"] == pytest.approx((2 / 3 + 1 / 2) / 2)
        assert scores["dice_stomach"] == 1
        assert math.isnan(scores["dice_small_bowel"])

    def test_an_organ_in_one_mask_alone_scores_nothing(self, metric: GiTractScores) -> None:
        scores = metric.compute(predictions=[[[1, 0]], [[0, 0]]], references=[[[0, 2]], [[0, 0]]])
        assert (scores["dice"], scores["dice_large_bowel"], scores["dice_small_bowel"]) == (0, 0, 0)

    def test_slices_where_both_masks_are_empty_do_not_count(self, metric: GiTractScores) -> None:
        scores = metric.compute(predictions=[[[1, 0]], [[0, 0]]], references=[[[1, 0]], [[0, 0]]])
        assert (scores["dice"], scores["dice_large_bowel"], scores["dice_volume"]) == (1, 1, 1)

    def test_nothing_to_score_is_nan_and_not_a_number_made_up(self, metric: GiTractScores) -> None:
        scores = metric.compute(predictions=[[[0, 0]]], references=[[[0, 0]]])
        # For first_place, slices that are empty in both masks are perfect.
        assert all(math.isnan(value) for name, value in scores.items() if not name.endswith("first_place"))
        assert all(math.isnan(value) for value in metric.compute().values())

    def test_dice_volume_pools_a_scan_and_averages_scans(self, metric: GiTractScores) -> None:
        # Scan a: 1 + 0 common pixels of 1 + 1 and 1 + 2; scan b: 1 of 1 and 1.
        scores = metric.compute(
            predictions=[[[1, 0]], [[1, 1]], [[1, 0]]],
            references=[[[1, 0]], [[0, 1]], [[1, 0]]],
            scans=["a", "a", "b"],
        )
        assert scores["dice_volume_large_bowel"] == pytest.approx((2 * 2 / (3 + 2) + 1) / 2)
        assert scores["dice_large_bowel"] == pytest.approx((1 + 2 / 3 + 1) / 3)

    def test_overlapping_organs_keep_their_own_pixels(self, metric: GiTractScores) -> None:
        truth = organ_stack([[1, 1, 0]], [[0, 1, 1]], [[0, 0, 0]])
        preds = organ_stack([[1, 1, 0]], [[0, 0, 1]], [[0, 0, 0]])  # the shared pixel given to one
        scores = metric.compute(predictions=[preds], references=[truth])
        assert (scores["dice_large_bowel"], scores["dice_small_bowel"]) == (1, pytest.approx(2 / 3))
        assert metric.compute(predictions=[truth], references=[truth])["dice"] == 1

    def test_a_label_map_and_an_organ_stack_may_be_compared(self, metric: GiTractScores) -> None:
        truth = organ_stack([[1, 1, 0]], [[0, 1, 1]], [[0, 0, 0]])
        scores = metric.compute(predictions=[[[1, 2, 2]]], references=[truth])
        assert (scores["dice_large_bowel"], scores["dice_small_bowel"]) == (pytest.approx(2 / 3), 1)

    def test_other_labels(self) -> None:
        metric = evaluate.load(str(METRIC_FILE), labels=["liver"])
        scores = metric.compute(predictions=[[[1, 1, 0]]], references=[np.array([[[1, 0, 0]]])])
        assert scores["dice_liver"] == pytest.approx(2 / 3) and "dice_stomach" not in scores
        with pytest.raises(ValueError, match=r"expected label ids 0 to 1 of shape .* \(1, height, width\)"):
            metric.add(prediction=[[2]], reference=[[1]])

    def test_slices_without_a_scan_are_scans_of_their_own(self, metric: GiTractScores) -> None:
        for prediction, reference in (([[1, 0]], [[1, 0]]), ([[1, 1]], [[0, 1]])):
            metric.add(prediction=prediction, reference=reference)
        assert metric.compute()["dice_volume"] == pytest.approx((1 + 2 / 3) / 2)


class TestExactness:
    @pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
    def test_batches_and_order_change_no_bit(self, batch_size: int, metric: GiTractScores) -> None:
        predictions, references, scans = random_slices(1000)
        everything = {"predictions": predictions, "references": references, "scans": scans, "slices": range(1000)}
        expected = metric.compute(**everything)
        assert expected["hausdorff_score"] < 1
        assert 0.2 < expected["dice"] < 0.9 and expected["dice"] != expected["dice_volume"]
        order = np.random.default_rng(batch_size).permutation(1000)
        for start in range(0, 1000, batch_size):
            chosen = order[start : start + batch_size]
            metric.add_batch(
                predictions=[predictions[i] for i in chosen],
                references=[references[i] for i in chosen],
                scans=[scans[i] for i in chosen],
                slices=chosen.tolist(),
            )
        assert metric.compute() == expected

    def test_the_mean_is_that_of_the_single_values(self, metric: GiTractScores) -> None:
        predictions, references, scans = random_slices(300)
        values = []
        for prediction, reference in zip(predictions, references, strict=True):
            for organ in (1, 2, 3):
                p, t = prediction == organ, reference == organ
                if p.any() or t.any():
                    values.append(2 * (p & t).sum() / (p.sum() + t.sum()))
        scores = metric.compute(predictions=predictions, references=references, scans=scans)
        assert scores["dice"] == pytest.approx(np.mean(values), abs=1e-14)

    def test_computing_starts_anew(self, metric: GiTractScores) -> None:
        metric.compute(predictions=[[[1, 1]]], references=[[[0, 1]]])
        assert metric.compute(predictions=[[[1, 0]]], references=[[[1, 0]]])["dice"] == 1


class TestErrors:
    @pytest.mark.parametrize(
        ("prediction", "reference", "message"),
        [
            ([[0, 1]], [[0, 1, 1]], "masks of one shape"),
            ([[0, 4]], [[0, 1]], r"label ids 0 to 3.*\[0, 4\]"),
            ([[0, 1]], [[0, -1]], "label ids 0 to 3"),
            ([[0, 0.5]], [[0, 1]], "label ids 0 to 3"),
            ([0, 1], [0, 1], r"got shape \(2,\)"),
            (np.zeros((4, 2, 2)), np.zeros((4, 2, 2)), r"got shape \(4, 2, 2\)"),
            (np.full((3, 2, 2), 2), np.zeros((3, 2, 2)), r"got shape \(3, 2, 2\) with values \[2\]"),
        ],
    )
    def test_masks_that_are_none(self, prediction: Any, reference: Any, message: str, metric: GiTractScores) -> None:
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=[prediction], references=[reference])

    @pytest.mark.parametrize(("predictions", "references", "scans"), [(2, 1, None), (1, 2, None), (2, 2, 1)])
    def test_unequal_numbers(
        self, predictions: int, references: int, scans: int | None, metric: GiTractScores
    ) -> None:
        mask = [[0, 1]]
        names = None if scans is None else ["a"] * scans
        with pytest.raises(ValueError, match="as many predictions as references, scans and slices"):
            metric.add_batch(predictions=[mask] * predictions, references=[mask] * references, scans=names)

    def test_what_makes_no_volume(self, metric: GiTractScores) -> None:
        masks = {"predictions": [[[0, 1]], [[0, 1]]], "references": [[[0, 1]], [[0, 1]]], "scans": ["a", "a"]}
        with pytest.raises(ValueError, match="slice 1: number 7 of scan 'a' was added before"):
            metric.add_batch(**masks, slices=[7, 7])
        with pytest.raises(ValueError, match=r"slice 1: .* as all of scan 'a', but got \(1, 2\), \(1, 3\)"):
            metric.add_batch(predictions=[[[0, 1]], [[0, 1, 1]]], references=[[[0, 1]], [[0, 1, 1]]], scans=["a", "a"])
        with pytest.raises(ValueError, match=r"slice 0: expected label ids .* \(2 of 3 slices cannot be used\)$"):
            metric.add_batch(predictions=[[[9]], [[1]], [[1]]], references=[[[0]], [[1]], [[1, 1]]])
        assert math.isnan(metric.compute()["dice"]), "a batch with a mistake leaves nothing"
        metric.add_batch(**masks, slices=[7, 8])
        with pytest.raises(ValueError, match="number 8 of scan 'a' was added before"):
            metric.add(prediction=[[0, 1]], reference=[[0, 1]], scan="a", slice=8)

    def test_a_preset_that_is_none(self, metric: GiTractScores) -> None:
        with pytest.raises(ValueError, match="expected a preset of mle_bench, first_place, host, but got 'mine'"):
            metric.compute(predictions=[[[0]]], references=[[[0]]], preset="mine")

    @pytest.mark.parametrize("given", ["predictions", "references", "scans"])
    def test_one_without_the_other(self, given: str, metric: GiTractScores) -> None:
        with pytest.raises(ValueError, match="predictions and references together"):
            metric.compute(**{given: [[[0, 1]]]})


def test_evaluate_loads_the_file_offline_and_scores_alike(
    run_python: Any, tmp_path: Path, metric: GiTractScores
) -> None:
    predictions, references, scans = random_slices(50)
    slices = {
        "predictions": [mask.tolist() for mask in predictions],
        "references": [mask.tolist() for mask in references],
        "scans": scans,
    }
    (tmp_path / "slices.json").write_text(json.dumps(slices), encoding="utf-8")
    program = (
        "import importlib.util, json, pathlib, sys\n"
        # as where this package is not installed
        f"sys.path = [path for path in sys.path if path != {str(ROOT)!r}]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "assert importlib.util.find_spec('gi_segmentation') is None\n"
        "import evaluate\n"
        f"metric = evaluate.load({str(METRIC_FILE)!r})\n"
        "print(json.dumps(metric.compute(**json.loads(pathlib.Path('slices.json').read_text()))))\n"
    )
    done = run_python(["-c", program], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == metric.compute(**slices)


def test_evaluate_describes_the_metric() -> None:
    loaded = evaluate.load(str(METRIC_FILE))
    assert "mean over pairs of slice and organ" in loaded.description and "large_bowel" in loaded.inputs_description
    assert "Data in Brief" in loaded.citation and loaded.reference_urls


@pytest.mark.parametrize("preset", PRESETS)
def test_it_gives_the_trainers_numbers(preset: str, dataset_dir: Path, tmp_path: Path) -> None:
    flags = {"max_eval_samples": None, "per_device_eval_batch_size": 1, "preset": preset}
    trainer, samples = make_trainer(arguments(dataset_dir, tmp_path, **flags))
    expected = trainer.evaluate(thorough=True)
    metric, rows = evaluate.load(str(METRIC_FILE)), samples["validation"]
    for index, row in enumerate(rows):
        predicted = compare_slice(trainer.model.eval(), trainer.eval_dataset, index).predicted
        truth = organ_masks(row["segmentation"], row["height"], row["width"])
        metric.add(prediction=predicted.masks, reference=truth, scan=row["scan"], slice=row["slice"])
    scores = metric.compute(preset=preset)
    assert len(scores) == 11 + 3 * len(PRESETS) and 0.001 < scores["dice"] < 1
    assert {name: expected[f"eval_{name}"] for name in scores} == pytest.approx(scores, abs=0, nan_ok=True)


def test_a_copy_that_lost_its_package_says_what_to_do(run_python: Any, tmp_path: Path) -> None:
    """The copy in the cache of `evaluate` finds the package by a note that `evaluate` writes beside it."""
    (tmp_path / "metrics.py").write_bytes(METRIC_FILE.read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps({"original file path": str(tmp_path / "gone" / "metrics.py")}))
    program = (
        "import sys\n"
        f"sys.path = [path for path in sys.path if path != {str(ROOT)!r}]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "import metrics\n"
    )
    done = run_python(["-c", program], cwd=tmp_path)
    assert "ImportError: expected the package gi_segmentation installed or at" in done.stderr
    assert "install it, or load the metric with download_mode='force_redownload'" in done.stderr
