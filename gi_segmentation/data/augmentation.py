"""Random changes of the training slices, with albumentations."""

import math
import os
import random
import warnings

import numpy as np

# Set before the import, because the import asks the network for a newer version otherwise.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2

# Each process that loads slices works on one slice at a time. Threads of OpenCV would only take turns with the other
# processes: with them, a slice took a third more of the processor's time.
cv2.setNumThreads(0)

# The transforms and their sizes are those of the original project. Its rotation of 0.15 was meant in radians. Its 5 to
# 8 holes were never made, because albumentations ignores arguments that it does not know. Shift, scale change and the
# sides of the holes are fractions of the image's size.
MAX_SHIFT = 0.12
MAX_SCALE_CHANGE = 0.12
MAX_ROTATION_DEGREES = math.degrees(0.15)
NUM_HOLES = (5, 8)
HOLE_SIDE = (1 / 40, 1 / 20)


def shift_scale_rotate(scale: tuple[float, float], degrees: float, shear: float, probability: float) -> A.Affine:
    """Return a random shift, scale, rotation and shear.

    Args:
        scale: Least and greatest scale.
        degrees: Greatest rotation in degrees.
        shear: Greatest shear in degrees.
        probability: How often it happens.
    """
    return A.Affine(
        translate_percent=(-MAX_SHIFT, MAX_SHIFT),
        scale=scale,
        rotate=(-degrees, degrees),
        shear=(-shear, shear),
        # Label ids have no order. The mean of the ids 1 and 3 would be 2, which is a third organ.
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        p=probability,
    )


def brightness_and_contrast(max_contrast: float) -> A.RandomBrightnessContrast:
    """Return a random change of brightness and contrast."""
    # With `ensure_safe_range` the changes are limited so far that no intensity leaves 0 to 1. Without it, bright
    # tissue would be clipped to one flat value.
    return A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=max_contrast, ensure_safe_range=True, p=0.5)


def holes(probability: float) -> A.CoarseDropout:
    """Return holes in the image, but not in the labels."""
    return A.CoarseDropout(
        num_holes_range=NUM_HOLES, hole_height_range=HOLE_SIDE, hole_width_range=HOLE_SIDE, fill=0, p=probability
    )


def usual_changes(mirror: bool) -> list[A.BasicTransform]:
    """Return the changes of the original project; without `mirror`, there is no left-right flip."""
    scale = 1 - MAX_SCALE_CHANGE, 1 + MAX_SCALE_CHANGE
    return [
        *([A.HorizontalFlip(p=0.5)] if mirror else []),
        A.VerticalFlip(p=0.5),
        shift_scale_rotate(scale, MAX_ROTATION_DEGREES, shear=0, probability=0.5),
        brightness_and_contrast(0.2),
        holes(0.5),
    ]


def strong_changes() -> list[A.BasicTransform]:
    """Return changes that make few patients look like many. They are our choice, see docs/benchmark_notes.md.

    Patients differ in size, posture and shape, scanners in contrast, noise and the sensitivity of their coils. All
    patients lie in the scanner the same way, so there are no flips.
    """
    return [
        shift_scale_rotate((0.75, 1.3), degrees=15, shear=6, probability=0.9),
        A.ElasticTransform(
            alpha=30, sigma=8, interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST, p=0.3
        ),
        A.RandomGamma(gamma_limit=(60, 160), p=0.5),
        brightness_and_contrast(0.3),
        # Intensities that grow or fall across the slice, as far from a coil.
        A.Illumination(mode="linear", intensity_range=(0.05, 0.2), p=0.5),
        A.GaussianBlur(blur_limit=(3, 3), p=0.15),
        A.GaussNoise(std_range=(0.01, 0.04), p=0.25),
        holes(0.3),
    ]


def build_augmentation(strong: bool = False, mirror: bool = True) -> A.Compose:
    """Build the augmentation of a training slice and its labels.

    The usual changes are: a left-right flip; an up-down flip; shift, scale and rotation together; brightness and
    contrast; holes in the image, but not in the labels. Each happens with a probability of 0.5. The strong changes are
    in `strong_changes`.

    Args:
        strong: Whether to make the strong changes.
        mirror: Whether a slice may be flipped left-right. A left kidney would become a right one.

    Returns:
        A pipeline that takes and returns `image` (float32 in 0 to 1, shape `(height, width, channels)`) and `mask`
        (uint8, shape `(height, width)` or `(height, width, bytes)`).

    Raises:
        UserWarning: If albumentations does not know an argument.
    """
    # By default albumentations warns about an unknown argument, ignores it and goes on. Here the warning is an error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return A.Compose(strong_changes() if strong else usual_changes(mirror))


def augment(
    augmentation: A.Compose, image: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change one slice at random.

    Args:
        augmentation: From `build_augmentation`.
        image: float32 in 0 to 1, shape `(height, width, channels)`.
        labels: Organ bits, uint8, shape `(height, width)` or `(height, width, bytes)`.
        seed: The changes depend on this number alone. So a resumed run makes the same changes as an uninterrupted one.

    Returns:
        Image and labels, with the same shapes and types.
    """
    # `set_random_seed` would give the same seed to every transform. All of them draw their probability first, so
    # either all would happen or none. `set_random_state` gives them one generator, from which they draw one after the
    # other.
    augmentation.set_random_state(np.random.default_rng(seed), random.Random(seed))
    changed = augmentation(image=image, mask=labels)
    return changed["image"], changed["mask"]
