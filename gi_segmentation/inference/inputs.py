"""Find out what an input is by looking at it: slices of Kaggle, NIfTI files, or DICOM series."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

from gi_segmentation.data.kaggle import find_input
from gi_segmentation.errors import InputError
from gi_segmentation.inference import dicom, nifti
from gi_segmentation.inference.volumes import Slice, Volume, VolumeSlice, kaggle_volume, list_slices

Kind: TypeAlias = Literal["kaggle", "nifti", "dicom"]
# What must be installed to read a kind of files, or to write a format.
PACKAGES: dict[str, tuple[str, ...]] = {
    "kaggle": (),
    "nifti": ("nibabel",),
    "dicom": ("pydicom",),
    "dicom-seg": ("highdicom",),
    "rtstruct": ("pydicom",),
}


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
    by_kind: dict[Kind, list[Path]] = defaultdict(list)
    for one in path.rglob("*") if path.is_dir() else [path]:
        if kind := find_kind(one):
            by_kind[kind].append(one)
    if len(by_kind) > 1:
        (kind, first), (other_kind, second) = [(kind, min(files)) for kind, files in sorted(by_kind.items())][:2]
        raise InputError(
            f"--input {path}: has files of several kinds, {kind} ({first}) and {other_kind} ({second}); name one kind"
        )
    if not by_kind:
        raise InputError(
            f"--input {path}: no slices; expected caseN_dayN/scans/slice_*.png below it, NIfTI files (.nii, .nii.gz), "
            f"or DICOM files"
        )
    ((kind, files),) = by_kind.items()
    if kind == "kaggle":
        return Scans(kind, [*find_input(path if path.is_dir() else path.parent)])
    files.sort()
    require(kind, files[0])
    volumes = dicom.find_series(files) if kind == "dicom" else [nifti.open_volume(one) for one in files]
    if not volumes:
        raise InputError(f"--input {path}: has DICOM files, but none is a slice of an MR series; export the images")
    return Scans(kind, [*list_slices(check_names(volumes))])


def find_kind(path: Path) -> Kind | None:
    """Return the kind of a file; None for a file that holds no slice."""
    if path.suffix == ".png":
        return "kaggle"
    if nifti.is_nifti(path):
        return "nifti"
    # A DICOM file may have any name. Tables and zips need not be opened to know that they are none.
    if path.suffix in (".csv", ".zip") or not path.is_file():
        return None
    return "dicom" if dicom.is_dicom(path) else None


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
