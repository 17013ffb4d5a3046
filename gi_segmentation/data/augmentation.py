"""Random changes of the training slices, with albumentations."""

import math
import os
import random
import warnings

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import asks the network for a newer version

import albumentations as A
import cv2

# The original project's list. Its rotation of "0.15" was meant in radians and its dropout of 5 to 8 holes never took
# effect, because albumentations ignores arguments it does not know.
MAX_SHIFT = 0.12
MAX_SCALE_CHANGE = 0.12
MAX_ROTATION_DEGREES = math.degrees(0.15)
NUM_HOLES = (5, 8)
HOLE_SIDE = (1 / 40, 1 / 20)


def build_augmentation() -> A.Compose:
    """The augmentation of a training slice and its label map.

    Flips both ways; shift, scale and rotation; brightness and contrast; holes in the image but not in the labels.
    Each with probability 0.5. Brightness and contrast stop short of clipping.

    Returns:
        A pipeline for `image`, float32 in 0 to 1, shape `(height, width, channels)`, and `mask`, uint8, shape
        `(height, width)` or `(height, width, organs)`, which is only ever resampled by nearest neighbour.

    Raises:
        UserWarning: If albumentations does not know an argument (it would otherwise ignore it).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.VerticalFlip(p=0.5),
                A.Affine(
                    translate_percent=(-MAX_SHIFT, MAX_SHIFT),
                    scale=(1 - MAX_SCALE_CHANGE, 1 + MAX_SCALE_CHANGE),
                    rotate=(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    p=0.5,
                ),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, ensure_safe_range=True, p=0.5),
                A.CoarseDropout(
                    num_holes_range=NUM_HOLES, hole_height_range=HOLE_SIDE, hole_width_range=HOLE_SIDE, fill=0, p=0.5
                ),
            ]
        )


def augment(
    augmentation: A.Compose, image: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change one slice at random.

    Args:
        augmentation: From `build_augmentation`.
        image: float32 in 0 to 1, shape `(height, width, channels)`.
        labels: Label ids or masks, uint8, shape `(height, width)` or `(height, width, organs)`.
        seed: What happens depends on this alone, so that a resumed run repeats an uninterrupted one.

    Returns:
        Image and labels, shapes and types as given.
    """
    # Not set_random_seed, which seeds every transform alike: then all of them happen, or none.
    augmentation.set_random_state(np.random.default_rng(seed), random.Random(seed))
    changed = augmentation(image=image, mask=labels)
    return changed["image"], changed["mask"]
