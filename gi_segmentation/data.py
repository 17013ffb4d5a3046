"""From the dataset `gi_tract` to the tensors that model and scores need."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch.nn import functional as F
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments
from gi_segmentation.augmentation import augment
from gi_segmentation.errors import InputError
from gi_segmentation.rle import decode
from gi_segmentation.schema import ORGANS, dataset_features

BUILD_COMMAND = "python -m dataset_builder build --kaggle_dir KAGGLE_DIR --output_dir gi_tract"


def find_dataset(name: str, revision: str | None) -> DatasetDict:
    """Load the dataset from a folder or from the Hub.

    Raises:
        InputError: If there is none; says which command makes one.
    """
    folder = Path(name)
    if not folder.is_dir() and name.count("/") != 1:
        raise InputError(f"--dataset_name {name}: no such folder; `{BUILD_COMMAND}` makes one")
    if (folder / "train.csv").is_file():
        raise InputError(f"--dataset_name {name}: a Kaggle folder, not a dataset yet; `{BUILD_COMMAND}` makes one")
    try:
        # The absolute path, because the bare name may mean the builder that `dataset_builder` registers.
        loaded = load_dataset(str(folder.resolve()) if folder.is_dir() else name, revision=revision)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"--dataset_name {name}: {error}; `{BUILD_COMMAND}` makes one") from error
    if not isinstance(loaded, DatasetDict):
        raise InputError(f"--dataset_name {name}: expected splits, got {type(loaded).__name__}")
    return loaded


def load_slices(data_args: DataArguments, seed: int) -> DatasetDict:
    """Load the splits to train and validate on.

    Args:
        data_args: Which dataset, and how much of it.
        seed: Draws `max_train_samples`.

    Returns:
        `train` and `validation`.

    Raises:
        InputError: If the dataset, a split or a column is missing, a patient stands in both splits, or validation
            shows no organ.
    """
    loaded = find_dataset(data_args.dataset_name, data_args.dataset_revision)
    missing = [split for split in ("train", "validation") if split not in loaded]
    if missing:
        raise InputError(
            f"{data_args.dataset_name}: expected the splits train and validation, got {', '.join(loaded)}"
        )
    columns = set(dataset_features()) - set(loaded["train"].column_names)
    if columns:
        raise InputError(f"{data_args.dataset_name}: lacks the columns {', '.join(sorted(columns))}; rebuild it")
    train, validation = loaded["train"], loaded["validation"]
    shared = set(train.unique("case")) & set(validation.unique("case"))
    if shared:
        raise InputError(
            f"{data_args.dataset_name}: patients {sorted(shared)} stand in train and in validation, so that scores "
            f"would flatter; split by patient"
        )
    if data_args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data_args.max_train_samples, len(train))))
    if data_args.max_eval_samples is not None:
        validation = validation.select(range(min(data_args.max_eval_samples, len(validation))))
    if not any(rle for organs in validation["segmentation"] for rle in organs.values()):
        raise InputError("the validation slices show no organ, so there is nothing to score; take more of them")
    return DatasetDict(train=train, validation=validation)


def scale_intensity(image: np.ndarray) -> np.ndarray:
    """Scale a raw slice to 0 to 1 by its own maximum, so that nothing is clipped.

    MR intensities have no unit; what is bright differs from scan to scan.

    Args:
        image: Raw intensities, shape `(height, width)`.

    Returns:
        float32, same shape; all 0 where the slice is black.

    Example:
        >>> scale_intensity(np.array([[0, 500, 2000]], dtype=np.uint16))
        array([[0.  , 0.25, 1.  ]], dtype=float32)
    """
    return image.astype(np.float32) / np.float32(max(image.max(), 1))


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a scaled slice to a square, bilinear with antialiasing, as the model card's own lines do.

    Args:
        image: float32, shape `(height, width)`.
        image_size: Height and width of the result.
    """
    tensor = torch.from_numpy(image)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="bilinear", antialias=True)[0, 0].numpy()


def resize_labels(labels: np.ndarray, image_size: int) -> np.ndarray:
    """Resize a label map to a square by nearest neighbour: a label id is no quantity to interpolate."""
    tensor = torch.from_numpy(labels)[None, None]
    return F.interpolate(tensor, size=(image_size, image_size), mode="nearest-exact")[0, 0].numpy()


def organ_masks(segmentation: dict[str, str], height: int, width: int) -> np.ndarray:
    """The exact masks of a slice, overlaps kept: bool, shape `(organs, height, width)`."""
    return np.stack([decode(segmentation[organ], height, width) for organ in ORGANS])


class SliceTransform:
    """Turns rows of the dataset into model inputs; for `Dataset.with_transform`.

    Args:
        processor: Its size, mean and standard deviation are used.
        augmentation: Changes the slices at random; None leaves them as they are.
        seed: Of the augmentation, together with the epoch and the slice's id.
        scoring: Whether to add what scores at native resolution need.
    """

    def __init__(
        self,
        processor: SegformerImageProcessorPil,
        augmentation: A.Compose | None = None,
        seed: int = 0,
        scoring: bool = False,
    ) -> None:
        self.image_size: int = processor.size["height"]
        self.mean = np.array(processor.image_mean, dtype=np.float32)[:, None, None]
        self.std = np.array(processor.image_std, dtype=np.float32)[:, None, None]
        self.augmentation = augmentation
        self.seed = seed
        self.scoring = scoring
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by worker processes that live on

    def normalize(self, image: np.ndarray) -> torch.Tensor:
        """From a scaled slice `(height, width)` to the model's three normalised channels."""
        return torch.from_numpy((image[None] - self.mean) / self.std)

    def pixel_values(self, raw: np.ndarray) -> torch.Tensor:
        """From a raw slice `(height, width)` to model input: float32, shape `(3, image_size, image_size)`."""
        return self.normalize(resize_image(scale_intensity(raw), self.image_size))

    def labelled_example(self, row: dict[str, Any], raw: np.ndarray) -> dict[str, Any]:
        """Model input and labels of a slice, augmented if so asked."""
        image = resize_image(scale_intensity(raw), self.image_size)
        labels = resize_labels(np.array(row["annotation"]), self.image_size)
        if self.augmentation is not None:
            sequence = np.random.SeedSequence([self.seed, int(self.epoch), zlib.crc32(row["id"].encode())])
            image, labels = augment(self.augmentation, image, labels, int(sequence.generate_state(1)[0]))
        return {"pixel_values": self.normalize(image), "labels": torch.from_numpy(labels.astype(np.int64))}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Transform a batch of rows, as `datasets` hands them over: lists by column."""
        examples = []
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            example = self.labelled_example(row, np.array(row["image"]))
            if self.scoring:
                example["organ_masks"] = torch.from_numpy(
                    organ_masks(row["segmentation"], row["height"], row["width"])
                )
                example["scan"] = torch.tensor(scan_number(row["case"], row["day"]))
            examples.append(example)
        return {key: [example[key] for example in examples] for key in examples[0]}


def scan_number(case: int, day: int) -> int:
    """A scan as one number, as tensors carry no names.

    Example:
        >>> scan_number(case=123, day=20)
        12300020
    """
    return case * 100_000 + day


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack examples to a batch.

    Returns:
        `pixel_values` `(B, 3, S, S)` and `labels` `(B, S, S)`; of evaluation examples also `organ_masks`, padded at
        bottom and right to the largest slice `(B, organs, H, W)`, the true `native_size` `(B, 2)` and `scan` `(B,)`.
    """
    batch = {key: torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels")}
    if "organ_masks" in examples[0]:
        masks = [example["organ_masks"] for example in examples]
        sizes = torch.tensor([mask.shape[1:] for mask in masks])
        height, width = sizes.amax(dim=0).tolist()
        batch["organ_masks"] = torch.stack([F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks])
        batch["native_size"] = sizes
        batch["scan"] = torch.stack([example["scan"] for example in examples])
    return batch


def transform_splits(
    slices: DatasetDict, processor: SegformerImageProcessorPil, augmentation: A.Compose | None, seed: int
) -> tuple[Dataset, Dataset]:
    """Attach the transforms, which run as slices are read: `train` augmented, `validation` ready to be scored."""
    return (
        slices["train"].with_transform(SliceTransform(processor, augmentation, seed)),
        slices["validation"].with_transform(SliceTransform(processor, scoring=True)),
    )
