"""Scans are scored as they complete, in whatever batches and order their slices come."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import EvalPrediction

from gi_segmentation.data.dataset_scans import list_dataset_scans
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.masks import pack_masks
from gi_segmentation.rle import organ_masks
from gi_segmentation.scoring.clinical import compare_organ
from gi_segmentation.scoring.scans import compare_masks, score_scans
from gi_segmentation.scoring.streaming import StreamingScorer
from gi_segmentation.training.evaluation import ComputeMetrics


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


def score_slices(scorer: StreamingScorer, slices: list[Slice]) -> dict[str, float]:
    for one in slices:
        scorer.add(*one)
    return score_scans(scorer.take(), scorer.rules)


class TestScanScorer:
    def test_scores_are_those_of_the_whole_volumes(self, validation: Dataset) -> None:
        scorer, slices, expected = StreamingScorer(validation), list(predicted_slices(validation)), []
        scorer.restart(clinical=True, presets=True)
        for scan in validation.unique("scan"):
            rows = validation.filter(lambda row, scan=scan: row["scan"] == scan)
            assert rows["slice"] == sorted(rows["slice"])
            size = rows[0]["height"], rows[0]["width"]
            target = np.stack([organ_masks(outlines, *size) for outlines in rows["segmentation"]], axis=1)
            bits = [packed for (case, day, _), packed, _ in slices if f"case{case}_day{day}" == scan]
            preds = [np.unpackbits(one, count=3 * size[0] * size[1]).reshape(3, *size) for one in bits]
            volume = np.stack(preds, axis=1).astype(bool)
            spacing_mm = (3.0, *rows[0]["pixel_spacing"])
            clinical = [compare_organ(*masks, spacing_mm) for masks in zip(volume, target, strict=True)]
            labels = sum(counts for (case, day, _), _, counts in slices if f"case{case}_day{day}" == scan)
            expected.append(
                compare_masks(
                    rows[0]["case"],
                    scan,
                    GI_TRACT.names,
                    volume,
                    target,
                    label_counts=labels,
                    clinical=clinical,
                    presets=True,
                )
            )
        scores = score_slices(scorer, slices)
        assert scores == score_scans(expected)
        assert 0.5 < scores["dice"] < 0.95 and scores["hausdorff_mm_large_bowel"] > 0

    def test_order_and_processes_change_no_bit(self, validation: Dataset) -> None:
        slices = list(predicted_slices(validation))
        expected = score_slices(StreamingScorer(validation), slices)
        shuffled = random.Random(0).sample(slices, len(slices))
        assert score_slices(StreamingScorer(validation), shuffled) == expected
        shares = [StreamingScorer(validation, share=(index, 2)) for index in range(2)]
        for scorer in shares:
            for one in slices:
                scorer.add(*one)
        parts = [scorer.take() for scorer in shares]
        assert all(parts), "one process scored everything"
        assert score_scans([*parts[1], *parts[0]]) == expected

    def test_a_scan_is_scored_and_its_masks_are_dropped_as_soon_as_it_is_whole(self, validation: Dataset) -> None:
        scorer, slices = StreamingScorer(validation), list(predicted_slices(validation))
        kept = []
        for one in slices:
            scorer.add(*one)
            kept.append(sum(map(len, scorer.preds.values())))
        assert len(slices) == 24 and max(kept) == 11 and kept[11] == kept[23] == 0

    def test_evaluations_follow_each_other(self, validation: Dataset) -> None:
        scorer, slices = StreamingScorer(validation), list(predicted_slices(validation))
        assert score_slices(scorer, slices) == score_slices(scorer, slices)

    def test_no_slice_counts_twice_and_none_is_lost(self, validation: Dataset) -> None:
        scorer, slices = StreamingScorer(validation), list(predicted_slices(validation))
        (case, day, number), *rest = slices[0]
        scorer.add(*slices[0])
        with pytest.raises(ValueError, match=f"once, but case{case}_day{day} slice {number} was added twice"):
            scorer.add(*slices[0])
        for one in slices[1:12]:
            scorer.add(*one)
        with pytest.raises(ValueError, match="was added twice"):  # its scan is over
            scorer.add(*slices[0])
        with pytest.raises(ValueError, match="expected slices of the split"):
            scorer.add([case, day, 999], *rest)
        with pytest.raises(ValueError, match="1 scans are incomplete"):
            scorer.take()

    def test_millimetres_are_those_of_the_file_names(self, dataset_dir: Path) -> None:
        splits = load_dataset(str(dataset_dir))
        found = {plan.spacing_mm for split in splits.values() for plan in list_dataset_scans(split).values()}
        assert found == {(3.0, 1.5, 1.5), (3.0, 1.63, 1.63)}

    def test_a_gap_between_slices_gives_no_millimetres(self, validation: Dataset) -> None:
        gap = validation.filter(lambda row: row["slice"] != 5)
        scorer = StreamingScorer(gap)
        scorer.restart(clinical=True)
        scores = score_slices(scorer, list(predicted_slices(gap)))
        assert 0.5 < scores["dice"] < 1 and "hausdorff_mm_stomach" not in scores

    def test_an_organ_without_an_encoding_in_one_slice_is_unknown_in_its_scan(self, validation: Dataset) -> None:
        first, slices = validation.unique("scan")[0], list(predicted_slices(validation))
        partly = validation.map(
            lambda row: (
                {"segmentation": row["segmentation"] | ({"stomach": None} if row["slice"] == 4 else {})}
                if row["scan"] == first
                else {}
            )
        )
        scorer = StreamingScorer(partly)
        for one in slices:
            scorer.add(*one)
        unknown, whole = sorted(scorer.take(), key=lambda scan: scan.name != first)
        assert unknown.unknown == ("stomach",) and unknown.dice_numbers[2] == 0 < unknown.dice_numbers[0]
        assert whole.unknown == () and whole.dice_numbers[2] > 0

    def test_what_makes_no_volume(self, validation: Dataset) -> None:
        first = validation.unique("scan")[0]
        wider = validation.map(lambda row, n: {"width": row["width"] + (n % 12 == 3)}, with_indices=True)
        with pytest.raises(InputError, match=rf"^{first}: expected slices of one size .* \(2 such scans of 2\)"):
            StreamingScorer(wider)
        coarser = validation.map(lambda row, n: {"pixel_spacing": [1.5, 1.5 + n]}, with_indices=True)
        with pytest.raises(InputError, match="of one size and spacing, but got 12"):
            StreamingScorer(coarser)
        with pytest.raises(InputError, match=rf"^{first}: expected each slice once, but 2 come again \(1 such scans"):
            StreamingScorer(validation.select([*range(24), 0, 1]))


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
    assert found[-1] == score_slices(StreamingScorer(validation), slices) and len(metrics.scans) == 2
