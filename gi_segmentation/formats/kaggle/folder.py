"""Find the scans of a folder in Kaggle's layout: its slice images, and their annotations in `train.csv`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from gi_segmentation.errors import InputError
from gi_segmentation.files import FoundFiles, find_files, is_hidden
from gi_segmentation.formats.kaggle.annotations import Annotation, read_annotations
from gi_segmentation.formats.kaggle.label_file import LABEL_FILE, LabelFile, ScanFacts, read_label_file
from gi_segmentation.formats.kaggle.names import (
    FOLDER_PATTERN,
    SCAN_PATTERN,
    KaggleDataError,
    SliceFile,
    parse_slice_path,
    scan_folder,
)
from gi_segmentation.labels import GI_TRACT, LabelSet

# Scans with faulty images or annotations, according to the competition's hosts (data tab and its discussion).
FAULTY_SCANS = frozenset(
    {
        "case7_day0",
        "case9_day27",
        "case13_day0",
        "case34_day20",
        "case43_day18",
        "case43_day26",
        "case61_day14",
        "case81_day30",
        "case83_day11",
        "case124_day19",
        "case138_day0",
        "case144_day15",
    }
)


@dataclass(frozen=True)
class KaggleScan:
    """One volume.

    Attributes:
        name: For example `case123_day20`.
        case: Number of the patient.
        slices: Sorted by number.
        annotations: By slice id and organ; None if the split has no annotations.
        csv_path: The file of the annotations, which messages name.
        labels: The organs of the whole folder.
        facts: What `labels.json` says of it; None in a folder without this file.
        fold: Number of the fold of its patient; None before the patients are divided.
    """

    name: str
    case: int
    slices: list[SliceFile]
    annotations: dict[str, dict[str, Annotation]] | None = field(default=None, repr=False)
    csv_path: Path = Path("train.csv")
    labels: LabelSet = GI_TRACT
    facts: ScanFacts | None = None
    fold: int | None = None

    @property
    def drawn(self) -> tuple[str, ...]:
        """The organs that somebody has drawn in it, if it has annotations. On some slices they may be empty."""
        unknown = self.facts.unknown if self.facts else ()
        return tuple(organ for organ in self.labels.names if organ not in unknown)


def find_slices(folder: Path) -> tuple[list[SliceFile], list[str]]:
    """List the slice images below a folder.

    Args:
        folder: Any folder above the slices: `train` of a Kaggle folder, or the folder of one scan.

    Returns:
        The slices, sorted by case, day and number. Then the problems, see `parse_slices`, and links to folders that
        are missing.

    Raises:
        KaggleDataError: If a folder cannot be read.
    """
    if not folder.exists() and not folder.is_symlink():
        return [], []
    try:
        found = find_files(folder) if folder.exists() else FoundFiles([], [folder], [])
    except InputError as error:
        raise KaggleDataError([str(error)]) from error
    slices, problems = parse_slices(list_pngs(found))
    return slices, [*problems.values(), *find_lost(found.broken).values()]


def list_pngs(found: FoundFiles) -> list[Path]:
    """Return the PNGs of a folder, sorted.

    A link with the name of a scan is a scan, even if its folder is also there under another name. A broken link to a
    PNG is one of them, because it stands for a slice. Reading it raises an error.
    """
    files = found.files + found.broken
    for folder in found.repeated:
        if SCAN_PATTERN.fullmatch(scan_folder(folder / "slice.png")):
            files += [path for path in (*folder.glob("*"), *folder.glob("scans/*")) if not is_hidden(path)]
    return sorted(path for path in files if path.suffix == ".png")


def find_lost(broken: Sequence[Path]) -> dict[Path, str]:
    """Return the problems of the broken links that have the name of a folder with slices."""
    return {
        path: f"{path}: a link to {path.readlink()}, which is missing; correct the link or remove it"
        for path in broken
        if FOLDER_PATTERN.fullmatch(path.name)
    }


def parse_slices(paths: Iterable[Path]) -> tuple[list[SliceFile], dict[Path, str]]:
    """Read the paths of slice images, in any order.

    Returns:
        The slices, sorted by case, day and number. Then the problems by file: each PNG whose path does not describe a
        slice, and each PNG with the id of another one.
    """
    slices: dict[str, SliceFile] = {}
    misnamed: dict[Path, str] = {}
    copies: dict[Path, str] = {}
    # By links to its folder, one file can have several paths. It is one slice, under a path that is right.
    resolve = cache(Path.resolve)
    for path in sorted(paths):
        try:
            parsed = parse_slice_path(path)
        except KaggleDataError as error:
            misnamed[path] = str(error)
            continue
        # Two files can have one id, because the id has neither size nor spacing.
        first = slices.setdefault(parsed.id, parsed).path
        if path != first and (path.name, resolve(path.parent)) != (first.name, resolve(first.parent)):
            copies[path] = f"{path}: the same slice as {first}; remove one of them"
    if misnamed:
        right = {(one.path.name, resolve(one.path.parent)) for one in slices.values()}
        misnamed = {path: text for path, text in misnamed.items() if (path.name, resolve(path.parent)) not in right}
    problems = dict(sorted((misnamed | copies).items()))
    # Sorted by numbers: as text, case10 would come before case2.
    return sorted(slices.values(), key=lambda item: (item.case, item.day, item.number)), problems


def list_splits(kaggle_dir: Path) -> list[str]:
    """Return the splits of a Kaggle folder: always `train`, and `test` if that folder has slices or problems."""
    return ["train", "test"] if any(find_slices(kaggle_dir / "test")) else ["train"]


def group_scans(
    slices: list[SliceFile],
    annotations: dict[str, dict[str, Annotation]] | None,
    label_file: LabelFile | None = None,
    csv_path: Path = Path("train.csv"),
) -> list[KaggleScan]:
    """Group sorted slices into scans, and add the annotations of their slices, and what `labels.json` says of them."""
    labels = label_file.labels if label_file else GI_TRACT
    by_scan: dict[str, list[SliceFile]] = defaultdict(list)
    for slice_file in slices:
        by_scan[slice_file.scan].append(slice_file)
    return [
        KaggleScan(
            name=name,
            case=members[0].case,
            slices=members,
            annotations=None if annotations is None else {s.id: annotations.get(s.id, {}) for s in members},
            csv_path=csv_path,
            labels=labels,
            facts=label_file.scans.get(name) if label_file else None,
        )
        for name, members in by_scan.items()
    ]


def read_labels(kaggle_dir: Path) -> LabelSet:
    """Return the labels of a folder in Kaggle's layout: those of its `labels.json`, or else Kaggle's three organs.

    Raises:
        KaggleDataError: If there is a `labels.json` with problems.
    """
    label_file = read_label_file(kaggle_dir)
    return label_file.labels if label_file else GI_TRACT


def read_kaggle_scans(kaggle_dir: Path, split: str = "train") -> tuple[list[KaggleScan], list[str]]:
    """List the scans of a folder in Kaggle's layout and their annotations.

    Args:
        kaggle_dir: Folder with `train.csv` and `train/`, and with `labels.json` if the data is not Kaggle's.
        split: `train`, whose slices need annotations, or `test`, whose slices have none.

    Returns:
        The scans, sorted by case and day, and the problems of the CSV and of the file names. Pixels are not read. If
        the CSV is not readable, the scans have no annotations.

    Raises:
        KaggleDataError: If the folder does not exist, or its `labels.json` has problems.
    """
    folder = kaggle_dir / split
    if not kaggle_dir.is_dir():
        raise KaggleDataError([f"{kaggle_dir}: no such folder; expected the unpacked Kaggle download"])
    label_file = read_label_file(kaggle_dir)
    labels = label_file.labels if label_file else GI_TRACT
    csv_path = kaggle_dir / "train.csv"
    annotations: dict[str, dict[str, Annotation]] | None = None
    problems: list[str] = []
    if split == "train":
        try:
            label_path = kaggle_dir / LABEL_FILE if label_file else None
            annotations, problems = read_annotations(csv_path, labels.names, label_path=label_path)
        except KaggleDataError as error:
            # The images are checked all the same: one run must report all problems.
            problems = error.problems
    slices, path_problems = find_slices(folder)
    problems += path_problems
    if not slices and not path_problems:
        problems.append(
            f"{folder}: no slices; expected caseN/caseN_dayN/scans/slice_*.png below it; unpack them there"
        )
    elif annotations is not None:
        problems += find_unmatched_slices(slices, annotations, folder, csv_path)
    scans = group_scans(slices, annotations, label_file, csv_path)
    if label_file:
        problems += find_unnamed_scans(scans, label_file, kaggle_dir, split)
        checked = [check_rows(scan) for scan in scans]
        scans = [scan for scan, _ in checked]
        problems += [problem for _, found in checked for problem in found]
    return scans, problems


def find_unnamed_scans(scans: Sequence[KaggleScan], label_file: LabelFile, kaggle_dir: Path, split: str) -> list[str]:
    """Return the problems of scans that `labels.json` does not name, and of scans that only it has."""
    path = kaggle_dir / LABEL_FILE
    problems = [f"{path}: nothing about {scan.name} of {split}; add it" for scan in scans if scan.facts is None]
    if split == "train":
        there = {scan.name for scan in scans} | {one.scan for one in find_slices(kaggle_dir / "test")[0]}
        problems += [
            f"{path}: no slices of {name} under {kaggle_dir}; add them or remove the scan from the file"
            for name in label_file.scans
            if name not in there
        ]
    return problems


def check_rows(scan: KaggleScan) -> tuple[KaggleScan, list[str]]:
    """Compare the rows of a scan with the organs that `labels.json` calls unknown in it.

    Returns:
        The scan, and the problems: unknown organs that have rows, and other organs that have none on any slice. The
        latter are unknown in the scan that is returned, so that the same problem is not found on each slice again.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for organs in (scan.annotations or {}).values():
        for organ, annotation in organs.items():
            rows[organ].append(annotation.row)
    # Without any row, the problem is another one, and it was found before.
    missing = [organ for organ in scan.drawn if organ not in rows] if rows else []
    problems = [
        f"{scan.csv_path}: no row of {organ} on any slice of {scan.name}; add a row for each slice, or add {organ} to "
        f"its `unknown` in {LABEL_FILE}"
        for organ in missing
    ]
    problems += [
        f"{scan.csv_path}, row {min(rows[organ])}: {LABEL_FILE} calls {organ} unknown in {scan.name}, but "
        f"{len(rows[organ])} of its {len(scan.slices)} slices have a row of it; remove these rows, or {organ} from "
        f"its `unknown`"
        for organ in scan.labels.names
        if organ in rows and organ not in scan.drawn
    ]
    facts = scan.facts or ScanFacts()
    return replace(scan, facts=replace(facts, unknown=(*facts.unknown, *missing))), problems


def find_unmatched_slices(
    slices: list[SliceFile], annotations: dict[str, dict[str, Annotation]], folder: Path, csv_path: Path
) -> list[str]:
    """Return the problems of slices with an image but no rows, and of slices with rows but no image."""
    found = {slice_file.id for slice_file in slices}
    problems = [
        f"{csv_path}, row {min(annotation.row for annotation in organs.values())}: "
        f"no PNG for {slice_id} under {folder}; add the file or remove its rows"
        for slice_id, organs in annotations.items()
        if slice_id not in found
    ]
    problems += [
        f"{s.path}: no rows for {s.id} in {csv_path}; add them or remove the file"
        for s in slices
        if s.id not in annotations
    ]
    return problems
