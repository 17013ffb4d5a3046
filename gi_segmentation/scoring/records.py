"""The scores of single scans in a file, without rounding, so that several runs can be pooled later."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.scoring.scans import ScanScore


def to_json(value: Any) -> Any:
    """Return a value in the types of JSON. JSON has no NaN, so an undefined score becomes null."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [to_json(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def undefined_to_nan(values: Sequence[float | None]) -> tuple[float, ...]:
    """Return scores with NaN in place of null."""
    return tuple(math.nan if value is None else value for value in values)


def write_scans(scans: Sequence[ScanScore], path: Path) -> None:
    """Write the scores of scans as JSON, sorted by patient and scan.

    Args:
        scans: The scans.
        path: The file to write.
    """
    ordered = sorted(scans, key=lambda scan: scan.key)
    text = json.dumps([to_json(asdict(scan)) for scan in ordered], allow_nan=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_scans(path: Path) -> list[ScanScore]:
    """Read what `write_scans` wrote. Every number is the same to the last digit.

    Args:
        path: The file to read.

    Raises:
        InputError: If the file cannot be read, or holds something else.

    Example:
        >>> import tempfile
        >>> nan = math.nan
        >>> scan = ScanScore(7, "case7_day0", 2, (0.1, 0, 0), (1, 0, 0), (0.3, nan, nan), (0.2,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_scans([scan], Path(folder, "scans.json"))
        ...     copy = read_scans(Path(folder, "scans.json"))[0]
        >>> copy.patient, copy.dice_sums, copy.volume_dice
        (7, (0.1, 0, 0), (0.3, nan, nan))
    """
    try:
        return [
            ScanScore(
                **{
                    **fields,
                    "dice_sums": tuple(fields["dice_sums"]),
                    "dice_numbers": tuple(fields["dice_numbers"]),
                    "volume_dice": undefined_to_nan(fields["volume_dice"]),
                    "hausdorff": undefined_to_nan(fields["hausdorff"]),
                    "label_counts": None if fields["label_counts"] is None else np.array(fields["label_counts"]),
                    "clinical": tuple(
                        dict(zip(organ, undefined_to_nan(list(organ.values())), strict=True))
                        for organ in fields["clinical"]
                    ),
                }
            )
            for fields in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: expected the scores of scans as a training writes them, but got {error!r}; run the same "
            f"training command again, it scores the finished run anew"
        ) from error
