"""What was predicted for a scan, what is measured of it, and the verdict, for those who write its files or show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gi_segmentation.data.intensity import scale_intensity
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.formats.volumes import Volume, native_grid, read_intensities, read_pixels, whole_field
from gi_segmentation.labels import LabelSet
from gi_segmentation.review.measures import ScanMeasures, measure_scan, pick_intensity_slices
from gi_segmentation.review.ranges import TrainingRanges
from gi_segmentation.review.triage import Triage, judge_scan


@dataclass(frozen=True)
class PredictedScan:
    """What was predicted for a scan.

    The scan is measured and judged when somebody asks for it first, and not again.

    Attributes:
        scan: The scan.
        slice_masks: The masks of each slice: bool, shape `(organs, height, width)`.
        slice_probabilities: The mean probabilities of each slice over all models and flips, before post-processing:
            float16, same shapes; None if nobody needs them.
        algorithm: What made the masks.
        labels: The names of the organs, and their colours.
        ranges: The scans that the models were trained on; None if the checkpoints do not say it, or nobody needs it.
        agreement: By the name of the organ, the smallest Dice between the common masks, before post-processing, and
            those of one model or one flip alone; None if there is only one, or nobody needs it.
        problems: Why slices have empty masks, if some could not be read.
    """

    scan: InputScan
    slice_masks: Sequence[np.ndarray]
    slice_probabilities: Sequence[np.ndarray] | None
    algorithm: Algorithm
    labels: LabelSet
    ranges: TrainingRanges | None = None
    agreement: Mapping[str, float] | None = None
    problems: Sequence[str] = ()

    @property
    def volume(self) -> Volume:
        """The volume of the scan, with its grid in the patient."""
        return self.scan.volume

    @property
    def numbers(self) -> list[int]:
        """Numbers of the slices, ascending. Slices that are missing between them have no number here."""
        return [one.number for one in self.scan.slices]

    @cached_property
    def masks(self) -> np.ndarray:
        """The masks on the grid of the volume: bool, shape `(organs, i, j, k)`."""
        return native_grid(self.volume, zip(self.scan.slices, self.slice_masks, strict=True))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The mean probabilities on the grid of the volume: float16, shape `(organs, i, j, k)`."""
        assert self.slice_probabilities is not None
        return native_grid(self.volume, zip(self.scan.slices, self.slice_probabilities, strict=True))

    @cached_property
    def measured(self) -> ScanMeasures:
        """The measures of the whole field of view, and not only of what the model sees. It needs probabilities."""
        assert self.slice_probabilities is not None
        places = pick_intensity_slices(len(self.scan.slices))
        return measure_scan(
            np.stack(self.in_whole_field(self.slice_masks), axis=1),
            np.stack([scale_intensity(self.read_slice(place)) for place in places]),
            self.volume.spacing_mm,
            self.numbers,
            self.labels.names,
            np.stack(self.in_whole_field(self.slice_probabilities), axis=1),
        )

    @cached_property
    def triage(self) -> Triage:
        """The verdict on the scan. It needs probabilities."""
        return judge_scan(self.measured, self.ranges, self.agreement)

    def in_whole_field(self, predictions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return masks or probabilities of the slices with the whole field of view, see `volumes.whole_field`."""
        return [whole_field(one, organs) for one, organs in zip(self.scan.slices, predictions, strict=True)]

    def read_slice(self, place: int) -> np.ndarray:
        """Read the raw intensities of the slice at a position from 0 on, with the whole field of view."""
        return read_pixels(self.scan.slices[place]) if self._intensities is None else self._intensities[place]

    @cached_property
    def _intensities(self) -> np.ndarray | None:
        """The intensities of a volume that is read at once; None for slices of Kaggle's, which are single files.

        They are kept here, because another thread may read the next volume meanwhile.
        """
        return None if self.volume.read is None else read_intensities(self.volume)
