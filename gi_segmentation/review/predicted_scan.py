"""What was predicted for a scan, for those who measure it, judge it and write its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.formats.volumes import Volume, native_grid
from gi_segmentation.review.ranges import TrainingRanges


@dataclass(frozen=True)
class PredictedScan:
    """What was predicted for a scan, for those who write files.

    Attributes:
        scan: The scan.
        slice_masks: The masks of each slice: bool, shape `(organs, height, width)`.
        slice_probabilities: The mean probabilities of each slice over all models and flips, before post-processing:
            float16, same shapes; None if nobody needs them.
        algorithm: What made the masks.
        ranges: The scans that the models were trained on; None if the checkpoints do not say it, or nobody needs it.
        agreement: By the name of the organ, the smallest Dice between the common masks, before post-processing, and
            those of one model or one flip alone; None if there is only one, or nobody needs it.
    """

    scan: InputScan
    slice_masks: Sequence[np.ndarray]
    slice_probabilities: Sequence[np.ndarray] | None
    algorithm: Algorithm
    ranges: TrainingRanges | None = None
    agreement: Mapping[str, float] | None = None

    @property
    def volume(self) -> Volume:
        """The volume of the scan, with its grid in the patient."""
        return self.scan.volume

    @cached_property
    def masks(self) -> np.ndarray:
        """The masks on the grid of the volume: bool, shape `(organs, i, j, k)`."""
        return native_grid(self.volume, zip(self.scan.slices, self.slice_masks, strict=True))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The mean probabilities on the grid of the volume: float16, shape `(organs, i, j, k)`."""
        assert self.slice_probabilities is not None
        return native_grid(self.volume, zip(self.scan.slices, self.slice_probabilities, strict=True))
