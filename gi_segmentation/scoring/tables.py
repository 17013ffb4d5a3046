"""Scores as tables: one row per scan and organ for a CSV file, and the clinical scores of patients in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gi_segmentation.rules import DEFAULT_RULES, PRESETS, READ_BY_RULES, CompetitionRules
from gi_segmentation.scoring.intervals import Gains, Interval, find_intervals
from gi_segmentation.scoring.scans import ScanScore, average_patients, count_known_scans, find_organs

# With more organs, a table would be too wide to read.
MAX_COLUMNS = 5


def tabulate_scans(scans: Iterable[ScanScore], rules: CompetitionRules = DEFAULT_RULES) -> pd.DataFrame:
    """List all scores of each scan, one row per scan and organ that is known in it.

    Args:
        scans: The scans, in any order.
        rules: How to read the competition's metric.

    Returns:
        A table with the columns `case`, `scan`, `organ` and `slices`; `dice`, the mean over the slices with the organ
        in at least one mask, and `dice_slices`, their number; `volume_dice`; `hausdorff`, the competition's distance;
        and the scores of `clinical.compare_organ` if they were measured.
    """
    rows = []
    for scan in sorted(scans, key=lambda scan: scan.key):
        hausdorff = scan.hausdorff(rules)
        for index, organ in enumerate(scan.organs):
            if organ in scan.unknown:
                continue
            number = scan.dice_numbers[index]
            rows.append(
                {
                    "case": scan.patient,
                    "scan": scan.name,
                    "organ": organ,
                    "slices": scan.num_slices,
                    # Empty in both masks on all slices: there is no Dice, and 0 would be wrong.
                    "dice": scan.dice_sums[index] / number if number else math.nan,
                    "dice_slices": number,
                    "volume_dice": scan.volume_dice[index],
                    # A distance of all organs together is a single number, and is in all rows of its scan.
                    "hausdorff": hausdorff[index if len(hausdorff) > 1 else 0],
                    **(scan.clinical[index] if scan.clinical else {}),
                }
            )
    return pd.DataFrame(rows)


def tabulate_submissions(
    scans: Mapping[str, Sequence[ScanScore]], rules: CompetitionRules = DEFAULT_RULES
) -> pd.DataFrame:
    """List all scores of each scan, see `tabulate_scans`. Several submissions have a column with their name."""
    tables = [tabulate_scans(one, rules) for one in scans.values()]
    if len(tables) == 1:
        return tables[0]
    for name, table in zip(scans, tables, strict=True):
        table.insert(0, "submission", name)
    return pd.concat(tables, ignore_index=True)


def describe_clinical(scans: Sequence[ScanScore]) -> dict[str, Any]:
    """Summarise the clinical scores over patients.

    Args:
        scans: The scans; those without clinical scores are left out.

    Returns:
        - `scores`: by name and organ, `mean`, standard deviation `sd` (with n - 1), number of `patients`, and the
          confidence `interval` of the mean; None if a value does not exist;
        - `scans`: number of scans with clinical scores;
        - `one_sided`: per organ, the number of these scans with the organ in exactly one mask. They have no distance;
        - `known`: per organ, the number of these scans in which it is known. Only there if an organ is unknown in one.
    """
    # A scan with a gap between its slices has no clinical scores.
    measured = [scan for scan in scans if scan.clinical]
    patients, intervals = average_patients(measured), find_intervals(measured)
    organs, known_scans = find_organs(scans), count_known_scans(measured)
    shown = set(patients.index.get_level_values("organ")) if len(patients) else set()
    return {
        "scores": {
            str(name): {
                organ: describe_values(patients.loc[organ, name].dropna().tolist(), intervals[f"{name}_{organ}"])
                for organ in organs
                if organ in shown
            }
            for name in patients.columns
        },
        "scans": len(measured),
        # The means leave out these scans, which are often the worst. So the table must say how many there are.
        "one_sided": {
            organ: sum(math.isnan(scan.clinical[index].get("hausdorff_mm", 0)) for scan in measured)
            for index, organ in enumerate(organs)
        },
        **({"known": known_scans} if min(known_scans.values(), default=0) < len(measured) else {}),
    }


def format_presets(
    scores: Mapping[str, float | None], intervals: Mapping[str, Interval | None], chosen: str, prefix: str = ""
) -> str:
    """Format the competition's score by every preset as a Markdown table; an empty text if a score is missing.

    Earlier versions measured one preset only.

    Args:
        scores: Scores by name, from `scans.score_scans`; None or NaN if there is nothing to score.
        intervals: Their intervals.
        chosen: The preset of the headline number, which is marked.
        prefix: What stands before the names of the scores, such as `eval_`.

    Example:
        >>> scores = {f"{name}_{preset}": 0.5 for name in READ_BY_RULES for preset in PRESETS}
        >>> print(format_presets(scores, dict.fromkeys(scores), "host").splitlines()[-1])
        | **host** | 0.5000 | 0.5000 | 0.5000 |
    """
    keys = {preset: [f"{prefix}{name}_{preset}" for name in READ_BY_RULES] for preset in PRESETS}
    if any(key not in scores for names in keys.values() for key in names):
        return ""
    lines = ["| preset | its Dice | 1 − its distance | competition score |", "|---|---|---|---|"]
    for preset, names in keys.items():
        values = [math.nan if (score := scores[key]) is None else score for key in names]
        cells = [
            "none" if math.isnan(value) else f"{value:.4f}{format_interval(intervals[key], '.3f')}"
            for key, value in zip(names, values, strict=True)
        ]
        lines.append(f"| {f'**{preset}**' if preset == chosen else preset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_by_preset(
    rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, Interval | None]]], heading: str = ""
) -> str:
    """Format the competition scores of several predictions by every preset as a Markdown table.

    Args:
        rows: Scores and intervals of each prediction, from `scans.score_scans` and `intervals.find_intervals`.
        heading: What the predictions are.
    """
    keys = [f"competition_score_{preset}" for preset in PRESETS]
    lines = [f"| {heading} | {' | '.join(f'competition score, {preset}' for preset in PRESETS)} |"]
    lines.append("|---" * (len(keys) + 1) + "|")
    for name, (scores, intervals) in rows.items():
        cells = [f"{scores[key]:.4f}{format_interval(intervals[key], '.3f')}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_values(values: Sequence[float], interval: Interval | None) -> dict[str, Any]:
    """Return mean, standard deviation and number of the patients' scores; None if a value does not exist."""
    # `ddof=1`: the patients are a sample. One patient has no deviation.
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "patients": len(values),
        "interval": interval,
    }


def format_interval(interval: Sequence[float] | None, form: str) -> str:
    """Format an interval in brackets, with a space before it; an empty text for None.

    Example:
        >>> format_interval((0.81, 0.9), ".3f"), format_interval(None, ".3f")
        (' [0.810, 0.900]', '')
    """
    return "" if interval is None else f" [{', '.join(format(end, form) for end in interval)}]"


def format_gains(gains: Gains) -> list[str]:
    """Format the comparison of two predictions of the same scans, a line for each score."""
    lines = [
        f"  {name}: {before:.4f} to {after:.4f}, gain {after - before:+.4f}{format_interval(interval, '+.4f')}"
        for name, (before, after, interval) in gains.items()
    ]
    return [*lines, "a gain whose interval contains 0 may be chance"]


def format_clinical(described: dict[str, Any]) -> str:
    """Format the clinical scores as a Markdown table with a column per organ; several tables if there are many organs.

    Args:
        described: From `describe_clinical`.
    """
    scores = described["scores"]
    # An organ that no patient shows gets no column.
    organs = list(dict.fromkeys(organ for by_organ in scores.values() for organ in by_organ))
    parts = range(0, max(len(organs), 1), MAX_COLUMNS)
    return "\n\n".join(format_part(described, organs[start : start + MAX_COLUMNS]) for start in parts)


def format_part(described: dict[str, Any], organs: Sequence[str]) -> str:
    """Format the clinical scores of some organs, see `format_clinical`."""
    scores = described["scores"]
    head = "mean ± SD over patients [95 % interval of the mean]"
    lines = [f"| {head} | " + " | ".join(organ.replace("_", " ") for organ in organs) + " |"]
    lines.append("|---" * (len(organs) + 1) + "|")
    patients = [max(by_organ[organ]["patients"] for by_organ in scores.values()) for organ in organs]
    for name, by_organ in scores.items():
        # A tenth of a millimetre or millilitre is finer than the voxels. Scores from 0 to 1 need three digits.
        form = ".1f" if name.endswith(("_mm", "_ml")) else ".3f"
        cells: list[str] = []
        for one in (by_organ[organ] for organ in organs):
            spread = "" if one["sd"] is None else f" ± {one['sd']:{form}}"
            mean = "none" if one["mean"] is None else f"{one['mean']:{form}}"
            # The last row has the number of patients with the organ. A score that fewer patients have says so itself.
            fewer = f" ({one['patients']} patients)" if 0 < one["patients"] < patients[len(cells)] else ""
            cells.append(f"{mean}{spread}{format_interval(one['interval'], form)}{fewer}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| patients | {' | '.join(map(str, patients))} |")
    one_sided = [str(described["one_sided"][organ]) for organ in organs]
    lines.append(f"| scans with it in one mask only | {' | '.join(one_sided)} |")
    if "known" in described:
        scored = [f"{described['known'][organ]} of {described['scans']}" for organ in organs]
        lines.append(f"| scans where it is known | {' | '.join(scored)} |")
    return "\n".join(lines)
