"""Split the frames of a series into scans: one patient, one study, one stack of slices, one kind of image.

An archive or a program that removes the patient's data may have put several of them into one series. Each part that is
a whole scan by itself becomes one. If parts complement each other, it cannot be known which scan is whole, and the
series is refused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gi_segmentation.errors import InputError
from gi_segmentation.formats.dicom.files import Frame
from gi_segmentation.formats.dicom.geometry import (
    STEP_TOLERANCE_MM,
    check_planes,
    check_steps,
    find_normal,
    is_parallel,
    sort_frames,
)
from gi_segmentation.formats.dicom.kinds import KIND_ATTRIBUTES

# What a localizer is called by the scanners of several makers.
LOCALIZER_WORDS = re.compile(
    r"(?<![a-z])(loc|locali[sz]ers?|scouts?|survey|surview|topogram|plan ?scan)(?![a-z])", re.I
)
# Scanners take at most about this many slices in each direction to plan an examination.
LOCALIZER_SLICES = 10
# Cosine of the angle above which two directions are not at right angles, roughly.
RIGHT_ANGLE = 0.5
# A difference in one of these means another series or stack. It may lie elsewhere.
STACKS = ("SeriesNumber", "SeriesDescription", "Modality", "StackID")
PLANES = ("sagittal", "coronal", "axial")
# Letters of a value in the name of a scan, and thus of a file.
LABEL_LENGTH = 40


class SeriesPart(NamedTuple):
    """Frames that belong together.

    Attributes:
        name: Name of the scan.
        frames: Its frames.
        problem: Why it is no scan; empty if it may be one.
    """

    name: str
    frames: list[Frame]
    problem: str = ""


class Difference(NamedTuple):
    """A difference between the frames of a series.

    Attributes:
        what: What differs, for a message.
        parts: The frames, by what the name of their scan ends with.
        elsewhere: Whether the parts may lie at different places. Echoes of one scan may not, and two patients may.
        certain: Whether the parts are different scans, even if they fit together.
    """

    what: str
    parts: Mapping[str, list[Frame]]
    elsewhere: bool = False
    certain: bool = False


def split_series(name: str, frames: list[Frame]) -> list[SeriesPart]:
    """Split the frames of a series into scans.

    Args:
        name: Name of the series. A scan has this name if it is the only one; else an end is added.
        frames: The frames, in any order.

    Raises:
        InputError: If the parts of the series are no whole scans by themselves.
    """
    criteria: tuple[Callable[[list[Frame]], Difference], ...] = (
        by_study, by_patient, by_frame_of_reference, by_stack, by_orientation, by_kind, by_time, by_folder,
    )  # fmt: skip
    # From the coarsest criterion to the finest. The first one that finds a difference splits the series. Then all of
    # them split each part again.
    for criterion in criteria:
        difference = criterion(frames)
        if len(difference.parts) > 1:
            problems = check_difference(difference)
            parts = []
            for label, own in difference.parts.items():
                if label in problems:
                    parts.append(SeriesPart(f"{name}_{label}", own, problems[label]))
                else:
                    parts += split_series(f"{name}_{label}", own)
            return parts
    return [SeriesPart(name, frames)]


def check_difference(difference: Difference) -> dict[str, str]:
    """Check that parts of a series are scans by themselves.

    Returns:
        The problems of the parts that are no scans, by the ends of their names.

    Raises:
        InputError: If it cannot be told which parts are whole.
    """
    parts = difference.parts
    places = {label: distinct_places(own) for label, own in parts.items()}
    everything = [frame for own in parts.values() for frame in own]
    first = next(iter(places.values()))
    # Parts at the same places, such as echoes, are whole scans.
    if all(one.shape == first.shape and np.allclose(one, first, atol=STEP_TOLERANCE_MM) for one in places.values()):
        return {}
    # Parts at different places may be whole scans too, unless they form one stack together: then a scan was
    # probably divided.
    if difference.elsewhere:
        if all(len(own) > 1 for own in parts.values()) and (difference.certain or not is_stack(everything)):
            return {}
        raise InputError(describe_mixture(difference))
    # A part with a slice at each place is whole. If there is no such part, the missing slices cannot be told.
    total = len(distinct_places(everything))
    if all(len(one) < total for one in places.values()):
        raise InputError(describe_mixture(difference))
    return {
        label: f"{parts[label][0].path.parent}: {label} has slices at {len(one)} of {total} places of its series; "
        f"export the whole series"
        for label, one in places.items()
        if len(one) < total
    }


def describe_mixture(difference: Difference) -> str:
    """Return the message for a series whose parts are no whole scans."""
    (label, first), (other_label, other) = list(difference.parts.items())[:2]
    more = f" and {len(difference.parts) - 2} more" if len(difference.parts) > 2 else ""
    return (
        f"{other[0].path}: has another {difference.what} than {first[0].path} of the same series, which mixes "
        f"{len(first)} slices of {label} and {len(other)} of {other_label}{more}; export each of them whole and alone"
    )


def distinct_places(frames: Sequence[Frame]) -> np.ndarray:
    """Return the places of parallel frames, sorted along their normal, each once: shape `(places, 3)`."""
    positions = np.array([frame.position for frame in sort_frames(frames)])
    along = positions @ find_normal(frames[0])
    return positions[np.diff(along, prepend=-np.inf) > STEP_TOLERANCE_MM / 2]


def is_stack(frames: Sequence[Frame]) -> bool:
    """Tell whether frames fill a grid."""
    try:
        ordered = check_planes(list(frames))
        check_steps(ordered, np.array([frame.position for frame in ordered]), find_normal(ordered[0]))
    except InputError:
        return False
    return True


def group_frames(frames: Iterable[Frame], key: Callable[[Frame], object]) -> list[list[Frame]]:
    """Return the frames that have the same key, sorted by the key as text."""
    groups: dict[object, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[key(frame)].append(frame)
    return [groups[one] for one in sorted(groups, key=str)]


def by_study(frames: list[Frame]) -> Difference:
    """Two patients can have one SeriesInstanceUID after their data were removed. Without a UID, the date counts."""
    groups = group_frames(frames, lambda frame: frame.study_uid or frame.kind.get("StudyDate", ""))
    parts = {f"study-{number}": own for number, own in enumerate(groups, start=1)}
    # Slices of one patient in one coordinate system that fit together are parts of one scan.
    certain = len({(frame.patient, frame.frame_of_reference_uid) for frame in frames}) > 1
    return Difference("StudyInstanceUID or StudyDate", parts, elsewhere=True, certain=certain)


def by_patient(frames: list[Frame]) -> Difference:
    """The names of patients do not belong into names of files, so the patients are counted."""
    groups = group_frames(frames, lambda frame: frame.patient)
    parts = {f"patient-{number}": own for number, own in enumerate(groups, start=1)}
    return Difference("patient (PatientID, PatientName or PatientBirthDate)", parts, elsewhere=True)


def by_folder(frames: list[Frame]) -> Difference:
    """If the slices are numbered from 1 on in each of several folders, these are several series."""
    groups = group_frames(frames, lambda frame: frame.path.parent)
    numbers = [{frame.kind.get("InstanceNumber", "") for frame in own if not frame.number} - {""} for own in groups]
    doubled = len(groups) > 1 and sum(map(len, numbers)) > len(set().union(*numbers))
    parts = {f"folder-{number}": own for number, own in enumerate(groups, start=1)} if doubled else {"": frames}
    return Difference("folder, with the same numbers of slices,", parts, elsewhere=True)


def by_frame_of_reference(frames: list[Frame]) -> Difference:
    """Places in different coordinate systems cannot be compared."""
    groups = group_frames(frames, lambda frame: frame.frame_of_reference_uid)
    parts = {f"frame-{number}": own for number, own in enumerate(groups, start=1)}
    return Difference("frame of reference", parts, elsewhere=True)


def by_stack(frames: list[Frame]) -> Difference:
    """Several series, or several stacks of slices, may have got one SeriesInstanceUID."""
    return by_values(frames, STACKS)._replace(elsewhere=True)


def by_kind(frames: list[Frame]) -> Difference:
    """Several echoes, times, b-values or image types of the same slices may be in one series."""
    return by_values(frames, [name for name in KIND_ATTRIBUTES if name not in STACKS])


def by_values(frames: list[Frame], names: Iterable[str]) -> Difference:
    """Group frames by what differs among some names of `dicom.kinds`."""
    names = [name for name in names if len({frame.kind.get(name, "") for frame in frames}) > 1]
    groups = group_frames(frames, lambda frame: tuple(frame.kind.get(name, "") for name in names))
    # One name is enough if it alone tells all parts apart, as the echo time does if the echoes have numbers, too.
    alone = [name for name in names if len({own[0].kind.get(name, "") for own in groups}) == len(groups)]
    shown = alone[:1] or names
    values = {name: name_values([own[0].kind.get(name, "") for own in groups]) for name in shown}
    labels = ["_".join(f"{name}-{values[name][number]}" for name in shown) for number in range(len(groups))]
    if len(set(labels)) < len(labels):
        labels = [f"{label}_{number}" for number, label in enumerate(labels, start=1)]
    return Difference(" and ".join(shown), dict(zip(labels, groups, strict=True)))


def name_values(values: Sequence[str]) -> list[str]:
    r"""Return values as parts of file names. Words that all have are left out, if the others tell the values apart.

    Example:
        >>> name_values(["DERIVED\\PRIMARY\\WATER", "DERIVED\\PRIMARY\\FAT"])
        ['WATER', 'FAT']
        >>> name_values(["2.3", ""])
        ['2.3', 'none']
        >>> name_values(["0\\1\\0", "1\\0\\0"])
        ['0-1-0', '1-0-0']
    """
    words = [value.split("\\") for value in values]
    common = set(words[0]).intersection(*words[1:])
    own = ["-".join(word for word in one if word not in common) for one in words]
    if len(set(own)) < len(own):
        own = ["-".join(one) for one in words]
    return [re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:LABEL_LENGTH] or "none" for text in own]


def by_orientation(frames: list[Frame]) -> Difference:
    """A series may have several stacks in different directions. A single slice that is tilted is an error."""
    groups = group_parallel(frames)
    if len(groups) == 1 or not all(len(own) > 1 and is_stack(own) for own in groups):
        return Difference("", {"": frames})
    planes = [PLANES[int(np.abs(find_normal(own[0])).argmax())] for own in groups]
    labels = [
        f"{plane}-{planes[:index].count(plane) + 1}" if planes.count(plane) > 1 else plane
        for index, plane in enumerate(planes)
    ]
    return Difference("orientation", dict(zip(labels, groups, strict=True)), elsewhere=True)


def group_parallel(frames: Iterable[Frame]) -> list[list[Frame]]:
    """Return frames with the same directions of rows and columns."""
    groups: list[list[Frame]] = []
    for frame in frames:
        for own in groups:
            if is_parallel(frame, own[0]):
                own.append(frame)
                break
        else:
            groups.append([frame])
    return groups


def by_time(frames: list[Frame]) -> Difference:
    """Times differ within a scan, too. They tell scans apart if several slices lie at one place, or in few groups.

    So do the directions of diffusion. All slices of a 3D acquisition are acquired at once. Slices of a cine have few
    trigger times.
    """
    together = all(frame.kind.get("AcquisitionType") == "3D" for frame in frames)
    doubled = len(distinct_places(frames)) < len(frames)
    for name in ("GradientDirection", "AcquisitionNumber", "TriggerTime", "AcquisitionTime"):
        difference = by_values(frames, [name])
        groups = list(difference.parts.values())
        # With more groups, this value only counts the slices and tells no scans apart.
        if not 1 < len(groups) <= len(frames) / 2:
            continue
        places = [distinct_places(own) for own in groups]
        same = all(len(one) == len(own) == len(places[0]) for one, own in zip(places, groups, strict=True))
        if (doubled and same) or (not doubled and (together or name == "TriggerTime") and do_interleave(frames, name)):
            return difference
    return Difference("", {"": frames})


def do_interleave(frames: Sequence[Frame], name: str) -> bool:
    """Tell whether slices with one value of a time lie between those with another one."""
    values = [frame.kind.get(name, "") for frame in sort_frames(frames)]
    changes = sum(value != before for before, value in pairwise(values))
    return changes >= len(set(values))


def find_localizer(frames: Sequence[Frame]) -> str:
    """Say by what a series is a localizer: few slices in several directions, to plan an examination; empty if none."""
    groups = group_parallel(frames)
    axes: list[np.ndarray] = []
    for own in groups:
        normal = find_normal(own[0])
        if np.linalg.norm(normal) > RIGHT_ANGLE and all(abs(normal @ other) < RIGHT_ANGLE for other in axes):
            axes.append(normal)
    few = max(map(len, groups)) <= LOCALIZER_SLICES
    named = LOCALIZER_WORDS.search(frames[0].description)
    if len(axes) > 2 or (len(axes) == 2 and (few or named)):
        return f"its {len(frames)} slices lie in {len(axes)} directions at right angles"
    if named and len(frames) <= LOCALIZER_SLICES:
        return f"it has {len(frames)} slices, and its description says {named[0]}"
    return ""
