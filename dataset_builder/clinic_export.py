"""Write the patients of a phantom as planning systems export them: DICOM series, each with a structure set.

So the way from a clinic's contours to a dataset can be tried without a patient. The names of the ROIs differ between
patients, as they do between the people of a clinic. Each structure set has two ROIs that `convert` must not take for
an organ: a target volume (PTV), and one that the planning system has made and nobody has drawn.
"""

import datetime
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_dilation

from dataset_builder.series import KAGGLE_AXES, write_series
from gi_segmentation.data.synthetic import SOURCE, is_synthetic
from gi_segmentation.errors import InputError, join_problems
from gi_segmentation.files import writing_folder
from gi_segmentation.formats.algorithm import Algorithm
from gi_segmentation.formats.dicom.header import read_series_header, set_attributes
from gi_segmentation.formats.dicom.rtstruct import build_structure_set
from gi_segmentation.formats.dicom.series import find_series
from gi_segmentation.formats.kaggle.folder import KaggleScan, read_kaggle_scans
from gi_segmentation.formats.kaggle.images import decode_image, read_file
from gi_segmentation.formats.kaggle.names import SliceFile
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from gi_segmentation.rle import decode

# The day of the first scans. A scan of Kaggle's day 3 was made three days later.
FIRST_DAY = datetime.date(2026, 1, 1)
# The margin of the target volume, in pixels.
MARGIN = 4
TARGET = "PTV"
# What is not drawn, if all organs are.
TEMPLATE_ROI = "Duodenum"
# Names of TG-263 that are more than the words of ours with capital letters.
CLINIC_NAMES = {"large_bowel": "Bowel_Large", "small_bowel": "Bowel_Small"}


def name_roi(organ: str, second: bool) -> str:
    """Return what a clinic calls an organ: its name of TG-263, or in a second way of writing.

    Example:
        >>> name_roi("kidney_left", False), name_roi("kidney_left", True)
        ('Kidney_L', 'left kidney')
        >>> name_roi("small_bowel", False), name_roi("small_bowel", True)
        ('Bowel_Small', 'small bowel')
    """
    *words, last = organ.split("_")
    has_side = last in ("left", "right")
    if second:
        return " ".join([last, *words] if has_side else [*words, last])
    sided = [*words, last[0]] if has_side else [*words, last]
    return CLINIC_NAMES.get(organ, "_".join(word.capitalize() for word in sided))


def write_clinic_export(output_dir: Path, kaggle_dir: Path) -> list[Path]:
    """Write all scans of a phantom as DICOM series with structure sets. The folder gets its name when it is complete.

    Args:
        output_dir: Folder to create. An empty folder may exist there.
        kaggle_dir: The phantom. A folder with real patients is refused, because the files say that they are synthetic.

    Returns:
        The structure sets, in the folders of their series: `PHANTOM-012/20260104/RS`.

    Raises:
        InputError: If the folder to write has something, or the phantom has problems or a slice of a patient.
    """
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise InputError(f"{output_dir}: expected a new or empty folder; remove it, or choose another --output_dir")
    scans, problems = read_kaggle_scans(kaggle_dir)
    if problems:
        raise InputError(join_problems(problems))
    with writing_folder(output_dir) as folder:
        return [output_dir / write_drawn_scan(folder, scan).relative_to(folder) for scan in scans]


def write_drawn_scan(folder: Path, scan: KaggleScan) -> Path:
    """Write a scan and its structure set below a folder, and return the path of the structure set.

    Raises:
        InputError: If a slice is not synthetic.
    """
    first = scan.slices[0]
    date = FIRST_DAY + datetime.timedelta(days=first.day)
    own = folder / f"PHANTOM-{scan.case:03d}" / f"{date:%Y%m%d}"
    height_mm, width_mm = first.pixel_spacing
    affine = np.eye(4)
    affine[:3, :3] = KAGGLE_AXES * (
        width_mm,
        height_mm,
        scan.facts.slice_spacing_mm if scan.facts else first.thickness_mm,
    )
    voxels = np.stack([read_synthetic(one) for one in scan.slices]).transpose(2, 1, 0)
    values = {"PatientName": f"Phantom^Case {scan.case}", "PatientID": f"PHANTOM-{scan.case:03d}"}
    values |= dict.fromkeys(("StudyDate", "ContentDate"), f"{date:%Y%m%d}")
    (volume,) = find_series(write_series(own, voxels, affine, values=values)).volumes
    return write_plan(own / "RS", volume, scan, date)


def read_synthetic(slice_file: SliceFile) -> np.ndarray:
    """Read the pixels of a slice of a phantom: uint16, shape `(height, width)`.

    Raises:
        InputError: If the slice does not say that it is synthetic.
    """
    png = read_file(slice_file.path)
    if not is_synthetic(png):
        raise InputError(
            f"{slice_file.path}: expected a slice of a phantom, got one without its mark; name a folder that "
            f"`dataset_builder phantom` has written"
        )
    return decode_image(png, slice_file.path, slice_file.width, slice_file.height)


def write_plan(path: Path, volume: Volume, scan: KaggleScan, date: datetime.date) -> Path:
    """Write what is annotated on a scan as the approved structure set of a clinic.

    Args:
        path: File to write.
        volume: The series.
        scan: The scan.
        date: When it was drawn.
    """
    masks = [volume.to_native(read_masks(scan, organ)) for organ in scan.drawn]
    names = [name_roi(organ, scan.case % 2 == 1) for organ in scan.drawn]
    undrawn = [name_roi(organ, False) for organ in scan.labels.names if organ not in scan.drawn] or [TEMPLATE_ROI]
    # The last organ with a margin in the planes of the slices, which follow each other along the last axis.
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])[:, :, None]
    target = binary_dilation(masks[-1], cross, iterations=MARGIN)
    empty = [np.zeros_like(target)] * len(undrawn)
    header, algorithm = read_series_header(volume.origin), Algorithm({SOURCE: "synthetic"})
    labels = LabelSet((*names, TARGET, *undrawn))
    plan = build_structure_set(volume.origin, np.stack([*masks, target, *empty]), algorithm, labels, header)
    set_attributes(
        plan,
        SeriesDescription="Plan of a phantom",
        StructureSetLabel="PLAN",
        StructureSetDate=f"{date:%Y%m%d}",
        ApprovalStatus="APPROVED",
        ReviewDate=f"{date:%Y%m%d}",
        ReviewTime="120000",
        ReviewerName="Phantom",
    )
    plan.save_as(path, enforce_file_format=True)
    return path


def read_masks(scan: KaggleScan, organ: str) -> np.ndarray:
    """Return the mask of an organ on all slices of a scan: bool, shape `(slices, rows, columns)`."""
    annotations = scan.annotations or {}
    rles = [annotations[one.id][organ].rle if organ in annotations.get(one.id, {}) else "" for one in scan.slices]
    return np.stack([decode(rle, one.height, one.width) for rle, one in zip(rles, scan.slices, strict=True)])
