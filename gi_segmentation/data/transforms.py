"""From prepared slices to the tensors of a batch: augmentation, normalisation, labels."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from transformers import SegformerImageProcessorPil

from gi_segmentation.data.intensity import MAX_PIXEL, to_intensity, to_pixels
from gi_segmentation.labels import LabelMode

if TYPE_CHECKING:
    # Prediction imports this module, and `datasets` takes a second to import. Only type checkers need it here.
    from datasets import Dataset

    from gi_segmentation.data.prepared import PreparedSlices

# A function of image, organ bits and seed. It returns both, changed at random.
Augment: TypeAlias = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
# The columns of the dataset that a transform takes; scoring needs more of them.
SLICE_COLUMNS = ["id", "scan", "slice"]
SCORING_COLUMNS = [*SLICE_COLUMNS, "case", "day", "height", "width"]
# The label id of a pixel by its organ bits, if they are one byte: the number of the highest bit. Where organs overlap,
# the highest id wins, which is the rule of the column `annotation` too.
LABEL_IDS = [bits.bit_length() for bits in range(256)]


def normalize(images: torch.Tensor, processor: SegformerImageProcessorPil) -> torch.Tensor:
    """Turn prepared slices into the input of a model.

    Args:
        images: Prepared pixels, uint16, shape `(B, S, S, 1 or 3)`, on any device. One channel is shown in all three.
        processor: The model's image processor. Its mean and standard deviation are used.

    Returns:
        float32, shape `(B, 3, S, S)`, on the same device.
    """
    # In place, because new memory costs as much as the arithmetic.
    intensity = images.permute(0, 3, 1, 2).float().div_(MAX_PIXEL)
    mean, std = (intensity.new_tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    # Mean and deviation have the shape (3, 1, 1), so a single channel is repeated to three.
    return (intensity - mean).div_(std)


def unpack_labels(bits: torch.Tensor, label_mode: LabelMode, organs: int) -> torch.Tensor:
    """Turn organ bits into the labels of the loss.

    Args:
        bits: uint8, shape `(B, S, S)` or `(B, S, S, bytes)`, see `preprocessing.pack_organs`.
        label_mode: What the model's channels mean.
        organs: Number of organs.

    Returns:
        With `multiclass`: label ids, int64, shape `(B, S, S)`. With `multilabel`: masks, float32, shape
        `(B, organs, S, S)`.

    Example:
        >>> bits = torch.tensor([[[0, 1, 5]]], dtype=torch.uint8)
        >>> unpack_labels(bits, "multiclass", 3).tolist(), unpack_labels(bits, "multilabel", 3).tolist()
        ([[[0, 1, 3]]], [[[[0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]])
    """
    planes = bits[:, None] if bits.ndim == 3 else bits.movedim(-1, 1)
    if label_mode == "multilabel":
        places = torch.arange(organs, device=bits.device)
        shifts = (places % 8).to(torch.uint8)[:, None, None]
        # A single byte is repeated to all organs, without a copy.
        chosen = planes if planes.shape[1] == 1 else planes[:, places // 8]
        return (chosen >> shifts & 1).float()
    ids = torch.tensor(LABEL_IDS, device=bits.device)[planes.long()]
    for place in range(1, planes.shape[1]):
        # A later byte has later organs, so where it has any, it wins.
        ids[:, 0] = torch.where(ids[:, place] > 0, ids[:, place] + 8 * place, ids[:, 0])
    return ids[:, 0]


class SliceTransform:
    """Turns rows of the dataset into examples. It is a transform for `Dataset.with_transform`.

    An example has `images`, prepared pixels, uint16, shape `(S, S, 1 or 3)`; and `organs`, the organ bits, uint8,
    shape `(S, S)` or `(S, S, bytes)`. If an organ is unknown anywhere in the split, it has `known`, too: whether each
    organ was drawn in this slice, bool, shape `(organs,)`. `to_model` turns a batch of examples into the input and the
    labels of a model.

    Args:
        processor: The model's image processor.
        slices: The split. A row is looked up there by its scan and number.
        label_mode: What the model's channels mean.
        augment: Changes image and organ bits at random; None leaves them as they are.
        seed: Seed of the augmentation.
        scoring: Whether to add the slice's numbers and its own size. Scores at native resolution need them.
    """

    def __init__(
        self,
        processor: SegformerImageProcessorPil,
        slices: "PreparedSlices",
        label_mode: LabelMode = "multiclass",
        augment: Augment | None = None,
        seed: int = 0,
        scoring: bool = False,
    ) -> None:
        self.processor = processor
        self.slices = slices
        self.label_mode = label_mode
        self.augment = augment
        self.seed = seed
        self.scoring = scoring
        # Worker processes that live through all epochs have a copy of this object. A plain number would stay 0 in
        # their copies; they see a change in shared memory.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.earlier: Sequence[int] | None = None

    @contextmanager
    def repeating(self, earlier: Sequence[int]) -> Iterator[None]:
        """Change the slices that are read in this block otherwise than when they were read before in this epoch.

        Args:
            earlier: How often each of them was read before.
        """
        self.earlier = earlier
        try:
            yield
        finally:
            self.earlier = None

    def change(
        self, slice_id: str, earlier: int, pixels: np.ndarray, organs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment a slice.

        Args:
            slice_id: Its id.
            earlier: How often it was read before in this epoch.
            pixels: As `PreparedSlices.read` returns them, as well as `organs`.
            organs: The organ bits.

        Returns:
            Both, with the same shapes and types.
        """
        if self.augment is None:
            return pixels, organs
        # Seed, epoch, slice and repetition fix the changes. They do not depend on the order of slices, on the worker
        # process, or on an interruption. `hash` of a string differs from process to process; a checksum does not.
        key = self.seed, int(self.epoch), slice_id, *([earlier] if earlier else [])
        seed = zlib.crc32(" ".join(map(str, key)).encode())
        # The augmentation works on intensities of 0 to 1. It works on the size of the model's input, which is smaller
        # than most slices and so takes less time.
        intensity, organs = self.augment(to_intensity(pixels), organs, seed)
        return to_pixels(intensity), organs

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Transform rows. `datasets` passes and expects a list of values for each column."""
        names = list(zip(rows["scan"], rows["slice"], strict=True))
        found = self.slices.read(names)
        keys = zip(rows["id"], self.earlier or [0] * len(names), strict=True)
        changed = [self.change(*key, *one) for key, one in zip(keys, found, strict=True)]
        # PyTorch takes only arrays that can be written to and run forwards through memory. The organ bits of the cache
        # cannot be written to, and a flip may run backwards. Such arrays are copied.
        images, organs = (
            [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
            for arrays in zip(*changed, strict=True)
        )
        examples: dict[str, list[Any]] = {"images": images, "organs": organs}
        if (known := self.slices.known) is not None:
            examples["known"] = [torch.from_numpy(known[self.slices.rows[scan][number]]) for scan, number in names]
        if self.scoring:
            # Numbers instead of the id, because tensors hold no text. The Trainer collects tensors of all processes.
            examples["slice_id"] = list(torch.tensor([rows["case"], rows["day"], rows["slice"]]).T)
            examples["native_size"] = list(torch.tensor([rows["height"], rows["width"]]).T)
        return examples

    def to_model(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a batch of examples into the input of the model and its labels, on the device of the batch.

        Returns:
            `pixel_values`, float32, shape `(B, 3, S, S)`; and `labels`, see `unpack_labels`.
        """
        labels = unpack_labels(batch["organs"], self.label_mode, len(self.slices.labels))
        return normalize(batch["images"], self.processor), labels


def attach_transform(dataset: "Dataset", transform: SliceTransform) -> "Dataset":
    """Return a dataset whose rows are examples: the transform runs each time that a row is read."""
    # Only these columns are read of each row. Its image comes from `PreparedSlices`.
    return dataset.with_transform(transform, columns=SCORING_COLUMNS if transform.scoring else SLICE_COLUMNS)


def attached_transform(dataset: "Dataset") -> SliceTransform:
    """Return the transform that `attach_transform` attached to a split."""
    return dataset.format["format_kwargs"]["transform"]
