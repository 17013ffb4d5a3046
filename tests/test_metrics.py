"""The scores: by hand, against scikit-learn, and the same whatever the order, the batches or the process."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import EvalPrediction, SegformerImageProcessorPil
from transformers.modeling_outputs import SemanticSegmenterOutput

from gi_segmentation import metrics
from gi_segmentation.data import collate
from gi_segmentation.evaluation import ComputeMetrics, count_batch, label_masks, predict_masks
from gi_segmentation.metrics import DiceCounts, GiTractDice, count_pixels, dice_score
from gi_segmentation.schema import ORGANS

METRIC_FILE = Path(metrics.__file__)


def random_slices(number: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Predictions, references and scans: label maps of several sizes, related, many of them empty."""
    rng = np.random.default_rng(seed)
    predictions, references, scans = [], [], []
    for index in range(number):
        size = (int(rng.integers(3, 9)), int(rng.integers(3, 9)))
        reference = rng.integers(0, 4, size) * (rng.random(size) < rng.choice([0, 0.1, 0.6]))
        prediction = np.where(rng.random(size) < 0.7, reference, rng.integers(0, 4, size) * (rng.random() < 0.5))
        predictions.append(prediction)
        references.append(reference)
        scans.append(f"scan{index * 7 % 23}")
    return predictions, references, scans


def organ_stack(*organs: list[list[int]]) -> np.ndarray:
    return np.array(organs, dtype=np.uint8)


@pytest.fixture
def metric() -> GiTractDice:
    return GiTractDice()


class TestByHand:
    def test_dice_is_the_mean_over_slices_and_organs(self, metric: GiTractDice) -> None:
        # Slice one: organ 1 has 1 common pixel of 2 and 1: 2/3; organ 3 of 1 and 1: 1. Slice two: organ 1: 2/4.
        predictions = [[[1, 1, 3]], [[1, 1, 0]]]
        references = [[[1, 0, 3]], [[1, 0, 1]]]
        scores = metric.compute(predictions=predictions, references=references)
        assert scores["dice"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
        assert scores["dice_large_bowel"] == pytest.approx((2 / 3 + 1 / 2) / 2)
        assert scores["dice_stomach"] == 1
        assert math.isnan(scores["dice_small_bowel"])

    def test_an_organ_in_one_mask_alone_scores_nothing(self, metric: GiTractDice) -> None:
        scores = metric.compute(predictions=[[[1, 0]], [[0, 0]]], references=[[[0, 2]], [[0, 0]]])
        assert (scores["dice"], scores["dice_large_bowel"], scores["dice_small_bowel"]) == (0, 0, 0)

    def test_slices_where_both_masks_are_empty_do_not_count(self, metric: GiTractDice) -> None:
        scores = metric.compute(predictions=[[[1, 0]], [[0, 0]]], references=[[[1, 0]], [[0, 0]]])
        assert (scores["dice"], scores["dice_large_bowel"], scores["dice_volume"]) == (1, 1, 1)

    def test_nothing_to_score_is_nan_and_not_a_number_made_up(self, metric: GiTractDice) -> None:
        scores = metric.compute(predictions=[[[0, 0]]], references=[[[0, 0]]])
        assert all(math.isnan(scores[name]) for name in scores if name != "macro_f1_seed")
        assert scores["macro_f1_seed"] == 1  # the background was found
        assert all(math.isnan(value) for value in metric.compute().values())

    def test_dice_volume_pools_a_scan_and_averages_scans(self, metric: GiTractDice) -> None:
        # Scan a: 1 + 0 common pixels of 1 + 1 and 1 + 2; scan b: 1 of 1 and 1.
        scores = metric.compute(
            predictions=[[[1, 0]], [[1, 1]], [[1, 0]]],
            references=[[[1, 0]], [[0, 1]], [[1, 0]]],
            scans=["a", "a", "b"],
        )
        assert scores["dice_volume_large_bowel"] == pytest.approx((2 * 2 / (3 + 2) + 1) / 2)
        assert scores["dice_large_bowel"] == pytest.approx((1 + 2 / 3 + 1) / 3)

    def test_overlapping_organs_keep_their_own_pixels(self, metric: GiTractDice) -> None:
        truth = organ_stack([[1, 1, 0]], [[0, 1, 1]], [[0, 0, 0]])
        preds = organ_stack([[1, 1, 0]], [[0, 0, 1]], [[0, 0, 0]])  # the shared pixel given to one
        scores = metric.compute(predictions=[preds], references=[truth])
        assert (scores["dice_large_bowel"], scores["dice_small_bowel"]) == (1, pytest.approx(2 / 3))
        assert metric.compute(predictions=[truth], references=[truth])["dice"] == 1

    def test_a_label_map_and_an_organ_stack_may_be_compared(self, metric: GiTractDice) -> None:
        truth = organ_stack([[1, 1, 0]], [[0, 1, 1]], [[0, 0, 0]])
        scores = metric.compute(predictions=[[[1, 2, 2]]], references=[truth])
        assert (scores["dice_large_bowel"], scores["dice_small_bowel"]) == (pytest.approx(2 / 3), 1)

    def test_slices_without_a_scan_are_scans_of_their_own(self, metric: GiTractDice) -> None:
        for prediction, reference in (([[1, 0]], [[1, 0]]), ([[1, 1]], [[0, 1]])):
            metric.add(prediction=prediction, reference=reference)
        assert metric.compute()["dice_volume"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("seed", range(10))
def test_macro_f1_is_scikit_learns(seed: int, metric: GiTractDice) -> None:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 4, (5, 6, 7))
    predictions = np.where(rng.random(references.shape) < 0.6, references, rng.integers(0, 4, references.shape))
    scores = metric.compute(predictions=list(predictions), references=list(references))
    expected = f1_score(references.reshape(-1), predictions.reshape(-1), average="macro")
    assert scores["macro_f1_seed"] == pytest.approx(expected, abs=1e-12)


class TestExactness:
    @pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
    def test_batches_and_order_change_no_bit(self, batch_size: int, metric: GiTractDice) -> None:
        predictions, references, scans = random_slices(1000)
        expected = metric.compute(predictions=predictions, references=references, scans=scans)
        assert 0.2 < expected["dice"] < 0.9 and expected["dice"] != expected["dice_volume"]
        order = np.random.default_rng(batch_size).permutation(1000)
        for start in range(0, 1000, batch_size):
            chosen = order[start : start + batch_size]
            metric.add_batch(
                predictions=[predictions[i] for i in chosen],
                references=[references[i] for i in chosen],
                scans=[scans[i] for i in chosen],
            )
        assert metric.compute() == expected

    def test_the_mean_is_that_of_the_single_values(self, metric: GiTractDice) -> None:
        predictions, references, scans = random_slices(300)
        values = []
        for prediction, reference in zip(predictions, references, strict=True):
            for organ in (1, 2, 3):
                p, t = prediction == organ, reference == organ
                if p.any() or t.any():
                    values.append(2 * (p & t).sum() / (p.sum() + t.sum()))
        scores = metric.compute(predictions=predictions, references=references, scans=scans)
        assert scores["dice"] == pytest.approx(np.mean(values), abs=1e-14)

    def test_computing_starts_anew(self, metric: GiTractDice) -> None:
        metric.compute(predictions=[[[1, 1]]], references=[[[0, 1]]])
        assert metric.compute(predictions=[[[1, 0]]], references=[[[1, 0]]])["dice"] == 1

    def test_the_state_grows_with_scans_and_not_with_slices(self) -> None:
        def state_size(number: int) -> int:
            counts = DiceCounts()
            for index in range(number):
                counts.add_slice(index % 5, [[100, 200, 150]] * 3, [[100, 200, 150]] * 4)
            return len(pickle.dumps(vars(counts)))

        assert state_size(20_000) < state_size(10) + 100  # the sums are longer by some digits


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
    def test_masks_that_are_none(self, prediction: Any, reference: Any, message: str, metric: GiTractDice) -> None:
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=[prediction], references=[reference])

    @pytest.mark.parametrize(("predictions", "references", "scans"), [(2, 1, None), (1, 2, None), (2, 2, 1)])
    def test_unequal_numbers(self, predictions: int, references: int, scans: int | None, metric: GiTractDice) -> None:
        mask = [[0, 1]]
        names = None if scans is None else ["a"] * scans
        with pytest.raises(ValueError, match="as many predictions as references and scans"):
            metric.add_batch(predictions=[mask] * predictions, references=[mask] * references, scans=names)

    @pytest.mark.parametrize("given", ["predictions", "references", "scans"])
    def test_one_without_the_other(self, given: str, metric: GiTractDice) -> None:
        with pytest.raises(ValueError, match="predictions and references together"):
            metric.compute(**{given: [[[0, 1]]]})


def test_evaluate_loads_the_file_offline_and_scores_alike(
    run_python: Any, tmp_path: Path, metric: GiTractDice
) -> None:
    predictions, references, scans = random_slices(50)
    slices = {
        "predictions": [mask.tolist() for mask in predictions],
        "references": [mask.tolist() for mask in references],
        "scans": scans,
    }
    (tmp_path / "slices.json").write_text(json.dumps(slices), encoding="utf-8")
    program = (
        "import evaluate, json, pathlib\n"
        f"metric = evaluate.load({str(METRIC_FILE)!r})\n"
        "print(json.dumps(metric.compute(**json.loads(pathlib.Path('slices.json').read_text()))))\n"
    )
    done = run_python(["-c", program], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == metric.compute(**slices)


class TestCountBatch:
    """What evaluation counts from logits is what the native masks give."""

    SIZES = ((9, 14), (20, 7), (12, 12), (16, 21))

    def batch(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits of 4 slices at 5x5 pixels, and their collated truth at 10x10 and in their own sizes."""
        generator = torch.Generator().manual_seed(0)
        examples = [
            {
                "pixel_values": torch.zeros(3, 10, 10),
                "labels": torch.randint(0, 4, (10, 10), generator=generator),
                "organ_masks": torch.rand((3, *size), generator=generator) < 0.4,
                "scan": torch.tensor(index // 2),
            }
            for index, size in enumerate(self.SIZES)
        ]
        return torch.randn(4, 4, 5, 5, generator=generator), collate(examples)

    def test_padding_counts_for_nothing(self) -> None:
        logits, batch = self.batch()
        organ_counts, label_counts = count_batch([logits], batch)
        metric, by_counts = GiTractDice(), DiceCounts()
        for index, (height, width) in enumerate(self.SIZES):
            enlarged = F.interpolate(logits[index][None], size=(height, width), mode="bilinear")[0]
            target = batch["organ_masks"][index, :, :height, :width].numpy()
            metric.add(prediction=enlarged.argmax(dim=0).numpy(), reference=target, scan=index // 2)
            by_counts.add_slice(index // 2, organ_counts[index].tolist(), label_counts[index])
        expected, scores = metric.compute(), by_counts.scores()
        assert 0 < expected["dice"] < 1
        for name in expected.keys() - {"macro_f1_seed"}:
            assert scores[name] == expected[name]

    def test_macro_f1_is_counted_at_the_models_resolution(self) -> None:
        logits, batch = self.batch()
        _, label_counts = count_batch([logits], batch)
        counts = DiceCounts()
        for one in label_counts:
            counts.add_slice(0, [[0, 0, 0]] * 3, one)
        preds = F.interpolate(logits, size=(10, 10), mode="bilinear").argmax(dim=1)
        expected = f1_score(batch["labels"].reshape(-1), preds.reshape(-1), average="macro")
        assert counts.scores()["macro_f1_seed"] == pytest.approx(expected, abs=1e-12)

    def test_one_batch_or_four_give_the_same_scores(self) -> None:
        logits, batch = self.batch()
        whole, parts = ComputeMetrics(), ComputeMetrics()
        expected = whole(evaluate_prediction(count_batch([logits], batch), batch["scan"]), compute_result=True)
        for index in range(4):
            part = {key: value[index : index + 1] for key, value in batch.items()}
            counted = count_batch([logits[index : index + 1]], part)
            scores = parts(evaluate_prediction(counted, part["scan"]), compute_result=index == 3)
            assert bool(scores) == (index == 3)
        assert scores == expected and 0 < expected["dice"] < 1


def evaluate_prediction(counted: tuple[torch.Tensor, torch.Tensor], scans: torch.Tensor) -> Any:
    return EvalPrediction(predictions=tuple(part.numpy() for part in counted), label_ids=scans.numpy())


def test_predicted_labels_are_the_stock_processors() -> None:
    logits = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [(266, 266), (310, 360), (5, 7)]
    stock = SegformerImageProcessorPil().post_process_semantic_segmentation(
        SemanticSegmenterOutput(logits=logits), sizes
    )
    for index, (height, width) in enumerate(sizes):
        masks = predict_masks([logits[index][None]], height, width)[0]
        assert torch.equal(masks, stock[index] == torch.arange(1, 4)[:, None, None])


def test_organs_of_their_own_channel_may_overlap() -> None:
    logits = torch.tensor([[3.0, -1.0], [0.5, -1.0], [-2.0, 1.0]]).reshape(1, 3, 1, 2)
    masks = predict_masks([logits], 1, 2)
    assert masks[0, :, 0].tolist() == [[True, False], [True, False], [False, True]]
    assert label_masks(masks)[0].int().argmax(dim=0).tolist() == [[2, 3]]  # the highest label wins


def test_several_models_are_averaged_by_probability() -> None:
    # Organ 1 with probability 0.4 and 0.9, background 0.6 and 0.1; by logits the first would count for as much.
    first, second = (torch.tensor([1 - p, p, 0, 0]).clamp(min=1e-30).log().reshape(1, 4, 1, 1) for p in (0.4, 0.9))
    assert predict_masks([first, second], 1, 1).flatten().tolist() == [True, False, False]
    assert predict_masks([first], 1, 1).flatten().tolist() == [False, False, False]
    unsure = torch.tensor([0.1, 0.1, 0.1]).logit().reshape(1, 3, 1, 1)
    sure = torch.tensor([0.95, 0.85, 0.1]).logit().reshape(1, 3, 1, 1)
    assert predict_masks([unsure, sure], 1, 1).flatten().tolist() == [True, False, False]


def test_masks_of_labels_partition_the_pixels() -> None:
    organs = torch.rand(2, 3, 5, 6) < 0.4
    masks = label_masks(organs)
    assert masks.shape == (2, 4, 5, 6) and (masks.sum(dim=1) == 1).all()
    assert torch.equal(masks[:, 0], ~organs.any(dim=1))


def test_overlaps_are_scored_as_predicted() -> None:
    masks = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    masks[0, 0, :4] = masks[0, 2, 2:6] = True  # two rows in both
    example = {
        "pixel_values": torch.zeros(3, 8, 8), "labels": masks[0].float(), "organ_masks": masks[0],
        "scan": torch.tensor(1),
    }  # fmt: skip
    organ_counts, label_counts = count_batch([masks.float() * 20 - 10], collate([example]))
    assert organ_counts[0].tolist() == [[32, 32, 32], [0, 0, 0], [32, 32, 32]]
    assert label_counts[0].tolist() == [[16, 16, 16], [16, 16, 16], [0, 0, 0], [32, 32, 32]]


def test_arrays_and_tensors_are_counted_alike() -> None:
    rng = np.random.default_rng(0)
    preds, target = rng.random((2, 3, 4, 5)) < 0.5, rng.random((2, 3, 4, 5)) < 0.5
    arrays = count_pixels(preds, target)
    tensors = count_pixels(torch.from_numpy(preds), torch.from_numpy(target))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert array.shape == (2, len(ORGANS))
        np.testing.assert_array_equal(array, tensor.numpy())
    assert dice_score([3, 4, 4]) == 0.75


def test_evaluate_describes_the_metric() -> None:
    loaded = evaluate.load(str(METRIC_FILE))
    assert "mean over (slice, organ) pairs" in loaded.description and "large_bowel" in loaded.inputs_description
