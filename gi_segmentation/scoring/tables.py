"""Scores as tables: a row per scan and organ, and the clinical scores of patients in Markdown."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gi_segmentation.schema import ORGANS
from gi_segmentation.scoring.intervals import Interval, find_intervals
from gi_segmentation.scoring.scans import ScanScore, average_patients


def tabulate_scans(scans: Iterable[ScanScore]) -> pd.DataFrame:
    """All that is known of each scan, a row per scan and organ.

    Returns:
        Columns `case`, `scan`, `organ`, `slices`, `dice` (mean over the slices that have the organ in either mask, of
        which there are `dice_slices`), `volume_dice`, `hausdorff` (the competition's; where it is of all organs
        together, it stands in each row), and those of `clinical.measure_organ` where they were asked for.
    """
    rows = []
    for scan in sorted(scans, key=lambda scan: scan.key):
        for index, organ in enumerate(ORGANS):
            number = scan.dice_numbers[index]
            rows.append(
                {
                    "case": scan.patient,
                    "scan": scan.name,
                    "organ": organ,
                    "slices": scan.num_slices,
                    "dice": scan.dice_sums[index] / number if number else math.nan,
                    "dice_slices": number,
                    "volume_dice": scan.volume_dice[index],
                    "hausdorff": scan.hausdorff[index if len(scan.hausdorff) > 1 else 0],
                    **(scan.clinical[index] if scan.clinical else {}),
                }
            )
    return pd.DataFrame(rows)


def describe_clinical(scans: Sequence[ScanScore]) -> dict[str, Any]:
    """The clinical scores of patients: how they lie, and how sure their mean is.

    Args:
        scans: With clinical scores, all or some of them.

    Returns:
        `scores`: by name and organ the `mean` and `sd` (n − 1) over `patients`, and the mean's `interval`; None where
        there is none. `scans`: how many were measured. `one_sided`: per organ how many of them have it in one mask
        only, and thus no distance.
    """
    measured = [scan for scan in scans if scan.clinical]
    patients, intervals = average_patients(measured), find_intervals(measured)
    known = set(patients.index.get_level_values("organ")) if len(patients) else set()
    return {
        "scores": {
            str(name): {
                organ: describe_values(patients.loc[organ, name].dropna().tolist(), intervals[f"{name}_{organ}"])
                for organ in ORGANS
                if organ in known
            }
            for name in patients.columns
        },
        "scans": len(measured),
        "one_sided": {
            organ: sum(math.isnan(scan.clinical[index]["hausdorff_mm"]) for scan in measured)
            for index, organ in enumerate(ORGANS)
        },
    }


def describe_values(values: Sequence[float], interval: Interval | None) -> dict[str, Any]:
    """Mean, standard deviation and number of patients' scores; None where they have none."""
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "patients": len(values),
        "interval": interval,
    }


def format_interval(interval: Sequence[float] | None, form: str) -> str:
    """An interval in brackets, after a blank; nothing where there is none.

    Example:
        >>> format_interval((0.81, 0.9), ".3f"), format_interval(None, ".3f")
        (' [0.810, 0.900]', '')
    """
    return "" if interval is None else f" [{', '.join(format(end, form) for end in interval)}]"


def format_clinical(described: dict[str, Any]) -> str:
    """A Markdown table of the clinical scores, a column per organ.

    Args:
        described: From `describe_clinical`.
    """
    scores = described["scores"]
    organs = [organ for organ in ORGANS if any(organ in by_organ for by_organ in scores.values())]
    head = "mean ± SD over patients [95 % interval of the mean]"
    lines = [f"| {head} | " + " | ".join(organ.replace("_", " ") for organ in organs) + " |"]
    lines.append("|---" * (len(organs) + 1) + "|")
    patients = [max(by_organ[organ]["patients"] for by_organ in scores.values()) for organ in organs]
    for name, by_organ in scores.items():
        form = ".1f" if name.endswith(("_mm", "_ml")) else ".3f"
        cells: list[str] = []
        for one in (by_organ[organ] for organ in organs):
            spread = "" if one["sd"] is None else f" ± {one['sd']:{form}}"
            mean = "none" if one["mean"] is None else f"{one['mean']:{form}}"
            fewer = f" ({one['patients']} patients)" if 0 < one["patients"] < patients[len(cells)] else ""
            cells.append(f"{mean}{spread}{format_interval(one['interval'], form)}{fewer}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| patients | {' | '.join(map(str, patients))} |")
    one_sided = [str(described["one_sided"][organ]) for organ in organs]
    lines.append(f"| scans with it in one mask only | {' | '.join(one_sided)} |")
    return "\n".join(lines)
