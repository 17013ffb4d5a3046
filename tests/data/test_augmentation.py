"""Augmentation moves image and labels together, makes no new label, clips nothing, and depends on the seed alone."""

from functools import partial

import albumentations as A
import numpy as np
import pytest

from gi_segmentation.data import augmentation as module
from gi_segmentation.data.augmentation import build_augmentation

SEEDS = range(150)


@pytest.fixture(scope="module")
def augmentation() -> A.Compose:
    return build_augmentation()


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "strong"])
def either(request: pytest.FixtureRequest) -> A.Compose:
    return build_augmentation(strong=request.param)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Labels 1 and 3, whose areas touch. Interpolation between them would make a label 2 that is not there."""
    labels = np.zeros((96, 80), dtype=np.uint8)
    labels[20:60, 25:60] = 1
    labels[50:80, 10:40] = 3
    return labels


def augment(
    augmentation: A.Compose, image: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Augment a slice of one channel. Neither argument nor result has an axis for the channel."""
    changed, changed_labels = module.augment(augmentation, image[:, :, None], labels, seed)
    return changed[:, :, 0], changed_labels


def only(augmentation: A.Compose, *kinds: type) -> A.Compose:
    """Return the transforms of some kinds, with their own settings."""
    kept = [transform for transform in augmentation.transforms if isinstance(transform, kinds)]
    assert len(kept) == len(kinds)
    return A.Compose(kept)


def test_labels_are_never_interpolated(either: A.Compose, labels: np.ndarray) -> None:
    image = np.full(labels.shape, 0.5, dtype=np.float32)
    seen = set()
    for seed in SEEDS:
        changed_image, changed = augment(either, image, labels, seed)
        assert (changed.shape, changed.dtype) == (labels.shape, np.uint8)
        assert (changed_image.shape, changed_image.dtype) == (labels.shape, np.float32)
        seen |= set(np.unique(changed).tolist())
    assert seen == {0, 1, 3}


def test_channels_and_masks_move_together(augmentation: A.Compose, labels: np.ndarray) -> None:
    geometric = only(augmentation, A.HorizontalFlip, A.VerticalFlip, A.Affine)
    masks = np.stack([labels == 1, labels == 2, labels == 3], axis=-1).astype(np.uint8)
    image = np.stack([labels == 1, labels == 1, labels == 3], axis=-1).astype(np.float32)
    for seed in SEEDS:
        changed, moved = module.augment(geometric, image, masks, seed)
        _, expected = augment(geometric, image[:, :, 0], labels, seed)
        np.testing.assert_array_equal(moved, expected[:, :, None] == [1, 2, 3])
        np.testing.assert_array_equal(changed[:, :, 0], changed[:, :, 1])
        assert ((changed[:, :, 2] > 0.5) == moved[:, :, 2]).mean() > 0.97


def test_image_and_labels_move_together(augmentation: A.Compose, labels: np.ndarray) -> None:
    geometric = only(augmentation, A.HorizontalFlip, A.VerticalFlip, A.Affine)
    image = (labels == 1).astype(np.float32)
    moved = 0
    for seed in SEEDS:
        changed_image, changed = augment(geometric, image, labels, seed)
        assert ((changed_image > 0.5) == (changed == 1)).mean() > 0.97
        moved += not np.array_equal(changed, labels)
    assert moved > len(SEEDS) / 2


def test_strong_changes_move_image_and_labels_together(labels: np.ndarray) -> None:
    geometric = only(build_augmentation(strong=True), A.Affine, A.ElasticTransform)
    image = (labels == 1).astype(np.float32)
    sizes = []
    for seed in SEEDS:
        changed_image, changed = augment(geometric, image, labels, seed)
        assert ((changed_image > 0.5) == (changed == 1)).mean() > 0.96
        sizes.append((changed == 1).sum() / (labels == 1).sum())
    # Scales of 0.75 and 1.3 change an area to 0.56 and 1.69 times as much.
    assert min(sizes) < 0.7 and max(sizes) > 1.4


def test_strong_changes_keep_left_and_right(labels: np.ndarray) -> None:
    strong = build_augmentation(strong=True)
    image = np.zeros(labels.shape, dtype=np.float32)
    for seed in SEEDS:
        _, changed = augment(strong, image, labels, seed)
        # Label 1 lies above and to the right of label 3.
        upper, lower = np.argwhere(changed == 1).mean(axis=0), np.argwhere(changed == 3).mean(axis=0)
        assert upper[0] < lower[0] and upper[1] > lower[1]


def test_strong_changes_keep_intensities_between_0_and_1() -> None:
    strong = build_augmentation(strong=True)
    image = np.random.default_rng(0).random((96, 80), dtype=np.float32)
    means = []
    for seed in SEEDS:
        changed, _ = augment(strong, image, np.zeros(image.shape, dtype=np.uint8), seed)
        assert changed.min() >= 0 and changed.max() <= 1
        means.append(changed.mean())
    assert np.ptp(means) > 0.2


def test_shift_scale_and_rotation_stay_within_their_limits(augmentation: A.Compose) -> None:
    affine = only(augmentation, A.Affine)
    image = np.zeros((201, 201), dtype=np.float32)
    labels = np.zeros(image.shape, dtype=np.uint8)
    # A bar through the centre, 81 pixels long. Its direction, length and middle give rotation, scale and shift.
    labels[100, 60:141] = 1
    angles, lengths, shifts = [], [], []
    for seed in SEEDS:
        rows, columns = np.nonzero(augment(affine, image, labels, seed)[1])
        angles.append(np.degrees(np.arctan2(np.ptp(rows), np.ptp(columns))))
        lengths.append(np.hypot(np.ptp(rows), np.ptp(columns)) + 1)
        shifts.append(max(abs(rows.mean() - 100), abs(columns.mean() - 100)) / 201)
    # The limits are 0.15 radians (8.6 degrees), and 12 % for scale and shift. With 150 seeds, the largest value is
    # near its limit but not above it. Rounding to pixels needs some tolerance.
    assert 6 < max(angles) < 10
    assert 81 * 0.87 < min(lengths) < 76 and 86 < max(lengths) < 81 * 1.13 + 1
    assert 0.09 < max(shifts) < 0.13


def test_brightness_and_contrast_clip_nothing(augmentation: A.Compose) -> None:
    intensity = only(augmentation, A.RandomBrightnessContrast)
    image = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    changes = 0
    for seed in SEEDS:
        changed, _ = augment(intensity, image, np.zeros(image.shape, dtype=np.uint8), seed)
        # The image is a ramp. With clipping, several pixels at one end would get the same value.
        assert (np.diff(changed.reshape(-1)) > 0).all()
        assert changed.min() >= 0 and changed.max() <= 1
        changes += not np.array_equal(changed, image)
    assert len(SEEDS) / 4 < changes < len(SEEDS)


def test_dropout_makes_holes_in_the_image_and_not_in_the_labels(augmentation: A.Compose, labels: np.ndarray) -> None:
    dropout = only(augmentation, A.CoarseDropout)
    image = np.ones((200, 200), dtype=np.float32)
    labels = np.ones(image.shape, dtype=np.uint8)
    shares = []
    for seed in SEEDS:
        changed, kept = augment(dropout, image, labels, seed)
        np.testing.assert_array_equal(kept, labels)
        assert set(np.unique(changed)) <= {0, 1}
        shares.append(float((changed == 0).mean()))
    holed = [share for share in shares if share]
    assert len(SEEDS) / 4 < len(holed) < len(SEEDS)
    # There are 5 to 8 holes. A side of a hole is 1/40 to 1/20 of the slice's side. Holes may overlap, so the lower
    # limit holds only for the mean.
    assert max(holed) <= 8 / 20**2
    assert np.mean(holed) > 5 / 40**2


@pytest.mark.parametrize("strong", [False, True])
def test_only_the_seed_decides(strong: bool, labels: np.ndarray) -> None:
    augmentation = build_augmentation(strong)
    image = np.random.default_rng(0).random(labels.shape, dtype=np.float32)
    results = {}
    for seed in SEEDS:
        results[seed] = augment(augmentation, image, labels, seed)
    # Neither NumPy's global state nor the order of the calls may matter.
    np.random.seed(1)
    other = build_augmentation(strong)
    for seed in reversed(SEEDS):
        again = augment(other, image, labels, seed)
        np.testing.assert_array_equal(again[0], results[seed][0])
        np.testing.assert_array_equal(again[1], results[seed][1])
    # Affine, brightness and holes each happen with probability 1/2. So one slice in eight is at most flipped, and many
    # of these are equal. Nearly all others differ.
    assert len({changed.tobytes() for changed, _ in results.values()}) > 0.75 * len(SEEDS)


def test_both_flips_are_independent(augmentation: A.Compose) -> None:
    image = np.full((40, 40), 0.5, dtype=np.float32)
    image[:20, :20] = 0.25
    flips = only(augmentation, A.HorizontalFlip, A.VerticalFlip)
    corners = []
    for seed in SEEDS:
        changed, _ = augment(flips, image, np.zeros(image.shape, dtype=np.uint8), seed)
        corners.append(int(np.argmin(changed[::39, ::39])))
    counts = np.bincount(corners, minlength=4)
    # The dark corner shows which flips happened. Neither flip, only one of them, and both are expected in a quarter of
    # the cases each.
    assert counts.min() > len(SEEDS) / 8


def test_the_input_is_not_changed(either: A.Compose, labels: np.ndarray) -> None:
    image = np.random.default_rng(0).random(labels.shape, dtype=np.float32)
    image_before, labels_before = image.copy(), labels.copy()
    for seed in SEEDS[:20]:
        augment(either, image, labels, seed)
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(labels, labels_before)


@pytest.mark.parametrize("name", ["HorizontalFlip", "Affine", "RandomBrightnessContrast", "CoarseDropout"])
def test_an_argument_that_albumentations_does_not_know_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(A, name, partial(getattr(A, name), max_holes=8))
    with pytest.raises(UserWarning, match="max_holes"):
        build_augmentation()
