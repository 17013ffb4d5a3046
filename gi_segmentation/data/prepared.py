"""Prepared slices: from the cache of `datasets`, or made at each visit.

Decoding and resizing a slice takes several times as long as augmenting it, and gives the same result in every epoch.
So it is done once, for all slices of the dataset. `datasets` keeps the result in its cache, in files that are mapped
into memory. All folds, epochs, processes and later trainings with the same `--image_size` use these files.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from gi_segmentation import rle
from gi_segmentation.data import intensity, preprocessing
from gi_segmentation.data.dataset_scans import find_known_organs, list_slice_spacings
from gi_segmentation.data.preprocessing import (
    bits_shape,
    find_channels,
    prepare_image,
    prepare_organs,
    stack_channels,
)
from gi_segmentation.data.streaming import StreamedRows, is_index
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle import images
from gi_segmentation.formats.kaggle.images import decode_image
from gi_segmentation.labels import find_labels
from gi_segmentation.processes import count_cores
from gi_segmentation.rle import RleError

# The columns of the dataset from which a slice is prepared.
SOURCE_COLUMNS = ["id", "image", "segmentation", "height", "width"]
# The columns of the cache: prepared pixels with two bytes each, and organ bits with one byte per pixel for each eight
# organs. `large_binary` holds more than 2 GB in one buffer.
CACHE_FEATURES = Features({"pixels": Value("large_binary"), "organs": Value("large_binary")})
# With fewer slices than this, a process takes longer to start than to work.
SLICES_PER_PROCESS = 500


def select_sources(dataset: Dataset) -> Dataset | StreamedRows:
    """Return the columns `SOURCE_COLUMNS`, with images as bytes, not decoded."""
    if is_index(dataset):
        return StreamedRows(dataset, SOURCE_COLUMNS)
    return dataset.with_format(None).select_columns(SOURCE_COLUMNS).cast_column("image", Image(decode=False))


def read_image(row: dict[str, Any]) -> np.ndarray:
    """Check and decode the image of a row of `select_sources`: raw intensities, uint16, shape `(height, width)`.

    Raises:
        InputError: If the row has no whole image of the size that it states.
    """
    # A copy of the dataset can be damaged on a disk or on its way from a Hub, or somebody else made it. `datasets`
    # would decode the image without a look at its checksums.
    data = (row["image"] or {}).get("bytes") or b""
    return decode_image(data, row["id"], row["width"], row["height"])


def prepare_annotations(row: dict[str, Any], image_size: int) -> np.ndarray:
    """Check and prepare the annotations of a row of `select_sources`: organ bits, see `preprocessing.bits_shape`.

    Raises:
        InputError: If there is no annotation, or one is not a mask of the slice.
    """
    try:
        # A single organ may be unknown.
        if row["segmentation"] is None or set(row["segmentation"].values()) == {None}:
            raise RleError("no organ has a segmentation, not even an empty one")
        return prepare_organs(row, image_size)
    except RleError as error:
        raise InputError(f"{row['id']}: {error}; build the dataset again") from error


def prepare_rows(
    rows: dict[str, list[Any]], image_size: int, organs: Sequence[str], code: str
) -> dict[str, list[bytes]]:
    """Prepare rows for the cache. `datasets` passes and expects a list of values for each column.

    Args:
        rows: The columns `SOURCE_COLUMNS`.
        image_size: Height and width of the prepared slices.
        organs: Not used. Like `code`, they are a part of the fingerprint under which `datasets` keeps the result.
        code: The source code of the rules.

    Raises:
        InputError: As `read_image` and `prepare_annotations`.
    """
    columns = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return {
        "pixels": [prepare_image(read_image(row), image_size).tobytes() for row in columns],
        "organs": [prepare_annotations(row, image_size).tobytes() for row in columns],
    }


def cache_slices(dataset: Dataset, image_size: int) -> Dataset:
    """Return the dataset with the columns of `CACHE_FEATURES`, with a progress bar if they have to be made.

    Args:
        dataset: All slices of a split, as they were built.
        image_size: Height and width of the prepared slices.

    Raises:
        InputError: If a slice is damaged, or if the cache cannot be written.
    """
    # `datasets` finds an earlier result by a fingerprint of the rows, the function's name and these arguments. It does
    # not look into functions of an installed package, so a changed rule would not be noticed without the source code.
    code = "".join(inspect.getsource(module) for module in (intensity, preprocessing, rle, images))
    source, organs = cast(Dataset, select_sources(dataset)), find_labels(dataset.features).names
    num_proc = min(count_cores(), len(source) // SLICES_PER_PROCESS)
    try:
        prepared = source.map(
            prepare_rows,
            batched=True,
            batch_size=32,
            writer_batch_size=32,
            remove_columns=SOURCE_COLUMNS,
            features=CACHE_FEATURES,
            fn_kwargs={"image_size": image_size, "organs": organs, "code": code},
            num_proc=num_proc if num_proc > 1 else None,
            desc=f"Preparing slices of {image_size} x {image_size} pixels",
        )
    except OSError as error:
        # `datasets` has removed the file that it could not finish.
        num_bytes = 2 * image_size**2 + math.prod(bits_shape(len(organs), image_size))
        raise InputError(
            f"--cache_slices: {len(dataset)} slices of {image_size} x {image_size} pixels need "
            f"{num_bytes * len(dataset) / 1e9:.1f} GB in the cache of datasets, but: {error}; "
            f"free some space, name another folder by HF_DATASETS_CACHE, or add --no_cache_slices"
        ) from error
    # The new columns stand beside the old ones. Nothing is copied.
    return concatenate_datasets([dataset, prepared], axis=1)


def view_values(column: pa.ChunkedArray, dtype: type[np.generic], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the values of a column of `CACHE_FEATURES` as arrays that share the memory of the cache.

    Args:
        column: Values of the type `large_binary`, none of them null.
        dtype: What the bytes stand for.
        shape: Shape of each value.
    """
    # A value of `pyarrow` would be a copy of its bytes. So the arrays are made from the buffers of a column: the place
    # of each value, with 8 bytes, and the bytes of all values, one after the other.
    for chunk in column.chunks:
        _, starts, values = chunk.buffers()
        for start in np.frombuffer(starts, np.int64, count=len(chunk), offset=8 * chunk.offset):
            yield np.frombuffer(values, dtype, count=math.prod(shape), offset=start).reshape(shape)


class PreparedSlices:
    """Gives what a model is shown of a slice, and the organ bits, from the cache if the dataset has it.

    Args:
        dataset: A whole split. With `--max_train_samples` it has more slices than the training uses.
        image_size: Height and width of the model's input.
        slice_context: Distance to the neighbours, see `find_channels`; 0: a slice is shown alone.

    Attributes:
        labels: The labels of the dataset.
        known: From `find_known_organs`.
        rows: Row of each slice, by its scan and its number.

    Raises:
        InputError: If neighbours are wanted and no slice has one.
    """

    def __init__(self, dataset: Dataset, image_size: int, slice_context: int = 0) -> None:
        self.image_size = image_size
        self.slice_context = slice_context
        self.labels = find_labels(dataset.features)
        self.bits_shape = bits_shape(len(self.labels), image_size)
        self.known = find_known_organs(dataset)
        # With the format `arrow`, a row of the cache is not copied. A cache of another size is not used.
        self.cache: Dataset | None = None
        if len(dataset) and set(CACHE_FEATURES) <= set(dataset.column_names):
            cache = dataset.select_columns(list(CACHE_FEATURES)).with_format("arrow")
            if len(cache[0]["organs"][0].as_buffer()) == math.prod(self.bits_shape):
                self.cache = cache
        plain = dataset.with_format(None)
        self.images = select_sources(dataset)
        self.rows: dict[str, dict[int, int]] = defaultdict(dict)
        # Distance between the slices of each scan.
        self.spacing_mm: dict[str, float] = {}
        spacings = list_slice_spacings(dataset).tolist()
        for row, (scan, number, spacing) in enumerate(zip(plain["scan"], plain["slice"], spacings, strict=True)):
            self.rows[scan][number], self.spacing_mm[scan] = row, spacing
        # If every slice were its own neighbour, the model would see three equal channels without any sign of it.
        if (
            slice_context
            and len(dataset)
            and all(
                len(set(self.find_shown(scan, number))) == 1
                for scan, numbers in self.rows.items()
                for number in numbers
            )
        ):
            raise InputError(
                f"--slice_context {slice_context}: expected slices with neighbours at most that far away in their "
                f"scan, but none of the {len(dataset)} slices of a split has one; use 0, or build the dataset from "
                f"whole scans"
            )

    def find_shown(self, scan: str, number: int) -> list[int]:
        """Return the rows of the slices that the channels show for a slice."""
        # As many millimetres away as in a prediction, which uses the same function.
        return find_channels(self.rows[scan], number, self.slice_context, self.spacing_mm[scan])

    def read(self, slices: Sequence[tuple[str, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what a model is shown for some slices.

        Args:
            slices: Scan and number of each slice.

        Yields:
            For each slice: prepared pixels, uint16, shape `(S, S, 1 or 3)`; and the organ bits of the slice itself,
            see `preprocessing.bits_shape`. Neither may be changed.
        """
        rows = [self.find_shown(scan, number) for scan, number in slices]
        if self.cache is None:
            yield from map(self.prepare, rows)
            return
        # One access for all slices of a batch. The rows of the answer have the order of the question.
        table = self.cache[[row for shown in rows for row in shown]]
        pixels = view_values(table.column("pixels"), np.uint16, (self.image_size, self.image_size))
        organs = view_values(table.column("organs"), np.uint8, self.bits_shape)
        for shown in rows:
            images, bits = (list(islice(values, len(shown))) for values in (pixels, organs))
            # The slice itself is in the middle of those that are shown.
            yield stack_channels(images), bits[len(shown) // 2]

    def prepare(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Do the work of the cache for one slice, see `read`."""
        shown = [self.images[row] for row in rows]
        pixels = [prepare_image(read_image(row), self.image_size) for row in shown]
        return stack_channels(pixels), prepare_annotations(shown[len(shown) // 2], self.image_size)
