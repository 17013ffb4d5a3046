"""The scores as an `evaluate` metric: `evaluate.load("gi_segmentation/metrics.py")`, from anywhere.

Its card is model_cards/metric_card.md. The Trainer scores by the same functions.

`evaluate.load` copies this one file into its cache and imports it there. The package that it needs is the
installed one. Where no package is installed, it is the one that the file was copied from.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Hashable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import evaluate
import numpy as np

if TYPE_CHECKING:
    from gi_segmentation.rules import Preset


def find_project() -> Path:
    """Folder that holds the package `gi_segmentation`, where it is not installed.

    `evaluate` notes beside its copy of this file where the file came from: `metrics.json`.

    Raises:
        ImportError: If the note is missing, or the package is no longer where it was.
    """
    note = Path(__file__).with_suffix(".json")
    source = Path(__file__)
    if note.is_file():
        source = Path(json.loads(note.read_text(encoding="utf-8"))["original file path"])
    if not (source.parent / "scoring").is_dir():
        raise ImportError(
            f"expected the package gi_segmentation installed or at {source.parent}, but found neither; "
            f"install it, or load the metric with download_mode='force_redownload'"
        )
    return source.resolve().parents[1]


if importlib.util.find_spec("gi_segmentation") is None:
    sys.path.append(str(find_project()))

# Imported by name: `evaluate.load` refuses a file whose imports it cannot find, before it copies the file.
rules, schema, scans_module = map(
    import_module, ("gi_segmentation.rules", "gi_segmentation.schema", "gi_segmentation.scoring.scans")
)

DESCRIPTION = """\
Scores of large bowel, small bowel and stomach as this task has them: Dice, the mean over (slice, organ) pairs on the
grid of the masks given, pairs without the organ in both skipped; the same over whole scans; and the competition's
score with its 3D Hausdorff distance, each of whose ambiguities is settled by a preset.
"""

INPUTS = """\
Args:
    predictions: One mask per slice: label ids `(height, width)`, or one binary mask per organ
        `(organs, height, width)` in the order large_bowel, small_bowel, stomach.
    references: The truth, likewise; sizes as the predictions', slice by slice.
    scans: Which scan each slice belongs to, any hashable; None takes every slice for a scan of its own.
    slices: Number of each slice in its scan, by which slices are stacked; None stacks them as they come.
    preset: How to read the competition's metric, `mle_bench` or `first_place`; an option of `compute`.

Returns:
    `dice`, `dice_{organ}`, `dice_volume`, `dice_volume_{organ}`, `hausdorff_score`, `competition_dice`,
    `competition_score`: floats in 0 to 1, NaN where there is nothing to score.

Example:
    >>> metric = evaluate.load("gi_segmentation/metrics.py")  # doctest: +SKIP
    >>> metric.compute(predictions=[[[1, 1, 0]]], references=[[[1, 0, 0]]])["dice"]  # doctest: +SKIP
    0.6666666666666666
"""

CITATION = """\
Dice, L. R. (1945). Measures of the amount of ecologic association between species. Ecology 26, 297-302.
The data: Data in Brief 57 (2024) 111159, doi 10.1016/j.dib.2024.111159.
"""


def to_organ_masks(mask: Any) -> np.ndarray:
    """Bring a mask in either of its forms to one binary mask per organ.

    Args:
        mask: Label ids `(height, width)`, or binary masks `(organs, height, width)`.

    Returns:
        bool, shape `(organs, height, width)`.

    Raises:
        ValueError: If the shape is neither, or an id is unknown.
    """
    array = np.asarray(mask)
    if array.ndim == 3 and len(array) == len(schema.ORGANS) and set(np.unique(array)) <= {0, 1}:
        return array.astype(bool)
    if array.ndim != 2 or not np.isin(array, range(len(schema.LABELS))).all():
        values = np.unique(array)[:8].tolist()
        raise ValueError(
            f"expected label ids 0 to {len(schema.LABELS) - 1} of shape (height, width), or binary masks of shape "
            f"({len(schema.ORGANS)}, height, width), but got shape {array.shape} with values {values}"
        )
    return array == np.arange(1, len(schema.LABELS))[:, None, None]


PackedPair: TypeAlias = tuple[tuple[int, ...], np.ndarray]  # shape of prediction and truth, bits of both


def check_slice(
    scan: Hashable, number: Any, shapes: set[tuple[int, ...]], earlier: Sequence[dict[Any, PackedPair]]
) -> None:
    """Make sure that a slice fits those of its scan.

    Raises:
        ValueError: If it has another size, or came before.
    """
    shapes |= {shape for some in earlier for shape, _ in some.values()}
    if len(shapes) > 1:
        sizes = ", ".join(str(shape[1:]) for shape in sorted(shapes))
        raise ValueError(f"expected masks of one shape, as all of scan {scan!r}, but got {sizes}")
    if any(number in some for some in earlier):
        raise ValueError(f"number {number} of scan {scan!r} came before; give each slice once")


class GiTractScores(evaluate.Metric):
    """The scores as an `evaluate` metric, which keeps the masks, eight pixels a byte, until it computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slices: dict[Hashable, dict[Any, PackedPair]] = {}
        self.number = 0

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
            reference_urls=["https://www.kaggle.com/competitions/uw-madison-gi-tract-image-segmentation"],
        )

    def add_batch(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        scans: Sequence[Hashable] | None = None,
        slices: Sequence[int] | None = None,
    ) -> None:
        """Add slices by their masks; see `INPUTS`. Either all are added or, where one is wrong, none.

        Raises:
            ValueError: If the numbers of masks or the shapes of a pair differ, a mask is none, a slice comes twice, or
                slices of a scan differ in size; names the first such slice and how many there are.
        """
        first = self.number
        names = [("slice", first + index) for index in range(len(predictions))] if scans is None else scans
        numbers = range(first, first + len(predictions)) if slices is None else slices
        if not len(predictions) == len(references) == len(names) == len(numbers):
            raise ValueError(
                f"expected as many predictions as references, scans and slices, "
                f"but got {len(predictions)}, {len(references)}, {len(names)} and {len(numbers)}"
            )
        added: dict[Hashable, dict[Any, PackedPair]] = {}
        problems = []
        for index, (scan, number) in enumerate(zip(names, numbers, strict=True)):
            earlier = self.slices.get(scan, {}), added.setdefault(scan, {})
            try:
                pair = to_organ_masks(predictions[index]), to_organ_masks(references[index])
                check_slice(scan, number, {mask.shape for mask in pair}, earlier)
                added[scan][number] = pair[0].shape, np.packbits(np.stack(pair))
            except ValueError as error:
                problems.append(f"slice {index}: {error}")
        if problems:
            raise ValueError(f"{problems[0]} ({len(problems)} of {len(predictions)} slices cannot be used)")
        for scan, members in added.items():
            self.slices.setdefault(scan, {}).update(members)
        self.number += len(predictions)

    def add(self, *, prediction: Any, reference: Any, scan: Hashable = None, slice: int | None = None) -> None:
        """Add one slice by its masks."""
        scans, slices = ([value] if value is not None else None for value in (scan, slice))
        self.add_batch(predictions=[prediction], references=[reference], scans=scans, slices=slices)  # type: ignore[arg-type]

    def compute(
        self,
        *,
        predictions: Sequence[Any] | None = None,
        references: Sequence[Any] | None = None,
        scans: Sequence[Hashable] | None = None,
        slices: Sequence[int] | None = None,
        preset: "Preset" = rules.DEFAULT_PRESET,
    ) -> dict[str, float]:
        """Score the slices added so far and those given here, then start anew.

        Raises:
            ValueError: As `add_batch`, or if only one of predictions and references is given, or no such preset is
                known.
        """
        if preset not in rules.PRESETS:
            raise ValueError(f"expected a preset of {', '.join(rules.PRESETS)}, but got {preset!r}")
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references, scans=scans, slices=slices)
        elif any(given is not None for given in (predictions, references, scans, slices)):
            raise ValueError("expected predictions and references together, or neither; add the missing one")
        scored = []
        for scan, members in self.slices.items():
            pairs = [
                np.unpackbits(bits, count=2 * math.prod(shape)).reshape(2, *shape).astype(bool)
                for _, (shape, bits) in sorted(members.items())
            ]
            preds, target = np.stack(pairs, axis=2)
            scored.append(scans_module.measure_scan(scan, scan, preds, target, rules.PRESETS[preset]))
        self.slices, self.number = {}, 0
        return scans_module.score_scans(scored, rules.PRESETS[preset])
