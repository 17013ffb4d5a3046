"""From a slice to the tensors that a model needs: intensity, size, neighbours, labels, batches.

A raw slice x of 16 bits becomes a model input in three steps:

    scale        x / (x + mean of x)                  float32, 0 to 1
    resize       bilinear, to (image_size, image_size)
    normalise    (x - mean) / standard deviation      mean and deviation per channel, from the image processor
"""

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

if TYPE_CHECKING:
    # Prediction imports this module, and `datasets` takes a second to import. Only type checkers need it here.
    from datasets import Dataset

# A function of image, labels and seed. It returns both, changed at random.
Augment: TypeAlias = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def find_neighbours(numbers: Collection[int], number: int, slice_context: int) -> tuple[int, int]:
    """Find the two slices that are shown to the model beside a slice.

    These are the slices `number - slice_context` and `number + slice_context`. At the end of a scan, or at a gap, the
    farthest slice within that distance is used. This can be the slice itself.

    Args:
        numbers: Slice numbers of the scan.
        number: One of them.
        slice_context: Distance to the neighbours, in slices.

    Returns:
        The number of the slice before, and of the slice after.

    Example:
        >>> find_neighbours([1, 2, 3, 6], number=2, slice_context=2)
        (1, 3)
    """
    # The slice itself is within every distance, so both selections have at least one number.
    return (
        min(other for other in numbers if number - slice_context <= other <= number),
        max(other for other in numbers if number <= other <= number + slice_context),
    )


class SliceNeighbours:
    """Finds the neighbours of a slice in its own scan.

    Args:
        dataset: The whole split. With `--max_train_samples` it has more slices than the training uses.
        slice_context: Distance to the neighbours, in slices.

    Raises:
        InputError: If no slice has a neighbour.
    """

    def __init__(self, dataset: "Dataset", slice_context: int) -> None:
        # Only this column is read for a neighbour, and without the transform that the split may have.
        self.images = dataset.with_format(None).select_columns(["image"])
        self.slice_context = slice_context
        self.rows: dict[str, dict[int, int]] = defaultdict(dict)
        for row, (scan, number) in enumerate(zip(dataset["scan"], dataset["slice"], strict=True)):
            self.rows[scan][number] = row
        # If every slice were its own neighbour, the model would see three equal channels, and nobody would notice.
        if all(
            find_neighbours(numbers, number, slice_context) == (number, number)
            for numbers in self.rows.values()
            for number in numbers
        ):
            raise InputError(
                f"--slice_context {slice_context}: expected slices with neighbours at most that far away in their "
                f"scan, but none of the {len(dataset)} slices of a split has one; use 0, or build the dataset from "
                f"whole scans"
            )

    def __call__(self, scan: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the raw slices before and after a slice, each of shape `(height, width)`."""
        numbers = self.rows[scan]
        before, after = find_neighbours(numbers, number, self.slice_context)
        return np.array(self.images[numbers[before]]["image"]), np.array(self.images[numbers[after]]["image"])


def scale_intensity(image: np.ndarray) -> np.ndarray:
    """Scale a raw slice x to 0 to 1 by its own mean, as x / (x + mean), so that nothing is clipped.

    MR intensities have no unit, and each scan has its own range. The maximum is not a good scale: one bright arm or
    coil raises it, and the organs become dark. The mean hardly changes with such a spot. A pixel as bright as the mean
    gets the value 0.5, and brighter pixels approach 1.

    Args:
        image: Raw intensities, shape `(height, width)`.

    Returns:
        float32, same shape, at least 0 and below 1. A black slice is 0 everywhere.

    Example:
        >>> scale_intensity(np.array([[0, 500, 1500, 0]], dtype=np.uint16))
        array([[0.  , 0.5 , 0.75, 0.  ]], dtype=float32)
    """
    # A mean of at least 1 prevents 0 / 0 in a black slice. In all other slices the mean is far above 1.
    scaled = image.astype(np.float32)
    return scaled / (scaled + np.float32(max(image.mean(), 1)))


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a scaled slice to a square by bilinear interpolation.

    Args:
        image: float32, shape `(height, width)`.
        image_size: Height and width of the result.

    Returns:
        float32, shape `(image_size, image_size)`.
    """
    # With antialiasing, a smaller image averages all pixels that it covers. Without it, most of them would be skipped.
    # The code on the model card resizes in the same way, so that its masks are those of this project.
    tensor = torch.from_numpy(image)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="bilinear", antialias=True)[0, 0].numpy()


def resize_labels(labels: np.ndarray, image_size: int) -> np.ndarray:
    """Resize labels to a square. Each pixel takes the label of the nearest pixel.

    Args:
        labels: uint8, shape `(height, width)` or `(height, width, organs)`.
        image_size: Height and width of the result.

    Returns:
        uint8, shape `(image_size, image_size)` or `(image_size, image_size, organs)`.
    """
    # `nearest-exact` compares the centres of pixels, as `resize_image` does. PyTorch's older mode `nearest` compares
    # their corners, and would shift the labels against the image by up to half a pixel.
    tensor = torch.from_numpy(labels.reshape(*labels.shape[:2], -1)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(image_size, image_size), mode="nearest-exact")[0].permute(1, 2, 0)
    return resized.reshape(image_size, image_size, *labels.shape[2:]).numpy()


class SliceTransform:
    """Turns rows of the dataset into model inputs. It is a transform for `Dataset.with_transform`.

    Args:
        processor: The model's image processor. Its size, mean and standard deviation are used.
        label_mode: With `multiclass`, the labels are the label ids in `annotation`. With `multilabel`, they are the
            masks in `segmentation`, which may overlap.
        neighbours: Finds the slices for the first and the last channel; None: all three channels show the slice.
        augment: Changes image and labels at random; None leaves them as they are.
        seed: Seed of the augmentation.
        scoring: Whether to add the slice's numbers and its own size. Scores at native resolution need them.
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
        # Worker processes that live through all epochs have a copy of this object. A plain number would stay 0 in
        # their copies; they see a change in shared memory.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def scale(self, raws: Sequence[np.ndarray]) -> np.ndarray:
        """Scale and resize one raw slice, or three: float32 in 0 to 1, shape `(image_size, image_size, 1 or 3)`."""
        return np.stack([resize_image(scale_intensity(raw), self.image_size) for raw in raws], axis=-1)

    def normalize(self, image: np.ndarray) -> torch.Tensor:
        """Normalise scaled slices of shape `(S, S, 1 or 3)` to the three channels of the model, `(3, S, S)`."""
        # Mean and deviation have the shape (3, 1, 1). A single slice of shape (1, S, S) is repeated to three channels.
        return torch.from_numpy((image.transpose(2, 0, 1) - self.mean) / self.std)

    def pixel_values(self, raws: Sequence[np.ndarray]) -> torch.Tensor:
        """Turn one raw slice `(height, width)`, or three, into model input: float32, `(3, image_size, image_size)`."""
        return self.normalize(self.scale(raws))

    def raw_slices(self, row: dict[str, Any]) -> list[np.ndarray]:
        """Return the raw slice of a row, or three slices if the model also sees the neighbours."""
        raw = np.array(row["image"])
        if self.neighbours is None:
            return [raw]
        before, after = self.neighbours(row["scan"], row["slice"])
        return [before, raw, after]

    def labelled_example(self, row: dict[str, Any], masks: np.ndarray | None) -> dict[str, torch.Tensor]:
        """Return model input and labels of a slice, with augmentation if it is on.

        Args:
            row: A row of the dataset.
            masks: The organs' masks, bool, shape `(organs, height, width)`, for the mode multilabel; otherwise None.
        """
        image = self.scale(self.raw_slices(row))
        native = np.array(row["annotation"]) if masks is None else masks.transpose(1, 2, 0).astype(np.uint8)
        labels = resize_labels(native, self.image_size)
        # The augmentation works on intensities of 0 to 1, so it comes before the normalisation. It works on the size
        # of the model's input, which is smaller than most slices and so takes less time.
        if self.augment is not None:
            # Seed, epoch and slice fix the changes. They do not depend on the order of slices, on the worker process,
            # or on an interruption. `hash` of a string differs from process to process; a checksum does not.
            sequence = np.random.SeedSequence([self.seed, int(self.epoch), zlib.crc32(row["id"].encode())])
            image, labels = self.augment(image, labels, int(sequence.generate_state(1)[0]))
        # Cross-entropy takes label ids as int64. Binary cross-entropy takes masks as float32, one channel per organ.
        target = labels.astype(np.int64) if masks is None else labels.transpose(2, 0, 1).astype(np.float32)
        return {"pixel_values": self.normalize(image), "labels": torch.from_numpy(target)}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Transform rows. `datasets` passes and expects a list of values for each column."""
        examples = []
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            masks = None
            if self.label_mode == "multilabel":
                masks = organ_masks(row["segmentation"], row["height"], row["width"])
            example = self.labelled_example(row, masks)
            if self.scoring:
                # Numbers instead of the id, because tensors hold no text. The Trainer collects tensors of all
                # processes.
                example["slice_id"] = torch.tensor([row["case"], row["day"], row["slice"]])
                example["native_size"] = torch.tensor([row["height"], row["width"]])
            examples.append(example)
        return {key: [example[key] for example in examples] for key in examples[0]}


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples to a batch.

    Returns:
        `pixel_values`, shape `(B, 3, S, S)`; `labels`, shape `(B, S, S)` or `(B, organs, S, S)`. If the transform is
        scoring, also `slice_id`, shape `(B, 3)`: case, day and number of the slice; and `native_size`, shape `(B, 2)`:
        height and width in pixels.
    """
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def scoring_transform(
    processor: SegformerImageProcessorPil, label_mode: LabelMode, dataset: "Dataset", slice_context: int
) -> SliceTransform:
    """Return the transform with which a model scores the slices of a dataset.

    Args:
        processor: The model's image processor.
        label_mode: What the model's channels mean.
        dataset: The slices. Neighbours are found among them.
        slice_context: Distance to the slices for the first and the last channel; 0: all channels show the slice.

    Raises:
        InputError: If the model needs neighbours and no slice has one.
    """
    neighbours = SliceNeighbours(dataset, slice_context) if slice_context else None
    return SliceTransform(processor, label_mode, neighbours, scoring=True)


def attached_transform(dataset: "Dataset") -> SliceTransform:
    """Return the transform that `transform_splits` attached to a split."""
    return dataset.format["format_kwargs"]["transform"]
