"""Read label maps of NIfTI files as masks on the grids of their scans."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from gi_segmentation.errors import InputError, list_some, reading
from gi_segmentation.formats.label_names import MAX_VALUE, Values
from gi_segmentation.formats.nifti import farthest_mm, format_sizes, hush_nibabel, open_volume, read_to_end, three_axes
from gi_segmentation.formats.structures import StructureSet, empty_masks
from gi_segmentation.formats.volumes import Volume

# A label map lies on the grid of its scan if no voxel is further away than this share of the smallest side of a voxel.
SAME_GRID_SHARE = 0.1


@dataclass(frozen=True)
class LabelSource:
    """A file of labels.

    Attributes:
        path: The NIfTI file.
        names: The values of each structure. No values: every voxel that is not 0. None: the file's values are its
            names.
        order: Which axis of the file each axis of the scan is.
        flipped: The axes of the scan along which the file runs the other way.
        allowed: The values that it may have, besides 0; none: any.
    """

    path: Path
    names: Mapping[str, Values] | None
    order: tuple[int, ...] = (0, 1, 2)
    flipped: tuple[int, ...] = ()
    allowed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Drawing:
    """A scan, and the files of labels that belong to it by their names. None has been opened.

    Attributes:
        image: The scan.
        sources: The files of labels.
        label: What tells it from other label maps of the scan.
        notes: What the user should know.
    """

    image: Path
    sources: tuple[LabelSource, ...]
    label: str = ""
    notes: tuple[str, ...] = ()


def open_structures(volume: Volume, drawing: Drawing) -> StructureSet:
    """Check that the labels of a scan lie on its grid, and return them.

    Raises:
        InputError: If a file is damaged or lies on another grid, or if two structures have one name.
    """
    sources = []
    for source in drawing.sources:
        order, flipped = align(volume, open_volume(source.path))
        sources.append(replace(source, order=order, flipped=flipped))
    names = [name for source in sources for name in source.names or {}]
    if twice := [name for name in names if names.count(name) > 1]:
        files = [source.path for source in sources if twice[0] in (source.names or {})]
        raise InputError(f"{files[-1]}: {twice[0]!r} is there twice (also in {files[0].name}); rename one of them")
    read: Callable[[Sequence[str]], np.ndarray] = partial(read_masks, volume.shape, tuple(sources))
    paths = tuple(source.path for source in sources)
    values = repr([dict(source.names or {}) for source in sources])
    return StructureSet(volume, "nifti", paths, tuple(names), read, drawing.label, notes=drawing.notes, reading=values)


def align(volume: Volume, labels: Volume) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how a label map comes to the grid of its scan: by swapping and flipping axes.

    Args:
        volume: The scan.
        labels: The label map.

    Returns:
        Which axis of the label map each axis of the scan is, and the axes of the scan that are flipped then.

    Raises:
        InputError: If it lies on another grid.
    """
    # From the index of a voxel of the scan to that of the label map.
    steps = np.linalg.inv(labels.affine) @ volume.affine
    order = tuple(int(axis) for axis in np.abs(steps[:3, :3]).argmax(axis=0))
    flipped = tuple(axis for axis in range(3) if steps[order[axis], axis] < 0)
    if sorted(order) == [0, 1, 2] and tuple(labels.shape[axis] for axis in order) == volume.shape:
        exact = np.zeros((4, 4))
        exact[3, 3] = 1
        for axis in range(3):
            exact[order[axis], axis] = -1 if axis in flipped else 1
            exact[order[axis], 3] = labels.shape[order[axis]] - 1 if axis in flipped else 0
        distance = farthest_mm(labels.affine @ exact, volume.affine, volume.shape)
        if distance <= SAME_GRID_SHARE * min(volume.spacing_mm):
            return order, flipped
        difference = f"up to {distance:.3g} mm away"
    else:
        difference = f"{describe_grid(labels)}, and the scan {describe_grid(volume)}"
    raise InputError(
        f"{labels.path}: lies on another grid than {volume.path} ({difference}); draw on this scan, or resample the "
        f"label map to it (nearest neighbour)"
    )


def is_on_grid(image: Path, labels: Path) -> bool:
    """Tell whether a label map lies on the grid of a scan."""
    try:
        align(open_volume(image), open_volume(labels))
    except InputError:
        return False
    return True


def describe_grid(volume: Volume) -> str:
    """Return the numbers and sizes of the voxels of a grid."""
    sizes = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return f"{' x '.join(map(str, volume.shape))} voxels of {format_sizes(sizes)} mm"


def read_masks(shape: tuple[int, int, int], sources: Sequence[LabelSource], names: Sequence[str]) -> np.ndarray:
    """Read the masks of structures, see `StructureSet.read`."""
    masks = empty_masks(len(names), shape)
    for mask, name in zip(masks, names, strict=True):
        source = next(source for source in sources if name in (source.names or {}))
        assert source.names is not None
        if source.allowed and (others := sorted(find_values(source.path) - source.allowed - {0})):
            raise InputError(
                f"{source.path}: has the labels {list_some([str(value) for value in others])}, for which dataset.json "
                f"has no name; add them, or correct the label map"
            )
        voxels = np.flip(read_labels(source.path).transpose(source.order), source.flipped)
        for value in source.names[name]:
            mask |= voxels == value
        if not source.names[name]:
            mask |= voxels != 0
            check_one_value(source.path, voxels, mask)
    return masks


def check_one_value(path: Path, voxels: np.ndarray, mask: np.ndarray) -> None:
    """Check that a file of one structure has one value besides 0. A label map of several would become one structure.

    Raises:
        InputError: If not.
    """
    highest = voxels.max()
    if (voxels[mask] != highest).any():
        others = [str(value) for value in sorted(find_values(path) - {0})]
        raise InputError(
            f"{path}: has the labels {list_some(others)}, but its name is that of one structure; pair label maps by "
            f"--images and --labels, with as many * in both"
        )


def read_labels(path: Path) -> np.ndarray:
    """Read the voxels of a label map: whole numbers from 0 on, three axes.

    Raises:
        InputError: If the file is damaged, or has other numbers.
    """
    return read_labels_once(path, *find_change(path))


def find_values(path: Path) -> frozenset[int]:
    """Return the values that a label map has; errors as `read_labels`."""
    return find_values_once(path, *find_change(path))


def find_change(path: Path) -> tuple[int, int]:
    """Return when a file was changed, and its size. Together they tell another content.

    Raises:
        InputError: If it cannot be read.
    """
    with reading(path, "its voxels cannot be read", "copy it again"):
        status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache
def find_values_once(path: Path, changed_ns: int, size: int) -> frozenset[int]:
    """Find the values of a label map, see `find_values` and `read_labels_once`."""
    # Plane by plane, because a sorted copy of all voxels needs much memory.
    planes = read_labels_once(path, changed_ns, size).T
    return frozenset(int(value) for plane in planes for value in np.unique(plane))


@lru_cache(maxsize=1)
def read_labels_once(path: Path, changed_ns: int, size: int) -> np.ndarray:
    """Read a label map, see `read_labels`. The last one is kept, because its structures are asked for one by one.

    Args:
        path: The file.
        changed_ns: From `find_change`.
        size: The same.
    """
    with reading(path, "its voxels cannot be read", "copy it again"), hush_nibabel():
        voxels = read_to_end(path)
    if voxels.dtype.kind == "f":
        odd = ~np.isfinite(voxels) | (voxels != np.rint(voxels))
        if odd.any():
            raise InputError(
                f"{path}: expected whole numbers, as a label map has, got {voxels[odd][0]:.6g}; export it as a label "
                f"map, or round it"
            )
    if voxels.size and (voxels.min() < 0 or voxels.max() > MAX_VALUE):
        worst = min(voxels.min(), 0) or voxels.max()
        raise InputError(f"{path}: expected labels from 0 to {MAX_VALUE}, got {worst:.10g}; correct the label map")
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.int32)
    return voxels.reshape(three_axes(voxels.shape))
