"""Find label maps in NIfTI files, and the scans that they were drawn on.

Four arrangements are recognised by the names of files and folders: nnU-Net and the Medical Segmentation Decathlon
(`imagesTr`, `labelsTr`), TotalSegmentator (`segmentations`), BIDS (`sub-01_..._dseg`), and pairs of patterns.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm.auto import tqdm

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.label_maps import Drawing, LabelSource, find_values, is_on_grid, open_structures
from gi_segmentation.formats.label_names import (
    Values,
    find_beside,
    read_dataset_json,
    read_description,
    read_label_table,
)
from gi_segmentation.formats.nifti import nifti_scan_name, open_volume, strip_ending
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume

# With fewer scans, their headers are read at once.
MANY = 20
# How the names of label maps end in BIDS, and what is no scan.
BIDS_LABELS = ("dseg", "mask")
BIDS_OTHERS = (*BIDS_LABELS, "probseg")
# Parts of a BIDS name that say how something was made, and not from what.
BIDS_DERIVED = ("desc", "label", "space", "seg", "atlas", "res", "den")
# Names that tell the patient and the day.
PATIENT_NAMES = re.compile(r"(?:.*/)?(sub-[A-Za-z0-9]+|case\d+)(?:[_/](?:.*[_/])?(ses-[A-Za-z0-9]+|day\d+))?")


@dataclass
class FoundStructures:
    """What was found in NIfTI files.

    Attributes:
        sets: The label maps with their scans.
        problems: Why others cannot be used, by the names of their scans.
        remarks: What was recognised, assumed and passed over: lines for the user.
        unused: The NIfTI files that belong to nothing.
    """

    sets: list[StructureSet] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)


def find_nifti_structures(
    paths: Sequence[Path],
    root: Path,
    patterns: tuple[str, str] | None = None,
    label_names: Mapping[str, Values] | None = None,
    channel: str | None = None,
) -> FoundStructures:
    """Find the label maps of NIfTI files, and their scans.

    Args:
        paths: The NIfTI files.
        root: The folder that their names start from.
        patterns: Shell patterns of the scans and of the label maps, below `root`; None: what is recognised.
        label_names: Values by names; None: as a file beside the label maps, or their header, says.
        channel: The channel of nnU-Net to take, for example `0001`; None: `0000`.

    Raises:
        InputError: If a pattern finds nothing, or a file of names cannot be used.
    """
    found = FoundStructures()
    if patterns is not None:
        drawings = pair_by_patterns(paths, root, patterns, found)
    else:
        drawings = [
            *pair_nnunet(paths, root, channel, found),
            *pair_totalsegmentator(paths, root, found),
            *pair_bids(paths, root, found),
        ]
    drawings = name_values(drawings, label_names, root, patterns is not None, found)
    volumes: dict[Path, Volume] = {}
    for drawing in tqdm(drawings, desc="Opening label maps", unit="scan", disable=len(drawings) < MANY):
        name = nifti_scan_name(drawing.image, root)
        try:
            if drawing.image not in volumes:
                volumes[drawing.image] = open_volume(drawing.image, name)
            found.sets.append(open_structures(volumes[drawing.image], drawing))
        except InputError as error:
            found.problems.setdefault(name, str(error))
    used = {one.image for one in drawings} | {source.path for one in drawings for source in one.sources}
    found.unused = sorted({*paths} - used)
    return found


def find_patient(name: str) -> tuple[str, str]:
    """Return the patient and the day that the name of a scan tells. If it tells neither, each scan is a patient.

    Example:
        >>> find_patient("sub-01/ses-02/anat/sub-01_ses-02_T2w"), find_patient("imagesTr/case3_day20_0000")
        (('sub-01', 'ses-02'), ('case3', 'day20'))
        >>> find_patient("imagesTr/liver_7_0000")
        ('imagesTr/liver_7_0000', '')
    """
    match = PATIENT_NAMES.match(name)
    return (match[1], match[2] or "") if match else (name, "")


def pair_nnunet(paths: Sequence[Path], root: Path, channel: str | None, found: FoundStructures) -> list[Drawing]:
    """Pair the files of nnU-Net and of the Decathlon: `labelsTr/ID.nii.gz` with `imagesTr/ID_0000.nii.gz` or `ID`."""
    images = {(path.parent, strip_ending(path.name)): path for path in paths}
    channels: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for (folder, stem), path in images.items():
        if match := re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL):
            channels[folder, match[1]][match[2]] = path
    drawings, folders = [], set()
    for path in paths:
        if path.parent.name not in ("labelsTr", "labelsTs"):
            continue
        folder, stem = path.parent.with_name(path.parent.name.replace("labels", "images")), strip_ending(path.name)
        own = channels[folder, stem]
        image = own.get(channel or "0000") if own else images.get((folder, stem))
        if image is None:
            there = f"the channels {', '.join(sorted(own))}" if own else "nothing"
            wanted = f"{stem}_{channel or '0000'}" if own else stem
            found.problems[nifti_scan_name(path, root)] = (
                f"{path}: expected its scan {wanted} in {folder.name}, got {there}; put it there, or move this away"
            )
            continue
        table = path.parent.parent / "dataset.json"
        said = read_dataset_json(table) if table.exists() else None
        if path.parent not in folders:
            found.remarks += [f"nnU-Net or Decathlon in {path.parent.parent}", *(said.remarks if said else ())]
        if path.parent not in folders and len(own) > 1:
            listed = [f"{one} {said.channels.get(int(one), '') if said else ''}".strip() for one in sorted(own)]
            found.remarks.append(
                f"{folder}: has the channels {', '.join(listed)}; {channel or '0000'} is used, --channel takes another"
            )
        folders.add(path.parent)
        source = LabelSource(path, said.names, allowed=said.allowed) if said else LabelSource(path, None)
        drawings.append(Drawing(image, (source,), path.parent.name))
    return drawings


def pair_totalsegmentator(paths: Sequence[Path], root: Path, found: FoundStructures) -> list[Drawing]:
    """Pair the files of TotalSegmentator: all of `ID/segmentations` with the one scan in `ID`."""
    masks: dict[Path, list[Path]] = defaultdict(list)
    beside: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        (masks[path.parent.parent] if path.parent.name == "segmentations" else beside[path.parent]).append(path)
    drawings = []
    for folder, own in masks.items():
        named = [path for path in beside[folder] if strip_ending(path.name) in ("mri", "mr", "ct")]
        images = named or beside[folder]
        if len(images) != 1:
            there = list_some([path.name for path in images]) or "none"
            found.problems[folder.relative_to(root).as_posix()] = (
                f"{folder}: expected one scan beside `segmentations`, such as mri.nii.gz, got {there}; leave one there"
            )
            continue
        names = [strip_ending(path.name) for path in own]
        sources = tuple(LabelSource(path, {name: ()}) for path, name in zip(own, names, strict=True))
        drawings.append(Drawing(images[0], sources, "segmentations"))
    if masks:
        found.remarks.append(f"TotalSegmentator: {len(masks)} folders with `segmentations`")
    return drawings


def pair_bids(paths: Sequence[Path], root: Path, found: FoundStructures) -> list[Drawing]:
    """Pair the files of BIDS: `*_dseg` and `*_mask` with the scan that has the same entities."""
    entities = {path: one for path in paths if (one := parse_bids(path))}
    images = {path: one for path, one in entities.items() if one["suffix"] not in BIDS_OTHERS}
    groups: dict[tuple[Path, str], list[LabelSource]] = defaultdict(list)
    for path, own in entities.items():
        if own["suffix"] not in BIDS_LABELS:
            continue
        try:
            image = find_bids_image(path, own, images)
            groups[image, find_pipeline(path, root)].append(open_bids_labels(path, own, root))
        except InputError as error:
            found.problems[nifti_scan_name(path, root)] = str(error)
    if groups:
        found.remarks.append(f"BIDS: label maps of {len({image for image, _ in groups})} scans")
    return [Drawing(image, tuple(own), pipeline) for (image, pipeline), own in groups.items()]


def parse_bids(path: Path) -> dict[str, str]:
    """Return the entities of a BIDS name and its suffix; nothing if it is none.

    Example:
        >>> parse_bids(Path("sub-01_ses-2_T2w.nii.gz"))
        {'sub': '01', 'ses': '2', 'suffix': 'T2w'}
        >>> parse_bids(Path("liver.nii.gz"))
        {}
    """
    entities = parse_entities(strip_ending(path.name))
    return entities if path.name.startswith("sub-") else {}


def parse_entities(stem: str) -> dict[str, str]:
    """Return the entities and the suffix of a name of BIDS, also if it has no subject; nothing if it is none.

    Example:
        >>> parse_entities("desc-manual_dseg"), parse_entities("dseg")
        ({'desc': 'manual', 'suffix': 'dseg'}, {'suffix': 'dseg'})
    """
    *pairs, suffix = stem.split("_")
    if not all("-" in pair for pair in pairs):
        return {}
    return dict(pair.split("-", 1) for pair in pairs) | {"suffix": suffix}


def open_bids_labels(path: Path, entities: Mapping[str, str], root: Path) -> LabelSource:
    """Return a label map or the mask of a structure of BIDS, with its names.

    Raises:
        InputError: If the table of the names cannot be read.
    """
    if entities["suffix"] != "dseg":
        return LabelSource(path, {entities.get("label") or entities.get("desc") or "mask": ()})
    table = find_bids_table(path, entities, root)
    return LabelSource(path, read_label_table(table) if table else None)


def find_bids_image(path: Path, entities: Mapping[str, str], images: Mapping[Path, Mapping[str, str]]) -> Path:
    """Return the scan that a label map of BIDS was drawn on.

    Raises:
        InputError: If there is none, or more than one fits.
    """
    wanted = {key: value for key, value in entities.items() if key not in (*BIDS_DERIVED, "suffix")}

    def fits(image: Mapping[str, str]) -> bool:
        return all(image.get(key) == value for key, value in wanted.items()) and image.get("ses") == wanted.get("ses")

    candidates = [one for one, own in images.items() if fits(own)]
    exact = [one for one in candidates if set(images[one]) - {*BIDS_DERIVED, "suffix"} == set(wanted)]
    candidates = exact or candidates
    if len(candidates) > 1:
        candidates = [one for one in candidates if is_on_grid(one, path)] or candidates
    raw = [one for one in candidates if "derivatives" not in one.parts]
    candidates = raw if len(raw) == 1 else candidates
    if len(candidates) != 1:
        there = list_some([one.name for one in candidates]) or "none"
        raise InputError(
            f"{path}: expected one scan with its subject, session and other entities on its grid, got {there}; pair "
            f"them by --images and --labels"
        )
    return candidates[0]


def find_bids_table(path: Path, entities: Mapping[str, str], root: Path) -> Path | None:
    """Return the `dseg.tsv` with the names of a label map: the nearest one upwards, as BIDS inherits them."""
    for folder in path.parents:
        fitting = []
        for table in folder.glob("*dseg.tsv"):
            own = parse_entities(table.stem)
            if own and all(entities.get(key) == value for key, value in own.items()):
                fitting.append((len(own), table))
        if fitting:
            return max(fitting)[1]
        if folder == root:
            break
    return None


def find_pipeline(path: Path, root: Path) -> str:
    """Return the name of the pipeline that made a label map: the folder below `derivatives`."""
    parts = path.relative_to(root).parts
    return parts[parts.index("derivatives") + 1] if "derivatives" in parts else ""


def pair_by_patterns(
    paths: Sequence[Path], root: Path, patterns: tuple[str, str], found: FoundStructures
) -> list[Drawing]:
    """Pair files by two patterns: what their `*` stand for must be the same.

    If the pattern of the label maps has one `*` more, its text is the name of a structure, and all these files belong
    to one scan.

    Raises:
        InputError: If a pattern finds nothing, or both cannot be paired.
    """
    images = match_pattern(paths, root, patterns[0], "--images")
    # A wide pattern of label maps may fit to the scans, too.
    others = [path for path in paths if path not in images.values()]
    labels = match_pattern(others, root, patterns[1], "--labels")
    length, more = len(next(iter(images))), len(next(iter(labels)))
    if not length <= more <= length + 1:
        raise InputError(
            f"--labels {patterns[1]}: expected as many * as in --images {patterns[0]}, or one more for the names of "
            f"structures, got {more}; write both patterns with the same *"
        )
    groups: dict[tuple[str, ...], list[LabelSource]] = defaultdict(list)
    for texts, label in labels.items():
        names: Mapping[str, Values] | None = {texts[-1]: ()} if more > length else None
        if texts[:length] in images:
            groups[texts[:length]].append(LabelSource(label, names))
        else:
            found.problems[nifti_scan_name(label, root)] = (
                f"{label}: --images {patterns[0]} has no scan for it; put it there, or move this away"
            )
    if not groups:
        raise InputError(
            f"--images {patterns[0]} and --labels {patterns[1]}: no scan and label map agree in what * stands for, "
            f"such as {'/'.join(next(iter(images)))} and {'/'.join(next(iter(labels)))}; correct the patterns"
        )
    found.remarks.append(f"pairs by --images and --labels: {len(groups)}")
    return [Drawing(images[texts], tuple(own)) for texts, own in groups.items()]


def match_pattern(paths: Sequence[Path], root: Path, pattern: str, flag: str) -> dict[tuple[str, ...], Path]:
    """Return the files that a pattern matches, by the texts that its `*` stand for.

    Raises:
        InputError: If there is none, or if two files have the same texts.
    """
    form = translate_pattern(pattern)
    matched: dict[tuple[str, ...], Path] = {}
    for path in paths:
        if match := form.fullmatch(path.relative_to(root).as_posix()):
            texts = match.groups()
            if texts in matched:
                raise InputError(f"{flag} {pattern}: matches {matched[texts]} and {path} alike; write it more exactly")
            matched[texts] = path
    if not matched:
        names = list_some([path.relative_to(root).as_posix() for path in paths]) or "none"
        raise InputError(f"{flag} {pattern}: no NIfTI file below {root} has such a path; there are {names}")
    return matched


def translate_pattern(pattern: str) -> re.Pattern[str]:
    """Return a shell pattern as a regular expression with a group per `*`. A `*` ends at the next folder.

    Example:
        >>> translate_pattern("*/t?.nii.gz").fullmatch("P1/t2.nii.gz").groups()
        ('P1',)
        >>> translate_pattern("*/t2.nii.gz").fullmatch("P1/more/t2.nii.gz") is None
        True
    """
    signs = {"*": "([^/]*)", "?": "[^/]"}
    return re.compile("".join(signs.get(sign) or re.escape(sign) for sign in pattern.removeprefix("./")))


def name_values(
    drawings: Sequence[Drawing],
    label_names: Mapping[str, Values] | None,
    root: Path,
    asked: bool,
    found: FoundStructures,
) -> list[Drawing]:
    """Give names to the values of label maps that have none, or to all values if the user says their names.

    The names are those of the user, of a file beside them, or of the header. Any other value is `label_N`. All label
    maps without names of their own are of one kind: a value that is not in one of them is an empty structure there.
    """

    def is_unnamed(source: LabelSource) -> bool:
        # A file of one structure has no values to name.
        return source.names is None or (label_names is not None and any(source.names.values()))

    unnamed = [source.path for one in drawings for source in one.sources if is_unnamed(source)]
    if not unnamed:
        return list(drawings)
    table, origin = (label_names, "--label_names") if label_names else find_beside(root) if asked else (None, "")
    if table is None and (table := read_description(unnamed[0])):
        origin = f"the header of {unnamed[0].name}"
    seen: set[int] = set()
    broken: dict[Path, str] = {}
    for path in tqdm(unnamed, desc="Looking for labels", unit="file"):
        try:
            seen |= find_values(path)
        except InputError as error:
            # It is reported with its scan.
            broken[path] = str(error)
    named = {value for values in (table or {}).values() for value in values}
    names = {**(table or {}), **{f"label_{value}": (value,) for value in sorted(seen - named - {0})}}
    if table:
        found.remarks.append(f"names of labels from {origin}: {', '.join(table)}")
    if unknown := sorted(seen - named - {0}):
        found.remarks.append(
            f"labels without a name: {list_some([str(value) for value in unknown], 10)}; --label_names gives names"
        )
    for one in drawings:
        for source in one.sources:
            if source.path in broken:
                found.problems.setdefault(nifti_scan_name(one.image, root), broken[source.path])
    kept = [one for one in drawings if not any(source.path in broken for source in one.sources)]
    return [
        replace(
            one,
            sources=tuple(
                replace(source, names=names, allowed=frozenset()) if is_unnamed(source) else source
                for source in one.sources
            ),
        )
        for one in kept
    ]
