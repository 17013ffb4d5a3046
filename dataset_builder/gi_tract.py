"""The builder of the dataset `gi_tract`: one row per slice, splits by patient.

`datasets` calls a builder in three steps: `_info` names the columns, `_split_generators` says which scans go into
which split, and `_generate_examples` yields the rows. `datasets` then writes the rows to files and keeps these in its
cache.
"""

import hashlib
import inspect
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import datasets.load
import numpy as np
from datasets.builder import Key
from PIL import Image

from dataset_builder import splits, verify
from dataset_builder.splits import assign_folds
from dataset_builder.verify import CheckedSlice, check_slice
from gi_segmentation import files, labels, rle, schema
from gi_segmentation.files import check_utf8, find_files
from gi_segmentation.formats.kaggle import annotations, folder, images, label_file, names
from gi_segmentation.formats.kaggle.folder import FAULTY_SCANS, KaggleScan, list_pngs, list_splits, read_kaggle_scans
from gi_segmentation.formats.kaggle.label_file import LABEL_FILE, read_label_file
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.internals import register_dataset
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.rle import Runs, fill_runs
from gi_segmentation.schema import dataset_features


@dataclass
class GiTractConfig(datasets.BuilderConfig):
    """How to split a Kaggle folder.

    Attributes:
        num_folds: Number of folds into which the patients are divided.
        fold: The fold whose patients form `validation`. All others form `train`.
        seed: Seed of the division into folds.
        include_faulty_scans: Whether to keep the scans that the competition's hosts call faulty.
    """

    num_folds: int = 5
    fold: int = 0
    seed: int = 0
    include_faulty_scans: bool = False


def label_map(runs: Mapping[str, Runs], organs: Sequence[str], height: int, width: int) -> np.ndarray:
    """Make a map with one label id per pixel from the runs of the organs.

    Where organs overlap, the highest id wins: stomach over small bowel over large bowel. Each order takes pixels away
    from some organ. With this one, the organ that loses most still has a Dice of 0.9986 with its own encoding (22 real
    scans). The other orders that we tried gave less.

    Args:
        runs: The runs of each organ that somebody has drawn in the scan.
        organs: The names of all organs, in the order of the label ids from 1 on.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Label ids, uint8, shape `(height, width)`.

    Example:
        >>> encodings = {"large_bowel": "1 2", "small_bowel": "", "stomach": "2 2"}
        >>> runs = {organ: rle.parse_runs(text, 4) for organ, text in encodings.items()}
        >>> label_map(runs, list(runs), height=1, width=4)
        array([[1, 3, 3, 0]], dtype=uint8)
    """
    label_ids = np.zeros(height * width, dtype=np.uint8)
    # Later organs overwrite earlier ones, so the order of the labels is the rule for overlaps.
    for label_id, organ in enumerate(organs, start=1):
        if organ in runs:
            np.copyto(label_ids, label_id, where=fill_runs(runs[organ], label_ids.size))
    return label_ids.reshape(height, width)


def encode_annotation(label_ids: np.ndarray, labels: LabelSet) -> bytes:
    """Return a label map as a palette PNG: a viewer shows the organs' colours, and `np.array` gives the label ids."""
    image = Image.fromarray(label_ids)
    image.putpalette([channel for colour in labels.palette for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@cache
def empty_annotation(height: int, width: int, labels: LabelSet) -> bytes:
    """Return the annotation of a slice without organs. More than half of the slices have none, in a few sizes."""
    return encode_annotation(np.zeros((height, width), dtype=np.uint8), labels)


def slice_row(checked: CheckedSlice, scan: KaggleScan) -> dict[str, Any]:
    """Return one row of the dataset, with the columns of `schema.dataset_features`.

    Args:
        checked: The slice, without problems.
        scan: Its scan.
    """
    file = checked.file
    row: dict[str, Any] = {
        "id": file.id,
        # Bytes instead of a path: the dataset then holds the picture itself, and not the place where it once lay.
        "image": {"bytes": checked.image, "path": None},
        "annotation": None,
        "segmentation": None,
        "case": file.case,
        "day": file.day,
        "slice": file.number,
        "scan": file.scan,
        "fold": scan.fold,
        "height": file.height,
        "width": file.width,
        "pixel_spacing": list(file.pixel_spacing),
    }
    if scan.facts is not None:
        row |= {
            "slice_spacing": scan.facts.slice_spacing_mm,
            "rescale_slope": scan.facts.rescale_slope,
            "rescale_intercept": scan.facts.rescale_intercept,
        }
    if scan.annotations is not None:
        if any(starts.size for starts, _ in checked.runs.values()):
            label_ids = label_map(checked.runs, scan.labels.names, file.height, file.width)
            annotation = encode_annotation(label_ids, scan.labels)
        else:
            annotation = empty_annotation(file.height, file.width, scan.labels)
        row["annotation"] = {"bytes": annotation, "path": None}
        drawn = scan.annotations[file.id]
        # An organ that nobody has drawn in the scan is not empty but unknown.
        row["segmentation"] = {organ: drawn[organ].rle if organ in drawn else None for organ in scan.labels.names}
    return row


def read_folders(kaggle_dirs: Sequence[Path], split: str) -> list[KaggleScan]:
    """List the scans of a split of one or several Kaggle folders, sorted by case and day.

    Args:
        kaggle_dirs: The folders.
        split: `train`, or `test`, which not every folder needs to have.

    Raises:
        KaggleDataError: If a CSV or file names have problems, a patient is in two folders, or the folders do not have
            the same organs.
    """
    scans: list[KaggleScan] = []
    problems: list[str] = []
    folders: dict[int, Path] = {}  # the folder of each patient
    for kaggle_dir in kaggle_dirs:
        if split not in list_splits(kaggle_dir):
            continue
        found, more = read_kaggle_scans(kaggle_dir, split)
        problems += more
        # Two folders may have given one number to two patients, or one patient may be in both. Nothing can tell which.
        problems += [
            f"{kaggle_dir}: {split} has patient case{case}, which is in {folders[case]}, too; remove the patient from "
            f"one of the folders, or give it another number if it is another one"
            for case in sorted({scan.case for scan in found} & folders.keys())
        ]
        folders |= {scan.case: kaggle_dir for scan in found}
        scans += found
    # A folder without `labels.json` has Kaggle's organs. Its slices have a place in the dataset for fewer facts.
    if len({(scan.labels, scan.facts is None) for scan in scans}) > 1:
        problems.append(
            f"{', '.join(map(str, kaggle_dirs))}: expected the same organs in all folders, and {LABEL_FILE} in all or "
            f"in none of them"
        )
    if problems:
        raise KaggleDataError(problems)
    return sorted(scans, key=lambda scan: (scan.case, scan.slices[0].day))


def read_training_scans(
    kaggle_dirs: Sequence[Path], config: GiTractConfig
) -> tuple[list[KaggleScan], list[KaggleScan]]:
    """List the annotated scans of Kaggle folders.

    Returns:
        The scans to keep, and the faulty ones that are left out.

    Raises:
        KaggleDataError: As `read_folders`.
    """
    scans = read_folders(kaggle_dirs, "train")
    # The list is that of Kaggle's patients. Others may have the same numbers.
    listed = [scan for scan in scans if scan.name in FAULTY_SCANS and scan.facts is None]
    faulty = [] if config.include_faulty_scans else listed
    return [scan for scan in scans if scan not in faulty], faulty


def divide_scans(
    scans: list[KaggleScan], kaggle_dirs: Sequence[Path], config: GiTractConfig
) -> dict[str, list[KaggleScan]]:
    """Divide annotated scans into splits, and add the split `test` if a Kaggle folder has one.

    Returns:
        The scans of each split: `train`, `validation` and perhaps `test`. Those of `train` and `validation` know their
        fold.

    Raises:
        KaggleDataError: If the folds cannot be made, or file names of the test split have problems.
    """
    folds = assign_folds(scans, config.num_folds, config.seed)
    if config.fold not in folds.values():
        raise KaggleDataError([f"--fold: expected 0 to {config.num_folds - 1}, got {config.fold}"])
    scans = [replace(scan, fold=folds[scan.case]) for scan in scans]
    # A whole patient is in one split, with all scans.
    splits = {
        "train": [scan for scan in scans if scan.fold != config.fold],
        "validation": [scan for scan in scans if scan.fold == config.fold],
    }
    if test := read_folders(kaggle_dirs, "test"):
        splits["test"] = test
    return splits


def read_splits(kaggle_dir: Path, config: GiTractConfig) -> dict[str, list[KaggleScan]]:
    """Read a Kaggle folder and divide its scans: `read_training_scans`, then `divide_scans`."""
    # Faulty scans are left out before the patients are divided, so they have no influence on the folds.
    scans, _ = read_training_scans([kaggle_dir], config)
    return divide_scans(scans, [kaggle_dir], config)


class GiTract(datasets.GeneratorBasedBuilder):
    """Builds `gi_tract` from the Kaggle folder `data_dir`."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = GiTractConfig
    # Parquet stores rows in groups, and a reader that streams gets at least one whole group. A group of 100 slices has
    # about 15 MB.
    DEFAULT_WRITER_BATCH_SIZE = 100

    def _info(self) -> datasets.DatasetInfo:
        found = read_label_file(Path(self.config.data_dir))
        return datasets.DatasetInfo(features=dataset_features(found.labels if found else GI_TRACT, found is not None))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # `datasets` divides a list in `gen_kwargs` among its processes, and each process writes files (shards) of its
        # own. With a list of scans, each process gets whole scans.
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"scans": scans})
            for split, scans in read_splits(Path(self.config.data_dir), self.config).items()
        ]

    def _generate_examples(self, scans: list[KaggleScan]) -> Iterator[tuple[Key, dict[str, Any]]]:
        for scan_index, scan in enumerate(scans):
            for slice_index, slice_file in enumerate(scan.slices):
                checked, problems = check_slice(scan, slice_file)
                if problems:
                    raise KaggleDataError(problems)
                # A key says from which element of the list a row comes, here a scan, and its place in it. `datasets`
                # counts the rows of each scan with it. It does not sort by key: the rows stay in this order, by scan
                # and slice.
                yield Key(scan_index, slice_index), slice_row(checked, scan)


def fingerprint(kaggle_dir: Path) -> str:
    """Compute the fingerprint of a Kaggle folder and of the code that reads it.

    `datasets` keeps what it built in a cache, under this fingerprint. If the data or the code changes, the fingerprint
    changes too, and the cached copy is no longer used.

    Returns:
        A SHA-256 with 64 hexadecimal digits, of the source code, of the bytes of `train.csv` and `labels.json`, and of
        path, size and time of each slice.
    """
    digest = hashlib.sha256()
    kaggle = (annotations, folder, images, label_file, names)
    for module in (*kaggle, files, labels, splits, verify, rle, schema, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    for path in (kaggle_dir / "train.csv", kaggle_dir / LABEL_FILE):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    # Reading all 38,496 slices of the competition at each call would be slow. An edit changes the size or the time of
    # a file, and both are known without reading it.
    for path in list_pngs(find_files(kaggle_dir)) if kaggle_dir.is_dir() else ():
        # A broken link is a problem that the builder reports.
        status = path.stat() if path.exists() else path.lstat()
        digest.update(os.fsencode(path) + f"\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def find_gi_tract(data_dir: str | None) -> datasets.load.DatasetModule | None:
    """Find what `load_dataset("gi_tract", data_dir=KAGGLE_DIR)` loads.

    Args:
        data_dir: A Kaggle folder, or None.

    Returns:
        This module as a builder for the Kaggle folder. None leaves the name to `datasets`, which then loads the folder
        `./gi_tract`.

    Raises:
        KaggleDataError: If `data_dir` is None and there is no folder `./gi_tract`.
    """
    if data_dir is None:
        if Path("gi_tract").is_dir():
            return None
        raise KaggleDataError(
            ['load_dataset("gi_tract"): no folder ./gi_tract here; pass data_dir=KAGGLE_DIR, or run '
             '`python -m dataset_builder build --kaggle_dir KAGGLE_DIR` first']
        )  # fmt: skip
    kaggle_dir = Path(data_dir).expanduser().resolve()
    check_utf8("data_dir", kaggle_dir)
    # The absolute path is part of the cache's key. A relative one would mean another folder elsewhere.
    arguments = {"data_dir": str(kaggle_dir), "dataset_name": "gi_tract"}
    return datasets.load.DatasetModule(__name__, fingerprint(kaggle_dir), arguments)


def register() -> None:
    """Make `datasets.load_dataset("gi_tract", data_dir=KAGGLE_DIR)` find this builder."""
    register_dataset("gi_tract", find_gi_tract)
