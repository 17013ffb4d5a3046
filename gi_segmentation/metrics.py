"""The scores as a metric for `evaluate`: `evaluate.load("gi_segmentation/metrics.py")`.

The metric uses the same functions as the training. Its card is model_cards/metric_card.md.

`evaluate.load` copies this one file into its cache and imports the copy. The copy needs the package `gi_segmentation`:
the installed one or, if it is not installed, the one next to the original file.
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
    """Find the folder with the package `gi_segmentation`, if it is not installed.

    Raises:
        ImportError: If the package is no longer where it was.
    """
    # Beside its copy `metrics.py`, `evaluate` writes `metrics.json` with the path of the original file. Without this
    # note, this file is the original.
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

# `evaluate.load` looks for `import` lines in this file, and refuses it if a package is not installed. It does not see
# these imports, which work even if the package is only next to the original file.
rules, labels_module, scans_module = map(
    import_module, ("gi_segmentation.rules", "gi_segmentation.labels", "gi_segmentation.scoring.scans")
)

DESCRIPTION = """\
Scores of organs, by default large bowel, small bowel and stomach: Dice, the mean over pairs of slice and organ,
without the pairs that are empty in both masks; Dice over whole scans; and the score of the Kaggle competition with its
3D Hausdorff distance. A preset settles what the description of the competition leaves open. The scores are computed on
the grid of the masks.
"""

INPUTS = """\
Args:
    predictions: One mask per slice: label ids of shape `(height, width)`, or binary masks of shape
        `(organs, height, width)`. The names of the organs, in their order, are the argument `labels` of
        `evaluate.load`; without it they are large_bowel, small_bowel, stomach.
    references: The true masks in the same form. Each has the size of its prediction.
    scans: Name of the scan of each slice, any hashable value; None: every slice is a scan of its own.
    slices: Number of each slice in its scan. Slices are stacked in this order; None: in the order in which they come.
    preset: How to read the competition's metric, `mle_bench`, `first_place` or `host`. Only `compute` takes it.

Returns:
    `dice`, `dice_{organ}`, `dice_volume`, `dice_volume_{organ}`, `hausdorff_score`, `competition_dice`,
    `competition_score`, and the last three by every preset, such as `competition_score_host`: floats in 0 to 1; NaN if
    there is nothing to score.

Example:
    >>> metric = evaluate.load("gi_segmentation/metrics.py")  # doctest: +SKIP
    >>> metric.compute(predictions=[[[1, 1, 0]]], references=[[[1, 0, 0]]])["dice"]  # doctest: +SKIP
    0.6666666666666666
"""

CITATION = """\
Dice, L. R. (1945). Measures of the amount of ecologic association between species. Ecology 26, 297-302.
The data: Data in Brief 57 (2024) 111159, doi 10.1016/j.dib.2024.111159.
"""


def to_organ_masks(mask: Any, num_organs: int) -> np.ndarray:
    """Turn a mask in one of its two forms into one binary mask per organ.

    Args:
        mask: Label ids `(height, width)`, or binary masks `(organs, height, width)`.
        num_organs: The number of organs.

    Returns:
        bool, shape `(organs, height, width)`.

    Raises:
        ValueError: If the mask has neither form, or a label id is unknown.
    """
    # Masks of organs have the values 0 and 1 only. Three axes with other values are most likely a stack of slices with
    # label ids. It is refused, because a mask here is one slice.
    array = np.asarray(mask)
    if array.ndim == 3 and len(array) == num_organs and set(np.unique(array)) <= {0, 1}:
        return array.astype(bool)
    if array.ndim != 2 or not np.isin(array, range(num_organs + 1)).all():
        values = np.unique(array)[:8].tolist()
        raise ValueError(
            f"expected label ids 0 to {num_organs} of shape (height, width), or binary masks of shape "
            f"({num_organs}, height, width), but got shape {array.shape} with values {values}"
        )
    return array == np.arange(1, num_organs + 1)[:, None, None]


# The shape of prediction and truth, and the bits of both.
PackedPair: TypeAlias = tuple[tuple[int, ...], np.ndarray]


def check_fits_scan(
    scan: Hashable, number: Any, shapes: set[tuple[int, ...]], earlier: Sequence[dict[Any, PackedPair]]
) -> None:
    """Check that a slice fits the other slices of its scan.

    Args:
        scan: Name of the scan, for messages.
        number: Number of the slice.
        shapes: The shapes of its prediction and its truth.
        earlier: The slices of the scan so far: from earlier calls, and from this call.

    Raises:
        ValueError: If it has another size, or if it was added before.
    """
    shapes |= {shape for some in earlier for shape, _ in some.values()}
    # A volume needs slices of one size.
    if len(shapes) > 1:
        sizes = ", ".join(str(shape[1:]) for shape in sorted(shapes))
        raise ValueError(f"expected masks of one shape, as all of scan {scan!r}, but got {sizes}")
    if any(number in some for some in earlier):
        raise ValueError(f"number {number} of scan {scan!r} was added before; add each slice once")


class GiTractScores(evaluate.Metric):
    """The metric. It keeps the masks with eight pixels per byte until it computes the scores.

    Args:
        labels: Names of the organs; None: those of Kaggle.

    Raises:
        InputError: If a name cannot be used.
    """

    # `evaluate.Metric` would write all masks to a file as lists of numbers, and would take only one form of masks. So
    # `add_batch`, `add` and `compute` are written for this metric.

    def __init__(self, *args: Any, labels: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.organs = labels_module.GI_TRACT.names if labels is None else labels_module.LabelSet(tuple(labels)).names
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
        """Add the masks of slices. If one slice is wrong, no slice is added.

        Args:
            predictions: See `INPUTS`, as for all arguments.
            references: The true masks.
            scans: Name of the scan of each slice.
            slices: Number of each slice in its scan.

        Raises:
            ValueError: If the arguments have different lengths, a mask has neither form, a slice has another size than
                its truth or its scan, or a slice comes twice. The message has the first such slice and their number.
        """
        first = self.number
        # Without names, each slice gets a name that no other slice has, also over several calls.
        names = [("slice", first + index) for index in range(len(predictions))] if scans is None else scans
        numbers = range(first, first + len(predictions)) if slices is None else slices
        if not len(predictions) == len(references) == len(names) == len(numbers):
            raise ValueError(
                f"expected as many predictions as references, scans and slices, "
                f"but got {len(predictions)}, {len(references)}, {len(names)} and {len(numbers)}"
            )
        # Collected apart from `self.slices`, which stay as they are if a slice is wrong.
        added: dict[Hashable, dict[Any, PackedPair]] = {}
        problems = []
        for index, (scan, number) in enumerate(zip(names, numbers, strict=True)):
            earlier = self.slices.get(scan, {}), added.setdefault(scan, {})
            try:
                pair = [to_organ_masks(masks[index], len(self.organs)) for masks in (predictions, references)]
                check_fits_scan(scan, number, {mask.shape for mask in pair}, earlier)
                added[scan][number] = pair[0].shape, np.packbits(np.stack(pair))
            except ValueError as error:
                problems.append(f"slice {index}: {error}")
        if problems:
            raise ValueError(f"{problems[0]} ({len(problems)} of {len(predictions)} slices cannot be used)")
        for scan, members in added.items():
            self.slices.setdefault(scan, {}).update(members)
        self.number += len(predictions)

    def add(self, *, prediction: Any, reference: Any, scan: Hashable = None, slice: int | None = None) -> None:
        """Add the masks of one slice, see `INPUTS`."""
        # `is not None`, because a scan or a slice may have the number 0.
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
        """Score all slices: those that were added before, and those of this call. Then discard all slices.

        Args:
            predictions: See `INPUTS`, as for all arguments.
            references: The true masks.
            scans: Name of the scan of each slice.
            slices: Number of each slice in its scan.
            preset: How to read the competition's metric.

        Returns:
            Scores by name, see `INPUTS`.

        Raises:
            ValueError: As `add_batch`, or if only one of predictions and references is given, or if the preset is not
                known.
        """
        if preset not in list(rules.PRESETS):
            raise ValueError(f"expected a preset of {', '.join(rules.PRESETS)}, but got {preset!r}")
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references, scans=scans, slices=slices)
        elif any(given is not None for given in (predictions, references, scans, slices)):
            raise ValueError("expected predictions and references together, or neither; add the missing one")
        measured = []
        for scan, members in self.slices.items():
            pairs = [
                np.unpackbits(bits, count=2 * math.prod(shape)).reshape(2, *shape).astype(bool)
                for _, (shape, bits) in sorted(members.items())
            ]
            # Each pair has the shape (2, organs, height, width). The new axis of slices comes third.
            preds, target = np.stack(pairs, axis=2)
            # Who the patient is has no effect on these scores, so the scan takes its place.
            names = scan, scan, self.organs
            measured.append(scans_module.compare_masks(*names, preds, target, rules.PRESETS[preset], presets=True))
        self.slices, self.number = {}, 0
        return scans_module.score_scans(measured, rules.PRESETS[preset])
