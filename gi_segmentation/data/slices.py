"""The dataset `gi_tract`, loaded and checked: its splits, its scans, and the slices to train and to score."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.augmentation import augment, build_augmentation
from gi_segmentation.data.preprocessing import SliceNeighbours, SliceTransform
from gi_segmentation.errors import InputError
from gi_segmentation.schema import dataset_features, find_voxel_size_mm

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
        case: Whose scan it is.
        rows: Row of each slice in the dataset, by its number.
        size: Height and width of its slices.
        spacing_mm: Voxel size (z, y, x); None where slices are missing between the first and the last.
    """

    case: int
    rows: dict[int, int]
    size: tuple[int, int]
    spacing_mm: tuple[float, float, float] | None


def plan_scans(dataset: Dataset) -> dict[str, ScanPlan]:
    """The scans of a split by name, sorted by case and day.

    Raises:
        InputError: If a scan has slices of several sizes, or a slice twice; names the first and how many there are.
    """
    columns = ["case", "day", "scan", "slice", "height", "width", "pixel_spacing"]
    table = dataset.with_format(None).select_columns(columns).to_pandas()
    table["pixel_spacing"] = table["pixel_spacing"].map(tuple)
    plans: dict[str, ScanPlan] = {}
    problems = []
    for (case, _, scan), slices in table.groupby(["case", "day", "scan"]):
        rows = dict(zip(slices["slice"].tolist(), slices.index.tolist(), strict=True))
        grids = set(zip(slices["height"], slices["width"], slices["pixel_spacing"], strict=True))
        if len(grids) > 1:
            problems.append(f"{scan}: expected slices of one size and spacing, but got {len(grids)}")
        elif len(rows) < len(slices):
            problems.append(f"{scan}: expected each slice once, but {len(slices) - len(rows)} come again")
        height, width, pixel_spacing = min(grids)
        plans[scan] = ScanPlan(int(case), rows, (height, width), find_voxel_size_mm(rows, pixel_spacing))
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
    augmentation = partial(augment, build_augmentation()) if data_args.augmentation else None
    mode = model_args.label_mode
    train = SliceTransform(processor, mode, neighbours["train"], augmentation, seed)
    validation = SliceTransform(processor, mode, neighbours["validation"], scoring=True)
    return samples["train"].with_transform(train), samples["validation"].with_transform(validation)
