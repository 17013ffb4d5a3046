"""What somebody has drawn on a scan: a structure set, a segmentation or a label map of any format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from gi_segmentation.formats.volumes import Volume

StructureKind: TypeAlias = Literal["rtstruct", "seg", "nifti"]


@dataclass(frozen=True, eq=False)
class StructureSet:
    """The structures of one scan, from one source. No mask has been made.

    Attributes:
        volume: The scan that they were drawn on.
        kind: What its files are.
        paths: The files that it is read from.
        names: The names of its structures (ROIs, segments, labels), as they stand there. Each name is there once.
        read: Makes the masks of some of its structures, by their names: bool, shape `(names, i, j, k)` on the own grid
            of the volume. Raises `InputError`.
        label: What it is called there. For the screen only, because it may name the patient.
        created: Date and time as DICOM writes them, `YYYYMMDDHHMMSS`; empty if not known. For choosing and for the
            screen only.
        approved: Whether somebody approved it; None if it does not say.
        notes: What the user should know of it, for example what was left out.
    """

    volume: Volume
    kind: StructureKind
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    read: Callable[[Sequence[str]], np.ndarray] = field(repr=False)
    label: str = ""
    created: str = ""
    approved: bool | None = None
    notes: tuple[str, ...] = ()
