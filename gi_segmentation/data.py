"""From the dataset `gi_tract` to the tensors that model and scores need."""

import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import albumentations as A
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.augmentation import augment, build_augmentation
from gi_segmentation.errors import InputError
from gi_segmentation.rle import decode
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM, dataset_features

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


def load_slices(data_args: DataArguments) -> DatasetDict:
    """Load the splits to train and validate on, whole.

    Args:
        data_args: Which dataset.

    Returns:
        `train` and `validation`.

    Raises:
        InputError: If the dataset, a split or a column is missing, a patient stands in both splits, or validation
            slices make no volume.
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
    plan_scans(validation)  # better known now than after the first epoch
    return DatasetDict(train=train, validation=validation)


class ScanPlan(NamedTuple):
    """What a scan is made of.

    Attributes:
        rows: Row of each slice in the dataset, by its number.
        size: Height and width of its slices.
        spacing_mm: Voxel size (z, y, x); None where slices are missing between the first and the last.
    """

    rows: dict[int, int]
    size: tuple[int, int]
    spacing_mm: tuple[float, float, float] | None


def plan_scans(dataset: Dataset) -> dict[tuple[int, int], ScanPlan]:
    """The scans of a split by case and day.

    Raises:
        InputError: If a scan has slices of several sizes, or a slice twice; names the first and how many there are.
    """
    columns = ["case", "day", "slice", "height", "width", "pixel_spacing"]
    table = dataset.with_format(None).select_columns(columns).to_pandas()
    # Single precision by way of its digits: 1.63 mm is 1.63 again.
    table["pixel_spacing"] = table["pixel_spacing"].map(lambda sides: tuple(float(str(side)) for side in sides))
    plans: dict[tuple[int, int], ScanPlan] = {}
    problems = []
    for (case, day), slices in table.groupby(["case", "day"]):
        rows = dict(zip(slices["slice"].tolist(), slices.index.tolist(), strict=True))
        grids = set(zip(slices["height"], slices["width"], slices["pixel_spacing"], strict=True))
        if len(grids) > 1:
            problems.append(f"case{case}_day{day}: expected slices of one size and spacing, but got {len(grids)}")
        elif len(rows) < len(slices):
            problems.append(f"case{case}_day{day}: expected each slice once, but {len(slices) - len(rows)} come again")
        height, width, (row_mm, column_mm) = min(grids)
        whole = max(rows) - min(rows) < len(rows)
        plans[case, day] = ScanPlan(rows, (height, width), (SLICE_THICKNESS_MM, row_mm, column_mm) if whole else None)
    if problems:
        raise InputError(f"{problems[0]} ({len(problems)} such scans of {len(plans)}); correct the dataset")
    return plans


def select_samples(slices: DatasetDict, data_args: DataArguments, seed: int) -> DatasetDict:
    """The slices to train and score: all, or as many as the arguments say.

    Args:
        slices: From `load_slices`.
        data_args: How much of it.
        seed: Draws `max_train_samples`.

    Raises:
        InputError: If the validation slices show no organ.
    """
    train, validation = slices["train"], slices["validation"]
    if data_args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data_args.max_train_samples, len(train))))
    if data_args.max_eval_samples is not None:
        validation = validation.select(range(min(data_args.max_eval_samples, len(validation))))
    if not any(rle for organs in validation["segmentation"] for rle in organs.values()):
        raise InputError("the validation slices show no organ, so there is nothing to score; take more of them")
    return DatasetDict(train=train, validation=validation)


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

    def __init__(self, dataset: Dataset, slice_context: int) -> None:
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

    MR intensities have no unit; what is bright differs from scan to scan. A bright arm or coil would leave the organs
    dark if the maximum were to scale them; the mean it changes little.

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


def organ_masks(segmentation: dict[str, str], height: int, width: int) -> np.ndarray:
    """The exact masks of a slice, overlaps kept: bool, shape `(organs, height, width)`."""
    return np.stack([decode(segmentation[organ], height, width) for organ in ORGANS])


class SliceTransform:
    """Turns rows of the dataset into model inputs; for `Dataset.with_transform`.

    Args:
        processor: Its size, mean and standard deviation are used.
        label_mode: What `labels` are: label ids of `annotation`, or masks of `segmentation`, overlaps kept.
        neighbours: Where the first and the last channel come from; None takes the slice for all three.
        augmentation: Changes the slices at random; None leaves them as they are.
        seed: Of the augmentation, together with the epoch and the slice's id.
        scoring: Whether to add which slice it is and its own size, which scores at native resolution need.
    """

    def __init__(
        self,
        processor: SegformerImageProcessorPil,
        label_mode: str = "multiclass",
        neighbours: SliceNeighbours | None = None,
        augmentation: A.Compose | None = None,
        seed: int = 0,
        scoring: bool = False,
    ) -> None:
        self.image_size: int = processor.size["height"]
        self.mean = np.array(processor.image_mean, dtype=np.float32)[:, None, None]
        self.std = np.array(processor.image_std, dtype=np.float32)[:, None, None]
        self.label_mode = label_mode
        self.neighbours = neighbours
        self.augmentation = augmentation
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
        if self.augmentation is not None:
            sequence = np.random.SeedSequence([self.seed, int(self.epoch), zlib.crc32(row["id"].encode())])
            image, labels = augment(self.augmentation, image, labels, int(sequence.generate_state(1)[0]))
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


def transform_splits(
    slices: DatasetDict,
    samples: DatasetDict,
    processor: SegformerImageProcessorPil,
    model_args: ModelArguments,
    data_args: DataArguments,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Attach the transforms, which run as slices are read: `train` augmented, `validation` ready to be scored.

    Args:
        slices: From `load_slices`; where neighbours are found.
        samples: From `select_samples`.
        processor: The model's.
        model_args: What the labels are.
        data_args: What the channels are, and whether to augment.
        seed: Of the augmentation.

    Raises:
        InputError: If neighbours are wanted and a split has none.
    """
    neighbours = dict.fromkeys(slices)
    if data_args.slice_context:
        neighbours = {split: SliceNeighbours(slices[split], data_args.slice_context) for split in slices}
    augmentation = build_augmentation() if data_args.augmentation else None
    mode = model_args.label_mode
    train = SliceTransform(processor, mode, neighbours["train"], augmentation, seed)
    validation = SliceTransform(processor, mode, neighbours["validation"], scoring=True)
    return samples["train"].with_transform(train), samples["validation"].with_transform(validation)


def attached_transform(dataset: Dataset) -> SliceTransform:
    """The transform that `transform_splits` attached to a split."""
    return dataset.format["format_kwargs"]["transform"]


class BalancedSampler(Sampler[int]):
    """As many draws an epoch as there are slices, in which four groups come equally often.

    The groups are slices without any organ and slices with each of the organs; a slice with two organs is in both
    groups. Draws depend on seed and epoch alone, so that every process, and a resumed run, makes the same.

    Args:
        organs: Per slice whether it shows each organ: bool, shape `(slices, organs)`.
        seed: Of the draws.
        epoch: The transform's, one int64.
    """

    def __init__(self, organs: np.ndarray, seed: int, epoch: torch.Tensor) -> None:
        groups = np.column_stack([~organs.any(axis=1), organs])
        self.weights = torch.from_numpy((groups / groups.sum(axis=0).clip(min=1)).sum(axis=1))
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        seed = np.random.SeedSequence([self.seed, int(self.epoch)]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        yield from torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist()


def shown_organs(dataset: Dataset) -> np.ndarray:
    """Whether each slice shows each organ: bool, shape `(slices, organs)`."""
    return np.array([[bool(masks[organ]) for organ in ORGANS] for masks in dataset.with_format(None)["segmentation"]])
