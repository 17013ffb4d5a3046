"""`python -m gi_segmentation.score`: the competition's score of a submission, and the clinic's scores."""

import argparse
import math
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from dataset_builder.kaggle import ID_PATTERN, Annotation, KaggleDataError, find_slices, read_annotations
from gi_segmentation.clinical import format_clinical, score_organ
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.metrics import PREDICTED, TRUE, dice_score, nanmean
from gi_segmentation.rle import RleError, decode
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM
from gi_segmentation.surface import crop_to_both, find_surface, greatest_distance

DICE_WEIGHT, HAUSDORFF_WEIGHT = 0.4, 0.6
MAX_SIZE_RATIO = 10

Annotations = dict[str, dict[str, Annotation]]


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


class SliceGrid(NamedTuple):
    """Size of a slice, and of its pixels where that is asked for: (row mm, column mm)."""

    height: int
    width: int
    pixel_spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScanPair:
    """Truth and prediction of one scan as encodings: slices in order, organs in the order of `ORGANS`."""

    case: int
    name: str
    grid: SliceGrid
    slice_ids: list[str]
    target: list[list[str]]
    preds: list[list[str]]


@dataclass(frozen=True)
class ScanScore:
    """What is known of a scan.

    Attributes:
        dice: Of each slice and organ, shape `(slices, organs)`, NaN where both are empty and that is skipped.
        hausdorff: One distance, or one of each organ.
        clinical: A row per organ, as `clinical.average_patients` takes them; none unless asked for.
    """

    dice: list[list[float]]
    hausdorff: list[float]
    clinical: list[dict[str, float | str]]


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


def decode_volume(pair: ScanPair, slices: list[list[str]], path: Path) -> np.ndarray:
    """Masks of a scan.

    Args:
        pair: The scan.
        slices: Its `target` or its `preds`.
        path: The file they come from.

    Returns:
        bool, shape `(organs, slices, height, width)`.

    Raises:
        RleError: If an encoding is no mask of the slice; names file, slice and organ.
    """
    height, width = pair.grid.height, pair.grid.width
    volume = np.zeros((len(ORGANS), len(slices), height, width), dtype=bool)
    for number, (slice_id, organs) in enumerate(zip(pair.slice_ids, slices, strict=True)):
        for index, rle in enumerate(organs):
            try:
                if rle:
                    volume[index, number] = decode(rle, height, width)
            except RleError as error:
                raise RleError(f"{path}: {slice_id} {ORGANS[index]}: {error}") from error
    return volume


def score_slices(preds: np.ndarray, target: np.ndarray, rules: CompetitionRules) -> list[float]:
    """Dice of each slice of a volume.

    Example:
        >>> empty = np.zeros((1, 2, 2), dtype=bool)
        >>> [score_slices(empty, empty, PRESETS[preset]) for preset in ("mle_bench", "first_place")]
        [[nan], [1.0]]
    """
    dice = []
    for pair in zip(preds, target, strict=True):
        counts = [int(np.count_nonzero(mask)) for mask in (pair[0] & pair[1], *pair)]
        perfect = rules.both_empty == "perfect" and not (counts[PREDICTED] or counts[TRUE])
        dice.append(1.0 if perfect else dice_score(counts))
    return dice


def score_scan(pair: ScanPair, truth: Path, submission: Path, rules: CompetitionRules) -> ScanScore:
    """Score one scan of two files, with clinical scores if the size of its pixels is known."""
    preds, target = decode_volume(pair, pair.preds, submission), decode_volume(pair, pair.target, truth)
    dice = [score_slices(*organ, rules) for organ in zip(preds, target, strict=True)]
    if rules.hausdorff_over == "union":
        hausdorff = [hausdorff_distance(np.any(preds, axis=0), np.any(target, axis=0), rules)]
    else:
        hausdorff = [hausdorff_distance(*organ, rules) for organ in zip(preds, target, strict=True)]
    clinical: list[dict[str, float | str]] = []
    if pair.grid.pixel_spacing is not None:
        spacing_mm = (SLICE_THICKNESS_MM, *pair.grid.pixel_spacing)
        clinical = [
            {"case": pair.case, "scan": pair.name, "organ": organ, **score_organ(*masks, spacing_mm)}
            for organ, masks in zip(ORGANS, zip(preds, target, strict=True), strict=True)
        ]
    return ScanScore([list(organs) for organs in zip(*dice, strict=True)], hausdorff, clinical)


def read_table(path: Path, rle_column: str) -> Annotations:
    """Read truth or submission.

    Raises:
        InputError: If any row has a problem, a slice lacks an organ, or there are no rows; names the first problem
            and their number.
    """
    annotations, problems = read_annotations(path, rle_column)
    problems += [
        f"{path}: {slice_id} has no row for {organ}"
        for slice_id, organs in annotations.items()
        for organ in ORGANS
        if organ not in organs
    ]
    if problems:
        raise InputError(problems[0] + (f" ({len(problems)} problems)" if problems[1:] else ""))
    return annotations


def read_grids(truth: Path, kaggle_dir: Path | None, clinical: bool) -> dict[str, SliceGrid]:
    """Size of each slice, from `kaggle_dir`'s file names or the truth's own columns.

    Args:
        truth: CSV; with the columns `width` and `height` it needs no folder, nor with `spacing_x` and `spacing_y` for
            clinical scores.
        kaggle_dir: Folder with the slices; None looks beside the CSV.
        clinical: Whether the size of pixels is needed.

    Raises:
        InputError: If a column has something else than numbers, a PNG is not named as a slice, a slice has two sizes,
            or pixels have none; names the first slice and how many there are.
    """
    table = pd.read_csv(truth, dtype=str, na_filter=False)
    columns = ["height", "width", *(["spacing_y", "spacing_x"] if clinical else [])]
    grids: dict[str, SliceGrid] = {}
    if kaggle_dir is None and set(columns) <= set(table.columns):
        several = set()
        try:
            for slice_id, *texts in zip(table["id"], *(table[column] for column in columns), strict=True):
                spacing = (float(texts[2]), float(texts[3])) if clinical else None
                grid = SliceGrid(int(texts[0]), int(texts[1]), spacing)
                if grids.setdefault(slice_id, grid) != grid:
                    several.add(slice_id)
        except ValueError as error:
            wanted = "millimetres in spacing_x and spacing_y, " if clinical else ""
            raise InputError(f"{truth}: expected {wanted}pixels in the columns width and height ({error})") from error
        if several:
            raise InputError(f"{truth}: rows of {len(several)} slices disagree on their size, first {min(several)}")
    else:
        slices, problems = find_slices(kaggle_dir or truth.parent)
        if problems:
            raise KaggleDataError(problems)
        for item in slices:
            grids[item.id] = SliceGrid(item.height, item.width, item.pixel_spacing if clinical else None)
    flat = [i for i, grid in grids.items() if not all(0 < side < math.inf for side in grid.pixel_spacing or ())]
    if flat:
        raise InputError(f"{len(flat)} slices have pixels without a size in millimetres, the first {min(flat)}")
    return grids


def pair_scans(truth: Annotations, submission: Annotations, grids: dict[str, SliceGrid]) -> list[ScanPair]:
    """Bring truth and submission together, scan by scan.

    Raises:
        InputError: If their slices differ, a slice's size is unknown, or slices of a scan do not make a volume.
    """
    for what, ids in (
        ("lacks", truth.keys() - submission.keys()),
        ("has, unlike the truth,", submission.keys() - truth.keys()),
    ):
        if ids:
            raise InputError(f"the submission {what} {len(ids)} slices, the first {min(ids)}; score the same slices")
    unknown = truth.keys() - grids.keys()
    if unknown:
        raise InputError(
            f"no image for {len(unknown)} slices, the first {min(unknown)}: its size is needed; name the folder that "
            f"has them with --kaggle_dir"
        )
    scans: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    for slice_id in truth:
        case, day, number = (int(text) for text in ID_PATTERN.fullmatch(slice_id).groups())  # type: ignore[union-attr]
        scans[case, day].append((number, slice_id))
    pairs, uneven, broken = [], [], []
    for (case, day), members in sorted(scans.items()):
        name, members = f"case{case}_day{day}", sorted(members)
        ordered = [slice_id for _, slice_id in members]
        grid = grids[ordered[0]]
        if any(grids[slice_id] != grid for slice_id in ordered):
            uneven.append(name)
        if grid.pixel_spacing and members[-1][0] - members[0][0] >= len(members):
            broken.append(name)
        target, preds = ([[t[i][organ].rle for organ in ORGANS] for i in ordered] for t in (truth, submission))
        pairs.append(ScanPair(case, name, grid, ordered, target, preds))
    for names, what in (
        (uneven, "slices of several sizes are no volume; correct the file names"),
        (broken, "slices between its first and last are missing, without which millimetres cannot be measured"),
    ):
        if names:
            raise InputError(f"{names[0]}: {what}" + (f" ({len(names)} such scans)" if names[1:] else ""))
    return pairs


def competition_score(scans: list[ScanScore]) -> dict[str, float]:
    """Combine the scans' scores.

    Returns:
        `dice` (mean over slices and organs, but for those skipped), `dice_{organ}`, `hausdorff_score` (one
        minus the mean of the distances) and `competition_score`, 0.4 of the first plus 0.6 of the last.
    """
    per_organ = list(zip(*(organs for scan in scans for organs in scan.dice), strict=True))
    dice = nanmean(value for organ in per_organ for value in organ)
    return {
        "dice": dice,
        **{f"dice_{organ}": nanmean(values) for organ, values in zip(ORGANS, per_organ, strict=True)},
        **combine_scores(dice, [distance for scan in scans for distance in scan.hausdorff]),
    }


def combine_scores(dice: float, hausdorff: list[float]) -> dict[str, float]:
    """The competition's score from the mean Dice and the distances.

    Example:
        >>> combine_scores(0.8, [0.1, 0.3])
        {'hausdorff_score': 0.8, 'competition_score': 0.8}
    """
    hausdorff_score = 1 - nanmean(hausdorff)
    score = DICE_WEIGHT * dice + HAUSDORFF_WEIGHT * hausdorff_score
    return {"hausdorff_score": hausdorff_score, "competition_score": score}


def score_scans(
    truth: Path,
    submission: Path,
    kaggle_dir: Path | None = None,
    num_proc: int | None = None,
    rules: CompetitionRules = PRESETS["mle_bench"],
    clinical: bool = False,
) -> list[ScanScore]:
    """Score each scan of a submission.

    Args:
        truth: CSV with `id,class,segmentation`.
        submission: CSV with `id,class,predicted` for the same slices.
        kaggle_dir: Folder with the slices, for their sizes; None looks beside `truth`.
        num_proc: Processes; None takes one per core.
        rules: The competition's, where there is a choice.
        clinical: Whether to add the scores in millimetres.

    Raises:
        InputError: If either file has problems or they do not fit together.
    """
    annotations = read_table(truth, "segmentation"), read_table(submission, "predicted")
    pairs = pair_scans(*annotations, read_grids(truth, kaggle_dir, clinical))
    workers = max(1, min(num_proc or os.cpu_count() or 1, len(pairs)))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(score_scan, truth=truth, submission=submission, rules=rules), pairs)
        return list(tqdm(results, total=len(pairs), desc="Scoring", unit="scan"))


def score_submission(
    truth: Path,
    submission: Path,
    kaggle_dir: Path | None = None,
    num_proc: int | None = None,
    rules: CompetitionRules = PRESETS["mle_bench"],
) -> dict[str, float]:
    """Score a submission as the competition does.

    Args:
        truth: As `score_scans` takes it, and likewise the others.
        submission: Likewise.
        kaggle_dir: Likewise.
        num_proc: Likewise.
        rules: Likewise.

    Returns:
        As `competition_score`.

    Raises:
        InputError: If either file has problems or they do not fit together.
    """
    return competition_score(score_scans(truth, submission, kaggle_dir, num_proc, rules))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score a submission and print the scores."""
    parser = argparse.ArgumentParser("python -m gi_segmentation.score", description=__doc__)
    parser.add_argument("--truth", type=Path, required=True, help="train.csv with the outlines by hand")
    parser.add_argument("--submission", type=Path, required=True, help="submission.csv to score")
    parser.add_argument("--kaggle_dir", type=Path, help="folder with the slices (default: where the truth lies)")
    parser.add_argument("--num_proc", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="mle_bench", help="whose reading of the metric (default: %(default)s)"
    )
    parser.add_argument("--clinical", action="store_true", help="print scores in millimetres too, per organ")
    parser.add_argument("--output", type=Path, help="CSV for them, a row per scan and organ; with --clinical")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not (arguments.clinical and arguments.output.parent.is_dir()):
        raise InputError(f"--output {arguments.output}: expected --clinical beside it, and a folder that exists")
    rules = PRESETS[arguments.preset]
    files = arguments.truth, arguments.submission, arguments.kaggle_dir
    scans = score_scans(*files, arguments.num_proc, rules, arguments.clinical)
    scores = competition_score(scans)
    print(f"preset {arguments.preset}: " + ", ".join(f"{name} {value}" for name, value in asdict(rules).items()))
    for name, value in scores.items():
        print(f"{value:8.4f}  {name}")
    if arguments.clinical:
        rows = pd.DataFrame([row for scan in scans for row in scan.clinical])
        print(format_clinical(rows))
        if arguments.output is not None:
            rows.to_csv(arguments.output, index=False)
    return scores


if __name__ == "__main__":
    with exit_on_input_error():
        main()
