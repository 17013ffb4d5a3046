"""From logits to scores: masks on the native grid, scans scored as they complete, in whatever batches and order."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import EvalPrediction, SegformerImageProcessorPil
from transformers.modeling_outputs import SemanticSegmenterOutput

from gi_segmentation.data.slices import plan_scans
from gi_segmentation.errors import InputError
from gi_segmentation.inference.masks import count_labels, label_masks, pack_masks, predict_batch, predict_masks
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import ORGANS
from gi_segmentation.scoring.clinical import score_organ
from gi_segmentation.scoring.dice import count_pixels, dice_score
from gi_segmentation.scoring.scans import score_scan, score_scans
from gi_segmentation.scoring.streaming import ScanScorer
from gi_segmentation.training.evaluation import ComputeMetrics


def test_predicted_labels_are_the_stock_processors() -> None:
    logits = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [(266, 266), (310, 360), (5, 7)]
    stock = SegformerImageProcessorPil().post_process_semantic_segmentation(
        SemanticSegmenterOutput(logits=logits), sizes
    )
    for index, (height, width) in enumerate(sizes):
        masks = predict_masks([logits[index][None]], "multiclass", height, width)[0]
        assert torch.equal(masks, stock[index] == torch.arange(1, 4)[:, None, None])


def test_organs_of_their_own_channel_may_overlap() -> None:
    logits = torch.tensor([[3.0, -1.0], [0.5, -1.0], [-2.0, 1.0]]).reshape(1, 3, 1, 2)
    masks = predict_masks([logits], "multilabel", 1, 2)
    assert masks[0, :, 0].tolist() == [[True, False], [True, False], [False, True]]
    assert label_masks(masks)[0].int().argmax(dim=0).tolist() == [[2, 3]]  # the highest label wins


def test_several_models_are_averaged_by_probability() -> None:
    # Organ 1 with probability 0.4 and 0.9, background 0.6 and 0.1; by logits the first would count for as much.
    first, second = (torch.tensor([1 - p, p, 0, 0]).clamp(min=1e-30).log().reshape(1, 4, 1, 1) for p in (0.4, 0.9))
    assert predict_masks([first, second], "multiclass", 1, 1).flatten().tolist() == [True, False, False]
    assert predict_masks([first], "multiclass", 1, 1).flatten().tolist() == [False, False, False]
    unsure = torch.tensor([0.1, 0.1, 0.1]).logit().reshape(1, 3, 1, 1)
    sure = torch.tensor([0.95, 0.85, 0.1]).logit().reshape(1, 3, 1, 1)
    assert predict_masks([unsure, sure], "multilabel", 1, 1).flatten().tolist() == [True, False, False]


def test_masks_of_labels_partition_the_pixels() -> None:
    organs = torch.rand(2, 3, 5, 6) < 0.4
    masks = label_masks(organs)
    assert masks.shape == (2, 4, 5, 6) and (masks.sum(dim=1) == 1).all()
    assert torch.equal(masks[:, 0], ~organs.any(dim=1))


def test_arrays_and_tensors_are_counted_alike() -> None:
    rng = np.random.default_rng(0)
    preds, target = rng.random((2, 3, 4, 5)) < 0.5, rng.random((2, 3, 4, 5)) < 0.5
    arrays = count_pixels(preds, target)
    tensors = count_pixels(torch.from_numpy(preds), torch.from_numpy(target))
    for array, tensor in zip(arrays, tensors, strict=True):
        assert array.shape == (2, len(ORGANS))
        np.testing.assert_array_equal(array, tensor.numpy())
    assert dice_score([3, 4, 4]) == 0.75


def test_each_slice_is_predicted_on_its_own_grid_and_survives_packing() -> None:
    logits, sizes = (
        torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0)),
        [(9, 14), (20, 7), (3, 3), (5, 21)],
    )
    masks = predict_batch([logits], "multiclass", torch.tensor(sizes))
    packed = pack_masks(masks).numpy()
    assert packed.shape == (4, -(-3 * 20 * 7 // 8))
    for index, (height, width) in enumerate(sizes):
        enlarged = F.interpolate(logits[index][None], size=(height, width), mode="bilinear")[0].argmax(dim=0)
        bits = np.unpackbits(packed[index], count=3 * height * width).reshape(3, height, width)
        np.testing.assert_array_equal(bits, (enlarged == torch.arange(1, 4)[:, None, None]).numpy())


def test_macro_f1_is_counted_at_the_models_resolution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(4, 4, 5, 5, generator=generator),
        torch.randint(0, 4, (4, 10, 10), generator=generator),
    )
    counts = count_labels([logits], "multiclass", labels).sum(dim=0).tolist()
    preds = F.interpolate(logits, size=(10, 10), mode="bilinear").argmax(dim=1)
    expected = f1_score(labels.reshape(-1), preds.reshape(-1), average="macro")
    assert np.mean([dice_score(count) for count in counts]) == pytest.approx(expected, abs=1e-12)


def test_overlaps_are_scored_as_predicted() -> None:
    masks = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    masks[0, 0, :4] = masks[0, 2, 2:6] = True  # two rows in both
    logits = masks.float() * 20 - 10
    assert torch.equal(predict_batch([logits], "multilabel", torch.tensor([[8, 8]]))[0], masks[0])
    assert count_labels([logits], "multilabel", masks.float())[0].tolist() == [[16] * 3, [16] * 3, [0] * 3, [32] * 3]


@pytest.fixture(scope="module")
def validation(dataset_dir: Path) -> Dataset:
    return load_dataset(str(dataset_dir), split="validation")


Slice = tuple[list[int], np.ndarray, np.ndarray]


def predicted_slices(dataset: Dataset) -> Iterator[Slice]:
    """The truth with holes, as a model's prediction, ready for a scorer."""
    rng = np.random.default_rng(0)
    for row in dataset.select_columns(["case", "day", "slice", "segmentation", "height", "width"]):
        masks = organ_masks(row["segmentation"], row["height"], row["width"])
        preds = masks & (rng.random(masks.shape) < 0.8)
        packed = pack_masks([torch.from_numpy(preds)]).numpy()[0]
        yield [row["case"], row["day"], row["slice"]], np.pad(packed, (0, 5)), rng.integers(0, 9, (4, 3))


def scored(scorer: ScanScorer, slices: list[Slice]) -> dict[str, float]:
    for one in slices:
        scorer.add(*one)
    return score_scans(scorer.take(), scorer.rules)


class TestScanScorer:
    def test_scores_are_those_of_the_whole_volumes(self, validation: Dataset) -> None:
        scorer, slices, expected = ScanScorer(validation), list(predicted_slices(validation)), []
        scorer.clinical = True
        for scan in validation.unique("scan"):
            rows = validation.filter(lambda row, scan=scan: row["scan"] == scan)
            assert rows["slice"] == sorted(rows["slice"])
            size = rows[0]["height"], rows[0]["width"]
            target = np.stack([organ_masks(outlines, *size) for outlines in rows["segmentation"]], axis=1)
            bits = [packed for (case, day, _), packed, _ in slices if f"case{case}_day{day}" == scan]
            preds = [np.unpackbits(one, count=3 * size[0] * size[1]).reshape(3, *size) for one in bits]
            volume = np.stack(preds, axis=1).astype(bool)
            spacing_mm = (3.0, *rows[0]["pixel_spacing"])
            clinical = [score_organ(*masks, spacing_mm) for masks in zip(volume, target, strict=True)]
            labels = sum(counts for (case, day, _), _, counts in slices if f"case{case}_day{day}" == scan)
            expected.append(score_scan(rows[0]["case"], scan, volume, target, label_counts=labels, clinical=clinical))
        scores = scored(scorer, slices)
        assert scores == score_scans(expected)
        assert 0.5 < scores["dice"] < 0.95 and scores["hausdorff_mm_large_bowel"] > 0

    def test_order_and_processes_change_no_bit(self, validation: Dataset) -> None:
        slices = list(predicted_slices(validation))
        expected = scored(ScanScorer(validation), slices)
        shuffled = random.Random(0).sample(slices, len(slices))
        assert scored(ScanScorer(validation), shuffled) == expected
        shares = [ScanScorer(validation, share=(index, 2)) for index in range(2)]
        for scorer in shares:
            for one in slices:
                scorer.add(*one)
        parts = [scorer.take() for scorer in shares]
        assert all(parts), "one process scored everything"
        assert score_scans([*parts[1], *parts[0]]) == expected

    def test_a_scan_is_scored_and_its_masks_are_dropped_as_soon_as_it_is_whole(self, validation: Dataset) -> None:
        scorer, slices = ScanScorer(validation), list(predicted_slices(validation))
        kept = []
        for one in slices:
            scorer.add(*one)
            kept.append(sum(map(len, scorer.preds.values())))
        assert len(slices) == 24 and max(kept) == 11 and kept[11] == kept[23] == 0

    def test_evaluations_follow_each_other(self, validation: Dataset) -> None:
        scorer, slices = ScanScorer(validation), list(predicted_slices(validation))
        assert scored(scorer, slices) == scored(scorer, slices)

    def test_no_slice_counts_twice_and_none_is_lost(self, validation: Dataset) -> None:
        scorer, slices = ScanScorer(validation), list(predicted_slices(validation))
        (case, day, number), *rest = slices[0]
        scorer.add(*slices[0])
        with pytest.raises(ValueError, match=f"each slice once, but case{case}_day{day} slice {number} came again"):
            scorer.add(*slices[0])
        for one in slices[1:12]:
            scorer.add(*one)
        with pytest.raises(ValueError, match="came again"):  # its scan is over
            scorer.add(*slices[0])
        with pytest.raises(ValueError, match="expected slices of the split"):
            scorer.add([case, day, 999], *rest)
        with pytest.raises(ValueError, match="slices of 1 scans have not come"):
            scorer.take()

    def test_millimetres_are_those_of_the_file_names(self, dataset_dir: Path) -> None:
        splits = load_dataset(str(dataset_dir))
        found = {plan.spacing_mm for split in splits.values() for plan in plan_scans(split).values()}
        assert found == {(3.0, 1.5, 1.5), (3.0, 1.63, 1.63)}

    def test_a_gap_between_slices_gives_no_millimetres(self, validation: Dataset) -> None:
        gap = validation.filter(lambda row: row["slice"] != 5)
        scorer = ScanScorer(gap)
        scorer.clinical = True
        scores = scored(scorer, list(predicted_slices(gap)))
        assert 0.5 < scores["dice"] < 1 and "hausdorff_mm_stomach" not in scores

    def test_what_makes_no_volume(self, validation: Dataset) -> None:
        first = validation.unique("scan")[0]
        wider = validation.map(lambda row, n: {"width": row["width"] + (n % 12 == 3)}, with_indices=True)
        with pytest.raises(InputError, match=rf"^{first}: expected slices of one size .* \(2 such scans of 2\)"):
            ScanScorer(wider)
        coarser = validation.map(lambda row, n: {"pixel_spacing": [1.5, 1.5 + n]}, with_indices=True)
        with pytest.raises(InputError, match="of one size and spacing, but got 12"):
            ScanScorer(coarser)
        with pytest.raises(InputError, match=rf"^{first}: expected each slice once, but 2 come again \(1 such scans"):
            ScanScorer(validation.select([*range(24), 0, 1]))


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batches_change_no_bit(batch_size: int, validation: Dataset) -> None:
    slices = list(predicted_slices(validation))
    metrics, found = ComputeMetrics(validation), []
    for start in range(0, 24, batch_size):
        ids, packed, counts = zip(*slices[start : start + batch_size], strict=True)
        size = max(map(len, packed))
        rows = np.stack([np.pad(one, (0, size - len(one))) for one in packed])
        prediction = EvalPrediction(predictions=(rows, np.stack(counts)), label_ids=np.array(ids))
        found.append(metrics(prediction, compute_result=start + batch_size >= 24))
    assert not any(found[:-1])
    assert found[-1] == scored(ScanScorer(validation), slices) and len(metrics.scans) == 2
