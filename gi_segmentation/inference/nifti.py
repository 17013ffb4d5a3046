"""Read scans from NIfTI files, and write label maps on their grid."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gi_segmentation.errors import InputError, reading
from gi_segmentation.inference.volumes import Volume
from gi_segmentation.schema import ORGANS

SUFFIXES = (".nii", ".nii.gz")


def is_nifti(path: Path) -> bool:
    """Tell by its name whether a file is a NIfTI file."""
    return path.name.lower().endswith(SUFFIXES)


def open_volumes(paths: Iterable[Path]) -> tuple[list[Volume], dict[str, str]]:
    """Read the headers of NIfTI files.

    Returns:
        The volumes, and the problems of the files that cannot be used, by the names of their scans.
    """
    volumes, problems = [], {}
    for path in paths:
        try:
            volumes.append(open_volume(path))
        except InputError as error:
            problems[scan_name(path)] = str(error)
    return volumes, problems


def scan_name(path: Path) -> str:
    """Return the name of a NIfTI file without its ending.

    Example:
        >>> scan_name(Path("in/mr.2.nii.gz"))
        'mr.2'
    """
    return path.name[: -len(".nii.gz" if path.name.lower().endswith(".gz") else ".nii")]


def open_volume(path: Path) -> Volume:
    """Read the header of a NIfTI file.

    Raises:
        InputError: If the file is damaged, has no single volume, or does not say how it lies in the patient.
    """
    import nibabel

    with reading(path, "not a whole NIfTI file", "copy it again"):
        image: Any = nibabel.load(path)
        header = image.header
        unit = header.get_xyzt_units()[0]
    shape = tuple(int(length) for length in image.shape)
    # A file may have a fourth axis of length 1 for time, or be a single slice.
    spatial = three_axes(shape)
    if np.prod(shape) == 0 or np.prod(shape) != np.prod(spatial) or header.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: expected one volume of real numbers, got {header.get_data_dtype()} of shape {shape}; split it"
        )
    if not (header["sform_code"] or header["qform_code"]):
        raise InputError(f"{path}: does not say where left and right are (sform and qform are 0); convert it again")
    if unit not in ("mm", "unknown"):
        raise InputError(f"{path}: expected millimetres, got {unit}; convert it")
    return Volume(scan_name(path), path, spatial, np.asarray(image.affine, float), partial(read_voxels, path), header)


def read_voxels(path: Path) -> np.ndarray:
    """Read the voxels of a NIfTI file, scaled as its header says: float32, three axes.

    Raises:
        InputError: If the file is damaged.
    """
    import nibabel

    with reading(path, "its voxels cannot be read", "copy it again"):
        image: Any = nibabel.load(path)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    return voxels.reshape(three_axes(voxels.shape))


def three_axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the first three numbers of a shape; an axis that is missing has the length 1."""
    width, height, depth = (*shape, 1, 1, 1)[:3]
    return width, height, depth


def write_label_map(volume: Volume, masks: np.ndarray, path: Path) -> None:
    """Write a NIfTI file of label ids on the grid of a volume.

    Args:
        volume: The volume. If it is a NIfTI file, the label map has the same shape and the same header fields.
        masks: bool, shape `(organs, i, j, k)`. Where organs overlap, the highest id wins, as in the dataset.
        path: File to write, `.nii.gz`.
    """
    labels = np.zeros(volume.shape, dtype=np.uint8)
    for label, mask in enumerate(masks, start=1):
        labels[mask] = label
    write_bytes(volume, labels, 1.0, ", ".join(f"{label} {organ}" for label, organ in enumerate(ORGANS, 1)), path)


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
        description: At most 80 characters.
        path: File to write, `.nii.gz`.
    """
    import nibabel

    if isinstance(volume.origin, nibabel.Nifti1Header):
        header = volume.origin.copy()
        voxels = voxels.reshape(header.get_data_shape())
        header["cal_min"] = header["cal_max"] = 0
    else:
        header = nibabel.Nifti1Header()
        header.set_xyzt_units("mm")
        header.set_sform(volume.affine, "scanner")
        header.set_qform(volume.affine, "scanner")
    header["descrip"] = description.encode()
    header.set_data_dtype(np.uint8)
    image = nibabel.Nifti1Image(voxels, volume.affine, header)
    # The image has a header of its own. nibabel takes the voxels as they are if the slope is set.
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
