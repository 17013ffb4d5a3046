"""Read scans from NIfTI files, and write label maps on their grid.

A header has two places for the grid: the qform (a rotation and voxel sizes) and the sform (a matrix). Some readers
take one of them and some the other, and each repairs wrong values in its own way. So a file is read only if all of
them place it alike, and only such files are written.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet

# A pair of files has the ending `.hdr` for the header and `.img` for the voxels.
NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
# The length of a header of NIfTI-1 (and of Analyze, which came before it), and of NIfTI-2.
HEADER_SIZES = (348, 540)
# What the descriptions of our own files look like: `1 liver, 2 spleen`, or `probability of liver`.
OUR_LABEL_MAPS = re.compile(rb"1 [^\s,][^,]*(, \d+ .*)?|probability of .*", re.DOTALL)
# Bytes that are read at a time after the last voxel.
CHUNK_BYTES = 2**20
# Bytes of a description in a header.
DESCRIPTION_LENGTH = 80
# qform and sform may differ by half a voxel, and by this much at most.
SAME_PLACE_MM = 1.0
# Readers that know only right angles turn a sheared grid. Angles that differ from 90 degrees by rounding, which moves
# no voxel by more than this, are made right. A tilted gantry moves voxels by centimetres.
RIGHT_ANGLES_MM = 0.25
# A shift that is due to the 32 bits of the numbers in a header.
ROUNDING_MM = 0.005


@dataclass(frozen=True)
class NiftiFile:
    """What a writer needs to know of a NIfTI file. The rest of its header may name the patient, and goes nowhere.

    Attributes:
        paths: The file; for a pair, the header and the voxels.
        shape: Numbers of voxels, with axes of length 1.
        code: What the places are relative to: 1 the scanner, 2 another scan, 3 to 5 a template.
        has_unit: Whether it says that its numbers are millimetres. All readers assume it if it does not.
    """

    paths: tuple[Path, ...]
    shape: tuple[int, ...]
    code: int
    has_unit: bool


def is_nifti(path: Path) -> bool:
    """Tell by its name whether a file is a NIfTI file. A header of a pair must have the right length, too."""
    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        return False
    return ".nii" in path.name.lower()[-len(".nii.gz") :] or has_header(path)


def has_header(path: Path) -> bool:
    """Tell whether a file with the ending `.hdr` is a header of NIfTI or Analyze. Others have this ending, too."""
    import gzip

    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            start = file.read(4)
    except (OSError, EOFError):
        return False
    return any(int.from_bytes(start, order) in HEADER_SIZES for order in ("little", "big"))


def find_header(path: Path) -> Path:
    """Return the header of a pair of files if the other file of the pair is named; any other path as it is."""
    name, _, ending = path.name.rpartition(".img")
    if not name or ending.lower() not in ("", ".gz"):
        return path
    headers = (path.with_name(f"{name}.hdr{end}") for end in ("", ".gz"))
    return next((header for header in headers if header.exists()), path)


def open_volumes(paths: Iterable[Path], root: Path) -> tuple[list[Volume], dict[str, str]]:
    """Read the headers of NIfTI files.

    Args:
        paths: The files.
        root: The folder that their names start from.

    Returns:
        The volumes, and the problems of the files that cannot be used, by the names of their scans.
    """
    volumes, problems = [], {}
    for path in paths:
        name = nifti_scan_name(path, root)
        try:
            volumes.append(open_volume(path, name))
        except InputError as error:
            problems[name] = str(error)
    return volumes, problems


def nifti_scan_name(path: Path, root: Path) -> str:
    """Return the path of a NIfTI file below a folder, without its ending.

    In a cohort, each patient's file may have the same name. So the folders belong to the name, and the name of a file
    does not depend on which other files there are.

    Example:
        >>> nifti_scan_name(Path("in/mr.2.nii.gz"), Path("in"))
        'mr.2'
        >>> nifti_scan_name(Path("in/sub-01/T2.nii"), Path("in"))
        'sub-01/T2'
    """
    return path.relative_to(root).with_name(strip_ending(path.name)).as_posix()


def strip_ending(name: str) -> str:
    """Return the name of a NIfTI file without its ending."""
    endings = [ending for ending in NIFTI_SUFFIXES if name.lower().endswith(ending)]
    return (name[: -len(max(endings, key=len))] if endings else name) or name


@contextmanager
def hush_nibabel() -> Iterator[None]:
    """Suppress the messages of nibabel. It repairs unusual headers and says so, but we refuse them."""
    import nibabel

    with nibabel.imageglobals.LoggingOutputSuppressor():
        yield


def open_volume(path: Path, name: str | None = None) -> Volume:
    """Read the header of a NIfTI file.

    Args:
        path: The file, or the header of a pair.
        name: Name of the scan; None: the file without its ending.

    Raises:
        InputError: If the file is damaged, has no single volume, or does not say how it lies in the patient.
    """
    import nibabel

    check_packing(path)
    with reading(path, "not a whole NIfTI file", "copy it again"), hush_nibabel():
        image: Any = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Pair):
            raise InputError(
                f"{path}: expected NIfTI, got Analyze, which does not say where left and right are; convert the "
                f"original images again, for example with dcm2niix"
            )
        header = image.header
        unit = header.get_xyzt_units()[0]
        paths = tuple(Path(str(holder.filename)) for holder in image.file_map.values())
        with image.file_map["header" if len(paths) > 1 else "image"].get_prepare_fileobj("rb") as file:
            # As it stands in the file. nibabel has repaired `image.header`.
            raw = type(header).from_fileobj(file, check=False)
    shape = tuple(int(length) for length in image.shape)
    # A file may have a fourth axis of length 1 for time, or be a single slice.
    spatial = three_axes(shape)
    # `math.prod` counts with whole numbers of any size.
    one_volume = min(shape, default=0) > 0 and math.prod(shape) == math.prod(spatial)
    if not one_volume or header.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: expected one volume of real numbers, got {header.get_data_dtype()} of shape {shape}; split it"
        )
    if missing := [one for one in paths if not one.exists()]:
        raise InputError(f"{path}: its voxels are in {missing[0].name}, which is not there; put it beside the header")
    if unit not in ("mm", "unknown"):
        raise InputError(f"{path}: expected millimetres, got {unit}; convert it")
    affine, notes = find_grid(path, raw, spatial)
    code = int(raw["sform_code"]) or int(raw["qform_code"])
    origin = NiftiFile(paths, shape, code, unit == "mm")
    name = nifti_scan_name(path, path.parent) if name is None else name
    return Volume(name, path, spatial, affine, partial(read_nifti_voxels, path), origin, ", ".join(notes))


def check_packing(path: Path) -> None:
    """Check that a file is packed if its name says so, and only then.

    A browser may have unpacked it, and kept its name.

    Raises:
        InputError: If not.
    """
    packed = path.name.lower().endswith(".gz")
    with reading(path, "not a whole NIfTI file", "copy it again"), path.open("rb") as file:
        start = file.read(4)
    if packed and any(int.from_bytes(start, order) in HEADER_SIZES for order in ("little", "big")):
        raise InputError(f"{path}: it is not packed, and its name says so; rename it to {path.name[:-3]}")
    if not packed and start[:2] == b"\x1f\x8b":
        raise InputError(f"{path}: it is packed (gzip), and its name does not say so; rename it to {path.name}.gz")


def find_grid(path: Path, header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """Return the affine of a NIfTI file if all readers agree on it, and remarks for the user.

    Args:
        path: The file, for messages.
        header: Its header as it stands in the file.
        shape: Numbers of voxels.

    Raises:
        InputError: If they do not agree.
    """
    codes = int(header["qform_code"]), int(header["sform_code"])
    if not all(0 <= code <= 5 for code in codes):
        raise InputError(
            f"{path}: expected codes from 0 to 5 of qform and sform, got {codes[0]} and {codes[1]}; convert it again"
        )
    if codes == (0, 0):
        raise InputError(f"{path}: does not say where left and right are (sform and qform are 0); convert it again")
    sizes = np.asarray(header["pixdim"][1:4], float)
    odd = (not np.isfinite(size) or size <= 0 for size, number in zip(sizes, shape, strict=True) if number > 1)
    if any(odd):
        raise InputError(
            f"{path}: expected sizes of voxels above 0, got {format_sizes(sizes)} mm (pixdim); convert it again"
        )
    sform = header.get_sform() if codes[1] else None
    with reading(path, "its qform is no rotation", "convert it again, or set its qform code to 0"):
        # A value of 0 means 1, says the standard.
        header["pixdim"][0] = header["pixdim"][0] if abs(header["pixdim"][0]) == 1 else 1
        qform = header.get_qform() if codes[0] else None
        if qform is not None and not np.isfinite(qform).all():
            raise ValueError("it has a number that is not finite")
    affine = sform if sform is not None else qform
    assert affine is not None
    # For its checks of the numbers.
    Volume(path.name, path, shape, affine)
    notes = check_sform(path, sform, qform, sizes, shape) if sform is not None else []
    affine, more = right_angles(path, affine, shape)
    return affine, notes + more


def check_sform(
    path: Path, sform: np.ndarray, qform: np.ndarray | None, sizes: np.ndarray, shape: tuple[int, int, int]
) -> list[str]:
    """Check that a sform agrees with the rest of the header, and return remarks for the user.

    Args:
        path: The file, for messages.
        sform: Shape `(4, 4)`.
        qform: The same; None if the header has none.
        sizes: The sizes of voxels that the header states apart, in millimetres. Some readers take them.
        shape: Numbers of voxels.

    Raises:
        InputError: If they do not agree.
    """
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    limit = min(SAME_PLACE_MM, lengths.min() / 2)
    if ((np.array(shape) - 1) * np.abs(lengths - sizes)).max() > limit:
        raise InputError(
            f"{path}: has voxels of {format_sizes(lengths)} mm by its sform, and of {format_sizes(sizes)} mm by its "
            f"pixdim, and readers take either; convert it again"
        )
    if qform is None:
        return []
    if (distance := farthest_mm(sform, qform, shape)) > limit:
        raise InputError(
            f"{path}: its qform and its sform place it up to {distance:.3g} mm apart (axes {axis_codes(qform)} and "
            f"{axis_codes(sform)}), and readers take either; set the code of the wrong one to 0"
        )
    return [f"qform and sform {distance:.2g} mm apart, sform taken"] * (distance > ROUNDING_MM)


def right_angles(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """Return an affine that all readers of NIfTI place alike, and remarks for the user.

    Args:
        path: The file or folder, for messages.
        affine: Shape `(4, 4)`.
        shape: Numbers of voxels.

    Raises:
        InputError: If the axes are not at right angles. Some readers take such a grid, some turn it, some refuse it.
    """
    right = with_right_angles(affine, shape)
    distance = farthest_mm(affine, right, shape)
    if distance > RIGHT_ANGLES_MM:
        raise InputError(
            f"{path}: its axes are not at right angles (by up to {distance:.3g} mm, as with a tilted gantry), and "
            f"programs place such a NIfTI file differently; resample it, or predict its DICOM series with --format "
            f"rtstruct"
        )
    if distance <= ROUNDING_MM:
        return affine, []
    return right, [f"angles made right, which moves it by up to {distance:.2g} mm"]


def with_right_angles(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine with right angles that is closest to another one. The middle of the grid keeps its place.

    Args:
        affine: Shape `(4, 4)`.
        shape: Numbers of voxels.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The rotation that is closest to a matrix (polar decomposition).
    left, _, right = np.linalg.svd(affine[:3, :3] / lengths)
    changed = affine.copy()
    changed[:3, :3] = left @ right * lengths
    middle = (np.array(shape[:3]) - 1) / 2
    changed[:3, 3] += (affine[:3, :3] - changed[:3, :3]) @ middle
    return changed


def farthest_mm(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return the largest distance between the places that two affines give to a voxel.

    Example:
        >>> farthest_mm(np.eye(4), np.diag([1.0, 1, 1.5, 1]), (9, 9, 11))
        5.0
    """
    # The distance is largest at a corner of the grid.
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, number - 1) for number in shape))])
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def axis_codes(affine: np.ndarray) -> str:
    """Return where the axes of a volume point, for example `LPS`."""
    import nibabel

    return "".join(nibabel.aff2axcodes(affine))


def format_sizes(sizes: np.ndarray) -> str:
    """Return the sizes of a voxel as text."""
    return " x ".join(f"{size:.4g}" for size in sizes)


def read_nifti_voxels(path: Path) -> np.ndarray:
    """Read the voxels of a NIfTI file, scaled as its header says: float32, three axes.

    Raises:
        InputError: If the file is damaged.
    """
    with reading(path, "its voxels cannot be read", "copy it again"), hush_nibabel():
        voxels = read_to_end(path, np.float32)
    return voxels.reshape(three_axes(voxels.shape))


def read_to_end(path: Path, dtype: Any = None) -> np.ndarray:
    """Read the voxels of a NIfTI file, scaled as its header says, and check the checksum of a packed file.

    gzip has it at the end of the file, and nibabel stops at the last voxel.

    Args:
        path: The file, or the header of a pair.
        dtype: Type of the voxels; None: that of the file.
    """
    import gzip

    import nibabel

    image: Any = nibabel.load(path)
    stored, packed = image.dataobj, str(image.file_map["image"].filename)
    if not packed.lower().endswith(".gz"):
        return np.asarray(stored, dtype=dtype)
    with gzip.open(packed) as file:
        place = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
        voxels = np.asarray(nibabel.arrayproxy.ArrayProxy(file, place), dtype=dtype)
        while file.read(CHUNK_BYTES):
            pass
    return voxels


def three_axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the first three numbers of a shape; an axis that is missing has the length 1."""
    width, height, depth = (*shape, 1, 1, 1)[:3]
    return width, height, depth


def write_label_map(volume: Volume, masks: np.ndarray, path: Path, labels: LabelSet) -> None:
    """Write a NIfTI file of label ids on the grid of a volume. Its description has the name of each id.

    Args:
        volume: The volume. If it is a NIfTI file, the label map has the same shape and the same grid, and nothing else
            of its header, which may name the patient.
        masks: bool, shape `(organs, i, j, k)`. Where organs overlap, the highest id wins, as in the dataset.
        path: File to write, `.nii.gz`.
        labels: The names of the organs.
    """
    voxels = np.zeros(volume.shape, dtype=np.uint8)
    for label, mask in enumerate(masks, start=1):
        voxels[mask] = label
    write_bytes(
        volume, voxels, 1.0, ", ".join(f"{label} {organ}" for label, organ in enumerate(labels.names, 1)), path
    )


def write_probabilities(volume: Volume, probabilities: np.ndarray, organ: str, path: Path) -> None:
    """Write a NIfTI file of the probabilities of an organ, 0 to 1, on the grid of a volume.

    A voxel has 8 bits, and the header has the factor 1/255, which readers of NIfTI files apply. So the values are
    exact to 0.002, and the file has a quarter of the size of 32 bits.

    Args:
        volume: As in `write_label_map`.
        probabilities: 0 to 1, shape `(i, j, k)`.
        organ: Name of the organ.
        path: File to write, `.nii.gz`.
    """
    # Half precision has steps of 0.125 near 255, so the product needs single precision.
    scaled = np.rint(probabilities.astype(np.float32) * 255).astype(np.uint8)
    write_bytes(volume, scaled, 1 / 255, f"probability of {organ}", path)


def write_bytes(volume: Volume, voxels: np.ndarray, slope: float, description: str, path: Path) -> None:
    """Write voxels of 8 bits on the grid of a volume.

    Args:
        volume: As in `write_label_map`.
        voxels: uint8, shape `(i, j, k)`.
        slope: Factor from the stored voxels to their values.
        description: What the voxels are. If it is too long for a header, its first bytes stand there, and a header
            extension has the whole text.
        path: File to write, `.nii.gz`.

    Raises:
        InputError: If its axes are not at right angles.
    """
    import nibabel

    affine, _ = right_angles(volume.path, volume.affine, volume.shape)
    code = 1
    if isinstance(volume.origin, NiftiFile):
        voxels, code = voxels.reshape(volume.origin.shape), volume.origin.code
    header = nibabel.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code)
    header.set_qform(affine, code)
    if len(text := description.encode()) > DESCRIPTION_LENGTH:
        header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text))
        # A letter may have several bytes, and the cut may be within one.
        text = text[:DESCRIPTION_LENGTH].decode(errors="ignore").encode()
    header["descrip"] = text
    header.set_data_dtype(np.uint8)
    image = nibabel.Nifti1Image(voxels, affine, header)
    # The image has a header of its own. nibabel takes the voxels as they are if the slope is set.
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
