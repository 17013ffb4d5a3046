"""The competition's metric where its description leaves a choice: every choice by name, and presets of them all."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, get_type_hints


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
DEFAULT_PRESET: Preset = "mle_bench"  # the public grader's reading
DEFAULT_RULES = PRESETS[DEFAULT_PRESET]
