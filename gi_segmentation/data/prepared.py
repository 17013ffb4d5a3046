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
from gi_segmentation.data.preprocessing import find_channels, prepare_image, prepare_organs, stack_channels
from gi_segmentation.data.streaming import StreamedRows, is_index
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle import images
from gi_segmentation.formats.kaggle.images import decode_image
from gi_segmentation.processes import count_cores
from gi_segmentation.rle import RleError

# The columns of the dataset from which a slice is prepared.
SOURCE_COLUMNS = ["id", "image", "segmentation", "height", "width"]
# The columns of the cache: prepared pixels with two bytes each, and organ bits with one byte per pixel. `large_binary`
# holds more than 2 GB in one buffer.
CACHE_FEATURES = Features({"pixels": Value("large_binary"), "organs": Value("large_binary")})
BYTES_PER_PIXEL = 3
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
    """Check and prepare the annotations of a row of `select_sources`: organ bits, uint8, `(image_size, image_size)`.

    Raises:
        InputError: If an annotation is missing, or is not a mask of the slice.
    """
    try:
        if row["segmentation"] is None or None in row["segmentation"].values():
            raise RleError("an organ has no segmentation, not even an empty one")
        return prepare_organs(row, image_size)
    except RleError as error:
        raise InputError(f"{row['id']}: {error}; build the dataset again") from error


def prepare_rows(rows: dict[str, list[Any]], image_size: int, code: str) -> dict[str, list[bytes]]:
    """Prepare rows for the cache. `datasets` passes and expects a list of values for each column.

    Args:
        rows: The columns `SOURCE_COLUMNS`.
        image_size: Height and width of the prepared slices.
        code: Not used. It is a part of the fingerprint under which `datasets` keeps the result.

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
    source = cast(Dataset, select_sources(dataset))
    num_proc = min(count_cores(), len(source) // SLICES_PER_PROCESS)
    try:
        prepared = source.map(
            prepare_rows,
            batched=True,
            batch_size=32,
            writer_batch_size=32,
            remove_columns=SOURCE_COLUMNS,
            features=CACHE_FEATURES,
            fn_kwargs={"image_size": image_size, "code": code},
            num_proc=num_proc if num_proc > 1 else None,
            desc=f"Preparing slices of {image_size} x {image_size} pixels",
        )
    except OSError as error:
        # `datasets` has removed the file that it could not finish.
        raise InputError(
            f"--cache_slices: {len(dataset)} slices of {image_size} x {image_size} pixels need "
            f"{BYTES_PER_PIXEL * image_size**2 * len(dataset) / 1e9:.1f} GB in the cache of datasets, but: {error}; "
            f"free some space, name another folder by HF_DATASETS_CACHE, or add --no_cache_slices"
        ) from error
    # The new columns stand beside the old ones. Nothing is copied.
    return concatenate_datasets([dataset, prepared], axis=1)


def view_values(column: pa.ChunkedArray, dtype: type[np.generic], shape: tuple[int, int]) -> Iterator[np.ndarray]:
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
        slice_context: Distance to the neighbours, in slices; 0: a slice is shown alone.

    Raises:
        InputError: If neighbours are wanted and no slice has one.
    """

    def __init__(self, dataset: Dataset, image_size: int, slice_context: int = 0) -> None:
        self.image_size = image_size
        self.slice_context = slice_context
        # With the format `arrow`, a row of the cache is not copied. A cache of another size is not used.
        self.cache: Dataset | None = None
        if len(dataset) and set(CACHE_FEATURES) <= set(dataset.column_names):
            cache = dataset.select_columns(list(CACHE_FEATURES)).with_format("arrow")
            if len(cache[0]["organs"][0].as_buffer()) == image_size**2:
                self.cache = cache
        plain = dataset.with_format(None)
        self.images = select_sources(dataset)
        self.rows: dict[str, dict[int, int]] = defaultdict(dict)
        for row, (scan, number) in enumerate(zip(plain["scan"], plain["slice"], strict=True)):
            self.rows[scan][number] = row
        # If every slice were its own neighbour, the model would see three equal channels without any sign of it.
        if (
            slice_context
            and len(dataset)
            and all(
                len(set(find_channels(numbers, number, slice_context))) == 1
                for numbers in self.rows.values()
                for number in numbers
            )
        ):
            raise InputError(
                f"--slice_context {slice_context}: expected slices with neighbours at most that far away in their "
                f"scan, but none of the {len(dataset)} slices of a split has one; use 0, or build the dataset from "
                f"whole scans"
            )

    def read(self, slices: Sequence[tuple[str, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what a model is shown for some slices.

        Args:
            slices: Scan and number of each slice.

        Yields:
            For each slice: prepared pixels, uint16, shape `(S, S, 1 or 3)`; and the organ bits of the slice itself,
            uint8, shape `(S, S)`. Neither may be changed.
        """
        rows = [find_channels(self.rows[scan], number, self.slice_context) for scan, number in slices]
        if self.cache is None:
            yield from map(self.prepare, rows)
            return
        # One access for all slices of a batch. The rows of the answer have the order of the question.
        table = self.cache[[row for shown in rows for row in shown]]
        shape = self.image_size, self.image_size
        pixels = view_values(table.column("pixels"), np.uint16, shape)
        organs = view_values(table.column("organs"), np.uint8, shape)
        for shown in rows:
            images, bits = (list(islice(values, len(shown))) for values in (pixels, organs))
            # The slice itself is in the middle of those that are shown.
            yield stack_channels(images), bits[len(shown) // 2]

    def prepare(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Do the work of the cache for one slice, see `read`."""
        shown = [self.images[row] for row in rows]
        pixels = [prepare_image(read_image(row), self.image_size) for row in shown]
        return stack_channels(pixels), prepare_annotations(shown[len(shown) // 2], self.image_size)
