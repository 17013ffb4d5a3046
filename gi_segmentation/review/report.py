"""Write the report of a predicted scan: a JSON file for programs, and an HTML file to look at.

The HTML file is complete in itself: the pictures are in it, and it loads nothing and runs no script.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from gi_segmentation import __version__
from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.files import to_json, write_json, write_text
from gi_segmentation.formats.volumes import read_intensities, read_pixels
from gi_segmentation.review.measures import ScanMeasures, measure_scan, pick_intensity_slices
from gi_segmentation.review.overlays import Panel, draw_outlines
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.review.ranges import FEATURES, TrainingRanges, find_features
from gi_segmentation.review.triage import Triage, sort_scan
from gi_segmentation.schema import COLOURS, ORGANS

# Decimal places of the numbers in the JSON file.
DIGITS = 4
# Number of slices that are shown, and the size of each in inches and pixels per inch.
PICTURES = 12
PICTURE_INCHES, PICTURE_DPI = 3.0, 110
MEANINGS = {
    "good": "Nothing unusual was found. A clinician must still check every contour.",
    "look": "Something is unusual. Look at the reasons below before you use the contours.",
    "fail": "Do not use these contours without correcting them. The scan, or what was predicted, is far from usual.",
}


@dataclass(frozen=True, eq=False)
class ReportedScan:
    """A scan with what was predicted for it, in the orientation of the training, see `formats.volumes`.

    Attributes:
        name: Name of the scan.
        masks: bool, shape `(organs, D, H, W)`.
        probabilities: Probability of each organ, float, same shape.
        spacing_mm: Voxel size (z, y, x) in millimetres.
        numbers: Numbers of the slices, ascending, shape `(D,)`.
        read: Returns the raw intensities of the slice at a position from 0 on, shape `(H, W)`.
        grid: A line on the scan's own grid: size, spacing, and orientation.
        agreement: See `triage.sort_scan`.
    """

    name: str
    masks: np.ndarray
    probabilities: np.ndarray
    spacing_mm: tuple[float, float, float]
    numbers: Sequence[int]
    read: Callable[[int], np.ndarray]
    grid: str = ""
    agreement: Mapping[str, float] | None = None

    @cached_property
    def measured(self) -> ScanMeasures:
        """The measures of the scan."""
        scaled = np.stack([scale_intensity(self.read(place)) for place in pick_intensity_slices(len(self.numbers))])
        return measure_scan(self.masks, scaled, self.spacing_mm, self.numbers, self.probabilities)


def report_on(predicted: PredictedScan) -> ReportedScan:
    """Bring a predicted scan, with probabilities, to the orientation of the training."""
    volume, slices = predicted.volume, predicted.scan.slices
    numbers = [one.number for one in slices]
    # The grid has a slice for each number from the first on. Slices that are missing are left out here.
    places = np.array(numbers) - numbers[0]
    masks, probabilities = (
        np.stack([volume.to_training(organ)[places] for organ in native])
        for native in (predicted.masks, predicted.probabilities)
    )
    # The whole field of view, and not only what the model sees. A volume is read once.
    whole = None if volume.read is None else read_intensities(volume)

    def read(place: int) -> np.ndarray:
        return read_pixels(slices[place]) if whole is None else whole[place]

    return ReportedScan(
        volume.name, masks, probabilities, volume.spacing_mm, numbers, read, volume.describe(), predicted.agreement
    )


def write_report(predicted: PredictedScan, written: Mapping[str, Any], json_path: Path, html_path: Path) -> None:
    """Write the report of a predicted scan, with probabilities, as JSON and HTML.

    Args:
        predicted: The scan.
        written: `files`, by format their `names` or the `reason` for which there are none, and `remarks`.
        json_path: The file for programs.
        html_path: The file to look at.
    """
    scan = report_on(predicted)
    triage = sort_scan(scan.measured, predicted.ranges, scan.agreement)
    report = describe_report(scan, triage, predicted.algorithm.commits, predicted.ranges)
    report |= written
    write_json(json_path, report, ensure_ascii=False)
    write_text(html_path, render_report(report, draw_slices(scan)))


def describe_report(
    scan: ReportedScan, triage: Triage, checkpoints: Mapping[str, str], ranges: TrainingRanges | None
) -> dict[str, Any]:
    """Return the report as it stands in the JSON file. What is not known is None."""
    measured = scan.measured
    organs = {
        organ: {**asdict(one), "agreement": (scan.agreement or {}).get(organ)}
        for organ, one in measured.organs.items()
    }
    features = find_features(measured)
    report = {
        "scan": scan.name,
        "verdict": triage.verdict,
        "reasons": [reason._asdict() for reason in triage.reasons],
        "unchecked": list(triage.unchecked),
        "organs": organs,
        "geometry": {
            "grid": scan.grid,
            "first_slice": scan.numbers[0],
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
        "checkpoints": dict(checkpoints),
        "version": __version__,
    }
    return to_json(report, DIGITS)


def pick_shown_slices(masks: np.ndarray) -> list[int]:
    """Choose the slices to show: evenly among those with an organ, or among all if no organ was found.

    Args:
        masks: bool, shape `(organs, D, H, W)`.

    Returns:
        Their positions.
    """
    shown = np.flatnonzero(masks.any(axis=(0, 2, 3)))
    places = shown if len(shown) else np.arange(masks.shape[1])
    return places[np.unique(np.linspace(0, len(places) - 1, min(len(places), PICTURES)).round().astype(int))].tolist()


def draw_slices(scan: ReportedScan) -> list[tuple[int, str]]:
    """Draw slices with outlines.

    Returns:
        The number of each slice, and its picture as a data URI.
    """
    return [
        (scan.numbers[place], draw_slice(scan.read(place), scan.masks[:, place], scan.spacing_mm))
        for place in pick_shown_slices(scan.masks)
    ]


def draw_slice(image: np.ndarray, masks: np.ndarray, spacing_mm: tuple[float, float, float]) -> str:
    """Draw a slice with outlines, in true proportions, as a data URI."""
    _, row_mm, column_mm = spacing_mm
    height, width = image.shape[0] * row_mm, image.shape[1] * column_mm
    scale = PICTURE_INCHES / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_outlines(axes, Panel(scale_intensity(image), masks, ""))
    # A pixel need not be a square.
    axes.set_aspect(row_mm / column_mm)
    buffer = io.BytesIO()
    # A PNG of a noisy slice is five times as large.
    figure.savefig(buffer, format="jpeg", dpi=PICTURE_DPI, pil_kwargs={"quality": 88})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_report(report: Mapping[str, Any], pictures: Sequence[tuple[int, str]]) -> str:
    """Return the HTML of a report.

    Args:
        report: From `describe_report`.
        pictures: Number and data URI of each slice to show.
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
        colours={
            organ: "#{:02x}{:02x}{:02x}".format(*colour) for organ, colour in zip(ORGANS, COLOURS[1:], strict=True)
        },
        titles={name: feature.title for name, feature in FEATURES.items()},
        units={name: feature.unit for name, feature in FEATURES.items()},
    )
