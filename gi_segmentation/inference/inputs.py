"""Find out what an input is by looking at it: slices of Kaggle, NIfTI files, or DICOM series."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

from gi_segmentation.data.kaggle import parse_slices, scan_folder
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
    "report": (),
}


@dataclass(frozen=True)
class Scan:
    """A scan of an input. No pixel has been read.

    Attributes:
        name: Name of the scan, and of the files that are written for it.
        slices: Its slices, from head to feet; none if there is a problem.
        problem: Why it cannot be predicted: the whole message for the user. Empty if it can.
    """

    name: str
    slices: Sequence[Slice] = ()
    problem: str = ""

    @cached_property
    def volume(self) -> Volume:
        """The volume that the slices belong to.

        Raises:
            InputError: If they are slices of Kaggle's, and differ in size or spacing.
        """
        first = self.slices[0]
        return first.volume if isinstance(first, VolumeSlice) else kaggle_volume(self.slices)

    @property
    def paths(self) -> list[Path]:
        """The files that it is read from."""
        first = self.slices[0]
        if not isinstance(first, VolumeSlice):
            return [one.path for one in self.slices]
        origin = first.volume.origin
        return origin.paths if isinstance(origin, dicom.DicomSeries) else [first.path]


@dataclass(frozen=True)
class Scans:
    """The scans of an input.

    Attributes:
        kind: What the files are.
        scans: The scans, also those that cannot be predicted.
    """

    kind: Kind
    scans: list[Scan]

    @property
    def usable(self) -> list[Scan]:
        """The scans without a problem."""
        return [scan for scan in self.scans if not scan.problem]


def find_scans(path: Path, output_dir: Path | None = None) -> Scans:
    """List the scans to predict.

    Args:
        path: A folder or a file of any kind that `Kind` names.
        output_dir: A folder to pass over if it lies in the input, because it has earlier predictions.

    Raises:
        InputError: If there is nothing to predict, if there are files of several kinds, or if no scan can be used.
    """
    if not path.exists():
        raise InputError(f"--input {path}: no such file or folder")
    by_kind: dict[Kind, list[Path]] = defaultdict(list)
    for one in list_files(path, output_dir):
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
    files.sort()
    require(kind, files[0])
    scans = find_kaggle_scans(files) if kind == "kaggle" else find_volumes(kind, files)
    if not scans:
        raise InputError(f"--input {path}: has DICOM files, but none is a slice of an MR series; export the images")
    if all(scan.problem for scan in scans):
        more = f" (and {len(scans) - 1} more scans that cannot be used)" if scans[1:] else ""
        raise InputError(scans[0].problem + more)
    return Scans(kind, scans)


def list_files(path: Path, output_dir: Path | None) -> Iterator[Path]:
    """Yield the files to look at. A slice of Kaggle's stands for the whole folder that it lies in."""
    if not path.is_dir():
        yield from path.parent.glob("*.png") if path.suffix == ".png" else [path]
        return
    left_out = output_dir.resolve() if output_dir else None
    inside = left_out is not None and path.resolve() in left_out.parents
    for one in path.rglob("*"):
        # Names with a dot are hidden. A zip made on a Mac has a hidden `._x.nii.gz` beside `x.nii.gz`.
        if one.name.startswith(".") or (inside and left_out in one.resolve().parents):
            continue
        yield one


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


def find_kaggle_scans(paths: Iterable[Path]) -> list[Scan]:
    """List the scans of Kaggle's slices. A file with a wrong name is a problem of the scan whose folder it lies in."""
    slices, problems = parse_slices(paths)
    by_scan = {name: list(group) for name, group in groupby(slices, key=lambda one: one.scan)}
    bad: dict[str, str] = {}
    for path, problem in problems.items():
        bad.setdefault(scan_folder(path), problem)
    names = [*by_scan, *sorted(bad.keys() - by_scan.keys())]
    return [Scan(name, problem=bad[name]) if name in bad else Scan(name, by_scan[name]) for name in names]


def find_volumes(kind: Kind, paths: list[Path]) -> list[Scan]:
    """List the scans of NIfTI or DICOM files."""
    volumes, problems = dicom.find_series(paths) if kind == "dicom" else nifti.open_volumes(paths)
    scans = [Scan(name, problem=problem) for name, problem in problems.items()]
    by_name: dict[str, list[Volume]] = defaultdict(list)
    for volume in volumes:
        by_name[volume.name].append(volume)
    for name, same in by_name.items():
        if len(same) > 1:
            which = f"{same[0].path} and {same[1].path}"
            scans.append(
                Scan(name, problem=f"{which}: two scans with the name {name}; rename one, or predict each alone")
            )
        else:
            scans.append(Scan(name, list_slices(same)))
    return sorted(scans, key=lambda scan: scan.name)


def describe_scan(scan: Scan, kind: Kind) -> str:
    """Return a line for the user."""
    if scan.problem:
        return f"{scan.name}: cannot be predicted: {scan.problem}"
    try:
        volume = scan.volume
    except InputError as error:
        return f"{scan.name}: {len(scan.slices)} slices, but no volume: {error}"
    remarks = [volume.describe()]
    if missing := volume.training_shape[0] - len(scan.slices):
        remarks.append(f"{missing} slices missing")
    if kind != "kaggle" and volume.window != ((0, 0), volume.training_shape[1:]):
        height, width = volume.window[1]
        remarks.append(f"padded or cropped to {height} x {width} pixels, the field of view of the training")
    return f"{scan.name}: {', '.join(remarks)}"
