"""`convert --corrections`: what people changed in the contours that a model has predicted.

The input has the corrected contours, and another folder the predicted ones. Both are drawn on the same scans.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from dataset_builder.convert.listing import format_table
from dataset_builder.convert.plan import Plan, PlannedScan
from dataset_builder.convert.writing import read_masks
from gi_segmentation.formats.dicom.series import FoundSeries
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.scoring.clinical import compare_organ
from gi_segmentation.scoring.drawn_scans import Side, list_side, read_side
from gi_segmentation.scoring.referee import MatchedScan, Matches, match_sides, read_organs

HEADER = (
    "organ", "scans", "changed", "Dice: mean (worst)", "added path length: mean (most)", "volume: before -> after",
    "slices touched",
)  # fmt: skip


class Correction(NamedTuple):
    """What was changed in an organ of a scan.

    Attributes:
        dice: Dice of the prediction with the corrected mask, over the whole scan; NaN if both are empty.
        added_path_mm: Length of the contours that had to be drawn anew, see `scoring.clinical.added_path_length`.
        before_ml: Volume of the prediction.
        after_ml: Volume of the corrected mask.
        touched: Number of slices on which a voxel changed.
        drawn: Number of slices with the organ, before or after.
    """

    dice: float
    added_path_mm: float
    before_ml: float
    after_ml: float
    touched: int
    drawn: int


def describe_corrections(plan: Plan, path: Path, predicted: Path) -> list[str]:
    """Compare the corrected contours of an input with the predicted ones.

    Args:
        plan: The scans of the input, with what is taken of them.
        path: The input, for messages.
        predicted: A folder or a file with what was predicted for them: RTSTRUCT, SEG or NIfTI label maps.

    Returns:
        Lines for the user: a table with a row per organ, and what was left out.

    Raises:
        InputError: If the predictions cannot be read, or are those of other scans.
    """
    # A structure set of the predictions names its series by identifiers. The series lie in the input.
    volumes = [one.scan.volume for one in plan.scans if any(own.kind != "nifti" for own in one.sets)]
    files = list_side("--corrections", predicted)
    before = read_side(files, FoundSeries(volumes, {}, [], {}), "predicted")
    after = Side(path, {one.scan.name: join_structures(one) for one in plan.scans})
    matches = match_sides([after, before], None, "leave_out")
    changes = measure_corrections(matches)
    rows = [HEADER, *(describe_organ(organ, changes[organ]) for organ in matches.organs)]
    # `match_sides` counts patients, whom this table does not.
    notes = [note for note in matches.notes if note.startswith((f"{predicted}: ", f"{path}: "))]
    return [f"corrections of {predicted}:", *notes, *format_table(rows)]


def join_structures(one: PlannedScan) -> StructureSet:
    """Return what is taken of a scan as one structure set, whose structures are the organs."""

    def read(names: Sequence[str]) -> np.ndarray:
        masks = np.zeros((len(names), *one.scan.volume.shape), dtype=bool)
        for mask, organ in zip(masks, names, strict=True):
            for index, own in enumerate(one.sets):
                for _, part in read_masks(own, [name for number, name in one.organs[organ] if number == index]):
                    mask |= part
        return masks

    paths = tuple(path for own in one.sets for path in own.paths)
    return StructureSet(one.scan.volume, one.sets[0].kind, paths, tuple(one.organs), read)


def measure_corrections(matches: Matches) -> dict[str, list[Correction]]:
    """Measure what was changed in each organ of each scan, with a progress bar."""
    changes: dict[str, list[Correction]] = defaultdict(list)
    for scan in tqdm(matches.scans, desc="Comparing", unit="scan"):
        after, before = (partial(read_organs, own, grid=scan.grid) for own in scan.sides)
        for organ in matches.organs:
            # An organ that nobody has drawn in the corrected contours was not looked at.
            if organ in scan.sides[0].organs:
                changes[organ].append(measure_change(before([organ])[0], after([organ])[0], scan))
    return changes


def measure_change(before: np.ndarray, after: np.ndarray, scan: MatchedScan) -> Correction:
    """Measure what was changed in a mask: bool, shape `(D, H, W)` before and after."""
    scores = compare_organ(before, after, scan.grid.spacing_mm)
    touched, drawn = ((mask.any(axis=(1, 2)).sum()) for mask in (before != after, before | after))
    return Correction(
        scores["volume_dice"],
        scores["added_path_length_mm"],
        scores["volume_preds_ml"],
        scores["volume_target_ml"],
        int(touched),
        int(drawn),
    )


def describe_organ(organ: str, changes: Sequence[Correction]) -> tuple[str, ...]:
    """Return the row of an organ.

    Example:
        >>> changes = [Correction(1.0, 0, 200, 200, 0, 30), Correction(0.9, 120.5, 150, 180, 6, 20)]
        >>> describe_organ("stomach", changes)[2:5]
        ('1', '0.950 (0.900)', '60 mm (120 mm)')
        >>> describe_organ("stomach", changes)[5:]
        ('175 ml -> 190 ml (+8.6 %)', '6 of 50')
    """
    dice = [one.dice for one in changes if not np.isnan(one.dice)]
    path = [one.added_path_mm for one in changes]
    before, after = np.mean([(one.before_ml, one.after_ml) for one in changes], axis=0)
    share = f" ({(after - before) / before:+.1%})".replace("%", " %") if before else ""
    return (
        organ,
        str(len(changes)),
        str(sum(one.touched > 0 for one in changes)),
        f"{np.mean(dice):.3f} ({min(dice):.3f})" if dice else "-",
        f"{np.mean(path):.0f} mm ({max(path):.0f} mm)",
        f"{before:.0f} ml -> {after:.0f} ml{share}",
        f"{sum(one.touched for one in changes)} of {sum(one.drawn for one in changes)}",
    )
