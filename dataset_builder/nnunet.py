"""Write a dataset in the form that nnU-Net (version 2) reads, with our folds, so that both can be compared fairly.

Source: `documentation/dataset_format.md` and `ignore_label.md` of https://github.com/MIC-DKFZ/nnUNet.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import nibabel
import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from gi_segmentation.data.dataset_scans import DatasetScan, list_dataset_scans
from gi_segmentation.errors import InputError, list_some, one_line
from gi_segmentation.files import write_json, writing_folder
from gi_segmentation.formats.kaggle.images import decode_image
from gi_segmentation.formats.volumes import make_training_affine
from gi_segmentation.labels import BACKGROUND, LabelSet, find_labels
from gi_segmentation.rle import find_unknown

ENDING = ".nii.gz"
# nnU-Net leaves the voxels of this label out of its loss and of its scores.
IGNORE = "ignore"
FOLDER = re.compile(r"Dataset\d{3}_[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: The folder of the dataset.
        scans: Number of scans with annotations.
        tests: Number of scans without annotations.
        folds: Number of folds.
        partly: Scans with an organ that nobody has drawn.
        left_out: Scans with a gap between their slices.
        channel: Name of the channel.
    """

    folder: Path
    scans: int
    tests: int
    folds: int
    partly: list[str]
    left_out: list[str]
    channel: str

    def summary(self) -> str:
        """Return the report as a few lines for a terminal."""
        lines = [
            f"{self.scans} scans in {self.folds} folds" + (f", {self.tests} without labels" if self.tests else "")
        ]
        if self.partly:
            lines.append(
                f"{len(self.partly)} scans have organs that nobody has drawn ({list_some(self.partly)}): what no "
                f"drawn organ covers there has the label {IGNORE}"
            )
        if self.left_out:
            lines.append(f"left out, because slices are missing in between: {', '.join(self.left_out)}")
        lines.append(f"channel {self.channel}: nnU-Net normalises a channel CT in another way (--channel)")
        lines.append(f"written to {self.folder}")
        return "\n".join(lines)


def export_nnunet(dataset_dir: str, output_dir: Path, channel: str = "MRI") -> ExportReport:
    """Write a built dataset as a raw dataset of nnU-Net, with `splits_final.json`.

    Args:
        dataset_dir: Folder of the dataset, or its name on a Hub.
        output_dir: A new or empty folder with a name like `Dataset501_Abdomen`.
        channel: Name of the channel, by which nnU-Net chooses how to normalise.

    Returns:
        What was written.

    Raises:
        InputError: If the dataset cannot be loaded, has no folds or a label that nnU-Net needs for itself, or if
            `output_dir` has another name or holds files.
    """
    check_output_dir(output_dir)
    loaded = load_built(dataset_dir)
    labels = find_labels(loaded["train"].features)
    if IGNORE in (name.lower() for name in labels.names):
        raise InputError(f"--dataset_dir {dataset_dir}: nnU-Net uses the label {IGNORE!r} itself; rename this organ")
    plans = {split: list_dataset_scans(part) for split, part in loaded.items()}
    left_out = [name for scans in plans.values() for name, plan in scans.items() if plan.spacing_mm is None]
    plans = {split: {name: plan for name, plan in scans.items() if plan.spacing_mm} for split, scans in plans.items()}
    folds = find_folds(loaded, plans)
    if len(set(folds.values())) < 2:
        raise InputError(
            f"--dataset_dir {dataset_dir}: expected whole scans in at least two folds, but slices are missing in "
            f"{list_some(left_out) or 'no scan'}; build a dataset with more folds or more scans"
        )
    partly: list[str] = []
    with writing_folder(output_dir) as folder, tqdm(desc="Writing scans", unit="scan") as bar:
        bar.reset(total=sum(map(len, plans.values())))
        for split, scans in plans.items():
            for name, plan in scans.items():
                rows = loaded[split].select([plan.rows[number] for number in sorted(plan.rows)])
                write_image(folder / ("imagesTr" if name in folds else "imagesTs"), name, rows, plan)
                if name in folds and write_labels(folder / "labelsTr", name, rows, plan, labels):
                    partly.append(name)
                bar.update()
        write_json(folder / "dataset.json", describe_dataset(labels, len(folds), bool(partly), channel))
        splits = divide(folds)
        write_json(folder / "splits_final.json", splits)
    return ExportReport(output_dir, len(folds), len(plans.get("test", {})), len(splits), partly, left_out, channel)


def find_folds(loaded: datasets.DatasetDict, plans: Mapping[str, Mapping[str, DatasetScan]]) -> dict[str, int]:
    """Return the fold of each scan with annotations, by its name."""
    return {
        name: loaded[split].select_columns(["fold"])[next(iter(plan.rows.values()))]["fold"]
        for split, scans in plans.items()
        for name, plan in scans.items()
        if split != "test"
    }


def check_output_dir(output_dir: Path) -> None:
    """Check the name of the folder, which nnU-Net needs, and that nothing would be replaced."""
    if not FOLDER.fullmatch(output_dir.name):
        raise InputError(
            f"--output_dir {output_dir}: nnU-Net expects a name like Dataset501_Abdomen, three digits and a name; "
            f"choose such a folder in nnUNet_raw"
        )
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: it exists and is not an empty folder; remove it or name another")


def load_built(dataset_dir: str) -> datasets.DatasetDict:
    """Load a built dataset, with pictures as bytes.

    Raises:
        InputError: If it is no dataset with folds.
    """
    build = "`python -m dataset_builder build --kaggle_dir KAGGLE_DIR` makes one"
    folder = Path(dataset_dir)
    if (folder / "train.csv").is_file() or not (folder.is_dir() or dataset_dir.count("/") == 1):
        raise InputError(f"--dataset_dir {dataset_dir}: expected a built dataset; {build}")
    try:
        loaded = datasets.load_dataset(str(folder.resolve()) if folder.is_dir() else dataset_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"--dataset_dir {dataset_dir}: {one_line(error)}; {build}") from error
    if (
        not isinstance(loaded, datasets.DatasetDict)
        or "fold" not in loaded.get("train", Dataset.from_dict({})).features
    ):
        raise InputError(f"--dataset_dir {dataset_dir}: expected a split `train` with a column `fold`; {build}")
    for column in ("image", "annotation"):
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    return loaded


def write_image(folder: Path, name: str, rows: Dataset, plan: DatasetScan) -> None:
    """Write the intensities of a scan, as they were in its source."""
    height, width = plan.size
    planes = [decode_image(row["image"]["bytes"], row["id"], width, height) for row in rows]
    voxels: np.ndarray = np.stack(planes)
    slope, intercept = (
        rows[0].get(column, usual) for column, usual in (("rescale_slope", 1), ("rescale_intercept", 0))
    )
    if (slope, intercept) != (1, 0):
        voxels = (voxels * np.float64(slope) + intercept).astype(np.float32)
    write_nifti(folder / f"{name}_0000{ENDING}", voxels, plan)


def write_labels(folder: Path, name: str, rows: Dataset, plan: DatasetScan, labels: LabelSet) -> bool:
    """Write the label map of a scan. Where organs overlap, the highest label wins, as in the dataset.

    Returns:
        Whether an organ is unknown in the scan. What no drawn organ covers may be this organ, so it is ignored.
    """
    voxels = np.stack([np.array(Image.open(io.BytesIO(row["annotation"]["bytes"]))) for row in rows])
    unknown = bool(find_unknown(rows["segmentation"]))
    if unknown:
        voxels[voxels == 0] = len(labels) + 1
    write_nifti(folder / f"{name}{ENDING}", voxels, plan)
    return unknown


def write_nifti(path: Path, planes: np.ndarray, plan: DatasetScan) -> None:
    """Write a NIfTI file.

    Args:
        path: The file. Its folder is made.
        planes: Shape `(slices, height, width)`, in the orientation of the training.
        plan: The scan, for its spacing.
    """
    path.parent.mkdir(exist_ok=True)
    assert plan.spacing_mm is not None
    image = nibabel.Nifti1Image(planes.transpose(2, 1, 0), make_training_affine(plan.spacing_mm))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def describe_dataset(labels: LabelSet, scans: int, ignoring: bool, channel: str) -> dict[str, Any]:
    """Return the content of `dataset.json`."""
    names = (BACKGROUND, *labels.names, *([IGNORE] if ignoring else []))
    return {
        "channel_names": {"0": channel},
        "labels": {name: index for index, name in enumerate(names)},
        "numTraining": scans,
        "file_ending": ENDING,
    }


def divide(folds: dict[str, int]) -> list[dict[str, list[str]]]:
    """Return the content of `splits_final.json`: the scans to train on and to validate on, for each fold.

    Args:
        folds: The fold of each scan.

    Example:
        >>> divide({"case1_day0": 0, "case2_day0": 1})[0]
        {'train': ['case2_day0'], 'val': ['case1_day0']}
    """
    return [
        {
            "train": [name for name, held_back in folds.items() if held_back != fold],
            "val": [name for name, held_back in folds.items() if held_back == fold],
        }
        for fold in sorted(set(folds.values()))
    ]
