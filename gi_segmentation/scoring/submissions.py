"""The scores of a submission file against the outlines by hand."""

import math
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from gi_segmentation.data.kaggle import ID_PATTERN, Annotation, KaggleDataError, find_slices, read_annotations
from gi_segmentation.errors import InputError
from gi_segmentation.rle import RleError, decode
from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.schema import ORGANS, find_voxel_size_mm, scan_name
from gi_segmentation.scoring.clinical import measure_organs
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import ScanScore, measure_scan, score_scans
from gi_segmentation.scoring.tables import format_interval

COMPETITION_SCORES = (
    "dice",
    *(f"dice_{organ}" for organ in ORGANS),
    "hausdorff_score",
    "competition_dice",
    "competition_score",
)
Annotations = dict[str, dict[str, Annotation]]


class SliceGrid(NamedTuple):
    """Size of a slice, and of its pixels where that is asked for: (row mm, column mm)."""

    height: int
    width: int
    pixel_spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScanPair:
    """Truth and prediction of one scan as encodings: slices in order, organs in the order of `ORGANS`.

    `spacing_mm` is the size of a voxel (z, y, x), None where it was not asked for.
    """

    case: int
    name: str
    grid: SliceGrid
    spacing_mm: tuple[float, float, float] | None
    slice_ids: list[str]
    target: list[list[str]]
    preds: list[list[str]]


def decode_volume(pair: ScanPair, slices: list[list[str]], path: Path) -> tuple[np.ndarray, list[str]]:
    """Masks of a scan.

    Args:
        pair: The scan.
        slices: Its `target` or its `preds`.
        path: The file they come from.

    Returns:
        bool, shape `(organs, slices, height, width)`; and a
        sentence for each encoding that does not describe a mask of its slice.
    """
    height, width = pair.grid.height, pair.grid.width
    volume = np.zeros((len(ORGANS), len(slices), height, width), dtype=bool)
    problems = []
    for number, (slice_id, organs) in enumerate(zip(pair.slice_ids, slices, strict=True)):
        for index, rle in enumerate(organs):
            try:
                if rle:
                    volume[index, number] = decode(rle, height, width)
            except RleError as error:
                problems.append(f"{path}: {slice_id} {ORGANS[index]}: {error}")
    return volume, problems


def measure_pair(pair: ScanPair, truth: Path, submission: Path, rules: CompetitionRules) -> ScanScore | list[str]:
    """Score one scan of two files, with clinical scores if the size of its pixels is known; or say what is wrong."""
    target, problems = decode_volume(pair, pair.target, truth)
    preds, more = decode_volume(pair, pair.preds, submission)
    if problems or more:
        return problems + more
    clinical = measure_organs(preds, target, pair.spacing_mm)
    return measure_scan(pair.case, pair.name, preds, target, rules, clinical=clinical)


def read_whole_table(path: Path, rle_column: str) -> Annotations:
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
    raise_first(problems)
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
    sides = ("lacks", truth.keys() - submission.keys()), ("has, unlike the truth,", submission.keys() - truth.keys())
    differences = [f"{what} {len(ids)} slices, the first {min(ids)}" for what, ids in sides if ids]
    if differences:
        raise InputError(f"the submission {' and '.join(differences)}; score the same slices")
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
        name, members = scan_name(case, day), sorted(members)
        ordered = [slice_id for _, slice_id in members]
        grid = grids[ordered[0]]
        if any(grids[slice_id] != grid for slice_id in ordered):
            uneven.append(name)
        numbers = [number for number, _ in members]
        spacing_mm = find_voxel_size_mm(numbers, grid.pixel_spacing) if grid.pixel_spacing else None
        if grid.pixel_spacing and spacing_mm is None:
            broken.append(name)
        target, preds = ([[t[i][organ].rle for organ in ORGANS] for i in ordered] for t in (truth, submission))
        pairs.append(ScanPair(case, name, grid, spacing_mm, ordered, target, preds))
    for names, what in (
        (uneven, "slices of several sizes are no volume; correct the file names"),
        (broken, "slices between its first and last are missing, without which millimetres cannot be measured"),
    ):
        if names:
            raise InputError(f"{names[0]}: {what}" + (f" ({len(names)} such scans)" if names[1:] else ""))
    return pairs


def measure_submission(
    truth: Path,
    submission: Path,
    kaggle_dir: Path | None = None,
    num_proc: int | None = None,
    rules: CompetitionRules = DEFAULT_RULES,
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
        InputError: If either file has problems or they do not fit together; names the first and how many there are.
    """
    annotations = read_whole_table(truth, "segmentation"), read_whole_table(submission, "predicted")
    pairs = pair_scans(*annotations, read_grids(truth, kaggle_dir, clinical))
    workers = max(1, min(num_proc or os.cpu_count() or 1, len(pairs)))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(measure_pair, truth=truth, submission=submission, rules=rules), pairs)
        scored = list(tqdm(results, total=len(pairs), desc="Scoring", unit="scan"))
    raise_first([problem for result in scored if isinstance(result, list) for problem in result])
    return [result for result in scored if isinstance(result, ScanScore)]


def raise_first(problems: list[str]) -> None:
    """Raise the first problem, if there is any, and say how many there are.

    Raises:
        InputError: If there are problems.
    """
    if problems:
        raise InputError(problems[0] + (f" ({len(problems)} problems)" if problems[1:] else ""))


def format_scores(scans: list[ScanScore], rules: CompetitionRules, preset: str) -> str:
    """The scores as lines, each with the interval in which chance may have moved it, under the rules' names."""
    scores, intervals = score_scans(scans, rules), find_intervals(scans, rules)
    lines = [f"preset {preset}: " + ", ".join(f"{name} {value}" for name, value in asdict(rules).items())]
    if any(intervals.values()):
        lines.append(f"in brackets 95 % intervals over {len({scan.patient for scan in scans})} patients")
    for name in COMPETITION_SCORES:
        lines.append(f"{scores[name]:8.4f}  {name}{format_interval(intervals[name], '.4f')}")
    return "\n".join(lines)
