"""Find out what an input is by looking at it: slices of Kaggle, NIfTI files, or DICOM series."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from gi_segmentation.errors import InputError, join_problems, list_some
from gi_segmentation.files import FoundFiles, find_files
from gi_segmentation.formats import nifti
from gi_segmentation.formats.archives import MAX_NAME_BYTES, is_archive
from gi_segmentation.formats.beside import (
    LABEL_NAME,
    PACKED_DICOM,
    PICTURE_SUFFIXES,
    describe_group,
    find_format_problem,
    find_label_maps,
)
from gi_segmentation.formats.dicom import files as dicom
from gi_segmentation.formats.dicom import series as dicom_series
from gi_segmentation.formats.kaggle.folder import find_lost, list_pngs, parse_slices
from gi_segmentation.formats.kaggle.label_file import LabelFile, ScanFacts, read_label_file
from gi_segmentation.formats.kaggle.names import FILE_PATTERN, SliceFile, scan_folder
from gi_segmentation.formats.volumes import Slice, Volume, VolumeSlice, kaggle_volume, list_slices
from gi_segmentation.schema import FieldOfView

Kind: TypeAlias = Literal["kaggle", "nifti", "dicom"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What must be installed to read a kind of files.
PACKAGES_BY_KIND: dict[Kind, tuple[str, ...]] = {"kaggle": (), "nifti": ("nibabel",), "dicom": ("pydicom",)}


@dataclass(frozen=True)
class InputScan:
    """A scan of an input. No pixel has been read.

    Attributes:
        name: Name of the scan, and of the files that are written for it.
        slices: Its slices, from head to feet. If there is a problem: none, or those of Kaggle's that are right.
        problem: Why it cannot be predicted: the whole message for the user. Empty if it can.
        kind: What its files are.
        description: What a DICOM series says of itself.
    """

    name: str
    slices: Sequence[Slice] = ()
    problem: str = ""
    kind: Kind = "kaggle"
    description: str = ""

    @cached_property
    def volume(self) -> Volume:
        """The volume that the slices belong to.

        Raises:
            InputError: If they are slices of Kaggle's, and differ in size or spacing.
        """
        first = self.slices[0]
        return first.volume if isinstance(first, VolumeSlice) else kaggle_volume(self.slices)

    def in_field(self, field_mm: FieldOfView) -> "InputScan":
        """Return the scan with slices that are cropped or padded to the field of view of another training.

        Slices of Kaggle's are always seen as they are.
        """
        if not self.slices or not isinstance(self.slices[0], VolumeSlice) or self.volume.field_mm == field_mm:
            return self
        return replace(self, slices=list_slices([replace(self.volume, field_mm=field_mm)]))

    @property
    def is_cut(self) -> bool:
        """Whether its slices are cropped or padded to the field of view of the training."""
        first = next(iter(self.slices), None)
        return isinstance(first, VolumeSlice) and first.volume.window != ((0, 0), first.volume.training_shape[1:])

    @property
    def paths(self) -> list[Path]:
        """The files that it is read from."""
        if self.kind == "kaggle":
            return [one.path for one in self.slices]
        return list(self.volume.origin.paths)

    @property
    def series(self) -> dicom.DicomSeries | None:
        """The DICOM series; None for a scan of another kind, and for one that cannot be predicted."""
        return self.volume.origin if self.kind == "dicom" and self.slices else None


@dataclass(frozen=True)
class InputScans:
    """The scans of an input.

    Attributes:
        scans: The scans, also those that cannot be predicted.
        left_out: What else is there, or was not chosen: lines for the user.
    """

    scans: list[InputScan]
    left_out: list[str] = field(default_factory=list)

    @property
    def usable(self) -> list[InputScan]:
        """The scans without a problem."""
        return [scan for scan in self.scans if not scan.problem]

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of the scans."""
        return sorted({scan.kind for scan in self.scans})


def find_scans(
    path: Path,
    output_dir: Path | None = None,
    chosen: Sequence[str] = (),
    may_be_empty: bool = False,
    skips_faults: bool = False,
) -> InputScans:
    """List the scans to predict.

    Args:
        path: A folder or a file of any kind that `Kind` names.
        output_dir: A folder to pass over if it lies in the input, because it has earlier predictions.
        chosen: UIDs of series, or parts of names or descriptions. Other scans are left out; none: all are taken.
        may_be_empty: Whether nothing to predict is no error. `left_out` then says what was expected.
        skips_faults: Whether a file with a wrong name among Kaggle's slices is left out, and not its whole scan.

    Raises:
        InputError: If there is nothing to predict and there must be something, if slices of Kaggle's lie beside other
            scans, or if no scan can be used.
    """
    if not path.exists():
        missing = f"--input {path}: no such file or folder"
        if may_be_empty:
            return InputScans([], [missing])
        raise InputError(missing)
    root = path if path.is_dir() else path.parent
    files = sort_files(path, output_dir)
    for kind in (one for one in KINDS if files[one]):
        require(PACKAGES_BY_KIND[kind], files[kind][0])
    files["label map"] = find_label_maps(files["nifti"], root)
    files["nifti"] = sorted({*files["nifti"]} - {*files["label map"]})
    left_out: list[str] = []
    if files["kaggle"]:
        scans = find_kaggle_scans(files["kaggle"], files["broken link"])
        if skips_faults:
            scans, left_out = skip_faults(scans)
    else:
        # A packed file beside a series may be one of its slices.
        folders = {one.parent for one in files["dicom"]}
        beside = files["other"] + [one for one in files["foreign"] if one.parent in folders]
        series = dicom_series.find_series(files["dicom"], beside)
        left_out += [*series.remarks, *dicom_series.describe_alone(path, series.volumes)]
        scans = refuse_bad_names(
            [
                *list_scans("dicom", series.volumes, series.problems, series.descriptions),
                *list_scans("nifti", *nifti.open_volumes(files["nifti"], root)),
                *list_other_formats(files["foreign"], root),
            ]
        )
    # A link that may be the slice of a series is a problem already.
    lost = [one for one in files["broken link"] if not any(str(one) in scan.problem for scan in scans)]
    left_out += describe_left_out({**files, "broken link": lost}, root)
    if not scans:
        nothing = describe_nothing(path, bool(files["dicom"]))
        if may_be_empty:
            return InputScans([], [nothing, *left_out])
        raise InputError("; ".join([nothing, *left_out]))
    if chosen:
        scans, others = choose_scans(scans, chosen)
        left_out += others
    if all(scan.problem for scan in scans):
        raise InputError(join_problems(scan.problem for scan in scans))
    return InputScans(scans, left_out)


def sort_files(path: Path, output_dir: Path | None) -> defaultdict[str, list[Path]]:
    """Sort the files of an input by what they are.

    Returns:
        For each kind of `KINDS`, and for `foreign` (formats that are not read), `named label map` (the same),
        `picture`, `archive`, `other`, `broken link` (among the others) and `repeated link`, the files, sorted.

    Raises:
        InputError: If there are slices of Kaggle's beside other scans.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    found = list_input_files(path, output_dir)
    for one in found.files + found.broken:
        files[find_file_kind(one)].append(one)
    files["broken link"] = [one for one in found.broken if one in files["other"]]
    files["repeated link"] = found.repeated
    if others := files["nifti"] + files["dicom"] + files["foreign"]:
        # A viewer or a report may have any pictures, but none with the name of a slice of Kaggle's.
        slices = [one for one in files["kaggle"] if FILE_PATTERN.fullmatch(one.name)]
        files["picture"] += [one for one in files["kaggle"] if one not in slices]
        files["kaggle"] = slices
        if slices and (files["nifti"] or files["dicom"]):
            raise InputError(
                f"--input {path}: has files of several kinds, kaggle ({slices[0]}) and others ({min(others)}); name "
                f"the folder of one kind"
            )
    return defaultdict(list, {what: sorted(some) for what, some in files.items()})


def list_input_files(path: Path, output_dir: Path | None) -> FoundFiles:
    """List the files to look at. A slice of Kaggle's stands for the whole folder that it lies in."""
    if not path.is_dir():
        files = path.parent.glob("[!.]*.png") if path.suffix == ".png" else [nifti.find_header(path)]
        return FoundFiles(sorted(files), [], [])
    found = find_files(path, output_dir)
    # A link with the name of a scan may add slices.
    added = {*list_pngs(found)} - {*found.files, *found.broken}
    used = {folder for one in added for folder in one.parents}
    repeated = [one for one in found.repeated if one not in used and not is_circle(one)]
    return FoundFiles(sorted([*found.files, *added]), found.broken, repeated)


def is_circle(link: Path) -> bool:
    """Tell whether a link leads to a folder above itself. There are no other scans behind it."""
    return link.parent.resolve().is_relative_to(link.resolve())


def find_file_kind(path: Path) -> str:
    """Return what a file is, see `sort_files`."""
    if path.suffix == ".png":
        return "kaggle"
    if nifti.is_nifti(path):
        return "nifti"
    if is_archive(path):
        return "archive"
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return "picture"
    # Tables need not be opened to know that they are no scans. A DICOM file may have any name.
    if path.suffix == ".csv" or not path.is_file():
        return "other"
    if find_format_problem(path):
        # Such a file is never opened here, so its name decides.
        return "named label map" if LABEL_NAME.search(path.name.lower()) else "foreign"
    return "dicom" if dicom.is_dicom(path) else "other"


def describe_left_out(files: Mapping[str, list[Path]], root: Path) -> list[str]:
    """Return lines for the user about files that are no scans, or that are not read."""
    remedies = {
        "label map": "",
        "picture": "",
        "named label map": "",
        "archive": "unpack or name as --input what has scans",
        "broken link": "mend what is a scan",
        "repeated link": "its folder is here under another name",
    }
    lines = [describe_group(what, files[what], root, remedy) for what, remedy in remedies.items() if files.get(what)]
    if (foreign := files.get("foreign")) and files.get("kaggle"):
        lines.append(describe_group("file", foreign, root, find_format_problem(foreign[0]).partition(": ")[2]))
    return lines


def describe_nothing(path: Path, has_dicom: bool) -> str:
    """Return the message for an input without any scan."""
    if has_dicom:
        return f"--input {path}: has DICOM files, but none is a slice of an MR series; export the images"
    return (
        f"--input {path}: no slices; expected caseN_dayN/scans/slice_*.png below it, NIfTI files (.nii, .nii.gz), "
        f"or DICOM files"
    )


def choose_scans(scans: list[InputScan], chosen: Sequence[str]) -> tuple[list[InputScan], list[str]]:
    """Return the scans that the user wants, and a line about the others if there are any.

    Args:
        scans: All scans.
        chosen: UIDs of series or studies, or parts of names or descriptions. Capital letters do not matter.

    Raises:
        InputError: If one fits no scan. The message lists all scans.
    """
    for text in chosen:
        if not any(is_meant(scan, text) for scan in scans):
            names = list_some([describe_choice(scan) for scan in scans], limit=20)
            raise InputError(f"--series {text}: no scan has this UID, or this text in its name; there are {names}")
    taken = [scan for scan in scans if any(is_meant(scan, text) for text in chosen)]
    others = [scan for scan in scans if scan not in taken]
    names = list_some([describe_choice(scan) for scan in others])
    return taken, [f"left out by --series: {len(others)} scan{'s' * (len(others) > 1)}: {names}"] * bool(others)


def is_meant(scan: InputScan, text: str) -> bool:
    """Tell whether a user means a scan by a UID or a part of its name or description."""
    # A UID may be the beginning of another one.
    if re.fullmatch(r"\d+(\.\d+)+", text, re.ASCII) and scan.kind == "dicom":
        frames = scan.series.frames if scan.series else ()
        uids = {uid for frame in frames for uid in (frame.series_uid, frame.study_uid)}
        return text in uids or bool(re.match(rf"{re.escape(text)}(?![\d.])", scan.name))
    return text.casefold() in f"{scan.name} {scan.description}".casefold()


def describe_choice(scan: InputScan) -> str:
    """Return the name of a scan, with what helps to choose it."""
    remarks = [scan.description] * bool(scan.description) + ["cannot be predicted"] * bool(scan.problem)
    return f"{scan.name} ({', '.join(remarks)})" if remarks else scan.name


def require(packages: Iterable[str], subject: Path | str) -> None:
    """Check that packages for files of clinics are installed.

    Args:
        packages: Their names.
        subject: A file or a flag that needs them, for the message.

    Raises:
        InputError: If not.
    """
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f"{subject}: needs {package}, which is not installed; run `pip install -e .[clinic]`")


def find_kaggle_scans(paths: Iterable[Path], broken: Sequence[Path] = ()) -> list[InputScan]:
    """List the scans of Kaggle's slices. A file with a wrong name is a problem of the scan whose folder it lies in.

    Args:
        paths: The PNGs.
        broken: Broken links. One that has the name of a patient or a scan is a problem of its own.
    """
    slices, problems = parse_slices(paths)
    problems |= {path / "slice.png": problem for path, problem in find_lost(broken).items()}
    by_scan = {name: list(group) for name, group in groupby(slices, key=lambda one: one.scan)}
    bad: dict[str, str] = {}
    for path, problem in problems.items():
        bad.setdefault(scan_folder(path), problem)
    by_scan = {name: add_spacing(group) for name, group in by_scan.items()}
    names = [*by_scan, *sorted(bad.keys() - by_scan.keys())]
    return [InputScan(name, by_scan.get(name, ()), bad.get(name, "")) for name in names]


def skip_faults(scans: Iterable[InputScan]) -> tuple[list[InputScan], list[str]]:
    """Return the scans with the slices that are right, and lines about what is left out of them."""
    lines = [f"left out of {scan.name}: {scan.problem}" for scan in scans if scan.problem]
    return [replace(scan, problem="") for scan in scans if scan.slices], lines


def add_spacing(slices: list[SliceFile]) -> list[SliceFile]:
    """Return the slices of a scan with their distance, if the folder has a `labels.json`, as `convert` writes it.

    Raises:
        InputError: If this file cannot be used.
    """
    # The folder lies above `train`, the patient, the scan and `scans`. Each of these may be missing.
    for folder in islice(slices[0].path.parents, 1, 5):
        if label_file := read_label_file_once(folder):
            facts = label_file.scans.get(slices[0].scan, ScanFacts())
            return [one._replace(thickness_mm=facts.slice_spacing_mm) for one in slices]
    return slices


@lru_cache(maxsize=64)
def read_label_file_once(folder: Path) -> LabelFile | None:
    """Read the `labels.json` of a folder. All scans of the folder ask for it."""
    return read_label_file(folder)


def list_scans(
    kind: Kind,
    volumes: Iterable[Volume],
    problems: Mapping[str, str],
    descriptions: Mapping[str, str] = MappingProxyType({}),
) -> list[InputScan]:
    """List the scans of NIfTI or DICOM files, also those that cannot be predicted."""

    def describe(name: str) -> str:
        # The name of a series may begin with that of another one, as `A_T2` with `A`. The longest that fits is taken.
        series = [one for one in descriptions if name == one or name.startswith(f"{one}_")]
        return descriptions[max(series, key=len)] if series else ""

    scans = [InputScan(name, (), problem, kind, describe(name)) for name, problem in problems.items()]
    return scans + [
        InputScan(volume.name, list_slices([volume]), kind=kind, description=describe(volume.name))
        for volume in volumes
    ]


def list_other_formats(paths: list[Path], root: Path) -> list[InputScan]:
    """List scans in formats that are not read. Packed DICOM files of a folder count as one."""
    scans: dict[str, InputScan] = {}
    for path in paths:
        problem, name = find_format_problem(path), path.relative_to(root).as_posix()
        if PACKED_DICOM in problem:
            name = path.parent.relative_to(root).as_posix() if path.parent != root else root.resolve().name
        scans.setdefault(name, InputScan(name, problem=problem, kind="nifti"))
    return list(scans.values())


def refuse_bad_names(scans: list[InputScan]) -> list[InputScan]:
    """Sort scans by their names. Those that share a name, or whose name is too long, become problems."""
    by_name: dict[str, list[InputScan]] = defaultdict(list)
    for scan in scans:
        by_name[scan.name].append(scan)
    checked = []
    for name, same in sorted(by_name.items()):
        if len(same) > 1 and not any(scan.problem for scan in same):
            which = " and ".join(str(scan.paths[0]) for scan in same[:2])
            problem = f"{which}: two scans with the name {name}; rename one, or predict each alone"
            checked.append(replace(same[0], slices=(), problem=problem))
        elif len(os.fsencode(Path(name).name)) > MAX_NAME_BYTES and not same[0].problem:
            problem = f"{same[0].paths[0]}: expected a name of at most {MAX_NAME_BYTES} bytes; rename it"
            checked.append(replace(same[0], slices=(), problem=problem))
        else:
            checked += same
    return checked


def describe_scan(scan: InputScan) -> str:
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
    if scan.is_cut:
        height, width = volume.window[1]
        remarks.append(f"padded or cropped to {height} x {width} pixels, the field of view of the training")
    if isinstance(volume.origin, nifti.NiftiFile) and not volume.origin.has_unit:
        remarks.append("no unit in the header, taken as mm")
    return f"{scan.name}: {', '.join(remarks)}"
