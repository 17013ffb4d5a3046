"""The choices that the description of the competition's metric leaves open, and presets for them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, get_type_hints


@dataclass(frozen=True)
class CompetitionRules:
    """How to compute the competition's metric where its description leaves a choice.

    The grader that Kaggle runs is not public. Three sources describe or rebuild parts of it, and each has a preset.

    mle_bench, the default: mle-bench, `grade.py` of uw-madison-gi-tract-image-segmentation. It is a whole grader.

    first_place: the winner's validation code (CarnoZhao/Kaggle-UWMGIT, `monai/metric.py`). There the distance is 1 if
    exactly one mask is empty and 0 if both masks are empty, and a prediction that is too large is measured like any
    other. The winner's training script calls this code with single slices. It uses MONAI's Dice, which skips slices
    without the organ in the truth. The preset differs in these two points: it measures whole scans, as the competition
    does, and a slice that is empty in both masks counts as perfect.

    host: `common.py` of happyharrycn/UW-Madison-GI-Tract-Segmentation-Data-Tools (MIT, first published on 2023-03-21,
    by one of the competition's hosts). Its distance takes one true and one predicted mask, neither of them empty. It
    is the greater one of both directions, between the surfaces that google-deepmind's surface-distance finds. Its
    notes say that Kaggle brings all distances into 0 to 1, takes a Dice of slices in place of the Dice of volumes, and
    ignores what has no ground truth, in both. The notes leave open: whether the distance is of each organ or of all
    together; whether "scan" means a slice in the note on Dice, as in the names of Kaggle's folders; how distances come
    into 0 to 1; and what a missed organ counts. The preset takes each organ, ignores slices and scans, divides by the
    shape as the competition's page says, and takes the worst distance for a missed organ.

    Attributes:
        both_empty: What happens if both masks are empty, in a slice's organ or in a scan. It is `skipped` in the mean,
            or it counts as `perfect`.
        target_empty_slices: What happens to a slice's organ if the truth is empty. `worst`: a prediction there has a
            Dice of 0, and without a prediction `both_empty` decides. `ignored`: the mean leaves it out, whatever is
            predicted there.
        target_empty_scans: What happens to a scan if the truth is empty; with `hausdorff_over` `organ`, to an organ of
            a scan. `worst`: a prediction there has a distance of 1, and without a prediction `both_empty` decides.
            `ignored`: both means leave it out, that of the distances and that of Dice, whatever is predicted there.
        preds_empty: The distance if only the prediction is empty: `worst` is 1; `ignored` leaves it out of the mean.
            (The Dice of a slice is 0 there.)
        hausdorff_over: A scan has one distance, of the `union` of its organs, or one distance for each `organ`.
        direction: `symmetric` takes the larger of the distances in both directions; `preds_to_target` takes
            only the distance from the prediction to the target.
        points: Which points of a mask the distance looks at: all `voxels`; only the voxels of its `surface`; or the
            `corners` of voxels that belong to voxels inside and outside the mask, as surface-distance does. With
            `surface` and `corners`, a hole deep inside the other mask counts.
        normaliser: `unit_cube` divides coordinates by the shape of the volume, and the distance by √3, the diagonal of
            the cube. `volume_diagonal` divides the distance in voxels by the diagonal of the volume. In both, a slice
            is as thick as a pixel is wide.
        oversized: The distance if the prediction has more than ten times as many pixels as the target: `worst` is 1;
            `measured` treats it like any other distance.

    Raises:
        ValueError: If a value is not one of these.
    """

    # Every choice below can change the score. The same predictions have other scores with another preset, so only
    # scores with the same rules can be compared.
    both_empty: Literal["skipped", "perfect"] = "skipped"
    target_empty_slices: Literal["worst", "ignored"] = "worst"
    target_empty_scans: Literal["worst", "ignored"] = "worst"
    preds_empty: Literal["worst", "ignored"] = "worst"
    hausdorff_over: Literal["union", "organ"] = "union"
    direction: Literal["symmetric", "preds_to_target"] = "symmetric"
    points: Literal["voxels", "surface", "corners"] = "voxels"
    normaliser: Literal["unit_cube", "volume_diagonal"] = "unit_cube"
    oversized: Literal["worst", "measured"] = "worst"

    def __post_init__(self) -> None:
        # The types state the allowed values, here and for the flags of `gi_segmentation.score`.
        for name, hint in get_type_hints(CompetitionRules).items():
            value, known = getattr(self, name), get_args(hint)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")

    @property
    def distance(self) -> str:
        """The choices that decide on the distance of masks that are not empty. Records of scans have it as a key.

        Example:
            >>> CompetitionRules(both_empty="perfect").distance
            'union symmetric voxels unit_cube worst'
        """
        return " ".join((self.hausdorff_over, self.direction, self.points, self.normaliser, self.oversized))


Preset: TypeAlias = Literal["mle_bench", "first_place", "host"]
PRESETS: dict[Preset, CompetitionRules] = {
    "mle_bench": CompetitionRules(),
    "first_place": CompetitionRules(
        both_empty="perfect",
        hausdorff_over="organ",
        direction="preds_to_target",
        points="surface",
        normaliser="volume_diagonal",
        oversized="measured",
    ),
    "host": CompetitionRules(
        target_empty_slices="ignored",
        target_empty_scans="ignored",
        hausdorff_over="organ",
        points="corners",
        oversized="measured",
    ),
}
# The scores that depend on the rules. Those by a preset have its name as an ending, as in `competition_score_host`.
READ_BY_RULES = ("competition_dice", "hausdorff_score", "competition_score")
# The default of every `--preset`, of the model card and of the metric: the rules of the public grader.
DEFAULT_PRESET: Preset = "mle_bench"
DEFAULT_RULES = PRESETS[DEFAULT_PRESET]
