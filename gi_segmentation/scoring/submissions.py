"""Score a submission file against the annotations.

Three steps: read both files, pair their slices scan by scan, and measure the scans in several processes. Files with
problems are not scored. The error has the first problem and the number of all.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.annotations import Annotation, read_annotations, read_column_names, read_table
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.label_file import LabelFile, ScanFacts, read_label_file
from gi_segmentation.formats.kaggle.names import ID_PATTERN, KaggleDataError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.processes import count_cores, process_pool
from gi_segmentation.rle import RleError, decode
from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.schema import find_voxel_size_mm, scan_name
from gi_segmentation.scoring.clinical import compare_organs
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import ScanScore, compare_masks, count_known_scans, score_scans
from gi_segmentation.scoring.tables import format_interval, format_presets

# Python's `int` and `float` also accept "1_0", "-3", "nan" and digits of other scripts.
DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,30})?")
# Voxels of a scan, about ten times as many as in the largest scan of the competition. Truth and prediction of three
# organs take 1.6 GB then. A size of 60,000 x 60,000 in the CSV or in a file name would fill the memory.
MAX_SCORED_VOXELS = 2**28
# By slice id and organ.
Annotations = dict[str, dict[str, Annotation]]


class SliceGrid(NamedTuple):
    """Size of a slice in pixels, and of a pixel.

    Scores in millimetres need the size of a pixel, and the competition's scores do not.
    """

    height: int
    width: int
    # Height and width of a pixel in millimetres; None if it is not needed.
    pixel_spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScanPair:
    """Truth and prediction of one scan, as run-length encodings.

    Attributes:
        case: Number of the patient.
        name: Name of the scan.
        grid: Size of all its slices.
        spacing_mm: Voxel size (z, y, x) in millimetres; None if it is not needed.
        organs: Names of the organs.
        slice_ids: Ids of the slices, sorted by number.
        target: True encodings of each slice, in the order of `organs`.
        preds: Predicted encodings of each slice, in the order of `organs`.
        unknown: The organs that are not known in this scan. Their encodings are empty.
    """

    case: int
    name: str
    grid: SliceGrid
    spacing_mm: tuple[float, float, float] | None
    organs: tuple[str, ...]
    slice_ids: list[str]
    target: list[list[str]]
    preds: list[list[str]]
    unknown: tuple[str, ...] = ()


def decode_volume(pair: ScanPair, slices: list[list[str]], path: Path) -> tuple[np.ndarray, list[str]]:
    """Decode the masks of a scan.

    Args:
        pair: The scan.
        slices: Its `target` or its `preds`.
        path: The file of these encodings, for messages.

    Returns:
        Masks, bool, shape `(organs, slices, height, width)`, and a line of text for each encoding that does not fit
        its slice.
    """
    height, width = pair.grid.height, pair.grid.width
    volume = np.zeros((len(pair.organs), len(slices), height, width), dtype=bool)
    problems = []
    for number, (slice_id, encodings) in enumerate(zip(pair.slice_ids, slices, strict=True)):
        for index, rle in enumerate(encodings):
            try:
                # Most encodings are empty, and the volume is empty to begin with.
                if rle:
                    volume[index, number] = decode(rle, height, width)
            except RleError as error:
                problems.append(f"{path}: {slice_id} {pair.organs[index]}: {error}")
    return volume, problems


def measure_pair(pair: ScanPair, truth: Path, submission: Path, rules: CompetitionRules) -> ScanScore | list[str]:
    """Measure one scan, with clinical scores if `spacing_mm` is known, or return the problems of its encodings."""
    # Problems are returned and not raised. An exception in one process would end the others, and the message could not
    # count the problems of all scans.
    target, problems = decode_volume(pair, pair.target, truth)
    preds, more = decode_volume(pair, pair.preds, submission)
    if problems or more:
        return problems + more
    clinical = compare_organs(preds, target, pair.spacing_mm)
    names = pair.case, pair.name, pair.organs
    return compare_masks(*names, preds, target, rules, clinical=clinical, unknown=pair.unknown, presets=True)


def read_labels_of(folder: Path) -> LabelFile:
    """Return what `labels.json` says of a folder in Kaggle's layout, or what holds for Kaggle's own data."""
    return read_label_file(folder) or LabelFile(GI_TRACT, {})


def find_facts(slice_id: str, label_file: LabelFile) -> ScanFacts:
    """Return what is known of the scan of a slice."""
    return label_file.scans.get(slice_id.rpartition("_slice_")[0], ScanFacts())


def read_whole_table(path: Path, rle_column: str, label_file: LabelFile) -> Annotations:
    """Read the truth or a submission. Organs that are not known in a scan need no rows there.

    Raises:
        InputError: If a row has a problem, a slice lacks an organ, or there are no rows. The message has the first
            problem and their number.
    """
    annotations, problems = read_annotations(path, label_file.labels.names, rle_column)
    # A row with a problem is missing in its slice, so these come first.
    raise_first(problems)
    raise_first(
        [
            f"{path}: {slice_id} has no row for {organ}; add one, with an empty encoding if need be"
            for slice_id, organs in annotations.items()
            for organ in label_file.labels.names
            if organ not in organs and organ not in find_facts(slice_id, label_file).unknown
        ]
    )
    return annotations


def read_grids(truth: Path, kaggle_dir: Path | None, clinical: bool) -> dict[str, SliceGrid]:
    """Find the size of each slice, from columns of the truth or from the names of the images.

    Args:
        truth: CSV. Its columns `width` and `height` are used if it has them; for clinical scores it needs `spacing_x`
            and `spacing_y` too. Otherwise the names of the images are used.
        kaggle_dir: Folder with the images, in place of the columns; None: the folder of the CSV.
        clinical: Whether the size of a pixel is needed.

    Raises:
        InputError: If a column has other values than numbers, a PNG does not have the name of a slice, a slice has two
            sizes, or the size of a pixel is not positive. The message has the first slice and their number.
    """
    # An encoding alone does not give the size of its image: "1 3" is three pixels in an image of any size.
    columns = ["height", "width", *(["spacing_y", "spacing_x"] if clinical else [])]
    grids: dict[str, SliceGrid] = {}
    if kaggle_dir is None and set(columns) <= set(read_column_names(truth)):
        several = set()
        try:
            for slice_id, *texts in zip(*read_table(truth, ["id", *columns]), strict=True):
                # A blank line has no id.
                if not slice_id:
                    continue
                if wrong := [text for text in texts if not DECIMAL.fullmatch(text)]:
                    raise ValueError(f"got {wrong[0][:40]!r}")
                spacing = (float(texts[2]), float(texts[3])) if clinical else None
                # A slice has a row for each organ, and all of them must state the same size.
                grid = SliceGrid(int(texts[0]), int(texts[1]), spacing)
                if grids.setdefault(slice_id, grid) != grid:
                    several.add(slice_id)
        except ValueError as error:
            wanted = "millimetres in spacing_x and spacing_y, " if clinical else ""
            raise InputError(
                f"{truth}: expected {wanted}pixels in the columns width and height ({error}); correct the columns"
            ) from error
        if several:
            raise InputError(
                f"{truth}: expected the same size in all rows of a slice, but {len(several)} slices have several "
                f"sizes, the first {min(several)}; correct the columns"
            )
    else:
        slices, problems = find_slices(kaggle_dir or truth.parent)
        if problems:
            raise KaggleDataError(problems)
        for item in slices:
            grids[item.id] = SliceGrid(item.height, item.width, item.pixel_spacing if clinical else None)
    # "nan" and "inf" are floats too, and all comparisons with NaN are false.
    flat = [i for i, grid in grids.items() if not all(0 < side < math.inf for side in grid.pixel_spacing or ())]
    if flat:
        raise InputError(
            f"expected pixels of more than 0 mm, but {len(flat)} slices have others, the first {min(flat)}; correct "
            f"the names of the images, or the columns spacing_x and spacing_y"
        )
    return grids


def pair_scans(
    truth: Annotations, submission: Annotations, grids: dict[str, SliceGrid], label_file: LabelFile
) -> list[ScanPair]:
    """Pair the slices of truth and submission, scan by scan.

    Raises:
        InputError: If they have different slices, the size of a slice is not known, or the slices of a scan do not
            form a volume.
    """
    # A slice that is missing in the submission is an error, and not an empty prediction: most often, the wrong file
    # was given.
    sides = ("lacks", truth.keys() - submission.keys()), ("adds", submission.keys() - truth.keys())
    differences = [f"{what} {len(ids)} slices, the first {min(ids)}" for what, ids in sides if ids]
    if differences:
        raise InputError(
            f"expected the slices of the truth, but the submission {' and '.join(differences)}; "
            f"predict the same slices"
        )
    unknown = truth.keys() - grids.keys()
    if unknown:
        raise InputError(
            f"expected an image of each slice, because its name has the size, but {len(unknown)} slices have none, "
            f"the first {min(unknown)}; name the folder with the images by --kaggle_dir"
        )
    scans: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    for slice_id in truth:
        case, day, number = (int(text) for text in ID_PATTERN.fullmatch(slice_id).groups())  # type: ignore[union-attr]
        # Sorted as numbers below: slices of a file may come in any order, but a volume needs them along z.
        scans[case, day].append((number, slice_id))
    pairs, uneven, absurd, broken = [], [], [], []
    for (case, day), members in sorted(scans.items()):
        name, members = scan_name(case, day), sorted(members)
        ordered = [slice_id for _, slice_id in members]
        grid = grids[ordered[0]]
        if any(grids[slice_id] != grid for slice_id in ordered):
            uneven.append(name)
        if not 0 < grid.height * grid.width * len(ordered) <= MAX_SCORED_VOXELS:
            absurd.append(name)
        # The competition's distance takes slices as neighbours even if slices between them are missing, as the graders
        # do. Distances in millimetres would be wrong there.
        numbers = [number for number, _ in members]
        facts, organs = find_facts(ordered[0], label_file), label_file.labels.names
        size = grid.pixel_spacing
        spacing_mm = find_voxel_size_mm(numbers, size, facts.slice_spacing_mm) if size else None
        if size and spacing_mm is None:
            broken.append(name)
        target, preds = (
            [[t[i][organ].rle if organ not in facts.unknown else "" for organ in organs] for i in ordered]
            for t in (truth, submission)
        )
        pairs.append(ScanPair(case, name, grid, spacing_mm, organs, ordered, target, preds, facts.unknown))
    for names, what in (
        (uneven, "expected slices of one size and spacing, but got several; correct the sizes"),
        (
            absurd,
            f"expected 1 to {MAX_SCORED_VOXELS} voxels, but the sizes of its slices say otherwise; correct the sizes",
        ),
        (
            broken,
            "expected every slice from the first to the last, because scores in millimetres need them, but some are "
            "missing; add them, or score without --clinical",
        ),
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
    """Measure each scan of a submission.

    Args:
        truth: CSV with `id,class,segmentation`. If `labels.json` lies in the folder with the images, its labels, its
            distances between slices and its unknown organs hold; otherwise those of Kaggle's data.
        submission: CSV with `id,class,predicted` for the same slices.
        kaggle_dir: Folder with the images, for their sizes; None: the folder of `truth`.
        num_proc: Number of processes; None: one per core.
        rules: How to measure the competition's distance.
        clinical: Whether to add the scores in millimetres.

    Raises:
        InputError: If a file has problems or the files do not fit together. The message has the first problem and
            their number.
    """
    # Both files are read whole before the first scan is measured, so a mistake shows in seconds and not in minutes.
    label_file = read_labels_of(kaggle_dir or truth.parent)
    annotations = (
        read_whole_table(truth, "segmentation", label_file),
        read_whole_table(submission, "predicted", label_file),
    )
    pairs = pair_scans(*annotations, read_grids(truth, kaggle_dir, clinical), label_file)
    # A scan goes to a process as encodings of some kilobytes. Its masks, tens of megabytes, are made and dropped
    # there.
    workers = max(1, min(num_proc or count_cores(), len(pairs)))
    with process_pool(workers) as pool:
        results = pool.map(partial(measure_pair, truth=truth, submission=submission, rules=rules), pairs)
        measured = list(tqdm(results, total=len(pairs), desc="Scoring", unit="scan"))
    raise_first([problem for result in measured if isinstance(result, list) for problem in result])
    return [result for result in measured if isinstance(result, ScanScore)]


def raise_first(problems: list[str]) -> None:
    """Raise the first problem, if there is one, with the number of problems.

    Raises:
        InputError: If there are problems.
    """
    if problems:
        raise InputError(problems[0] + (f" ({len(problems)} problems)" if problems[1:] else ""))


def format_submission(scans: list[ScanScore], rules: CompetitionRules, preset: str) -> str:
    """Format the scores as text: a line with the rules, and a line for each score with its confidence interval.

    Args:
        scans: The scans of a submission.
        rules: How to read the competition's metric.
        preset: Name of the rules.
    """
    scores, intervals = score_scans(scans, rules), find_intervals(scans, rules)
    lines = [f"preset {preset}: " + ", ".join(f"{name} {value}" for name, value in asdict(rules).items())]
    # With one patient there is no interval, and so no brackets to explain.
    if any(intervals.values()):
        lines.append(f"in brackets 95 % intervals over {len({scan.patient for scan in scans})} patients")
    # An organ that is not known in each scan says in how many it is.
    known = {f"dice_{organ}": number for organ, number in count_known_scans(scans).items()}
    # Scores of whole scans are in the table that `--output` writes.
    for name in ("dice", *known, "hausdorff_score", "competition_dice", "competition_score"):
        fewer = f" (known in {known[name]} of {len(scans)} scans)" if known.get(name, len(scans)) < len(scans) else ""
        lines.append(f"{scores[name]:8.4f}  {name}{format_interval(intervals[name], '.4f')}{fewer}")
    # The same masks by every preset. A choice that replaces one of the preset has no effect here.
    lines += ["", format_presets(scores, intervals, preset)]
    return "\n".join(lines)
