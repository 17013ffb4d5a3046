"""Write the report of a predicted scan: a JSON file for programs, and an HTML file to look at.

The HTML file is complete in itself: the pictures are in it, and it loads nothing and runs no script.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from gi_segmentation import __version__
from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.files import to_json, write_json, write_text
from gi_segmentation.labels import LabelSet
from gi_segmentation.review.overlays import Panel, draw_outlines
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.review.ranges import find_features, list_features

# Decimal places of the numbers in the JSON file.
DIGITS = 4
# Number of slices that are shown, and the size of each in inches and pixels per inch.
NUM_PICTURES = 12
PICTURE_INCHES, PICTURE_DPI = 3.0, 110
# With more organs, a table takes the place of the cards.
MAX_CARDS = 8
# From this share of white on (luma), a colour needs a rim on white paper.
BRIGHT = 0.8
MEANINGS = {
    "good": "Nothing unusual was found. A clinician must still check every contour.",
    "look": "Something is unusual. Look at the reasons below before you use the contours.",
    "fail": "Do not use these contours without correcting them. The scan, or what was predicted, is far from usual.",
}


def write_report(predicted: PredictedScan, written: Mapping[str, Any], json_path: Path, html_path: Path) -> None:
    """Write the report of a predicted scan, with probabilities, as JSON and HTML.

    Args:
        predicted: The scan.
        written: `files`, by format their `names` or the `reason` for which there are none, and `remarks`.
        json_path: The file for programs.
        html_path: The file to look at.
    """
    report = {**describe_report(predicted), **written}
    write_json(json_path, report, ensure_ascii=False)
    write_text(html_path, render_report(report, draw_slices(predicted), predicted.labels))


def describe_report(predicted: PredictedScan) -> dict[str, Any]:
    """Return the report as it stands in the JSON file. What is not known is None."""
    measured, triage, ranges = predicted.measured, predicted.triage, predicted.ranges
    organs = {
        organ: {**asdict(one), "agreement": (predicted.agreement or {}).get(organ)}
        for organ, one in measured.organs.items()
    }
    features = find_features(measured)
    report = {
        "scan": predicted.volume.name,
        "verdict": triage.verdict,
        "reasons": [reason._asdict() for reason in triage.reasons],
        "unchecked": list(triage.unchecked),
        "organs": organs,
        "geometry": {
            "grid": predicted.volume.describe(),
            "first_slice": predicted.numbers[0],
            "shape": measured.shape,
            "spacing_mm": measured.spacing_mm,
            "field_mm": measured.field_mm,
            "missing_slices": measured.missing_slices,
        },
        "intensities": dict(measured.intensities),
        "training": None
        if ranges is None
        else {
            "scans": ranges.scans,
            "features": {
                name: {"value": features[name], "low": low, "high": high}
                for name, (low, high) in ranges.ranges.items()
            },
        },
        "checkpoints": dict(predicted.algorithm.commits),
        "version": __version__,
    }
    return to_json(report, DIGITS)


def pick_shown_slices(masks: Sequence[np.ndarray]) -> list[int]:
    """Choose the slices to show: evenly among those with an organ, or among all if no organ was found.

    Args:
        masks: The masks of each slice: bool, shape `(organs, H, W)`.

    Returns:
        Their positions.
    """
    shown = np.flatnonzero([one.any() for one in masks])
    places = shown if len(shown) else np.arange(len(masks))
    return places[
        np.unique(np.linspace(0, len(places) - 1, min(len(places), NUM_PICTURES)).round().astype(int))
    ].tolist()


def draw_slices(predicted: PredictedScan) -> list[tuple[int, str]]:
    """Draw slices with outlines.

    Returns:
        The number of each slice, and its picture as a data URI.
    """
    masks = predicted.in_whole_field(predicted.slice_masks)
    return [
        (predicted.numbers[place], draw_slice(predicted, predicted.read_slice(place), masks[place]))
        for place in pick_shown_slices(masks)
    ]


def draw_slice(predicted: PredictedScan, image: np.ndarray, masks: np.ndarray) -> str:
    """Draw a slice of a scan with outlines, in true proportions, as a data URI."""
    _, row_mm, column_mm = predicted.volume.spacing_mm
    height, width = image.shape[0] * row_mm, image.shape[1] * column_mm
    scale = PICTURE_INCHES / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_outlines(axes, Panel(scale_intensity(image), masks, ""), predicted.labels)
    # A pixel need not be a square.
    axes.set_aspect(row_mm / column_mm)
    buffer = io.BytesIO()
    # A PNG of a noisy slice is five times as large.
    figure.savefig(buffer, format="jpeg", dpi=PICTURE_DPI, pil_kwargs={"quality": 88})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_report(report: Mapping[str, Any], pictures: Sequence[tuple[int, str]], labels: LabelSet) -> str:
    """Return the HTML of a report.

    Args:
        report: From `describe_report`.
        pictures: Number and data URI of each slice to show.
        labels: The names of the organs, and their colours.
    """
    # `autoescape` makes text of the files harmless: a name of a scan may hold markup.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("gi_segmentation.review").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        report=report,
        pictures=pictures,
        meaning=MEANINGS[report["verdict"]],
        colours={organ: describe_colour(colour) for organ, colour in zip(labels.names, labels.colours, strict=True)},
        features=list_features(labels.names),
        as_table=len(labels) > MAX_CARDS,
    )


def describe_colour(colour: tuple[int, int, int]) -> str:
    """Return a colour for a style of the page. A bright one gets a rim.

    Example:
        >>> describe_colour((0, 158, 115)), describe_colour((255, 255, 255))
        ('#009e73', '#ffffff;box-shadow:0 0 0 1px #8995a3')
    """
    red, green, blue = colour
    rim = ";box-shadow:0 0 0 1px #8995a3" if 0.299 * red + 0.587 * green + 0.114 * blue > BRIGHT * 255 else ""
    return f"#{red:02x}{green:02x}{blue:02x}{rim}"
