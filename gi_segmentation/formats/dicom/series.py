"""Find the scans in DICOM files of any order: MR and CT series, with a file per slice or with all frames in one."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gi_segmentation.errors import InputError, reading
from gi_segmentation.formats.archives import safe_name
from gi_segmentation.formats.dicom.files import (
    DICOM_SUFFIXES,
    Frame,
    describe_series,
    find_damage,
    is_dicom,
    is_scan,
    read_dataset,
    read_file_header,
    read_frames,
)
from gi_segmentation.formats.dicom.geometry import build_volume
from gi_segmentation.formats.dicom.header import hush_pydicom
from gi_segmentation.formats.dicom.kinds import KIND_ATTRIBUTES, read_text
from gi_segmentation.formats.dicom.sorting import find_localizer, group_frames, is_stack, split_series
from gi_segmentation.formats.volumes import Volume

# Images of a screen, or of a program, with many frames.
CAPTURED_FRAMES = frozenset(f"1.2.840.10008.5.1.4.1.1.7.{number}" for number in (2, 3))
MAX_UID_LENGTH = 64
UID = re.compile(rf"[0-9.]{{1,{MAX_UID_LENGTH}}}", re.ASCII)


class FoundSeries(NamedTuple):
    """What was found in DICOM files.

    Attributes:
        volumes: The scans.
        problems: Why series are no scans, by their names.
        remarks: What was passed over, and why.
        descriptions: Modality, number and description of each series, by its name. The name of a scan that is a part
            of a series begins with it.
    """

    volumes: list[Volume]
    problems: dict[str, str]
    remarks: list[str]
    descriptions: dict[str, str]


class Headers(NamedTuple):
    """What was read of DICOM files.

    Attributes:
        frames: The slices, by the UID of their series, or by their folder if the UIDs were removed.
        problems: Why series cannot be used, by the same keys.
        damaged: What is wrong with the files that may belong to any series.
        remarks: What was passed over, and why.
        descriptions: Modality, number and description of each series, by the same keys.
    """

    frames: dict[str, list[Frame]]
    problems: dict[str, str]
    damaged: dict[Path, str]
    remarks: list[str]
    descriptions: dict[str, str]


def find_series(paths: Iterable[Path], others: Iterable[Path] = ()) -> FoundSeries:
    """List the scans of DICOM files in any order. No pixel is read, except to tell copies.

    Localizers and files of other kinds are passed over.

    Args:
        paths: The DICOM files.
        others: All other files beside them, and broken links. One that looks like a slice may be the missing slice of
            a series, so it is an error of the series in its folder.
    """
    headers = read_headers(sorted(paths))
    problems = dict(headers.problems)
    damaged = headers.damaged | find_lost_slices(headers.frames, others)
    lonely = blame_damaged(damaged, headers.frames, problems)
    singles = join_single_slices({key: own for key, own in headers.frames.items() if key not in problems})
    problems |= find_split_scans(
        {key: own for key, own in headers.frames.items() if key not in problems.keys() | singles.joined}
    )
    names = name_series({*headers.frames, *problems, *singles.stacks, *singles.problems})
    descriptions = {names[key]: text for key, text in headers.descriptions.items() if key in names}
    named = {names[key]: text for key, text in problems.items()} | lonely
    found = FoundSeries([], named, headers.remarks, descriptions)
    for key in sorted(headers.frames.keys() - problems.keys() - singles.joined):
        add_scans(names[key], headers.frames[key], [], found)
    for folder, stacks in singles.stacks.items():
        for number, own in enumerate(stacks, start=1):
            remark = f"each of its {len(own)} slices has a SeriesInstanceUID of its own"
            add_scans(names[folder] + f"_{number}" * (len(stacks) > 1), own, [remark], found)
    for folder, problem in singles.problems.items():
        found.problems.setdefault(names[folder], problem)
    return found


def read_headers(paths: Iterable[Path]) -> Headers:
    """Read the headers of DICOM files."""
    headers = Headers(defaultdict(list), {}, {}, [], {})
    for path in paths:
        key = ""
        try:
            # The library reads an attribute when it is asked for it, so each step can meet a damaged one.
            with reading(path, "its header cannot be read", "copy or export it again"), hush_pydicom():
                header, missing = read_file_header(path)
                if not is_scan(path, header):
                    headers.remarks.extend(describe_captured(path, header))
                    continue
                key = series_key(path, header)
                headers.descriptions.setdefault(key, describe_series(header))
                if missing:
                    raise InputError(f"{path}: its pixels cannot be decoded ({missing}); copy or export it again")
                headers.frames[key].extend(read_frames(path, header))
        except InputError as error:
            if key:
                headers.problems.setdefault(key, str(error))
            # Without a UID, it may be a slice of any series in its folder.
            if key in ("", folder_key(path)):
                headers.damaged[path] = str(error)
    return headers


def describe_captured(path: Path, header: Any) -> Iterable[str]:
    """Yield a remark for a file whose frames may be slices, but at unknown places."""
    if str(header.get("SOPClassUID")) in CAPTURED_FRAMES and header.get("Modality") in ("MR", "CT"):
        count = read_text(header, "NumberOfFrames") or "1"
        yield f"{path}: passed over: a secondary capture with {count} frames, which do not say where they lie"


def folder_key(path: Path) -> str:
    """Return the key of a series whose UIDs were removed: its folder."""
    # The folder of a link, and not of its target: git-annex keeps each file in a folder of its own.
    return str(path.parent.resolve())


def series_key(path: Path, header: Any) -> str:
    """Return the UID of the series of a file. Without a UID, a folder is a series.

    Raises:
        InputError: If it is not a valid UID.
    """
    uid = str(header.get("SeriesInstanceUID") or "")
    # The output files are named by it, so a crafted UID must not lead out of the output folder.
    if len(uid) > MAX_UID_LENGTH:
        raise InputError(
            f"{path}: expected at most {MAX_UID_LENGTH} letters as SeriesInstanceUID, got {len(uid)}; export it again"
        )
    if uid and not UID.fullmatch(uid):
        raise InputError(f"{path}: expected digits and dots as SeriesInstanceUID, got {uid!r:.80}; export it again")
    return uid or folder_key(path)


def name_series(keys: Iterable[str]) -> dict[str, str]:
    """Name each series: by its UID, or by its folder. Folders of one name get the names of the folders around them.

    Example:
        >>> name_series(["1.2.3", "/in/A/T2", "/in/B/T2", "/in/B/T1"])
        {'1.2.3': '1.2.3', '/in/A/T2': 'A_T2', '/in/B/T2': 'B_T2', '/in/B/T1': 'T1'}
    """
    names = {key: key for key in keys}
    folders = [Path(key) for key in names if not UID.fullmatch(key)]
    for folder in folders:
        same = [one for one in folders if one.name == folder.name]
        count = 1
        while len({one.parts[-count:] for one in same}) < len(same):
            count += 1
        names[str(folder)] = safe_name("_".join(folder.parts[-count:]))
    return names


def find_lost_slices(frames: Mapping[str, Sequence[Frame]], others: Iterable[Path]) -> dict[Path, str]:
    """Find the files that are no DICOM files, and should be, by their names."""
    siblings: dict[Path, set[Path]] = defaultdict(set)
    for own in frames.values():
        for frame in own:
            siblings[frame.path.parent].add(frame.path)
    lost = {}
    for path in others:
        if may_be_slice(path, siblings.get(path.parent, set())):
            lost[path] = (
                f"{path}: {find_damage(path)}; it may be a slice of this series: copy it again, or move it away"
            )
    return lost


def may_be_slice(path: Path, siblings: Iterable[Path]) -> bool:
    """Tell by its name whether a file that is no DICOM file was meant to be a slice.

    Args:
        path: The file.
        siblings: The slices in its folder.
    """
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if suffixes & DICOM_SUFFIXES:
        # A download that broke off has an end such as `.part`. The whole file may be there, too.
        return path.suffix.lower() in DICOM_SUFFIXES or path.with_suffix("") not in siblings
    pattern = name_pattern(path)
    numbered = "#" in pattern and any(name_pattern(one) == pattern for one in siblings)
    return numbered or may_be_unnamed(path, siblings)


def name_pattern(path: Path) -> str:
    """Return a name without its numbers.

    Example:
        >>> name_pattern(Path("IM0016")), name_pattern(Path("1.2.840.113"))
        ('IM#', '#')
    """
    return re.sub(r"\d+(\.\d+)*", "#", path.name)


def may_be_unnamed(path: Path, siblings: Iterable[Path]) -> bool:
    """Tell whether a file without an end in its name is a slice that is empty or damaged, among others without one."""
    plain = not re.search(r"\.[A-Za-z]", path.name) and any(not one.suffix[1:].isalpha() for one in siblings)
    # Programs leave files with a word as their name, such as LICENSE and VERSION.
    word = path.name.isalpha() and len(path.name) > 3
    if not plain or word:
        return False
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError:
        return True
    return not start or b"\0" in start


def blame_damaged(
    damaged: Mapping[Path, str], frames: Mapping[str, Sequence[Frame]], problems: dict[str, str]
) -> dict[str, str]:
    """Add damaged files to the problems of all series that they may belong to.

    Returns:
        The problems of files that belong to no series, by the names of the files.
    """
    folders = {key: {frame.path.parent for frame in own} for key, own in frames.items()}
    used = set().union(*folders.values())
    lonely = {}
    for path, problem in damaged.items():
        blamed = [key for key, own in folders.items() if path.parent in own]
        if path.parent not in used:
            # Some archives have a folder for each file.
            blamed = [key for key, own in folders.items() if len(own) > 1 and is_among(path.parent, own)]
        own_key = folder_key(path)
        for key in blamed:
            problems.setdefault(key, problem)
        if blamed and own_key not in frames:
            problems.pop(own_key, None)
        elif not blamed and own_key not in problems:
            lonely[f"{safe_name(path.parent.name)}/{safe_name(path.name)}"] = problem
    return lonely


def is_among(folder: Path, folders: Iterable[Path]) -> bool:
    """Tell whether a folder lies beside folders that all lie in one."""
    return {one.parent for one in folders} == {folder.parent}


class SingleSlices(NamedTuple):
    """Series of one slice each that may be one series.

    Attributes:
        stacks: Those that fill a grid together, by the keys of their folders.
        problems: Why others are no scan together, by the keys of their folders.
        joined: The keys of all these series.
    """

    stacks: dict[str, list[list[Frame]]]
    problems: dict[str, str]
    joined: set[str]


def join_single_slices(series: Mapping[str, Sequence[Frame]]) -> SingleSlices:
    """Join series of one slice each. Some programs that remove the patient's data give each file UIDs of its own."""
    singles = SingleSlices(defaultdict(list), {}, set())
    alone = [own[0] for own in series.values() if len(own) == 1 and own[0].series_uid]
    numbers = Counter(folder_key(frame.path) for frame in alone)

    def find_place(frame: Frame) -> str:
        # Some archives have a folder for each series.
        folder = folder_key(frame.path)
        return folder if numbers[folder] > 1 or not frame.study_uid else str(Path(folder).parent)

    for frames in group_frames(alone, lambda frame: (find_place(frame), frame.size)):
        folder = find_place(frames[0])
        for own in group_frames(frames, scan_key):
            if len(own) > 1 and is_stack(own):
                singles.stacks[folder].append(own)
                singles.joined.update(frame.series_uid for frame in own)
        rest = [frame for frame in frames if frame.series_uid not in singles.joined]
        # Slices of one kind that form no scan together form none alone. Neither do those that fit together by chance.
        # Slices of several patients may be alone.
        for own in [*group_frames(rest, lambda frame: (*frame.patient, *kind_key(frame))), rest]:
            left = [frame for frame in own if frame.series_uid not in singles.joined]
            alike = len({(frame.patient, kind_key(frame)) for frame in left}) == 1
            if len(left) > 2 and (alike or is_stack(left)):
                singles.joined.update(frame.series_uid for frame in left)
                singles.problems[folder] = (
                    f"{folder}: {len(left)} slices, each with a SeriesInstanceUID of its own, are no "
                    f"whole scan together; export the series with its own UIDs"
                )
    return singles


def find_split_scans(series: Mapping[str, Sequence[Frame]]) -> dict[str, str]:
    """Find series that are parts of one scan, because a program has given some of its slices another UID.

    Returns:
        The problems of these series, by their keys.
    """
    whole = {key: own for key, own in series.items() if len({scan_key(frame) for frame in own}) == 1}
    # Some archives have a folder for each series. Without the UID of a study, folders may be those of two patients.
    folders = group_frames(
        (own[0] for own in whole.values()),
        lambda frame: ("" if frame.study_uid else folder_key(frame.path), *scan_key(frame)),
    )
    problems: dict[str, str] = {}
    for firsts in folders:
        keys = [frame.series_uid or folder_key(frame.path) for frame in firsts]
        frames = [frame for key in keys for frame in whole[key]]
        # Two series may lie above each other by chance, but not if they have one number.
        numbered = bool(firsts[0].kind.get("SeriesNumber")) or min(len(whole[key]) for key in keys) == 1
        if len(keys) > 1 and numbered and is_stack(frames):
            text = (
                f"{firsts[1].path}: has another SeriesInstanceUID than {firsts[0].path}, but is the same in all else "
                f"and fits to its slices, so both may be pieces of one series; export the series with its own UIDs"
            )
            problems |= dict.fromkeys(keys, text)
    return problems


def kind_key(frame: Frame) -> tuple[str, ...]:
    """Return what all slices of a scan have in common, without the UIDs."""
    return (str(frame.orientation), *(frame.kind.get(name, "") for name in KIND_ATTRIBUTES))


def scan_key(frame: Frame) -> tuple[str, ...]:
    """Return what all slices of a scan have in common, without the UID of the series."""
    return (*frame.patient, frame.study_uid, frame.frame_of_reference_uid, *kind_key(frame))


def add_scans(name: str, frames: list[Frame], remarks: Sequence[str], found: FoundSeries) -> None:
    """Add the scans of a series to what was found."""
    if reason := find_localizer(frames):
        found.remarks.append(f"{name}: passed over: a localizer ({frames[0].description}): {reason}")
        return
    try:
        own, copies = drop_copies(frames)
        parts = split_series(name, own)
    except InputError as error:
        found.problems[name] = str(error)
        return
    for part in parts:
        try:
            if part.problem:
                raise InputError(part.problem)
            check_concatenation(part.frames)
            more = [f"{copies} copies passed over"] * bool(copies)
            volume = build_volume(part.name, part.frames, [*remarks, *more])
            check_instance_numbers(part.frames)
            found.volumes.append(volume)
        except InputError as error:
            found.problems[part.name] = str(error)


def check_concatenation(frames: Sequence[Frame]) -> None:
    """Check that all files are there of an enhanced series that was cut into several files.

    Raises:
        InputError: If not.
    """
    for frame in frames:
        total, uid = frame.kind.get("InConcatenationTotalNumber", ""), frame.kind.get("ConcatenationUID", "")
        files = {other.path for other in frames if other.kind.get("ConcatenationUID") == uid}
        if uid and total.isdigit() and len(files) != int(total):
            raise InputError(
                f"{frame.path}: expected {total} files of this concatenation, got {len(files)}; export all of them"
            )


def check_instance_numbers(frames: Sequence[Frame]) -> None:
    """Check that slices have different numbers, or all the same one.

    Raises:
        InputError: If each number occurs several times, because two series without UIDs lie above each other.
    """
    numbers = Counter(frame.kind.get("InstanceNumber", "") for frame in frames if not frame.number)
    if len(numbers) > 1 and min(numbers.values()) > 1:
        raise InputError(
            f"{frames[0].path.parent}: each number of a slice occurs {min(numbers.values())} times, as if several "
            f"series were mixed; export each of them alone"
        )


def drop_copies(frames: Sequence[Frame]) -> tuple[list[Frame], int]:
    """Keep one of several slices that are equal in their place, their kind, their number and their pixels.

    A copy may have the UID of the original or another one, and two slices may have one UID by mistake.

    Returns:
        The slices, and the number of copies.

    Raises:
        InputError: If pixels must be compared, and cannot be read.
    """
    kept: list[Frame] = []
    for equal in group_frames(frames, image_key):
        contents: set[bytes] = set()
        for frame in equal:
            # Only where all headers are equal, because this reads the whole file.
            content = hash_pixels(frame) if len(equal) > 1 else b""
            if content not in contents:
                kept.append(frame)
            contents.add(content)
    return kept, len(frames) - len(kept)


def image_key(frame: Frame) -> tuple[object, ...]:
    """Return all that a header says of an image, without its own UID."""
    return (
        frame.number, frame.position, frame.size, frame.pixel_spacing, tuple(sorted(frame.kind.items())),
        scan_key(frame),
    )  # fmt: skip


def hash_pixels(frame: Frame) -> bytes:
    """Return a fingerprint of the pixels of a file.

    Raises:
        InputError: If the file cannot be read.
    """
    with reading(frame.path, "its pixels cannot be read", "copy or export it again"):
        return hashlib.sha256(read_dataset(frame.path).PixelData).digest()


def describe_alone(path: Path, volumes: Iterable[Volume]) -> Iterable[str]:
    """Yield a remark if a user names one file of a series that has more.

    Args:
        path: What the user names.
        volumes: The scans in it.
    """
    key = find_key(path) if path.is_file() else ""
    files = [one for one in path.parent.iterdir() if one.is_file() and is_dicom(one)] if key else []
    count = sum(find_key(one) == key for one in files)
    if count > 1:
        for volume in volumes:
            yield f"{volume.name}: {path.name} is 1 of {count} files of its series; name the folder to predict all"


def find_key(path: Path) -> str:
    """Return the UID or the folder of the series of a file; empty if it cannot be read."""
    try:
        with reading(path, "its header cannot be read", "copy or export it again"):
            header, _ = read_file_header(path)
            return series_key(path, header) if is_scan(path, header) else ""
    except InputError:
        return ""
