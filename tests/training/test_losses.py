"""The loss equals values computed by hand, a formula in plain NumPy, and MONAI's loss."""

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from gi_segmentation.labels import LabelMode
from gi_segmentation.training import losses


def soft_dice_loss(logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode = "multiclass") -> torch.Tensor:
    """Return the Dice part of the loss of one batch."""
    return losses.soft_dice_loss(losses.dice_sums(logits, labels, label_mode))


def dice_cross_entropy_loss(
    logits: torch.Tensor, labels: torch.Tensor, label_mode: LabelMode = "multiclass"
) -> torch.Tensor:
    """Return the loss of one batch on one process."""
    return losses.dice_cross_entropy_loss(logits, labels, label_mode)


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    """Return logits with these probabilities: one list per label, one number per pixel; shape `(1, labels, 1, W)`."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[None, :, None]


def reference_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Compute soft Dice loss and cross-entropy with one loop over organs, float64."""
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


def test_the_dice_loss_of_two_pixels_by_hand() -> None:
    # Two pixels of organ 1 are predicted with 1/2 and 1/4. Overlap is 3/4, and total is 3/4 + 2. So Dice is
    # 2 * 3/4 / (3/4 + 2) = 6/11, and the loss is 5/11.
    logits = logits_of([[0.5, 0.75], [0.5, 0.25], [0, 0], [0, 0]])
    assert soft_dice_loss(logits, torch.tensor([[[1, 1]]])).item() == pytest.approx(5 / 11)


def test_the_dice_loss_of_a_false_alarm_by_hand() -> None:
    # A pixel of organ 1 is predicted with 1, and a pixel of background is predicted as organ 1 with 1/2. Overlap is 1,
    # and total is 3/2 + 1. So Dice is 2 / 2.5.
    logits = logits_of([[1e-30, 0.5], [1.0, 0.5], [0, 0], [0, 0]])
    assert soft_dice_loss(logits, torch.tensor([[[1, 0]]])).item() == pytest.approx(1 - 2 / 2.5)


def test_organs_are_averaged_and_pooled_over_the_batch_by_hand() -> None:
    # Two slices of one pixel. Both predict organ 1 with 1/2 and organ 2 with 1/4.
    # Organ 1 is on the first slice: overlap 1/2, total 1/2 + 1/2 + 1, Dice 2 * 1/2 / 2 = 1/2.
    # Organ 2 is on the second slice: overlap 1/4, total 1/4 + 1/4 + 1, Dice 2 * 1/4 / (3/2) = 1/3.
    logits = torch.cat([logits_of([[0.25], [0.5], [0.25], [0]])] * 2)
    labels = torch.tensor([[[1]], [[2]]])
    assert soft_dice_loss(logits, labels).item() == pytest.approx(1 - (1 / 2 + 1 / 3) / 2)


def test_dice_and_cross_entropy_add_up_by_hand() -> None:
    logits = logits_of([[0.5, 0.75], [0.5, 0.25], [1e-30, 1e-30], [1e-30, 1e-30]])
    loss = dice_cross_entropy_loss(logits, torch.tensor([[[1, 1]]])).item()
    assert loss == pytest.approx(5 / 11 + (math.log(2) + math.log(4)) / 2)


def test_a_sure_right_answer_has_no_loss_and_a_sure_wrong_one_a_large_loss() -> None:
    labels = torch.arange(4)[None, None].expand(1, 2, 4)
    right = 100.0 * torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2)
    assert dice_cross_entropy_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert dice_cross_entropy_loss(right.roll(1, dims=1), labels).item() == pytest.approx(101, abs=1e-3)


def test_an_organ_that_no_slice_shows_has_no_dice_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6)
    # Labels are 0, 1 and 2, so no slice shows organ 3.
    labels = torch.randint(0, 3, (2, 5, 6))
    changed = logits.clone()
    # Probability moves only between background and organ 3, so the Dice of organs 1 and 2 stays the same.
    total = logits[:, [0, 3]].logsumexp(dim=1)
    changed[:, 0] = changed[:, 3] = total - math.log(2)
    assert soft_dice_loss(changed, labels).item() == pytest.approx(soft_dice_loss(logits, labels).item(), rel=1e-6)
    assert 0 < soft_dice_loss(logits, labels).item() < 1


def test_the_loss_of_a_batch_without_organs_is_cross_entropy() -> None:
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
def test_the_loss_equals_monais_if_every_organ_is_present(seed: int, label_mode: LabelMode) -> None:
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


def test_the_loss_of_a_pixel_in_two_organs_by_hand() -> None:
    # A pixel is in two organs, and each is predicted with 3/4. Both have a Dice of 2 * 3/4 / (3/4 + 1) = 6/7, and a
    # cross-entropy of -ln 3/4. The third organ is absent and predicted with 1/2: its cross-entropy is -ln 1/2, and it
    # has no Dice.
    logits = torch.tensor([0.75, 0.75, 0.5]).logit().reshape(1, 3, 1, 1)
    labels = torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1)
    expected = 1 / 7 + (2 * math.log(4 / 3) + math.log(2)) / 3
    assert dice_cross_entropy_loss(logits, labels, "multilabel").item() == pytest.approx(expected)


@pytest.mark.parametrize("organ", [1, 2, 3])
def test_the_dice_loss_raises_an_organs_logits_inside_it_and_lowers_them_outside(organ: int) -> None:
    logits = torch.zeros(1, 4, 2, 3, requires_grad=True)
    labels = torch.zeros(1, 2, 3, dtype=torch.int64)
    labels[0, 0, organ - 1] = organ
    soft_dice_loss(logits, labels).backward()
    assert logits.grad is not None
    # Training goes against the gradient: a negative one raises the logit where the organ is.
    assert logits.grad[0, organ, 0, organ - 1] < 0
    elsewhere = logits.grad[0, organ].clone()
    elsewhere[0, organ - 1] = 1
    # A positive gradient lowers it everywhere else.
    assert (elsewhere > 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_of_random_logits_equals_a_formula_in_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((3, 4, 7, 9))
    labels = rng.integers(0, 4, (3, 7, 9)) * (rng.random((3, 7, 9)) < 0.4)
    if seed % 4 == 0:
        labels[labels == 2] = 0
    dice, cross_entropy = reference_loss(logits, labels)
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    assert soft_dice_loss(*tensors).item() == pytest.approx(dice, rel=1e-5)
    assert dice_cross_entropy_loss(*tensors).item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_smaller_logits_are_interpolated_bilinearly() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 4, 3, 4)), rng.integers(0, 4, (2, 12, 16))

    def weights(small: int, large: int) -> np.ndarray:
        """Return bilinear interpolation along one axis as a matrix `(large, small)`. Pixel centres are at 0.5, 1.5."""
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
def test_two_processes_have_the_loss_and_the_gradient_of_all_their_slices(label_mode: LabelMode) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3 if label_mode == "multilabel" else 4, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (4, 8, 8), generator=generator)
    # The stomach is only on slices of the second process. Without pooling, the first process would not count it at
    # all.
    labels[:2][labels[:2] == 3] = 0
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
    # Cross-entropy is not pooled, so the processes have different values with the right mean. DistributedDataParallel
    # takes the mean of the gradients, so the mean is compared here, too.
    assert np.mean(values) == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(torch.stack(gradients).mean(dim=0), expected, rtol=1e-4, atol=1e-6)


class TestUnknownOrgans:
    """What nobody has drawn changes no loss. Slice 1 knows all organs, slice 2 does not know organ 1."""

    KNOWN = torch.tensor([[True, True], [False, True]])

    def test_dice_leaves_the_slice_out_by_hand(self) -> None:
        # Each slice has a pixel, which is predicted as background, organ 1 and organ 2 with 1/2, 1/4 and 1/4. The
        # first one is organ 1, the second one organ 2. Organ 1 counts the first slice alone.
        logits = logits_of([[0.5], [0.25], [0.25]]).repeat(2, 1, 1, 1)
        sums = losses.dice_sums(logits, torch.tensor([[[1]], [[2]]]), "multiclass", self.KNOWN)
        np.testing.assert_allclose(sums, [[0.25, 0.25], [1.25, 1.5], [1, 1]])

    def test_the_background_may_be_an_unknown_organ_by_hand(self) -> None:
        # In both slices the pixel is labelled background, with a probability of 1/2. In the second one it may also be
        # organ 1, with another 1/4.
        logits = logits_of([[0.5], [0.25], [0.25]]).repeat(2, 1, 1, 1).requires_grad_()
        loss = losses.cross_entropy_loss(logits, torch.zeros(2, 1, 1, dtype=torch.long), "multiclass", self.KNOWN)
        assert loss.item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4)) / 2)
        loss.backward()
        # The gradient of -log of a sum of probabilities is p minus its share in the sum. Half of it, because the loss
        # is a mean over two pixels.
        first, second = logits.grad.reshape(2, 3)
        np.testing.assert_allclose(first, [-1 / 4, 1 / 8, 1 / 8], rtol=1e-6)
        np.testing.assert_allclose(second, [(1 / 2 - 2 / 3) / 2, (1 / 4 - 1 / 3) / 2, 1 / 8], rtol=1e-6)

    def test_the_mask_of_an_unknown_organ_has_no_gradient_by_hand(self) -> None:
        # All probabilities are 1/2. Three of the four masks are known, so the mean is over three pixels.
        logits = torch.zeros(2, 2, 1, 1, requires_grad=True)
        labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[..., None, None]
        loss = losses.dice_cross_entropy_loss(logits, labels, "multilabel", known=self.KNOWN)
        # Organ 1 has the overlap 1/2 and the total 3/2 in the first slice. Organ 2 has 1/2 and 1 + 1 in both.
        assert loss.item() == pytest.approx((1 - 2 / 3 + 1 - 1 / 2) / 2 + math.log(2))
        loss.backward()
        assert logits.grad.flatten().ne(0).tolist() == [True, True, False, True]

    @pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
    def test_with_all_organs_known_the_loss_is_the_same_to_the_bit(self, label_mode: LabelMode) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4, 3 + (label_mode == "multiclass"), 33, 33, generator=generator)
        labels = torch.randint(0, 4, (4, 33, 33), generator=generator)
        if label_mode == "multilabel":
            labels = (labels[:, None] == torch.arange(1, 4)[:, None, None]).float()
        known = torch.ones(4, 3, dtype=torch.bool)
        losses_of = [losses.dice_cross_entropy_loss(logits, labels, label_mode, known=one) for one in (None, known)]
        assert losses_of[0].item() == losses_of[1].item()

    def test_two_processes_that_know_unequally_many_organs_have_the_loss_of_all_slices(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, labels = torch.randn(2, 2, 8, 8, generator=generator), torch.ones(2, 2, 8, 8)
        whole = losses.cross_entropy_loss(logits, labels, "multilabel", self.KNOWN)
        shares = [
            losses.cross_entropy_loss(
                logits[one], labels[one], "multilabel", self.KNOWN[one], lambda number: torch.tensor(3 * 64), 2
            )
            for one in (slice(0, 1), slice(1, 2))
        ]
        assert np.mean(shares) == pytest.approx(whole.item(), rel=1e-6)
