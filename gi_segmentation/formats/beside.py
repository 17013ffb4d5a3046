"""Files beside scans that are not read as scans: label maps, pictures, archives, and scans in other formats."""

import gzip
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, list_some, reading
from gi_segmentation.formats.nifti import OUR_LABEL_MAPS, find_header, hush_nibabel, strip_ending

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
WITH_SLICER = "convert it to NIfTI, for example with 3D Slicer or SimpleITK"
WITH_FREESURFER = "convert it to NIfTI, for example with mri_convert of FreeSurfer"
WITH_DCM2NIIX = "convert it to NIfTI, for example with dcm2niix"
UNPACK = "unpack it"
PACKED_DICOM = "a packed DICOM file"
# Formats of scans that are not read, by their endings, and what to do.
OTHER_FORMATS = {
    ".nrrd": ("NRRD", WITH_SLICER),
    ".nhdr": ("NRRD", WITH_SLICER),
    ".mha": ("MetaImage", WITH_SLICER),
    ".mhd": ("MetaImage", WITH_SLICER),
    ".gipl": ("GIPL", WITH_SLICER),
    ".gipl.gz": ("GIPL", WITH_SLICER),
    ".mnc": ("MINC", WITH_FREESURFER),
    ".mnc.gz": ("MINC", WITH_FREESURFER),
    ".mgh": ("FreeSurfer's MGH", WITH_FREESURFER),
    ".mgh.gz": ("FreeSurfer's MGH", WITH_FREESURFER),
    ".mgz": ("FreeSurfer's MGH", WITH_FREESURFER),
    ".par": ("Philips PAR/REC", WITH_DCM2NIIX),
    ".nii.bz2": ("a packed NIfTI file", UNPACK),
    ".nii.xz": ("a packed NIfTI file", UNPACK),
    ".nii.zst": ("a packed NIfTI file", UNPACK),
    ".nii.zip": ("a packed NIfTI file", UNPACK),
    ".img": ("the voxels of Analyze or NIfTI without the header .hdr", "put the header beside it"),
    ".img.gz": ("the voxels of Analyze or NIfTI without the header .hdr.gz", "put the header beside it"),
    "2dseq": ("Bruker", WITH_SLICER),
}
# What the names of label maps contain, or those of their folders. What is in the file decides.
LABEL_NAME = re.compile(r"seg|mask|label|lbl|roi|contour|annot|truth|prob|(?<![a-z])gt(?![a-z])")
# A file with so few values is no scan. With more, up to as many as a byte has, most neighbours must be equal.
FEW_VALUES = 8
MAX_LABELS = 256
# A packed file of more bytes than this share of its voxels' is no mask, if it is not tiny.
PACKED_SHARE = 0.1
SMALL_FILE = 4096
# NIfTI's code of the intent "label".
INTENT_LABEL = 1002


def find_format_problem(path: Path) -> str:
    """Return the problem of a file that is a scan in a format that is not read here; empty for any other file."""
    name = path.name.lower()
    ending = next((ending for ending in sorted(OTHER_FORMATS, key=len)[::-1] if name.endswith(ending)), "")
    # Other programs use this ending, too. The voxels are in another file.
    if ending == ".par" and not any(path.with_suffix(other).exists() for other in (".rec", ".REC", ".Rec")):
        return ""
    if ending in (".img", ".img.gz") and find_header(path) != path:
        return ""
    if ending == "2dseq" and name != ending:
        return ""
    if ending:
        what, remedy = OTHER_FORMATS[ending]
    elif name.endswith(".gz") and is_packed_dicom(path):
        what, remedy = PACKED_DICOM, "unpack all of its folder (gunzip)"
    else:
        return ""
    return f"{path}: expected DICOM or NIfTI, got {what}; {remedy}"


def is_packed_dicom(path: Path) -> bool:
    """Tell whether a gzip file has a DICOM file in it."""
    try:
        with gzip.open(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, EOFError, zlib.error):
        return False


def find_label_maps(paths: Sequence[Path], root: Path) -> list[Path]:
    """Return those of some NIfTI files that are label maps or probabilities, and no scans.

    Their names say it, or they stand beside a scan whose name theirs begins with, or their headers say it. In each
    case, the voxels must agree: a few whole numbers, in areas. A mask of one organ may have any name, such as
    `liver.nii.gz`. It has two to eight values, and a scan of the same size lies in its folder.

    Args:
        paths: NIfTI files.
        root: The folder that they were found in. The names of the folders below it count, too.
    """
    stems = {(path.parent, strip_ending(path.name)) for path in paths}
    found, plain = [], []
    for path in paths:
        stem = strip_ending(path.name)
        # If the folder has `sub1` too, `sub1_seg` most likely is a mask of that scan.
        starts = (stem[: match.start()] for match in re.finditer(r"[^A-Za-z0-9]", stem))
        suspected = bool(LABEL_NAME.search(path.relative_to(root).as_posix().lower()))
        if is_label_map(path, suspected or any((path.parent, start) in stems for start in starts)):
            found.append(path)
        elif len(paths) > 1 and has_few_values(path):
            plain.append(path)
    scans = {(path.parent, find_shape(path)) for path in paths if path not in {*found, *plain}} if plain else set()
    return [*found, *(path for path in plain if (path.parent, find_shape(path)) in scans)]


def find_shape(path: Path) -> tuple[int, ...]:
    """Return the numbers of voxels of a NIfTI file; nothing if it cannot be read."""
    import nibabel

    with suppress(InputError), reading(path, "not a whole NIfTI file", "copy it again"), hush_nibabel():
        image: Any = nibabel.load(path)
        return tuple(image.shape)
    return ()


def has_few_values(path: Path) -> bool:
    """Tell whether the voxels of a file are two to eight whole numbers, as in a mask, and not one or many.

    A packed scan is passed over without a look at its voxels, because its size says enough.
    """
    import nibabel

    with suppress(InputError), reading(path, "not a whole NIfTI file", "copy it again"), hush_nibabel():
        image: Any = nibabel.load(path)
        size = math.prod(image.shape) * image.get_data_dtype().itemsize
        if path.suffix.lower() == ".gz" and path.stat().st_size > max(PACKED_SHARE * size, SMALL_FILE):
            return False
        # The middle slice rules out nearly all scans, so their other voxels need not be read.
        middle = np.asanyarray(image.dataobj[..., image.shape[-1] // 2])
        if not has_labels(middle) or len(np.unique(middle)) > FEW_VALUES:
            return False
        voxels = np.asanyarray(image.dataobj)
        return has_labels(voxels) and 1 < len(np.unique(voxels)) <= FEW_VALUES
    return False


def is_label_map(path: Path, suspected: bool) -> bool:
    """Tell whether a NIfTI file is a label map or a map of probabilities.

    Args:
        path: The file. If it is damaged, this is reported when it is read as a scan.
        suspected: Whether its name speaks for it. If not, its header must.
    """
    import nibabel

    try:
        with reading(path, "not a whole NIfTI file", "copy it again"), hush_nibabel():
            image: Any = nibabel.load(path)
            header = image.header
            marked = "intent_code" in header and int(header["intent_code"]) == INTENT_LABEL
            marked |= "descrip" in header and bool(OUR_LABEL_MAPS.fullmatch(bytes(header["descrip"])))
            if not (marked or suspected):
                return False
            voxels = np.asanyarray(image.dataobj)
            return has_labels(voxels) or ("prob" in path.name.lower() and has_probabilities(voxels))
    except InputError:
        return False


def has_labels(voxels: np.ndarray) -> bool:
    """Tell whether voxels are labels in areas.

    Example:
        >>> areas = np.repeat(np.arange(20), 50).reshape(20, 50)
        >>> has_labels(areas.T), has_labels(areas % 2), has_labels(areas * 0.01)
        (True, True, False)
        >>> has_labels(np.random.default_rng(0).integers(0, 200, (20, 50)))
        False
    """
    if voxels.dtype.kind not in "iufb" or not np.isfinite(voxels).all():
        return False
    values = np.unique(voxels)
    if len(values) > MAX_LABELS or not np.array_equal(values, np.rint(values)):
        return False
    # Two neighbours of background are equal in every kind of image, so these pairs do not count.
    first, second = voxels[:-1], voxels[1:]
    border = (first != 0) | (second != 0)
    return len(values) <= FEW_VALUES or bool((first == second)[border].mean() > 0.5)


def has_probabilities(voxels: np.ndarray) -> bool:
    """Tell whether voxels are numbers from 0 to 1."""
    return voxels.dtype.kind == "f" and bool((voxels >= 0).all() and (voxels <= 1).all())


def describe_group(what: str, paths: Iterable[Path], root: Path, remedy: str = "") -> str:
    """Return a line that says how many files are left out, and names the first three.

    Example:
        >>> describe_group("picture", [Path("in/a.png"), Path("in/b.png")], Path("in"))
        'left out: 2 pictures: a.png, b.png'
    """
    names = [path.relative_to(root).as_posix() for path in paths]
    line = f"left out: {len(names)} {what}{'s' * (len(names) > 1)}: {list_some(names)}"
    return line + f"; {remedy}" * bool(remedy)
