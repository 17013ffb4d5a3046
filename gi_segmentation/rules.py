"""The choices that the description of the competition's metric leaves open, and presets for them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, get_type_hints


@dataclass(frozen=True)
class CompetitionRules:
    """How to compute the competition's metric where its description leaves a choice. The host's code is not public.

    The defaults are those of mle-bench (`grade.py` of uw-madison-gi-tract-image-segmentation). The preset first_place
    follows the winner's validation code (CarnoZhao/Kaggle-UWMGIT, `monai/metric.py`). There the distance is 1 if
    exactly one mask is empty and 0 if both masks are empty, and a prediction that is too large is measured like any
    other. The winner's training script calls this code with single slices. It uses MONAI's Dice, which skips slices
    without the organ in the truth. The preset differs in these two points: it measures whole scans, as the competition
    does, and a slice that is empty in both masks counts as perfect.

    Attributes:
        both_empty: What happens if both masks are empty, in a slice's organ or in a scan. It is `skipped` in the mean,
            or it counts as `perfect`.
        hausdorff_over: A scan has one distance, of the `union` of its organs, or one distance for each `organ`.
        direction: `symmetric` takes the larger of the distances in both directions; `preds_to_target` takes
            only the distance from the prediction to the target.
        points: Which points of a mask the distance looks at: all `voxels`, or only those of the `surface`. With
            `surface`, a hole deep inside the other mask counts.
        normaliser: `unit_cube` divides coordinates by the shape of the volume, and the distance by √3, the diagonal of
            the cube. `volume_diagonal` divides the distance in voxels by the diagonal of the volume. In both, a slice
            is as thick as a pixel is wide.
        one_empty: The distance if exactly one mask is empty: `worst` is 1; `skipped` leaves it out of the mean.
        oversized: The distance if the prediction has more than ten times as many pixels as the target: `worst` is 1;
            `measured` treats it like any other distance.

    Raises:
        ValueError: If a value is not one of these.
    """

    # Every choice below can change the score. The same predictions have other scores with another preset, so only
    # scores with the same rules can be compared.
    both_empty: Literal["skipped", "perfect"] = "skipped"
    hausdorff_over: Literal["union", "organ"] = "union"
    direction: Literal["symmetric", "preds_to_target"] = "symmetric"
    points: Literal["voxels", "surface"] = "voxels"
    normaliser: Literal["unit_cube", "volume_diagonal"] = "unit_cube"
    one_empty: Literal["worst", "skipped"] = "worst"
    oversized: Literal["worst", "measured"] = "worst"

    def __post_init__(self) -> None:
        # The types state the allowed values, here and for the flags of `gi_segmentation.score`.
        for name, hint in get_type_hints(CompetitionRules).items():
            value, known = getattr(self, name), get_args(hint)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


Preset: TypeAlias = Literal["mle_bench", "first_place"]
PRESETS: dict[Preset, CompetitionRules] = {
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
# The default of every `--preset`, of the model card and of the metric: the rules of the public grader.
DEFAULT_PRESET: Preset = "mle_bench"
DEFAULT_RULES = PRESETS[DEFAULT_PRESET]
