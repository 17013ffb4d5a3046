"""From a slice to the tensors that a model needs: intensity, size, neighbours, labels, batches.

A raw slice x of 16 bits becomes a model input in four steps:

    scale        x / (x + mean of x)                  float32, 0 to 1
    resize       bilinear, to (image_size, image_size)
    round        to whole multiples of 1 / 65535      uint16
    normalise    (x - mean) / standard deviation      mean and deviation per channel, from the image processor

The first three steps prepare a slice. Their result depends on the slice alone, so a training keeps it in a cache
(`data.prepared`). The augmentation comes before the last step, and its result is rounded too. The last step is done
for whole batches, on the device of the model, so that only one channel of 16 bits has to travel there.
"""

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional as F
from transformers import SegformerImageProcessorPil

from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import ORGANS, LabelMode

if TYPE_CHECKING:
    # Prediction imports this module, and `datasets` takes a second to import. Only type checkers need it here.
    from datasets import Dataset

    from gi_segmentation.data.prepared import PreparedSlices

# A function of image, organ bits and seed. It returns both, changed at random.
Augment: TypeAlias = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]

# The value of a prepared pixel with the intensity 1.
MAX_PIXEL = 65535
# The columns of the dataset that a transform takes; scoring needs more of them.
SLICE_COLUMNS = ["id", "scan", "slice"]
SCORING_COLUMNS = [*SLICE_COLUMNS, "case", "day", "height", "width"]
# The label id of a pixel by its organ bits: the number of the highest bit. Where organs overlap, the highest id wins,
# which is the rule of the column `annotation` too.
LABEL_IDS = [bits.bit_length() for bits in range(2 ** len(ORGANS))]


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
    # From far to near. The distance 0 is the slice itself, so both searches find something.
    distances = range(slice_context, -1, -1)
    return (
        next(number - distance for distance in distances if number - distance in numbers),
        next(number + distance for distance in distances if number + distance in numbers),
    )


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


def prepare_image(raw: np.ndarray, image_size: int) -> np.ndarray:
    """Scale, resize and round a raw slice.

    Args:
        raw: Raw intensities, shape `(height, width)`.
        image_size: Height and width of the result.

    Returns:
        uint16, shape `(image_size, image_size)`; `MAX_PIXEL` stands for an intensity of 1.
    """
    return to_pixels(resize_image(scale_intensity(raw), image_size))


def pack_organs(masks: np.ndarray) -> np.ndarray:
    """Pack the masks of a slice into one number per pixel. Organ k is bit k.

    Args:
        masks: bool, shape `(organs, height, width)`.

    Returns:
        Organ bits, uint8, shape `(height, width)`.

    Example:
        >>> pack_organs(np.array([[[True, False]], [[False, False]], [[True, True]]]))
        array([[5, 4]], dtype=uint8)
    """
    return np.packbits(masks, axis=0, bitorder="little")[0]


def resize_organs(bits: np.ndarray, image_size: int) -> np.ndarray:
    """Resize organ bits to a square. Each pixel takes the bits of the nearest pixel.

    Args:
        bits: uint8, shape `(height, width)`.
        image_size: Height and width of the result.

    Returns:
        uint8, shape `(image_size, image_size)`.
    """
    # `nearest-exact` compares the centres of pixels, as `resize_image` does. PyTorch's older mode `nearest` compares
    # their corners, and would shift the labels against the image by up to half a pixel.
    tensor = torch.from_numpy(bits)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="nearest-exact")[0, 0].numpy()


def prepare_organs(row: dict[str, Any], image_size: int) -> np.ndarray:
    """Decode the outlines of a row, and resize them: organ bits, uint8, shape `(image_size, image_size)`."""
    return resize_organs(pack_organs(organ_masks(row["segmentation"], row["height"], row["width"])), image_size)


def to_pixels(intensity: np.ndarray) -> np.ndarray:
    """Round intensities, float32 in 0 to 1, to prepared pixels: uint16, same shape."""
    # 16 bits need half the memory of float32. The rounding changes an intensity by less than 0.00001.
    pixels = intensity * np.float32(MAX_PIXEL)
    return np.rint(pixels, out=pixels).astype(np.uint16)


def to_intensity(pixels: np.ndarray) -> np.ndarray:
    """Turn prepared pixels, uint16, into intensities: float32 in 0 to 1, same shape."""
    return np.multiply(pixels, np.float32(1 / MAX_PIXEL), dtype=np.float32)


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


def unpack_labels(bits: torch.Tensor, label_mode: LabelMode) -> torch.Tensor:
    """Turn organ bits into the labels of the loss.

    Args:
        bits: uint8, shape `(B, S, S)`.
        label_mode: What the model's channels mean.

    Returns:
        With `multiclass`: label ids, int64, shape `(B, S, S)`. With `multilabel`: masks, float32, shape
        `(B, organs, S, S)`.

    Example:
        >>> bits = torch.tensor([[[0, 1, 5]]], dtype=torch.uint8)
        >>> unpack_labels(bits, "multiclass").tolist(), unpack_labels(bits, "multilabel").tolist()
        ([[[0, 1, 3]]], [[[[0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]])
    """
    if label_mode == "multilabel":
        places = torch.arange(len(ORGANS), dtype=torch.uint8, device=bits.device)[:, None, None]
        return (bits[:, None] >> places & 1).float()
    return torch.tensor(LABEL_IDS, device=bits.device)[bits.long()]


class SliceTransform:
    """Turns rows of the dataset into examples. It is a transform for `Dataset.with_transform`.

    An example has `images`, prepared pixels, uint16, shape `(S, S, 1 or 3)`; and `organs`, the organ bits, uint8,
    shape `(S, S)`. `to_model` turns a batch of examples into the input and the labels of a model.

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

    def change(self, slice_id: str, pixels: np.ndarray, organs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Augment a slice.

        Args:
            slice_id: Its id.
            pixels: As `PreparedSlices.read` returns them, as well as `organs`.
            organs: The organ bits.

        Returns:
            Both, with the same shapes and types.
        """
        if self.augment is None:
            return pixels, organs
        # Seed, epoch and slice fix the changes. They do not depend on the order of slices, on the worker process,
        # or on an interruption. `hash` of a string differs from process to process; a checksum does not.
        seed = zlib.crc32(f"{self.seed} {int(self.epoch)} {slice_id}".encode())
        # The augmentation works on intensities of 0 to 1. It works on the size of the model's input, which is smaller
        # than most slices and so takes less time.
        intensity, organs = self.augment(to_intensity(pixels), organs, seed)
        return to_pixels(intensity), organs

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Transform rows. `datasets` passes and expects a list of values for each column."""
        found = self.slices.read(list(zip(rows["scan"], rows["slice"], strict=True)))
        changed = [self.change(slice_id, *one) for slice_id, one in zip(rows["id"], found, strict=True)]
        # PyTorch takes only arrays that can be written to and run forwards through memory. The organ bits of the cache
        # cannot be written to, and a flip may run backwards. Such arrays are copied.
        images, organs = (
            [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
            for arrays in zip(*changed, strict=True)
        )
        examples: dict[str, list[Any]] = {"images": images, "organs": organs}
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
        return normalize(batch["images"], self.processor), unpack_labels(batch["organs"], self.label_mode)


def attach_transform(dataset: "Dataset", transform: SliceTransform) -> "Dataset":
    """Return a dataset whose rows are examples: the transform runs each time that a row is read."""
    # Only these columns are read of each row. Its image comes from `PreparedSlices`.
    return dataset.with_transform(transform, columns=SCORING_COLUMNS if transform.scoring else SLICE_COLUMNS)


def attached_transform(dataset: "Dataset") -> SliceTransform:
    """Return the transform that `attach_transform` attached to a split."""
    return dataset.format["format_kwargs"]["transform"]
