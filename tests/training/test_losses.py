"""The loss against values worked out by hand and against a formula in plain NumPy."""

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from gi_segmentation.schema import LabelMode
from gi_segmentation.training import losses


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode = "multiclass") -> torch.Tensor:
    """The Dice part of the loss of one batch."""
    return losses.soft_dice_loss(losses.dice_sums(logits, labels, label_mode))


def dice_cross_entropy_loss(
    logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode = "multiclass"
) -> torch.Tensor:
    """The loss of one batch on one process."""
    return losses.dice_cross_entropy_loss(logits, labels, label_mode)


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    """Logits whose softmax gives these probabilities: one list per label; shape `(1, labels, 1, W)`."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[None, :, None]


def reference_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Soft Dice loss and cross-entropy, pixel by pixel and organ by organ, float64."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(probabilities, labels[:, None], axis=1)
    losses = []
    for organ in range(1, logits.shape[1]):
        truth = labels == organ
        if truth.any():
            predicted = probabilities[:, organ]
            losses.append(1 - 2 * predicted[truth].sum() / (predicted.sum() + truth.sum()))
    return float(np.mean(losses)) if losses else 0.0, float(-np.log(chosen).mean())


def test_dice_by_hand() -> None:
    # Two pixels, both organ 1, predicted with 1/2 and 1/4: 2 * 3/4 / (3/4 + 2) = 6/11.
    logits = logits_of([[0.5, 0.75], [0.5, 0.25], [0, 0], [0, 0]])
    assert soft_dice_loss(logits, torch.tensor([[[1, 1]]])).item() == pytest.approx(5 / 11)


def test_a_false_alarm_counts_by_hand() -> None:
    # One pixel of organ 1, found for certain; on the next, background, it is predicted with 1/2: 2 / (3/2 + 1).
    logits = logits_of([[1e-30, 0.5], [1.0, 0.5], [0, 0], [0, 0]])
    assert soft_dice_loss(logits, torch.tensor([[[1, 0]]])).item() == pytest.approx(1 - 2 / 2.5)


def test_organs_are_averaged_and_pooled_over_the_batch_by_hand() -> None:
    # Organ 1: slice one has it, predicted 1/2; slice two has it not, predicted 1/2: 2 * 1/2 / (1 + 1) = 1/2.
    # Organ 2: slice two has it, predicted 1/4; slice one 1/4: 2 * 1/4 / (1/2 + 1) = 1/3.
    logits = torch.cat([logits_of([[0.25], [0.5], [0.25], [0]])] * 2)
    labels = torch.tensor([[[1]], [[2]]])
    assert soft_dice_loss(logits, labels).item() == pytest.approx(1 - (1 / 2 + 1 / 3) / 2)


def test_dice_and_cross_entropy_add_up_by_hand() -> None:
    logits = logits_of([[0.5, 0.75], [0.5, 0.25], [1e-30, 1e-30], [1e-30, 1e-30]])
    loss = dice_cross_entropy_loss(logits, torch.tensor([[[1, 1]]])).item()
    assert loss == pytest.approx(5 / 11 + (math.log(2) + math.log(4)) / 2)


def test_a_certain_right_answer_costs_nothing_and_a_wrong_one_much() -> None:
    labels = torch.arange(4)[None, None].expand(1, 2, 4)
    right = 100.0 * torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2)
    assert dice_cross_entropy_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert dice_cross_entropy_loss(right.roll(1, dims=1), labels).item() == pytest.approx(101, abs=1e-3)


def test_an_organ_that_no_slice_shows_is_left_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6)
    labels = torch.randint(0, 3, (2, 5, 6))  # never 3
    changed = logits.clone()
    # Move probability between background and organ 3 alone: the Dice of organs 1 and 2 is as before.
    total = logits[:, [0, 3]].logsumexp(dim=1)
    changed[:, 0] = changed[:, 3] = total - math.log(2)
    assert soft_dice_loss(changed, labels).item() == pytest.approx(soft_dice_loss(logits, labels).item(), rel=1e-6)
    assert 0 < soft_dice_loss(logits, labels).item() < 1


def test_a_batch_without_organs_has_cross_entropy_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    labels = torch.zeros(2, 5, 6, dtype=torch.int64)
    assert soft_dice_loss(logits, labels).item() == 0
    loss = dice_cross_entropy_loss(logits, labels)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    loss.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and (logits.grad[:, 1:] > 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_with_every_organ_present_it_is_monais(seed: int, label_mode: LabelMode) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 3 if label_mode == "multilabel" else 4, 9, 8, generator=generator)
    if label_mode == "multilabel":
        labels = (torch.rand(3, 3, 9, 8, generator=generator) < 0.3).float()
        peer = DiceLoss(sigmoid=True, batch=True, smooth_nr=0, smooth_dr=0)(logits, labels)
        entropy = torch.nn.BCEWithLogitsLoss()(logits, labels)
    else:
        labels = torch.randint(0, 4, (3, 9, 8), generator=generator)
        options = {"softmax": True, "to_onehot_y": True, "include_background": False}
        peer = DiceLoss(**options, batch=True, smooth_nr=0, smooth_dr=0)(logits, labels[:, None])
        entropy = torch.nn.CrossEntropyLoss()(logits, labels)
    assert soft_dice_loss(logits, labels, label_mode).item() == pytest.approx(peer.item(), rel=1e-5)
    assert dice_cross_entropy_loss(logits, labels, label_mode).item() == pytest.approx(
        (peer + entropy).item(), rel=1e-5
    )


def test_overlapping_organs_are_two_answers_by_hand() -> None:
    # One pixel in two organs, each predicted with 3/4: Dice 2 * 3/4 / (3/4 + 1) = 6/7 twice, entropy -ln 3/4 and, for
    # the absent organ predicted with 1/2, -ln 1/2.
    logits = torch.tensor([0.75, 0.75, 0.5]).logit().reshape(1, 3, 1, 1)
    labels = torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1)
    expected = 1 / 7 + (2 * math.log(4 / 3) + math.log(2)) / 3
    assert dice_cross_entropy_loss(logits, labels, "multilabel").item() == pytest.approx(expected)


@pytest.mark.parametrize("organ", [1, 2, 3])
def test_the_dice_of_every_organ_pulls_at_its_logits(organ: int) -> None:
    logits = torch.zeros(1, 4, 2, 3, requires_grad=True)
    labels = torch.zeros(1, 2, 3, dtype=torch.int64)
    labels[0, 0, organ - 1] = organ
    soft_dice_loss(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad[0, organ, 0, organ - 1] < 0  # where the organ is, up
    elsewhere = logits.grad[0, organ].clone()
    elsewhere[0, organ - 1] = 1
    assert (elsewhere > 0).all()  # and down where it is not


@pytest.mark.parametrize("seed", range(20))
def test_random_logits_agree_with_plain_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((3, 4, 7, 9))
    labels = rng.integers(0, 4, (3, 7, 9)) * (rng.random((3, 7, 9)) < 0.4)
    if seed % 4 == 0:
        labels[labels == 2] = 0
    dice, cross_entropy = reference_loss(logits, labels)
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    assert soft_dice_loss(*tensors).item() == pytest.approx(dice, rel=1e-5)
    assert dice_cross_entropy_loss(*tensors).item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_logits_of_a_quarter_are_interpolated_bilinearly() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 4, 3, 4)), rng.integers(0, 4, (2, 12, 16))

    def weights(small: int, large: int) -> np.ndarray:
        """Bilinear interpolation along one axis, pixel centres at half, as a matrix `(large, small)`."""
        centres = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
        return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(small)))

    enlarged = np.einsum("Yy,blyx,Xx->blYX", weights(3, 12), logits, weights(4, 16))
    expected = sum(reference_loss(enlarged, labels))
    assert dice_cross_entropy_loss(torch.from_numpy(logits), torch.from_numpy(labels)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_half_precision_logits_give_a_full_precision_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 64, 64), torch.randint(0, 4, (2, 64, 64))
    half = dice_cross_entropy_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(dice_cross_entropy_loss(logits, labels).item(), rel=0.01)


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_processes_together_have_the_loss_and_the_gradient_of_all_their_slices(label_mode: LabelMode) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3 if label_mode == "multilabel" else 4, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (4, 8, 8), generator=generator)
    labels[:2][labels[:2] == 3] = 0  # the stomach is on slices of the second process alone
    if label_mode == "multilabel":
        labels = (labels[:, None] == torch.arange(1, 4)[:, None, None]).float()
    weight = torch.ones(1, requires_grad=True)
    whole = dice_cross_entropy_loss(weight * logits, labels, label_mode)
    (expected,) = torch.autograd.grad(whole, weight)
    total = losses.dice_sums(logits, labels, label_mode)
    values, gradients = [], []
    for share in (slice(0, 2), slice(2, 4)):
        loss = losses.dice_cross_entropy_loss(
            weight * logits[share], labels[share], label_mode, reduce=lambda sums: total, num_processes=2
        )
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert np.mean(values) == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(torch.stack(gradients).mean(dim=0), expected, rtol=1e-4, atol=1e-6)
