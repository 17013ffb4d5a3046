"""Read slices from Parquet files while a model trains, from a folder or a Hub. No copy of the images is made.

A Parquet file stores its rows in groups, and a reader gets a whole group. In the files of `dataset_builder`, a group
has up to 32 slices of one scan, about 4 MB. A training first reads all columns but the pictures. This index says for
each slice in which file, in which group and at which place its row is. `sampling.StreamingSampler` then draws the
slices so that hardly any group is read twice in an epoch.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value, load_dataset_builder
from fsspec.core import url_to_fs

from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelSet
from gi_segmentation.schema import OWN_COLUMNS, dataset_features

# The columns with pictures. They are not in the index.
PICTURE_COLUMNS = ("image", "annotation")
# Where the row of a slice is, as columns of the index. `file` has the names of all files of the dataset.
PLACE_COLUMNS = ("file", "row_group", "place")
# Row groups that a process keeps in memory, up to 200 MB. A window of the sampler has a third as many.
KEPT_GROUPS = 48


def load_index(path: str, revision: str | None) -> DatasetDict:
    """Read all columns but the pictures, and find the place of each row.

    Args:
        path: Folder of a dataset, or a Hub id.
        revision: Branch, tag or commit on the Hub; None: its main branch.

    Returns:
        The splits, with the columns `PLACE_COLUMNS` in place of `PICTURE_COLUMNS`.

    Raises:
        ValueError: If a file is not Parquet, or has no images.
    """
    files = load_dataset_builder(path, revision=revision).config.data_files or {}
    names = [name for split in files.values() for name in split]
    places = {"file": ClassLabel(names=names), "row_group": Value("int32"), "place": Value("int32")}
    splits = {}
    for split, paths in files.items():
        table = pa.concat_tables([index_file(name, names.index(name)) for name in paths])
        # After reading, Arrow keeps memory that it no longer needs.
        pa.default_memory_pool().release_unused()
        features = {**find_features(table), **places}
        info = DatasetInfo(features=Features({name: features[name] for name in table.column_names}))
        splits[split] = Dataset(table.cast(info.features.arrow_schema), info=info)
    return DatasetDict(splits)


def find_features(table: pa.Table) -> Features:
    """Return the columns that a table of a dataset of ours may have, with its labels.

    Raises:
        ValueError: If it has no column `segmentation` with an encoding of each organ, or a label cannot be used.
    """
    place = table.schema.get_field_index("segmentation")
    kind = table.schema.field(place).type if place >= 0 else pa.null()
    if not pa.types.is_struct(kind):
        raise ValueError("expected a column `segmentation` with an encoding of each organ")
    try:
        labels = LabelSet(tuple(kind.field(i).name for i in range(kind.num_fields)))
    except InputError as error:
        raise ValueError(str(error)) from error
    return dataset_features(labels, own=set(OWN_COLUMNS) <= set(table.column_names))


def open_file(name: str) -> Any:
    """Open a file in a folder or on a Hub, so that only the bytes that a reader asks for are downloaded."""
    system, path = url_to_fs(name)
    # By default, 50 MB more are read from a Hub at each request, and a row group has 4 MB. `pre_buffer` of the reader
    # joins the requests for columns that lie beside each other.
    return system.open(path, "rb", cache_type="none")


def index_file(name: str, number: int) -> pa.Table:
    """Read the columns of a file but the pictures, and add the place of each row.

    Args:
        name: Path or address of the file.
        number: Its number among all files of the dataset.

    Raises:
        ValueError: If it is no Parquet file, or has no images.
    """
    with open_file(name) as opened:
        file = pq.ParquetFile(opened, pre_buffer=True)
        if "image" not in file.schema_arrow.names:
            raise ValueError(f"{name}: expected a column `image`, but there is none")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        # A column that the file lacks is left out.
        table = file.read(columns=[column for column in dataset_features(own=True) if column not in PICTURE_COLUMNS])
    places = {
        "file": np.full(len(table), number),
        "row_group": np.repeat(np.arange(len(sizes)), sizes),
        "place": np.concatenate([np.arange(size) for size in sizes] or [np.arange(0)]),
    }
    for column, values in places.items():
        table = table.append_column(column, pa.array(values))
    return table


def is_index(dataset: Dataset) -> bool:
    """Tell whether a split comes from `load_index`."""
    return set(PLACE_COLUMNS) <= set(dataset.column_names)


def number_groups(index: Dataset) -> np.ndarray:
    """Return the number of the row group of each slice among all row groups: int, shape `(slices,)`."""
    plain = index.with_format("numpy", columns=["file", "row_group"])[:]
    return np.unique(np.stack([plain["file"], plain["row_group"]]), axis=1, return_inverse=True)[1].reshape(-1)


class StreamedRows:
    """Gives the rows of a split with their images, row group by row group.

    Args:
        index: A split from `load_index`, or a part of one.
        columns: The columns of the rows.
    """

    def __init__(self, index: Dataset, columns: list[str]) -> None:
        plain = index.with_format("numpy", columns=list(PLACE_COLUMNS))[:]
        self.places = np.stack([plain[column] for column in PLACE_COLUMNS], axis=1)
        self.names = index.features["file"].names
        self.columns = columns
        self.groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def __getitem__(self, row: int) -> dict[str, Any]:
        file, group, place = map(int, self.places[row])
        if (file, group) not in self.groups:
            self.groups[file, group] = self.read_group(file, group)
            if len(self.groups) > KEPT_GROUPS:
                self.groups.popitem(last=False)
        self.groups.move_to_end((file, group))
        return self.groups[file, group][place]

    def read_group(self, file: int, group: int) -> list[dict[str, Any]]:
        """Read a row group."""
        # A process that loads slices must not share an open file with its parent, because both would move its
        # position. So a file is opened for each group.
        with open_file(self.names[file]) as opened:
            return pq.ParquetFile(opened, pre_buffer=True).read_row_group(group, columns=self.columns).to_pylist()
