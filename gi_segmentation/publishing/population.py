"""Whether the slices of a dataset show synthetic patients or real ones, and what a card calls the dataset."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from gi_segmentation.data.streaming import is_index, open_file
from gi_segmentation.data.synthetic import MARK, MARK_PLACE

# Names of the dataset on the card. Cards with the first one speak of the competition, its patients and its rules.
KAGGLE_TITLE = "UW-Madison GI Tract"
SYNTHETIC_TITLE = f"synthetic patients (a phantom of the {KAGGLE_TITLE} data)"


def name_dataset(title: str | None, synthetic: bool) -> str:
    """Return the name of the dataset on the card.

    Args:
        title: From `--dataset_title`; None: this project knows two kinds of datasets by itself.
        synthetic: From `are_all_synthetic`.

    Example:
        >>> name_dataset("Trial of our clinic", synthetic=False), name_dataset("Trial of our clinic", synthetic=True)
        ('Trial of our clinic', 'Trial of our clinic (synthetic patients)')
    """
    if title is None:
        return SYNTHETIC_TITLE if synthetic else KAGGLE_TITLE
    # A title must not present synthetic patients as real ones.
    return f"{title} (synthetic patients)" if synthetic and "synthetic" not in title.lower() else title


def are_all_synthetic(slices: DatasetDict) -> bool:
    """Tell whether every slice of a dataset has the mark. One slice without it makes the whole dataset patients'.

    Args:
        slices: The splits, as they were loaded, also without pictures as with `--streaming`.
    """
    return all(is_split_synthetic(dataset) for dataset in slices.values())


def is_split_synthetic(dataset: Dataset) -> bool:
    """Tell whether every slice of a split has the mark; True if it has no slice."""
    if not is_index(dataset):
        # The whole table, of which `dataset` may be a selection. Only the start of each file is read.
        return all(has_marks(chunk) for chunk in dataset.data.column("image").chunks)
    plain = dataset.with_format("numpy", columns=["file", "row_group"])[:]
    groups = np.unique(np.stack([plain["file"], plain["row_group"]], axis=1), axis=0)
    # The first group without a mark is the last one that is read. So real data is not read twice.
    return all(
        is_group_synthetic(dataset.features["file"].names[file], group) for file, group in groups.astype(int).tolist()
    )


def is_group_synthetic(name: str, group: int) -> bool:
    """Tell whether every slice of a row group of a Parquet file has the mark."""
    with open_file(name) as opened:
        table = pq.ParquetFile(opened, pre_buffer=True).read_row_group(group, columns=["image"])
    return all(has_marks(chunk) for chunk in table.column("image").chunks)


def has_marks(images: pa.StructArray) -> bool:
    """Tell whether all images of a column have the mark. An image without bytes has none."""
    starts = pc.binary_slice(pc.struct_field(images, "bytes"), MARK_PLACE, MARK_PLACE + len(MARK))
    # `min_count=0`: without it, the answer for no image at all would be null.
    return bool(pc.all(pc.fill_null(pc.equal(starts, pa.scalar(MARK, starts.type)), False), min_count=0).as_py())
