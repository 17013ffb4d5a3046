"""The scores of single scans in a file, without rounding, so that several runs can be pooled later."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.files import to_json, write_json
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.scoring.scans import ScanScore


def undefined_to_nan(values: Sequence[float | None]) -> tuple[float, ...]:
    """Return scores with NaN in place of null."""
    return tuple(math.nan if value is None else value for value in values)


def write_scan_scores(scans: Mapping[str, Sequence[ScanScore]], path: Path) -> None:
    """Write the scores of scans as JSON, sorted by patient and scan.

    Args:
        scans: The scans by the way they were predicted, for example `eval` and `eval_flips`.
        path: The file to write.
    """
    ordered = {way: sorted(members, key=lambda scan: scan.key) for way, members in scans.items()}
    records = {way: [to_json(asdict(scan)) for scan in members] for way, members in ordered.items()}
    write_json(path, records, indent=1)


def parse_record(fields: dict[str, Any]) -> ScanScore:
    """Return one scan from its record."""
    if "distances" not in fields:
        # A single distance is not enough for all presets, and nothing in the file tells by which one it was measured.
        raise ValueError("the scores of an earlier version, which measured the distance of one preset only")
    counts, clinical = fields["label_counts"], fields["clinical"]
    values = {
        # Earlier versions knew Kaggle's organs only, and did not write their names.
        "organs": tuple(fields.get("organs", GI_TRACT.names)),
        "unknown": tuple(fields.get("unknown", ())),
        "dice_sums": tuple(fields["dice_sums"]),
        "dice_numbers": tuple(fields["dice_numbers"]),
        "volume_dice": undefined_to_nan(fields["volume_dice"]),
        "preds_slices": tuple(fields["preds_slices"]),
        "target_slices": tuple(fields["target_slices"]),
        "distances": {way: undefined_to_nan(distances) for way, distances in fields["distances"].items()},
        "label_counts": None if counts is None else np.array(counts),
        "clinical": tuple(dict(zip(organ, undefined_to_nan(list(organ.values())), strict=True)) for organ in clinical),
    }
    return ScanScore(**{**fields, **values})


def read_scan_scores(path: Path) -> dict[str, list[ScanScore]]:
    """Read what `write_scan_scores` wrote. Every number is the same to the last digit.

    Args:
        path: The file to read.

    Raises:
        InputError: If the file cannot be read, or holds something else.

    Example:
        >>> import tempfile
        >>> nan = math.nan
        >>> scan = ScanScore(7, "case7_day0", ("liver", "spleen"), 2, (0.1, 0), (1, 0), (0.3, nan), (1, 0), (1, 0), {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_scan_scores({"eval": [scan]}, Path(folder, "scans.json"))
        ...     copy = read_scan_scores(Path(folder, "scans.json"))["eval"][0]
        >>> copy.patient, copy.dice_sums, copy.volume_dice
        (7, (0.1, 0), (0.3, nan))
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {way: [parse_record(fields) for fields in members] for way, members in records.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: expected the scores of scans as a training writes them, but got {error!r}; run the same "
            f"training command again, it scores the finished run anew"
        ) from error
