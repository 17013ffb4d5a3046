"""Find the scan that a structure set or a segmentation was drawn on, by the identifiers that it names.

Names of files, dates and patients say nothing here. A planning system may have drawn on the T1 of a study whose T2 has
the same frame of reference. Such contours lie at the right place of both scans, but only one of them is meant. So a
scan that is named and not there is a problem, also if another one would fit.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.dicom.series import FoundSeries
from gi_segmentation.formats.volumes import Volume


class References(NamedTuple):
    """What a file with structures names.

    Attributes:
        path: The file.
        series: The UIDs of series.
        drawn_on: The UIDs of the images that single contours or frames were drawn on.
        images: The UIDs of the images that the file as a whole names.
        frame_of_reference_uid: The coordinate system of its places; empty if it does not say.
    """

    path: Path
    series: frozenset[str]
    drawn_on: frozenset[str]
    images: frozenset[str]
    frame_of_reference_uid: str


def find_volume(references: References, found: FoundSeries) -> tuple[Volume, list[str]]:
    """Return the scan that is meant, and notes for the user.

    Args:
        references: What the file names.
        found: The scans that are there.

    Raises:
        InputError: If the scan is not there, cannot be read, is not the only one that fits, or has another frame of
            reference.
    """
    matches, how = find_matches(references, found.volumes)
    if not matches:
        raise InputError(describe_missing(references, found))
    if len(matches) > 1:
        names = list_some([volume.name for volume in matches])
        raise InputError(
            f"{references.path}: fits to {len(matches)} scans ({names}), so it cannot be told which of them was drawn "
            f"on; export it with one scan alone"
        )
    check_frame_of_reference(references, matches[0])
    return matches[0], [how] * bool(how) + list(describe_gaps(references, matches[0]))


def find_matches(references: References, volumes: Sequence[Volume]) -> tuple[list[Volume], str]:
    """Return the scans that may be meant, and how they were found; empty if by the images that are named."""
    # Single contours say most exactly what they were drawn on. The list of the whole file may have all echoes.
    if uids := references.drawn_on or references.images:
        return [volume for volume in volumes if uids & image_uids(volume)], ""
    if references.series:
        how = "names no images, and was taken to its series"
        return [volume for volume in volumes if references.series & series_uids(volume)], how
    own = references.frame_of_reference_uid
    how = "names no series, and was taken to the only scan with its frame of reference"
    return [volume for volume in volumes if own and frame_of_reference(volume) == own], how


def image_uids(volume: Volume) -> frozenset[str]:
    """Return the UIDs of the images of a scan."""
    return frozenset(frame.instance_uid for frame in volume.origin.frames if frame.instance_uid)


def series_uids(volume: Volume) -> frozenset[str]:
    """Return the UIDs of the series of a scan."""
    return frozenset(frame.series_uid for frame in volume.origin.frames if frame.series_uid)


def frame_of_reference(volume: Volume) -> str:
    """Return the coordinate system of a scan; empty if it was removed."""
    uid: str = volume.origin.frames[0].frame_of_reference_uid
    return uid


def describe_missing(references: References, found: FoundSeries) -> str:
    """Return the message for a file whose scan is not there."""
    path = references.path
    for uid in sorted(references.series):
        if problem := next((text for name, text in found.problems.items() if is_named(name, uid)), ""):
            return f"{path}: its series {uid} is no scan: {problem}"
    here = frozenset().union(*map(series_uids, found.volumes))
    if known := sorted(references.series & here):
        return f"{path}: names images that its series {known[0]} does not have; export both of them together"
    if references.series:
        more = " is not there, and neither are its images; add its files"
        return f"{path}: its series {list_some(sorted(references.series))}{more}"
    if references.drawn_on or references.images:
        return f"{path}: the images that it names are not there; add the files of its scan"
    return f"{path}: names no series, and no scan has its frame of reference; export it with its scan"


def is_named(name: str, uid: str) -> bool:
    """Tell whether the name of a scan is that of a series, or of a part of it."""
    return name == uid or name.startswith(f"{uid}_")


def check_frame_of_reference(references: References, volume: Volume) -> None:
    """Check that a file and its scan have the same coordinate system.

    Raises:
        InputError: If both name one, and these differ.
    """
    own, other = references.frame_of_reference_uid, frame_of_reference(volume)
    if own and other and own != other:
        raise InputError(
            f"{references.path}: has the frame of reference {own}, but its scan {volume.name} has {other}, so its "
            f"places are not those of the scan; export both of them together"
        )


def describe_gaps(references: References, volume: Volume) -> Iterable[str]:
    """Yield notes about references that cannot be followed."""
    if missing := len((references.drawn_on or references.images) - image_uids(volume)):
        yield f"{missing} of the images that it names are not in the scan"
    if not references.frame_of_reference_uid or not frame_of_reference(volume):
        yield "no frame of reference to compare"
