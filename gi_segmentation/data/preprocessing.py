"""From a slice to the tensors that a model needs: intensity, size, neighbours, labels, batches."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional as F
from transformers import SegformerImageProcessorPil

from gi_segmentation.errors import InputError
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import LabelMode

if TYPE_CHECKING:  # prediction needs this module, but not `datasets`, which takes a second to import
    from datasets import Dataset

# Image, labels and a seed in; image and labels out, changed at random.
Augment: TypeAlias = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def find_neighbours(numbers: Collection[int], number: int, slice_context: int) -> tuple[int, int]:
    """Which slices stand for those `slice_context` before and after: at an end or a gap the furthest one before it.

    Args:
        numbers: Slice numbers of the scan.
        number: One of them.
        slice_context: How far to look.

    Example:
        >>> find_neighbours([1, 2, 3, 6], number=2, slice_context=2)
        (1, 3)
    """
    return (
        min(other for other in numbers if number - slice_context <= other <= number),
        max(other for other in numbers if number <= other <= number + slice_context),
    )


class SliceNeighbours:
    """Finds the neighbours of a slice in its own scan, among all slices of a split.

    Args:
        dataset: The whole split, whichever of its slices are trained on.
        slice_context: How far the neighbours are.

    Raises:
        InputError: If no slice has any.
    """

    def __init__(self, dataset: "Dataset", slice_context: int) -> None:
        self.images = dataset.with_format(None).select_columns(["image"])
        self.slice_context = slice_context
        self.rows: dict[str, dict[int, int]] = defaultdict(dict)
        for row, (scan, number) in enumerate(zip(dataset["scan"], dataset["slice"], strict=True)):
            self.rows[scan][number] = row
        if all(
            find_neighbours(numbers, number, slice_context) == (number, number)
            for numbers in self.rows.values()
            for number in numbers
        ):
            raise InputError(
                f"--slice_context {slice_context}: none of the {len(dataset)} slices of a split has a neighbour that "
                f"near in its scan; take 0, or build the dataset from whole scans"
            )

    def __call__(self, scan: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The raw slices before and after, each `(height, width)`."""
        numbers = self.rows[scan]
        before, after = find_neighbours(numbers, number, self.slice_context)
        return np.array(self.images[numbers[before]]["image"]), np.array(self.images[numbers[after]]["image"])


def scale_intensity(image: np.ndarray) -> np.ndarray:
    """Scale a raw slice x to 0 to 1 by its own mean, as x / (x + mean), so that nothing is clipped.

    MR intensities have no unit, and each scan has its own range. The maximum is no good scale: one bright arm or coil
    raises it, and the organs become dark. The mean hardly changes with such a spot. A pixel as bright as the mean gets
    the value 0.5; brighter pixels approach 1.

    Args:
        image: Raw intensities, shape `(height, width)`.

    Returns:
        float32, same shape, below 1; all 0 where the slice is black.

    Example:
        >>> scale_intensity(np.array([[0, 500, 1500, 0]], dtype=np.uint16))
        array([[0.  , 0.5 , 0.75, 0.  ]], dtype=float32)
    """
    scaled = image.astype(np.float32)
    return scaled / (scaled + np.float32(max(image.mean(), 1)))


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a scaled slice to a square, bilinear with antialiasing, as the model card's own lines do.

    Args:
        image: float32, shape `(height, width)`.
        image_size: Height and width of the result.
    """
    tensor = torch.from_numpy(image)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="bilinear", antialias=True)[0, 0].numpy()


def resize_labels(labels: np.ndarray, image_size: int) -> np.ndarray:
    """Resize label maps to a square by nearest neighbour: a label id is no quantity to interpolate.

    Args:
        labels: uint8, shape `(height, width)` or `(height, width, organs)`.
        image_size: Height and width of the result.
    """
    tensor = torch.from_numpy(labels.reshape(*labels.shape[:2], -1)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(image_size, image_size), mode="nearest-exact")[0].permute(1, 2, 0)
    return resized.reshape(image_size, image_size, *labels.shape[2:]).numpy()


class SliceTransform:
    """Turns rows of the dataset into model inputs; for `Dataset.with_transform`.

    Args:
        processor: Its size, mean and standard deviation are used.
        label_mode: What `labels` are: label ids of `annotation`, or masks of `segmentation`, overlaps kept.
        neighbours: Where the first and the last channel come from; None takes the slice for all three.
        augment: Changes image and labels at random; None leaves them as they are.
        seed: Of the augmentation, together with the epoch and the slice's id.
        scoring: Whether to add which slice it is and its own size, which scores at native resolution need.
    """

    def __init__(
        self,
        processor: SegformerImageProcessorPil,
        label_mode: LabelMode = "multiclass",
        neighbours: SliceNeighbours | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        scoring: bool = False,
    ) -> None:
        self.image_size: int = processor.size["height"]
        self.mean = np.array(processor.image_mean, dtype=np.float32)[:, None, None]
        self.std = np.array(processor.image_std, dtype=np.float32)[:, None, None]
        self.label_mode = label_mode
        self.neighbours = neighbours
        self.augment = augment
        self.seed = seed
        self.scoring = scoring
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by worker processes that live on

    def scale(self, raws: Sequence[np.ndarray]) -> np.ndarray:
        """From one raw slice, or three, to float32 in 0 to 1, shape `(image_size, image_size, 1 or 3)`."""
        return np.stack([resize_image(scale_intensity(raw), self.image_size) for raw in raws], axis=-1)

    def normalize(self, image: np.ndarray) -> torch.Tensor:
        """From scaled slices `(S, S, 1 or 3)` to the model's three normalised channels `(3, S, S)`."""
        return torch.from_numpy((image.transpose(2, 0, 1) - self.mean) / self.std)

    def pixel_values(self, raws: Sequence[np.ndarray]) -> torch.Tensor:
        """From one raw slice `(height, width)`, or three, to model input: float32, `(3, image_size, image_size)`."""
        return self.normalize(self.scale(raws))

    def raw_slices(self, row: dict[str, Any]) -> list[np.ndarray]:
        """The slice of a row, between its neighbours where the model wants them."""
        raw = np.array(row["image"])
        if self.neighbours is None:
            return [raw]
        before, after = self.neighbours(row["scan"], row["slice"])
        return [before, raw, after]

    def labelled_example(self, row: dict[str, Any], masks: np.ndarray | None) -> dict[str, torch.Tensor]:
        """Model input and labels of a slice, augmented if so asked; `masks` are needed for the mode multilabel."""
        image = self.scale(self.raw_slices(row))
        native = np.array(row["annotation"]) if masks is None else masks.transpose(1, 2, 0).astype(np.uint8)
        labels = resize_labels(native, self.image_size)
        if self.augment is not None:
            sequence = np.random.SeedSequence([self.seed, int(self.epoch), zlib.crc32(row["id"].encode())])
            image, labels = self.augment(image, labels, int(sequence.generate_state(1)[0]))
        target = labels.astype(np.int64) if masks is None else labels.transpose(2, 0, 1).astype(np.float32)
        return {"pixel_values": self.normalize(image), "labels": torch.from_numpy(target)}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Transform a batch of rows, as `datasets` hands them over: lists by column."""
        examples = []
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            masks = None
            if self.label_mode == "multilabel":
                masks = organ_masks(row["segmentation"], row["height"], row["width"])
            example = self.labelled_example(row, masks)
            if self.scoring:
                example["slice_id"] = torch.tensor([row["case"], row["day"], row["slice"]])
                example["native_size"] = torch.tensor([row["height"], row["width"]])
            examples.append(example)
        return {key: [example[key] for example in examples] for key in examples[0]}


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples to a batch.

    Returns:
        `pixel_values` `(B, 3, S, S)` and `labels` `(B, S, S)` or `(B, organs, S, S)`; of evaluation examples also
        `slice_id`, case, day and number of the slice `(B, 3)`, and `native_size` `(B, 2)`.
    """
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def attached_transform(dataset: "Dataset") -> SliceTransform:
    """The transform that `transform_splits` attached to a split."""
    return dataset.format["format_kwargs"]["transform"]
