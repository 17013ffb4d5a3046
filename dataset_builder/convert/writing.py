"""Write scans as slices of Kaggle's layout, and keep a record of each, so that an interrupted command can go on."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np

from dataset_builder.convert.options import Missing
from dataset_builder.convert.plan import PlannedScan
from gi_segmentation.data.synthetic import mark_synthetic
from gi_segmentation.errors import InputError, describe_fault, reading
from gi_segmentation.files import hash_file, write_json, writing_file, writing_folder
from gi_segmentation.formats.kaggle.images import MAX_PIXELS
from gi_segmentation.formats.kaggle.label_file import LABEL_FILE, LabelFile, ScanFacts, write_label_file
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume, read_voxels, to_whole_intensities
from gi_segmentation.labels import LabelSet
from gi_segmentation.rle import encode
from gi_segmentation.schema import slice_name

# The hidden folder in the output with a record of each scan. It has nothing of the input's names.
RECORDS = ".converted"
# A change of what is written changes this number. Then all scans are converted again.
VERSION = 1
# Decimals of a spacing in a file name. Kaggle has two, and 0.9765625 mm on 512 pixels would be off by a pixel then.
SPACING_DECIMALS = 6
PNG_COMPRESSION = 3
# Masks that are read at a time, together.
MASK_BYTES = 2**28


@dataclass(frozen=True)
class ScanTask:
    """A scan to convert.

    Attributes:
        planned: The scan and what is taken of it.
        name: Its name in the output, for example `case3_day0`.
        salt: The secret of the key file.
        missing: What an organ is that nobody has drawn in it.
    """

    planned: PlannedScan
    name: str
    salt: str
    missing: Missing


@dataclass(frozen=True)
class ScanOutcome:
    """What became of a scan.

    Attributes:
        status: `converted`, `kept` from an earlier run, or `failed`.
        message: Why it failed, or what the user should know.
    """

    status: str
    message: str = ""


@dataclass(frozen=True)
class ScanRecord:
    """What is known of a converted scan.

    Attributes:
        made_of: Fingerprint of its files and of what was taken.
        slices: Number of its slices.
        facts: What `labels.json` says of it, without the unknown organs.
        segmentation: The run-length encodings of each slice, for each organ that somebody has drawn.
    """

    made_of: str
    slices: int
    facts: ScanFacts
    segmentation: Mapping[str, Sequence[str]]


def convert_scan(task: ScanTask, output_dir: Path) -> ScanOutcome:
    """Write a scan, if an earlier run has not. Its folder appears when it is complete, and its record after that.

    Whatever is wrong with a scan stops no other one.
    """
    try:
        made_of = find_fingerprint(task)
        earlier = read_record(record_path(output_dir, task.name))
        if earlier is not None and earlier.made_of == made_of and has_slices(task, output_dir):
            check_organs(task, earlier)
            return ScanOutcome("kept")
        remove_scan(output_dir, task.name)
        record, remarks = write_scan(task, made_of, scan_dir(output_dir, task.name))
        check_organs(task, record)
        write_record(record_path(output_dir, task.name), record)
        return ScanOutcome("converted", "; ".join(remarks))
    except InputError as error:
        message = str(error)
    except (MemoryError, OSError):
        # A full disk is the same for all other scans.
        raise
    except Exception as error:
        message = f"{task.planned.scan.name}: {describe_fault(error)}"
    remove_scan(output_dir, task.name)
    return ScanOutcome("failed", message)


def has_slices(task: ScanTask, output_dir: Path) -> bool:
    """Tell whether all slices of a scan are in the output, and no others. Somebody may have removed some."""
    volume, folder = task.planned.scan.volume, scan_dir(output_dir, task.name) / "scans"
    names = {name_slice(volume, number) for number in range(1, volume.training_shape[0] + 1)}
    return folder.is_dir() and {path.name for path in folder.iterdir()} == names


def check_organs(task: ScanTask, record: ScanRecord) -> None:
    """Check that somebody has drawn an organ in a scan.

    Raises:
        InputError: If not, and if that means that nobody knows where they are.
    """
    if not record.segmentation and task.missing == "unknown":
        raise InputError(
            f"{task.planned.scan.name}: none of its organs has a voxel; correct its contours, leave it out, or say "
            f"--missing empty"
        )


def find_fingerprint(task: ScanTask) -> str:
    """Return a fingerprint of what a scan is made of: the contents of its files, and its organs.

    It has the secret of the key file, so that nobody can compare it with other files.

    Raises:
        InputError: If a file cannot be read.
    """
    planned = task.planned
    digest = hashlib.sha256(f"{task.salt} {VERSION} {task.name}".encode())
    for path in [*planned.scan.volume.origin.paths, *(path for one in planned.sets for path in one.paths)]:
        with reading(path, "cannot be read", "copy it again"):
            digest.update(bytes.fromhex(hash_file(path)))
    digest.update(json.dumps([planned.organs, [one.reading for one in planned.sets]], sort_keys=True).encode())
    return digest.hexdigest()


def write_scan(task: ScanTask, made_of: str, folder: Path) -> tuple[ScanRecord, list[str]]:
    """Write the slices of a scan, and encode its organs.

    Returns:
        The record, and remarks for the user.

    Raises:
        InputError: If a file is damaged or a slice is too large.
    """
    volume = task.planned.scan.volume
    _, height, width = volume.training_shape
    if height * width > MAX_PIXELS:
        raise InputError(
            f"{volume.path}: expected slices of at most {MAX_PIXELS} pixels, got {width} x {height}; resample it"
        )
    whole, slope, intercept = to_whole_intensities(read_voxels(volume))
    with writing_folder(folder) as scratch:
        (scratch / "scans").mkdir()
        for number, plane in enumerate(volume.to_training(whole), start=1):
            path = scratch / "scans" / name_slice(volume, number)
            written, png = cv2.imencode(
                ".png", np.ascontiguousarray(plane), [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION]
            )
            if not written:
                raise OSError(f"{path}: could not be written")
            data = png.tobytes()
            path.write_bytes(mark_synthetic(data) if task.planned.scan.synthetic else data)
        del whole
        segmentation, remarks = encode_organs(task.planned)
    facts = ScanFacts(round(volume.spacing_mm[0], SPACING_DECIMALS), slope, intercept)
    return ScanRecord(made_of, volume.training_shape[0], facts, segmentation), remarks


def name_slice(volume: Volume, number: int) -> str:
    """Return the file name of a slice, which states the width before the height."""
    _, height, width = volume.training_shape
    _, row_spacing, column_spacing = volume.spacing_mm
    return f"slice_{number:04d}_{width}_{height}_{format_spacing(column_spacing)}_{format_spacing(row_spacing)}.png"


def format_spacing(spacing_mm: float) -> str:
    """Return a spacing with two decimals as in Kaggle's names, or with more if it has more.

    Example:
        >>> format_spacing(1.5), format_spacing(0.9765625), format_spacing(3.0000001)
        ('1.50', '0.976562', '3.00')
    """
    text = f"{spacing_mm:.{SPACING_DECIMALS}f}".rstrip("0")
    return text + "0" * (2 - len(text.partition(".")[2]))


def encode_organs(planned: PlannedScan) -> tuple[dict[str, list[str]], list[str]]:
    """Encode the organs of a scan. A few masks at a time are in the memory.

    Returns:
        The encodings of the slices for each organ, and remarks for the user. An organ of a label map or of a
        segmentation may be empty: whoever drew the others has seen that it is not there. A structure set without a
        voxel of an organ says nothing, so the organ is not among them.

    Raises:
        InputError: If a file is damaged.
    """
    segmentation, remarks = {}, []
    organs = {part: organ for organ, parts in planned.organs.items() for part in parts}
    masks: dict[str, np.ndarray] = {}
    left = Counter(organs.values())
    for index, one in enumerate(planned.sets):
        for name, mask in read_masks(one, [name for number, name in organs if number == index]):
            organ = organs[index, name]
            masks[organ] = masks[organ] | mask if organ in masks else mask
            left[organ] -= 1
            if left[organ]:
                continue
            mask = masks.pop(organ)
            if mask.any() or one.kind != "rtstruct":
                segmentation[organ] = [encode(plane) for plane in planned.scan.volume.to_training(mask)]
            else:
                remarks.append(f"{organ} has no voxel in the structure set, so it counts as not drawn")
    return segmentation, remarks


def read_masks(one: StructureSet, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the mask of each structure on the grid of its scan: bool, shape `(i, j, k)`.

    Several are read at a time, because a structure set of a clinic takes seconds to read.

    Raises:
        InputError: If a file is damaged.
    """
    size = max(MASK_BYTES // math.prod(one.volume.shape), 1)
    for start in range(0, len(names), size):
        some = names[start : start + size]
        yield from zip(some, one.read(some), strict=True)


def scan_dir(output_dir: Path, name: str) -> Path:
    """Return the folder of a scan."""
    return output_dir / "train" / name.partition("_")[0] / name


def record_path(output_dir: Path, name: str) -> Path:
    """Return where the record of a scan lies."""
    return output_dir / RECORDS / f"{name}.json"


def remove_scan(output_dir: Path, name: str) -> None:
    """Remove a scan from the output: first its record, so that a folder with a record is always whole."""
    record_path(output_dir, name).unlink(missing_ok=True)
    folder = scan_dir(output_dir, name)
    shutil.rmtree(folder, ignore_errors=True)
    # The patient may have other scans, which another process may write now.
    with suppress(OSError):
        folder.parent.rmdir()


def write_record(path: Path, record: ScanRecord) -> None:
    """Write the record of a scan."""
    path.parent.mkdir(exist_ok=True)
    facts = {key: value for key, value in asdict(record.facts).items() if key != "unknown"}
    content = {"made_of": record.made_of, "slices": record.slices, "facts": facts}
    write_json(path, {**content, "segmentation": record.segmentation}, indent=None)


def read_record(path: Path) -> ScanRecord | None:
    """Read the record of a scan; None if there is none, or if it is damaged. Then the scan is converted again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, segmentation = ScanFacts(**content["facts"]), dict(content["segmentation"])
        return ScanRecord(str(content["made_of"]), int(content["slices"]), facts, segmentation)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_index(output_dir: Path) -> None:
    """Remove `train.csv` and `labels.json`, because the scans are about to change."""
    for name in ("train.csv", LABEL_FILE):
        (output_dir / name).unlink(missing_ok=True)


def write_index(output_dir: Path, names: Sequence[str], labels: LabelSet, missing: Missing) -> None:
    """Write `labels.json` and `train.csv` from the records. With them, the folder is complete.

    Args:
        output_dir: The folder.
        names: The scans that it has, in order.
        labels: The organs.
        missing: `unknown` or `empty`: what an organ is that nobody has drawn in a scan.
    """
    scans = {}
    with writing_file(output_dir / "train.csv") as scratch:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write("id,class,segmentation\n")
            for name in names:
                record = read_record(record_path(output_dir, name))
                if record is None:
                    raise InputError(f"{output_dir}: the record of {name} is lost; start the same command again")
                scans[name] = write_rows(file, name, record, labels, missing)
        write_label_file(output_dir, LabelFile(labels, scans))


def write_rows(file: TextIO, name: str, record: ScanRecord, labels: LabelSet, missing: Missing) -> ScanFacts:
    """Write the rows of a scan, and return what `labels.json` says of it."""
    drawn = record.segmentation
    nothing = [""] * record.slices
    known = [organ for organ in labels.names if organ in drawn or missing == "empty"]
    for number in range(record.slices):
        for organ in known:
            file.write(f"{slice_name(name, number + 1)},{organ},{drawn.get(organ, nothing)[number]}\n")
    unknown = tuple(organ for organ in labels.names if organ not in known)
    return ScanFacts(
        record.facts.slice_spacing_mm, record.facts.rescale_slope, record.facts.rescale_intercept, unknown
    )
