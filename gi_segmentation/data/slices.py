"""A dataset: load it, check its splits and scans, and choose the slices to train on and to score."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, config, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.augmentation import augment, build_augmentation
from gi_segmentation.data.dataset_scans import find_missing_organs, list_dataset_scans
from gi_segmentation.data.prepared import PreparedSlices, cache_slices
from gi_segmentation.data.streaming import PICTURE_COLUMNS, load_index
from gi_segmentation.data.transforms import SliceTransform, attach_transform
from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelMode, find_labels
from gi_segmentation.schema import ALL_FOLDS, dataset_features, scan_name, slice_name
from gi_segmentation.shortages import describe_full_cache

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
BUILD_COMMAND = "python -m dataset_builder build --kaggle_dir KAGGLE_DIR --output_dir gi_tract"


def find_dataset(name: str, revision: str | None, streaming: bool = False) -> DatasetDict:
    """Load the dataset from a folder or from the Hub.

    Args:
        name: A folder, or a Hub id of the form `NAMESPACE/NAME`.
        revision: Branch, tag or commit on the Hub; None: its main branch.
        streaming: Whether to leave the pictures where they are, see `load_index`.

    Raises:
        InputError: If it cannot be loaded. The message has the command that builds a dataset.
    """
    folder = Path(name)
    # A Hub id of a dataset has exactly one slash. Everything else can only be a folder.
    if not folder.is_dir() and name.count("/") != 1:
        raise InputError(f"--dataset_name {name}: no such folder; `{BUILD_COMMAND}` makes one")
    if (folder / "train.csv").is_file():
        raise InputError(f"--dataset_name {name}: a Kaggle folder, not a dataset yet; `{BUILD_COMMAND}` makes one")
    try:
        # The absolute path, because `gi_tract` alone may also name the builder that `dataset_builder` registers.
        path = str(folder.resolve()) if folder.is_dir() else name
        loaded = load_index(path, revision) if streaming else load_dataset(path, revision=revision)
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        if line := describe_full_cache(error, Path(config.HF_DATASETS_CACHE)):
            raise InputError(line) from error
        raise InputError(f"--dataset_name {name}: {error}; `{BUILD_COMMAND}` makes one") from error
    if not isinstance(loaded, DatasetDict):
        raise InputError(
            f"--dataset_name {name}: expected splits, got {type(loaded).__name__}; `{BUILD_COMMAND}` makes one"
        )
    return loaded


def split_by_fold(slices: DatasetDict, name: str, fold: str) -> DatasetDict:
    """Divide the slices anew, by their column `fold`.

    Args:
        slices: `train` and `validation` as they were built.
        name: Name of the dataset, for messages.
        fold: Number of the fold whose patients form `validation`, or `all`.

    Returns:
        `train` and `validation`, the same rows in the same order as in a dataset that was built with this fold. With
        `all`, every slice is in `train`, and `validation` is empty.

    Raises:
        InputError: If the dataset has no such fold.
    """
    everyone = concatenate_datasets([slices["train"], slices["validation"]])
    keys = everyone.with_format(None).select_columns(["case", "day", "slice", "fold"]).to_pandas()
    # A built dataset is sorted by scan and slice. The order decides which slices an epoch draws for a given seed.
    keys = keys.sort_values(["case", "day", "slice"], kind="stable")
    folds = sorted(keys["fold"].unique().tolist())
    held_back = np.zeros(len(keys), dtype=bool)
    if fold != ALL_FOLDS:
        held_back = (keys["fold"] == int(fold)).to_numpy()
        if not held_back.any():
            raise InputError(
                f"--fold {fold}: {name} has no such fold; expected one of {', '.join(map(str, folds))}, or {ALL_FOLDS}"
            )
    return DatasetDict(
        train=everyone.select(keys.index[~held_back].to_numpy()),
        validation=everyone.select(keys.index[held_back].to_numpy()),
    )


def check_slice_names(dataset: Dataset, name: str) -> None:
    """Check that slices and scans have the names that follow from their numbers.

    Somebody else may have made the dataset, and the names of scans stand on cards, on pictures and in tables.

    Args:
        dataset: A split.
        name: Name of the dataset, for the message.

    Raises:
        InputError: If a row has another name.
    """
    names = dataset.with_format(None).select_columns(["id", "scan", "case", "day", "slice"])[:]
    for slice_id, scan, case, day, number in zip(*names.values(), strict=True):
        expected = scan_name(case, day)
        if None in (case, day, number) or scan != expected or slice_id != slice_name(expected, number):
            raise InputError(
                f"{name}: expected names like case1_day2_slice_0003, as the columns case, day and slice say, but a "
                f"row has the id {slice_id!r} and the scan {scan!r}; build the dataset again"
            )


def check_labels(slices: DatasetDict, name: str) -> None:
    """Check that a dataset has labels, the same in both splits.

    Raises:
        InputError: If not. The message begins with the name of the dataset.
    """
    try:
        train, validation = (find_labels(slices[split].features) for split in SPLITS)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if train != validation:
        raise InputError(
            f"{name}: expected the same labels in both splits, but train has {', '.join(train.names)} and validation "
            f"has {', '.join(validation.names)}; build the dataset again"
        )


def load_slices(data_args: DataArguments) -> DatasetDict:
    """Load and check the splits `train` and `validation`.

    Args:
        data_args: Name and revision of the dataset, the fold that is held back, and whether to cache the slices.

    Returns:
        `train` and `validation`, with all slices, and the columns of the cache. With `--fold all`, `validation` is
        empty.

    Raises:
        InputError: If the dataset, a split, a column or the fold is missing, a name is not that of a slice, a patient
            is in both splits, or the slices of a validation scan do not form a volume.
    """
    loaded = find_dataset(data_args.dataset_name, data_args.dataset_revision, data_args.streaming)
    missing = [split for split in SPLITS if split not in loaded]
    if missing:
        raise InputError(
            f"{data_args.dataset_name}: expected the splits train and validation, got {', '.join(loaded)}; "
            f"`{BUILD_COMMAND}` makes them"
        )
    # The index of a streamed dataset has no pictures. `load_index` has looked for them in the files.
    wanted = set(dataset_features()) - set(PICTURE_COLUMNS if data_args.streaming else ())
    columns = wanted - set(loaded["train"].column_names)
    if columns:
        raise InputError(
            f"{data_args.dataset_name}: lacks the columns {', '.join(sorted(columns))}, because it was built by an "
            f"older version; build it again: `{BUILD_COMMAND}`"
        )
    check_labels(loaded, data_args.dataset_name)
    for split in SPLITS:
        check_slice_names(loaded[split], data_args.dataset_name)
    if data_args.cache_slices and not data_args.streaming:
        # Before the fold is taken out, so that all folds share one cache.
        loaded = DatasetDict({split: cache_slices(loaded[split], data_args.image_size) for split in SPLITS})
    if data_args.fold is not None:
        loaded = split_by_fold(loaded, data_args.dataset_name, data_args.fold)
    train, validation = loaded["train"], loaded["validation"]
    # Scans of one patient look alike. A model that knows the patient from training would score too well on the others.
    shared = set(train.unique("case")) & set(validation.unique("case"))
    if shared:
        raise InputError(
            f"{data_args.dataset_name}: patients {sorted(shared)} are in train and in validation, so the scores "
            f"would be too good; split by patient"
        )
    # The result is not used. A fault of the validation scans is found here, and not after the first epoch.
    list_dataset_scans(validation)
    return DatasetDict(train=train, validation=validation)


def select_samples(slices: DatasetDict, data_args: DataArguments, seed: int) -> DatasetDict:
    """Choose the slices to train on and to score: all of them, or as many as the arguments say.

    Args:
        slices: From `load_slices`.
        data_args: `max_train_samples` and `max_eval_samples`.
        seed: Seed of the random choice of training slices.

    Raises:
        InputError: If the validation slices show no organ.
    """
    train, validation = slices["train"], slices["validation"]
    # Training slices are drawn at random: the first ones would all come from a few patients. Validation slices are the
    # first ones, so that they form whole scans, at most one of which is cut off.
    if data_args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data_args.max_train_samples, len(train))))
    if data_args.max_eval_samples is not None:
        validation = validation.select(range(min(data_args.max_eval_samples, len(validation))))
    # Dice skips a slice and organ if prediction and truth are both empty. Without any organ, the score could be NaN.
    if len(validation) and not any(rle for organs in validation["segmentation"] for rle in organs.values()):
        raise InputError("the validation slices show no organ, so there is nothing to score; take more of them")
    if missing := find_missing_organs(train):
        logger.warning(
            "no training slice shows %s, so the model cannot learn it; what it predicts there means nothing",
            ", ".join(missing),
        )
    return DatasetDict(train=train, validation=validation)


def transform_splits(
    slices: DatasetDict,
    samples: DatasetDict,
    processor: SegformerImageProcessorPil,
    model_args: ModelArguments,
    data_args: DataArguments,
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Attach the transforms that turn a slice into tensors each time it is read.

    Args:
        slices: From `load_slices`; the neighbours are found among them.
        samples: From `select_samples`; these get the transforms.
        processor: The model's image processor.
        model_args: Its `label_mode` is used.
        data_args: `slice_context` and those of the augmentation are used.
        seed: Seed of the augmentation.

    Returns:
        The training slices, with augmentation, and the validation slices, with what scoring needs.

    Raises:
        InputError: If the model needs neighbours and no slice of a split has one.
    """
    # A neighbour may be any slice of the split, even one that `select_samples` left out.
    size, context = processor.size["height"], data_args.slice_context
    whole = {split: PreparedSlices(slices[split], size, context) for split in SPLITS}
    augmentation = None
    if data_args.augmentation:
        mirror = not whole["train"].labels.has_sides
        augmentation = partial(augment, build_augmentation(data_args.strong_augmentation, mirror))
    # Nothing is computed here. The transforms run when a slice is read, so every epoch makes other random changes.
    mode = model_args.label_mode
    train = SliceTransform(processor, whole["train"], mode, augmentation, seed)
    validation = SliceTransform(processor, whole["validation"], mode, scoring=True)
    return attach_transform(samples["train"], train), attach_transform(samples["validation"], validation)


def attach_scoring_transform(
    dataset: Dataset, processor: SegformerImageProcessorPil, label_mode: LabelMode, slice_context: int
) -> Dataset:
    """Attach the transform with which a model scores the slices of a dataset.

    Args:
        dataset: The slices. Neighbours are found among them.
        processor: The model's image processor.
        label_mode: What the model's channels mean.
        slice_context: Distance to the slices for the first and the last channel; 0: all channels show the slice.

    Raises:
        InputError: If the model needs neighbours and no slice has one.
    """
    slices = PreparedSlices(dataset, processor.size["height"], slice_context)
    return attach_transform(dataset, SliceTransform(processor, slices, label_mode, scoring=True))
