"""The competition's score: the choices that its description leaves open, by name, and its Hausdorff distance."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np

from .surface import crop_to_both, find_surface, greatest_distance  # relative, as metrics.py says

DICE_WEIGHT, HAUSDORFF_WEIGHT = 0.4, 0.6
MAX_SIZE_RATIO = 10


@dataclass(frozen=True)
class CompetitionRules:
    """The competition's metric where its description leaves a choice; the host's code is not public.

    The defaults are mle-bench's, `grade.py` of uw-madison-gi-tract-image-segmentation. The preset first_place is the
    winner's validation code (CarnoZhao/Kaggle-UWMGIT, `monai/metric.py`): its distance is 1 where exactly one mask is
    empty, 0 where both are, and whatever is measured where the prediction is too large. Its training script hands it
    single slices and takes MONAI's Dice, which skips slices without the organ in the truth; the preset measures whole
    scans, as the competition does, and counts slices as perfect that are empty in both.

    Attributes:
        both_empty: A slice's organ, or a scan, that neither mask has: `skipped` in the mean, or counts as `perfect`.
        hausdorff_over: One distance a scan, of the `union` of its organs, or one of each `organ`.
        direction: `symmetric`, the greater of both ways, or only `preds_to_target`.
        points: Distances between all `voxels` of the masks, or between the voxels of their `surface` alone, by which a
            hole far inside the other mask counts.
        normaliser: Coordinates over the volume's shape and the distance over √3, the diagonal of the `unit_cube`; or
            voxels over the `volume_diagonal`. A slice is as thick as a pixel is wide.
        one_empty: The distance where exactly one mask is empty: 1, the `worst`, or `skipped`.
        oversized: The distance where the prediction has over ten times the target's pixels: `worst`, or `measured` as
            any other.

    Raises:
        ValueError: If a value is none of those.
    """

    both_empty: Literal["skipped", "perfect"] = "skipped"
    hausdorff_over: Literal["union", "organ"] = "union"
    direction: Literal["symmetric", "preds_to_target"] = "symmetric"
    points: Literal["voxels", "surface"] = "voxels"
    normaliser: Literal["unit_cube", "volume_diagonal"] = "unit_cube"
    one_empty: Literal["worst", "skipped"] = "worst"
    oversized: Literal["worst", "measured"] = "worst"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(CompetitionRules).items():
            value, known = getattr(self, name), get_args(hint)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


PRESETS = {
    "mle_bench": CompetitionRules(),
    "first_place": CompetitionRules(
        both_empty="perfect",
        hausdorff_over="organ",
        direction="preds_to_target",
        points="surface",
        normaliser="volume_diagonal",
        one_empty="worst",
        oversized="measured",
    ),
}


def hausdorff_distance(preds: np.ndarray, target: np.ndarray, rules: CompetitionRules = PRESETS["mle_bench"]) -> float:
    """Normalised Hausdorff distance of two volumes.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: True mask, same shape.
        rules: What to measure.

    Returns:
        0 to 1; NaN where the rules skip.

    Raises:
        ValueError: If the shapes differ.

    Source: mle-bench, `grade.py` of uw-madison-gi-tract-image-segmentation.

    Example:
        >>> target, preds = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> target[0, 0, 0] = preds[0, 0, 2] = True
        >>> round(hausdorff_distance(preds, target) * math.sqrt(3), 6)  # two of four pixels apart
        0.5
    """
    if preds.shape != target.shape:
        raise ValueError(f"expected volumes of one shape, but got {preds.shape} and {target.shape}")
    shape = np.array(preds.shape)
    preds, target = crop_to_both(preds, target)
    num_preds, num_target = np.count_nonzero(preds), np.count_nonzero(target)
    if not num_preds and not num_target:
        return 0.0 if rules.both_empty == "perfect" else math.nan
    if not num_preds or not num_target:
        return 1.0 if rules.one_empty == "worst" else math.nan
    if rules.oversized == "worst" and num_preds > MAX_SIZE_RATIO * num_target:
        return 1.0
    if rules.normaliser == "unit_cube":
        spacing, diagonal = tuple(1 / shape), math.sqrt(3)
    else:
        spacing, diagonal = (1.0, 1.0, 1.0), math.sqrt((shape**2).sum())
    if rules.points == "surface":
        preds, target = find_surface(preds), find_surface(target)
    ways = [(preds, target), (target, preds)] if rules.direction == "symmetric" else [(preds, target)]
    return max(greatest_distance(*way, spacing) for way in ways) / diagonal
