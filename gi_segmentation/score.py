"""`python -m gi_segmentation.score`: the competition's score of a submission, as mle-bench computes it."""

import argparse
import math
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import distance_transform_edt, find_objects
from tqdm.auto import tqdm

from dataset_builder.kaggle import ID_PATTERN, Annotation, KaggleDataError, find_slices, read_annotations
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.metrics import count_pixels, dice_score, nanmean
from gi_segmentation.rle import RleError, decode
from gi_segmentation.schema import ORGANS

DICE_WEIGHT, HAUSDORFF_WEIGHT = 0.4, 0.6
MAX_SIZE_RATIO = 10

Annotations = dict[str, dict[str, Annotation]]


@dataclass(frozen=True)
class ScanPair:
    """Truth and prediction of one scan as encodings: slices in order, organs in the order of `ORGANS`."""

    name: str
    image_size: tuple[int, int]  # (height, width)
    slice_ids: list[str]
    target: list[list[str]]
    preds: list[list[str]]


@dataclass(frozen=True)
class ScanScore:
    """Dice of each slice and organ, shape `(slices, organs)`, NaN where both are empty; and the scan's distance."""

    dice: list[list[float]]
    hausdorff: float


def hausdorff_distance(preds: np.ndarray, target: np.ndarray) -> float:
    """Normalised symmetric Hausdorff distance of two volumes.

    Coordinates are divided by the volume's shape, the distance by the diagonal of the unit cube.

    Args:
        preds: Predicted mask, bool, shape `(D, H, W)`.
        target: True mask, same shape.

    Returns:
        0 to 1; NaN where both are empty; 1 where one is, or where `preds` has more than ten times the pixels.

    Source: mle-bench, `grade.py` of uw-madison-gi-tract-image-segmentation.

    Example:
        >>> target, preds = np.zeros((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
        >>> target[0, 0, 0] = preds[0, 0, 2] = True
        >>> round(hausdorff_distance(preds, target) * math.sqrt(3), 6)  # two of four pixels apart
        0.5
    """
    num_preds, num_target = np.count_nonzero(preds), np.count_nonzero(target)
    if not num_preds and not num_target:
        return math.nan
    if not num_preds or not num_target or num_preds > MAX_SIZE_RATIO * num_target:
        return 1.0
    sampling = [1 / size for size in preds.shape]
    box = find_objects((preds | target).astype(np.int8))[0]  # the nearest pixel of either lies within
    preds, target = preds[box], target[box]
    distance = max(
        float(distance_transform_edt(~target, sampling=sampling)[preds].max()),
        float(distance_transform_edt(~preds, sampling=sampling)[target].max()),
    )
    return distance / math.sqrt(3)


def decode_volume(pair: ScanPair, slices: list[list[str]], path: Path) -> np.ndarray:
    """Masks of a scan.

    Args:
        pair: The scan.
        slices: Its `target` or its `preds`.
        path: The file they come from.

    Returns:
        bool, shape `(slices, organs, height, width)`.

    Raises:
        RleError: If an encoding is no mask of the slice; names file, slice and organ.
    """
    volume = np.zeros((len(slices), len(ORGANS), *pair.image_size), dtype=bool)
    for masks, slice_id, organs in zip(volume, pair.slice_ids, slices, strict=True):
        for index, rle in enumerate(organs):
            try:
                masks[index] = decode(rle, *pair.image_size)
            except RleError as error:
                raise RleError(f"{path}: {slice_id} {ORGANS[index]}: {error}") from error
    return volume


def score_scan(pair: ScanPair, truth: Path, submission: Path) -> ScanScore:
    """Score one scan of two files; the Hausdorff distance is taken over all organs together."""
    preds, target = decode_volume(pair, pair.preds, submission), decode_volume(pair, pair.target, truth)
    counts = np.stack(count_pixels(preds, target), axis=-1).tolist()
    dice = [[dice_score(organ) for organ in organs] for organs in counts]
    return ScanScore(dice, hausdorff_distance(np.any(preds, axis=1), np.any(target, axis=1)))


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


def read_image_sizes(truth: Path, kaggle_dir: Path | None) -> dict[str, tuple[int, int]]:
    """Size (height, width) of each slice: from `kaggle_dir`'s file names, or the truth's own columns.

    Args:
        truth: CSV; with the columns `width` and `height` it needs no folder.
        kaggle_dir: Folder with the slices; None looks beside the CSV.

    Raises:
        InputError: If a column has something else than whole numbers, or a PNG is not named as a slice.
    """
    table = pd.read_csv(truth, dtype=str, na_filter=False)
    if kaggle_dir is None and {"width", "height"} <= set(table.columns):
        rows = zip(table["id"], table["height"], table["width"], strict=True)
        try:
            return {slice_id: (int(height), int(width)) for slice_id, height, width in rows}
        except ValueError as error:
            raise InputError(f"{truth}: expected pixels in the columns width and height ({error})") from error
    slices, problems = find_slices(kaggle_dir or truth.parent)
    if problems:
        raise KaggleDataError(problems)
    return {slice_file.id: (slice_file.height, slice_file.width) for slice_file in slices}


def pair_scans(truth: Annotations, submission: Annotations, sizes: dict[str, tuple[int, int]]) -> list[ScanPair]:
    """Bring truth and submission together, scan by scan.

    Raises:
        InputError: If their slices differ, a slice's size is unknown, or a scan has slices of two sizes.
    """
    for what, ids in (
        ("lacks", truth.keys() - submission.keys()),
        ("has, unlike the truth,", submission.keys() - truth.keys()),
    ):
        if ids:
            raise InputError(f"the submission {what} {len(ids)} slices, the first {min(ids)}; score the same slices")
    unknown = truth.keys() - sizes.keys()
    if unknown:
        raise InputError(
            f"no image for {len(unknown)} slices, the first {min(unknown)}: its size is needed; name the folder that "
            f"has them with --kaggle_dir"
        )
    scans: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    for slice_id in truth:
        case, day, number = (int(text) for text in ID_PATTERN.fullmatch(slice_id).groups())  # type: ignore[union-attr]
        scans[case, day].append((number, slice_id))
    pairs = []
    for (case, day), members in sorted(scans.items()):
        ordered = [slice_id for _, slice_id in sorted(members)]
        if len({sizes[slice_id] for slice_id in ordered}) > 1:
            raise InputError(f"case{case}_day{day}: slices of several sizes are no volume; correct the file names")
        target, preds = ([[t[i][organ].rle for organ in ORGANS] for i in ordered] for t in (truth, submission))
        pairs.append(ScanPair(f"case{case}_day{day}", sizes[ordered[0]], ordered, target, preds))
    return pairs


def competition_score(scans: list[ScanScore]) -> dict[str, float]:
    """Combine the scans' scores.

    Returns:
        `dice` (mean over slices and organs where either mask has a pixel), `dice_{organ}`, `hausdorff_score` (one
        minus the mean distance of the scans) and `competition_score`, 0.4 of the first plus 0.6 of the last.
    """
    per_organ = list(zip(*(organs for scan in scans for organs in scan.dice), strict=True))
    dice = nanmean(value for organ in per_organ for value in organ)
    return {
        "dice": dice,
        **{f"dice_{organ}": nanmean(values) for organ, values in zip(ORGANS, per_organ, strict=True)},
        **combine_scores(dice, [scan.hausdorff for scan in scans]),
    }


def combine_scores(dice: float, hausdorff: list[float]) -> dict[str, float]:
    """The competition's score from the mean Dice and the distance of each scan.

    Example:
        >>> combine_scores(0.8, [0.1, 0.3])
        {'hausdorff_score': 0.8, 'competition_score': 0.8}
    """
    hausdorff_score = 1 - nanmean(hausdorff)
    score = DICE_WEIGHT * dice + HAUSDORFF_WEIGHT * hausdorff_score
    return {"hausdorff_score": hausdorff_score, "competition_score": score}


def score_submission(
    truth: Path, submission: Path, kaggle_dir: Path | None = None, num_proc: int | None = None
) -> dict[str, float]:
    """Score a submission.

    Args:
        truth: CSV with `id,class,segmentation`.
        submission: CSV with `id,class,predicted` for the same slices.
        kaggle_dir: Folder with the slices, for their sizes; None looks beside `truth`.
        num_proc: Processes; None takes one per core.

    Returns:
        As `competition_score`.

    Raises:
        InputError: If either file has problems or they do not fit together.
    """
    pairs = pair_scans(
        read_table(truth, "segmentation"), read_table(submission, "predicted"), read_image_sizes(truth, kaggle_dir)
    )
    workers = max(1, min(num_proc or os.cpu_count() or 1, len(pairs)))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(score_scan, truth=truth, submission=submission), pairs)
        return competition_score(list(tqdm(results, total=len(pairs), desc="Scoring", unit="scan")))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Score a submission and print the scores."""
    parser = argparse.ArgumentParser("python -m gi_segmentation.score", description=__doc__)
    parser.add_argument("--truth", type=Path, required=True, help="train.csv with the outlines by hand")
    parser.add_argument("--submission", type=Path, required=True, help="submission.csv to score")
    parser.add_argument("--kaggle_dir", type=Path, help="folder with the slices (default: where the truth lies)")
    parser.add_argument("--num_proc", type=int, help="processes (default: one per core)")
    arguments = parser.parse_args(argv)
    scores = score_submission(arguments.truth, arguments.submission, arguments.kaggle_dir, arguments.num_proc)
    print("preset mle_bench: both-empty pairs skipped, Hausdorff over all organs together, symmetric")
    for name, value in scores.items():
        print(f"{value:8.4f}  {name}")
    return scores


if __name__ == "__main__":
    with exit_on_input_error():
        main()
