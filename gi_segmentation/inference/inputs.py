"""Find out what an input is by looking at it: slices of Kaggle, or NIfTI files."""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

from gi_segmentation.data.kaggle import find_input
from gi_segmentation.errors import InputError
from gi_segmentation.inference import nifti
from gi_segmentation.inference.volumes import Slice, Volume, VolumeSlice, kaggle_volume, list_slices

Kind: TypeAlias = Literal["kaggle", "nifti"]
# What must be installed to read a kind of files, or to write a format.
PACKAGES: dict[str, tuple[str, ...]] = {"kaggle": (), "nifti": ("nibabel",)}


@dataclass(frozen=True)
class Scans:
    """The scans of an input. No pixel has been read.

    Attributes:
        kind: What the files are.
        slices: The slices of all scans, scan by scan, from head to feet.
    """

    kind: Kind
    slices: list[Slice]

    @property
    def names(self) -> list[str]:
        """Names of the scans."""
        return list(dict.fromkeys(one.scan for one in self.slices))


def find_scans(path: Path) -> Scans:
    """List the slices to predict.

    Args:
        path: A folder or a file of any kind that `Kind` names.

    Raises:
        InputError: If there is nothing to predict, if there are files of several kinds, or if a file is unusable.
    """
    if not path.exists():
        raise InputError(f"--input {path}: no such file or folder")
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    niftis = sorted(filter(nifti.is_nifti, files))
    pngs = [one for one in files if one.suffix == ".png"]
    if niftis and pngs:
        raise InputError(
            f"--input {path}: has NIfTI files and PNGs, for example {niftis[0]} and {min(pngs)}; name one"
        )
    if niftis:
        require("nifti", niftis[0])
        return Scans("nifti", [*list_slices(check_names([nifti.open_volume(one) for one in niftis]))])
    if path.is_file():
        raise InputError(f"--input {path}: expected a NIfTI file (.nii, .nii.gz), or a folder")
    return Scans("kaggle", [*find_input(path)])


def require(kind: str, subject: Path | str) -> None:
    """Check that the packages for a kind of files, or for a format, are installed.

    Args:
        kind: The kind or the format.
        subject: A file or a flag that needs them, for the message.

    Raises:
        InputError: If not.
    """
    for package in PACKAGES[kind]:
        if find_spec(package) is None:
            raise InputError(f"{subject}: needs {package}, which is not installed; run `pip install -e .[clinic]`")


def check_names(volumes: list[Volume]) -> list[Volume]:
    """Return the volumes, if no two of them would be written to the same file.

    Raises:
        InputError: If two have one name.
    """
    counts = Counter(volume.name for volume in volumes)
    for name, count in counts.items():
        if count > 1:
            first, second = [volume.path for volume in volumes if volume.name == name][:2]
            raise InputError(
                f"{first} and {second}: two scans with the name {name}; rename one, or predict each alone"
            )
    return volumes


def find_volume(slices: list[Slice]) -> Volume:
    """Return the volume that the slices of a scan belong to.

    Raises:
        InputError: If they are slices of Kaggle's, and differ in size or spacing.
    """
    first = slices[0]
    return first.volume if isinstance(first, VolumeSlice) else kaggle_volume(slices)


def describe_scans(scans: Scans) -> list[str]:
    """Return a line per scan for the user."""
    lines = []
    for name, group in groupby(scans.slices, key=lambda one: one.scan):
        slices = list(group)
        volume = find_volume(slices)
        remarks = [volume.describe()]
        if missing := volume.training_shape[0] - len(slices):
            remarks.append(f"{missing} slices missing")
        if scans.kind != "kaggle" and volume.window != ((0, 0), volume.training_shape[1:]):
            height, width = volume.window[1]
            remarks.append(f"padded or cropped to {height} x {width} pixels, the field of view of the training")
        lines.append(f"{name}: {', '.join(remarks)}")
    return lines
