"""From logits to masks: on the native grid, from one model or from several, packed and unpacked."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import SegformerImageProcessorPil
from transformers.modeling_outputs import SemanticSegmenterOutput

from gi_segmentation.labels import GI_TRACT, LabelMode
from gi_segmentation.models.masks import count_labels, masks_to_labels, pack_masks, predict_batch, predict_masks
from gi_segmentation.scoring.dice import dice_score


def test_predicted_labels_equal_those_of_the_stock_processor() -> None:
    logits = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [(266, 266), (310, 360), (5, 7)]
    stock = SegformerImageProcessorPil().post_process_semantic_segmentation(
        SemanticSegmenterOutput(logits=logits), sizes
    )
    for index, (height, width) in enumerate(sizes):
        masks = predict_masks([logits[index][None]], "multiclass", height, width)[0]
        assert torch.equal(masks, stock[index] == torch.arange(1, 4)[:, None, None])


def test_organs_with_channels_of_their_own_may_overlap() -> None:
    logits = torch.tensor([[3.0, -1.0], [0.5, -1.0], [-2.0, 1.0]]).reshape(1, 3, 1, 2)
    masks = predict_masks([logits], "multilabel", 1, 2)
    assert masks[0, :, 0].tolist() == [[True, False], [True, False], [False, True]]
    # Where organs overlap, a map of labels keeps the highest label.
    assert masks_to_labels(masks)[0].tolist() == [[2, 3]]


def test_several_models_are_averaged_by_probability() -> None:
    # The models give organ 1 the probabilities 0.4 and 0.9, and the background 0.6 and 0.1. The means are 0.65 and
    # 0.35, so organ 1 wins, although the first model alone says background.
    first, second = (torch.tensor([1 - p, p, 0, 0]).clamp(min=1e-30).log().reshape(1, 4, 1, 1) for p in (0.4, 0.9))
    assert predict_masks([first, second], "multiclass", 1, 1).flatten().tolist() == [True, False, False]
    assert predict_masks([first], "multiclass", 1, 1).flatten().tolist() == [False, False, False]
    # The mean of 0.1 and 0.95 is 0.525, above 1/2. The mean of 0.1 and 0.85 is 0.475, below it.
    unsure = torch.tensor([0.1, 0.1, 0.1]).logit().reshape(1, 3, 1, 1)
    sure = torch.tensor([0.95, 0.85, 0.1]).logit().reshape(1, 3, 1, 1)
    assert predict_masks([unsure, sure], "multilabel", 1, 1).flatten().tolist() == [True, False, False]


def test_the_first_of_several_highest_labels_wins() -> None:
    # All four channels are equal, and then the background and organ 2 are.
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 3.0]]).T.reshape(1, 4, 1, 3)
    assert masks_to_labels(predict_masks([logits], "multiclass", 1, 3)).tolist() == [[[0, 0, 1]]]
    assert logits.argmax(dim=1).tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_labels_are_counted_as_their_definition_says(label_mode: LabelMode) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, len(GI_TRACT.channels(label_mode)), 6, 6, generator=generator)
    organs = torch.rand(5, 3, 24, 24, generator=generator) < 0.3
    target = (organs * torch.tensor([1, 2, 3])[:, None, None]).amax(dim=1)
    labels = target if label_mode == "multiclass" else organs.float()
    counts = count_labels([logits], label_mode, labels)
    assert (counts.shape, counts.dtype) == ((5, 4, 3), torch.int64)
    preds = masks_to_labels(predict_masks([logits], label_mode, 24, 24))
    for index in range(5):
        for label in range(4):
            p, t = preds[index] == label, target[index] == label
            assert counts[index, label].tolist() == [int((p & t).sum()), int(p.sum()), int(t.sum())]


def test_each_slice_is_predicted_on_its_own_grid_and_packed_without_loss() -> None:
    logits, sizes = (
        torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0)),
        [(9, 14), (20, 7), (9, 14), (5, 21)],
    )
    masks = predict_batch([logits], "multiclass", torch.tensor(sizes))
    packed = pack_masks(masks).numpy()
    # All slices of a batch get as many bytes as the largest one needs: 3 organs of 20 x 7 bits, rounded up to bytes.
    assert packed.shape == (4, -(-3 * 20 * 7 // 8))
    for index, (height, width) in enumerate(sizes):
        enlarged = F.interpolate(logits[index][None], size=(height, width), mode="bilinear")[0].argmax(dim=0)
        bits = np.unpackbits(packed[index], count=3 * height * width).reshape(3, height, width)
        np.testing.assert_array_equal(bits, (enlarged == torch.arange(1, 4)[:, None, None]).numpy())


def test_macro_f1_equals_scikit_learns_at_the_models_resolution() -> None:
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
    # Organ 1 is in rows 0 to 3 and organ 3 in rows 2 to 5, so two rows are in both. The background has the other two
    # rows.
    masks[0, 0, :4] = masks[0, 2, 2:6] = True
    logits = masks.float() * 20 - 10
    assert torch.equal(predict_batch([logits], "multilabel", torch.tensor([[8, 8]]))[0], masks[0])
    assert count_labels([logits], "multilabel", masks.float())[0].tolist() == [[16] * 3, [16] * 3, [0] * 3, [32] * 3]


def test_a_predicted_organ_that_nobody_has_drawn_counts_as_background() -> None:
    # Two slices of two pixels, background and organ 2. Organ 1 is predicted for the first pixel.
    logits = 9.0 * F.one_hot(torch.tensor([[[1, 2]]] * 2), 3).permute(0, 3, 1, 2).float()
    labels, known = torch.tensor([[[0, 2]]] * 2), torch.tensor([[True, True], [False, True]])
    counts = count_labels([logits], "multiclass", labels, known)
    assert counts[0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 1, 1]]
    assert counts[1].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
