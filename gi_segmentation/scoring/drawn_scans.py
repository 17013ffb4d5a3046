"""What one side of a comparison has drawn on each scan, whatever its files are: a CSV of Kaggle's, NIfTI or DICOM."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from gi_segmentation.errors import InputError, join_problems, list_some
from gi_segmentation.files import find_files
from gi_segmentation.formats.dicom.files import is_dicom
from gi_segmentation.formats.dicom.read_structures import find_dicom_structures
from gi_segmentation.formats.dicom.series import FoundSeries, find_series
from gi_segmentation.formats.inputs import PACKAGES_BY_KIND, require
from gi_segmentation.formats.kaggle.label_file import ScanFacts
from gi_segmentation.formats.kaggle.names import ID_PATTERN
from gi_segmentation.formats.label_maps import Drawing, LabelSource, open_structures
from gi_segmentation.formats.label_names import Values, read_dataset_json
from gi_segmentation.formats.nifti import find_header, is_nifti, nifti_scan_name, open_volume, strip_ending
from gi_segmentation.formats.nifti_structures import (
    BIDS_DERIVED,
    BIDS_LABELS,
    FoundStructures,
    find_patient,
    name_values,
    open_bids_labels,
    parse_bids,
)
from gi_segmentation.formats.structures import StructureSet, choose_structures
from gi_segmentation.formats.volumes import Volume, make_training_affine
from gi_segmentation.rle import RleError, decode
from gi_segmentation.schema import scan_name
from gi_segmentation.scoring.submissions import (
    Annotations,
    SliceGrid,
    find_facts,
    read_grids,
    read_labels_of,
    read_whole_table,
)

# The CSV of a folder in Kaggle's layout, and that of a prediction.
TABLES = ("train.csv", "submission.csv")
PROBABILITIES = ".probability.nii.gz"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        path: The file or the folder.
        scans: What is drawn on each scan, by the name of the scan.
        notes: What the user should know: lines for the screen.
    """

    path: Path
    scans: dict[str, StructureSet]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Files:
    """The files of one side by their kinds. A CSV stands alone."""

    path: Path
    table: Path | None
    nifti: list[Path]
    dicom: list[Path]


def list_side(flag: str, path: Path) -> Files:
    """List the files of one side.

    Args:
        flag: The flag that names it, for messages.
        path: A file or a folder.

    Raises:
        InputError: If it has no file of a kind that can be scored, or files of two kinds.
    """
    if not path.exists() and path.suffix != ".csv":
        raise InputError(f"{flag} {path}: no such file or folder")
    table = next((path / name for name in TABLES if (path / name).is_file()), None)
    if not path.is_dir() and not is_nifti(path) and not is_dicom(path):
        table = path
    if table is not None:
        return Files(path, table, [], [])
    files = find_files(path).files if path.is_dir() else [find_header(path)]
    # `predict` writes probabilities beside its label maps.
    nifti = [one for one in files if is_nifti(one) and not one.name.endswith(PROBABILITIES)]
    dicom = [one for one in files if one not in nifti and is_dicom(one)]
    if not nifti and not dicom:
        raise InputError(
            f"{flag} {path}: expected {' or '.join(TABLES)}, NIfTI label maps, DICOM SEG or RTSTRUCT, got none; name "
            f"the folder that has them"
        )
    if nifti and dicom:
        raise InputError(
            f"{flag} {path}: has NIfTI files ({nifti[0].name}) and DICOM files ({dicom[0].name}); put those to score "
            f"into a folder of their own"
        )
    require(PACKAGES_BY_KIND["nifti" if nifti else "dicom"], path)
    return Files(path, None, nifti, dicom)


def read_sides(
    truth: Files,
    submissions: Sequence[Files],
    images: Path | None = None,
    kaggle_dir: Path | None = None,
    label_names: Mapping[str, Values] | None = None,
) -> list[Side]:
    """Read what all sides have drawn. No mask is made.

    Args:
        truth: The files of the truth.
        submissions: The files of each submission.
        images: Folder with the DICOM series that was drawn on. It may also lie beside the structure sets.
        kaggle_dir: Folder with the slices of a CSV; None: the folder of the CSV.
        label_names: The values of the label maps by the names of the structures; None: as they say themselves.

    Raises:
        InputError: If a file cannot be used.
    """
    sides = [truth, *submissions]
    series = FoundSeries([], {}, [], {})
    if any(side.dicom for side in sides):
        # A structure set names its scan by identifiers, so the slices may lie anywhere.
        beside = list_side("--images", images).dicom if images else []
        series = find_series(dict.fromkeys([*beside, *(one for side in sides for one in side.dicom)]))
    columns = ["segmentation"] + ["predicted"] * len(submissions)
    return [
        read_side(side, series, column, kaggle_dir, label_names) for side, column in zip(sides, columns, strict=True)
    ]


def read_side(
    files: Files,
    series: FoundSeries,
    column: str,
    kaggle_dir: Path | None = None,
    label_names: Mapping[str, Values] | None = None,
) -> Side:
    """Read what one side has drawn. No mask is made.

    Args:
        files: Its files.
        series: The DICOM series that a structure set may name.
        column: The column of a CSV with the encodings.
        kaggle_dir: As in `read_sides`.
        label_names: As in `read_sides`.

    Raises:
        InputError: If a file cannot be used.
    """
    if files.table:
        return read_csv(files, column, kaggle_dir)
    return (
        read_label_maps(files, label_names)
        if files.nifti
        else read_dicom(files, series, is_truth=column == "segmentation")
    )


def read_csv(files: Files, column: str, kaggle_dir: Path | None) -> Side:
    """Read a CSV. Slices that are missing within a scan are empty."""
    assert files.table is not None
    label_file = read_labels_of(kaggle_dir or files.table.parent)
    annotations = read_whole_table(files.table, column, label_file)
    grids = read_grids(files.table, kaggle_dir, clinical=True)
    if lost := annotations.keys() - grids.keys():
        raise InputError(
            f"{files.table}: the sizes of {len(lost)} slices are not known, the first {min(lost)}; name the folder "
            f"with their images by --kaggle_dir"
        )
    slices: dict[str, dict[int, str]] = defaultdict(dict)
    for slice_id in annotations:
        case, day, number = (int(text) for text in ID_PATTERN.fullmatch(slice_id).groups())  # type: ignore[union-attr]
        slices[scan_name(case, day)][number] = slice_id
    scans = {}
    for name, ids in sorted(slices.items()):
        facts = find_facts(min(ids.values()), label_file)
        volume = table_volume(name, files.table, {n: grids[i] for n, i in ids.items()}, facts)
        names = tuple(organ for organ in label_file.labels.names if organ not in facts.unknown)
        read = partial(read_table_masks, annotations, ids, volume)
        scans[name] = StructureSet(volume, "kaggle", (files.table,), names, read)
    return Side(files.path, scans)


def table_volume(name: str, table: Path, grids: Mapping[int, SliceGrid], facts: ScanFacts) -> Volume:
    """Return the grid of a scan of a CSV. Its first voxel lies at 0, because a CSV does not say where it lies."""
    if len(set(grids.values())) > 1:
        raise InputError(f"{table}: expected slices of one size and spacing in {name}, got several; correct the sizes")
    grid = grids[min(grids)]
    assert grid.pixel_spacing is not None
    height_mm, width_mm = grid.pixel_spacing
    affine = make_training_affine((facts.slice_spacing_mm, height_mm, width_mm))
    return Volume(name, table, (grid.width, grid.height, max(grids) - min(grids) + 1), affine)


def read_table_masks(
    annotations: Annotations, ids: Mapping[int, str], volume: Volume, names: Sequence[str]
) -> np.ndarray:
    """Read the masks of organs from a CSV, see `StructureSet.read`.

    Args:
        annotations: The rows of the CSV.
        ids: The ids of the slices of the scan, by their numbers.
        volume: Its grid.
        names: The organs.
    """
    width, height, _ = volume.shape
    masks = np.zeros((len(names), *volume.shape), dtype=bool)
    for number, slice_id in ids.items():
        for index, organ in enumerate(names):
            try:
                if rle := annotations[slice_id][organ].rle:
                    masks[index, :, :, number - min(ids)] = decode(rle, height, width).T
            except RleError as error:
                raise InputError(f"{volume.path}: {slice_id} {organ}: {error}") from error
    return masks


def read_label_maps(files: Files, label_names: Mapping[str, Values] | None) -> Side:
    """Read NIfTI label maps: one file per scan, or one folder `segmentations` per scan with a file per structure."""
    root = files.path if files.path.is_dir() else files.path.parent
    found = FoundStructures()
    drawings = list_drawings(files.nifti, root)
    named = name_values(list(drawings.values()), label_names, root, True, found)
    names = {drawing.image: name for name, drawing in drawings.items()}
    scans = {}
    for drawing in named:
        name = names[drawing.image]
        try:
            scans[name] = open_structures(open_volume(drawing.image, name), drawing)
        except InputError as error:
            found.problems[name] = str(error)
    if found.problems:
        raise InputError(join_problems(found.problems.values()))
    return Side(files.path, scans, found.remarks)


def list_drawings(paths: Sequence[Path], root: Path) -> dict[str, Drawing]:
    """Return the label maps of each scan by the name of the scan. Images that lie beside them are passed over.

    Raises:
        InputError: If two label maps belong to one scan.
    """
    nnunet = [path for path in paths if path.parent.name in ("labelsTr", "labelsTs")]
    folders = [path for path in paths if path.parent.name == "segmentations"]
    bids = [path for path in paths if parse_bids(path).get("suffix") in BIDS_LABELS]
    drawings: dict[str, Drawing] = {}
    if folders:
        by_folder: dict[Path, list[Path]] = defaultdict(list)
        for path in folders:
            by_folder[path.parent.parent].append(path)
        for folder, own in by_folder.items():
            name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
            sources = tuple(LabelSource(path, {strip_ending(path.name): ()}) for path in own)
            drawings[name] = Drawing(own[0], sources)
        return drawings
    if bids:
        return list_bids(bids, root)
    for path in nnunet or paths:
        name = strip_ending(path.name) if nnunet else nifti_scan_name(path, root)
        if name in drawings:
            raise InputError(
                f"{path}: {drawings[name].image} is of the scan {name}, too; leave one label map for each scan"
            )
        table = path.parent.parent / "dataset.json"
        names = read_dataset_json(table)[0] if nnunet and table.is_file() else None
        drawings[name] = Drawing(path, (LabelSource(path, names),))
    return drawings


def list_bids(paths: Sequence[Path], root: Path) -> dict[str, Drawing]:
    """Return the label maps of each scan of BIDS by its name: one `dseg`, or a `mask` for each structure.

    Raises:
        InputError: If two label maps belong to one scan, or a table of names cannot be read.
    """
    drawings: dict[str, Drawing] = {}
    for path in paths:
        name, entities = name_bids(path), parse_bids(path)
        source = open_bids_labels(path, entities, root)
        own = drawings.setdefault(name, Drawing(path, ()))
        if own.sources and "dseg" in (entities["suffix"], parse_bids(own.image)["suffix"]):
            raise InputError(f"{path}: {own.image} is of the scan {name}, too; leave one label map for each scan")
        drawings[name] = replace(own, sources=(*own.sources, source))
    return drawings


def name_bids(path: Path) -> str:
    """Return the name of the scan of a label map of BIDS.

    Example:
        >>> name_bids(Path("sub-01_ses-2_desc-manual_dseg.nii.gz"))
        'sub-01_ses-2'
    """
    left_out = (*BIDS_DERIVED, "suffix")
    return "_".join(f"{key}-{value}" for key, value in parse_bids(path).items() if key not in left_out)


def read_dicom(files: Files, series: FoundSeries, is_truth: bool) -> Side:
    """Read structure sets and segmentations.

    A program may have written a prediction as both. Its segmentation has every voxel, and its contours are rounded.
    What people drew is another matter: of several, the newest approved one is the truth, whatever its kind.

    Raises:
        InputError: If one cannot be used, if a scan has several and none is the newest, or if there is none.
    """
    found = find_dicom_structures(files.dicom, series, alone=True, predicted=not is_truth)
    structures, remarks = found.structures, list(found.remarks)
    if not is_truth:
        segmented = {id(one.volume) for one in structures if one.kind == "seg"}
        structures = [one for one in structures if one.kind == "seg" or id(one.volume) not in segmented]
        if left := len(found.structures) - len(structures):
            remarks.append(f"{left} RTSTRUCT left out, because there is a SEG of the same scan")
    chosen = choose_structures(structures)
    problems = [*found.problems.values(), *chosen.problems.values()]
    if problems:
        raise InputError(join_problems(problems))
    if not chosen.structures:
        raise InputError(f"{files.path}: has DICOM files, but no SEG and no RTSTRUCT; name the folder that has them")
    names = Counter(one.volume.name for one in chosen.structures)
    if twice := [name for name, number in names.items() if number > 1]:
        raise InputError(
            f"{files.path}: {list_some(twice)} has several segmentations; leave one for each scan, or name the folder "
            f"with the series by --images"
        )
    scans = {one.volume.name: one for one in chosen.structures}
    return Side(files.path, scans, [*remarks, *chosen.remarks, *count_notes(scans.values())])


def count_notes(structures: Iterable[StructureSet]) -> list[str]:
    """Return the notes of structure sets, each once, with the number of scans that have it."""
    counts = Counter(note for one in structures for note in one.notes)
    return [f"{note} ({number} scan{'s' * (number > 1)})" for note, number in counts.items()]


def find_person(name: str, structures: StructureSet) -> tuple[str, bool]:
    """Return what tells the patients of a cohort apart, and whether it is known or only the name of the scan."""
    if structures.kind in ("rtstruct", "seg"):
        patient = read_patient(structures)
        return (patient, True) if patient else (name, False)
    patient, _ = find_patient(name)
    return patient, patient != name or bool(re.fullmatch(r"case\d+|sub-[A-Za-z0-9]+", name))


def read_patient(structures: StructureSet) -> str:
    """Return the number of the patient of a DICOM file; empty if it was removed."""
    from gi_segmentation.formats.dicom.files import read_dataset
    from gi_segmentation.formats.dicom.header import hush_pydicom
    from gi_segmentation.formats.dicom.kinds import read_text

    with hush_pydicom():
        return read_text(read_dataset(structures.paths[0], stop_before_pixels=True), "PatientID")
