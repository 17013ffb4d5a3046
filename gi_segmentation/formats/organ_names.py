"""Which organ each structure of a scan becomes: by the patterns of `--organs`, or by the names that are known."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.structures import StructureKind
from gi_segmentation.known_organs import KNOWN_ORGANS, find_organ
from gi_segmentation.labels import BACKGROUND, check_name

# The patterns of each organ, in the order of the labels.
Patterns = Mapping[str, tuple[str, ...]]
# Signs with a meaning of their own in `--organs`.
SPECIAL = re.compile(r"[,;=*?\[\]]")
# What no name of an organ may have, see `labels.NAME_PATTERN`.
NOT_IN_NAMES = re.compile(r"[^\w .+()&'-]")


def parse_organs(text: str) -> dict[str, tuple[str, ...]]:
    """Read `--organs`: `ORGAN=PATTERN,PATTERN;ORGAN=PATTERN`.

    Raises:
        InputError: If it has another form, or a name cannot be that of an organ.

    Example:
        >>> parse_organs("stomach=Stomach*,Magen; large_bowel=Colon*")
        {'stomach': ('Stomach*', 'Magen'), 'large_bowel': ('Colon*',)}
    """
    organs: dict[str, tuple[str, ...]] = {}
    for part in filter(str.strip, text.split(";")):
        organ, sign, listed = (word.strip() for word in part.partition("="))
        patterns = tuple(pattern.strip() for pattern in listed.split(",") if pattern.strip())
        if not sign or not patterns:
            raise InputError(
                f'--organs: expected "stomach=Stomach*,Magen;liver=Liver", got {part.strip()!r:.80}; correct it'
            )
        check_name(organ)
        if twice := next((one for one in organs if one.lower() == organ.lower()), None):
            same = "is there twice" if twice == organ else f"and {twice} differ in case only"
            raise InputError(f"--organs: {organ} {same}; write all of its patterns after one =")
        organs[organ] = patterns
    if not organs:
        raise InputError('--organs: expected "stomach=Stomach*,Magen;liver=Liver", got nothing; name the organs')
    return organs


def format_organs(sources: Mapping[str, Iterable[str]]) -> str:
    """Return the text of `--organs` for names of structures. It is the inverse of `parse_organs`.

    Example:
        >>> format_organs({"stomach": ["Magen", "Stomach, old"]})
        'stomach=Magen,Stomach? old'
    """
    # A sign that `--organs` cannot have as it is. `?` stands for any one.
    return ";".join(
        f"{organ}={','.join(SPECIAL.sub('?', name) for name in names)}" for organ, names in sources.items()
    )


def map_structures(names: Sequence[str], kind: StructureKind, patterns: Patterns | None) -> dict[str, tuple[str, ...]]:
    """Find the structures of each organ of a scan.

    Args:
        names: The names of the structures.
        kind: What they come from. Without patterns, a plan for a treatment gives its known organs only, because it has
            dozens of other structures. A label map gives all of its labels.
        patterns: `--organs`; None: known names get the name that is usual here.

    Returns:
        The names of its structures for each organ that has any. There are several if each is written apart in
        `--organs`, as the parts of a colon.

    Raises:
        InputError: If it is not clear which structure an organ is, or which organ a structure is.
    """
    return map_known(names, kind) if patterns is None else map_patterns(names, patterns)


def fold(text: str) -> str:
    """Return what makes a difference between two names: neither capital letters nor how an accent is written.

    Example:
        >>> fold(" Du\u0308nndarm") == fold("D\u00fcnndarm")
        True
    """
    return unicodedata.normalize("NFC", text).strip().casefold()


def map_patterns(names: Sequence[str], patterns: Patterns) -> dict[str, tuple[str, ...]]:
    """Find the structures of each organ by patterns, see `map_structures`.

    Capital letters do not matter, unless a name is written exactly as the pattern.

    Example:
        >>> map_patterns(["Magen", "PTV"], {"stomach": ("Stomach*", "Magen"), "liver": ("Liver",)})
        {'stomach': ('Magen',)}
        >>> map_patterns(["Liver", "liver"], {"liver": ("liver",)})
        {'liver': ('liver',)}
    """
    mapped: dict[str, tuple[str, ...]] = {}
    taken: dict[str, str] = {}
    for organ, own in patterns.items():
        found: list[str] = []
        for pattern in own:
            fitting = [pattern] if pattern in names else names
            matching = [name for name in fitting if fnmatchcase(fold(name), fold(pattern)) and name not in found]
            if len(matching) > 1:
                raise InputError(
                    f"{pattern!r} of --organs fits to {list_some(matching, 5)}; write the name of {organ}, or of all "
                    f'its parts: "{format_organs({organ: matching})}"'
                )
            found += matching
        for name in found:
            if name in taken:
                raise InputError(f"{name!r} is {taken[name]} and {organ} by --organs; make the patterns more exact")
            taken[name] = organ
        if found:
            mapped[organ] = tuple(found)
    return mapped


def map_known(names: Sequence[str], kind: StructureKind) -> dict[str, tuple[str, ...]]:
    """Find the structures of each organ by the names that are known, see `map_structures`.

    Example:
        >>> map_known(["Bowel_Large", "PTV"], "rtstruct"), map_known(["colon", "tumour/1"], "nifti")
        ({'large_bowel': ('Bowel_Large',)}, {'large_bowel': ('colon',), 'tumour_1': ('tumour/1',)})
    """
    mapped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        organ = find_organ(name) or ("" if kind == "rtstruct" else usable_name(name))
        if organ:
            same = next((one for one in mapped if one.lower() == organ.lower()), organ)
            mapped[same].append(name)
    for organ, own in mapped.items():
        if len(own) > 1:
            raise InputError(
                f"{' and '.join(map(repr, own))} could both be {organ}; choose with --organs "
                f'"{format_organs({organ: own[:1]})}"'
            )
    return {organ: tuple(own) for organ, own in mapped.items()}


def usable_name(name: str) -> str:
    """Return a name that can be that of an organ; empty if there is none, as for a label `background`.

    Example:
        >>> usable_name("Tumour: left"), usable_name("background"), usable_name("GTV*")
        ('Tumour_ left', '', 'GTV_')
    """
    usable = NOT_IN_NAMES.sub("_", unicodedata.normalize("NFC", name)).lstrip(" _.+()&'-")[:64].rstrip()
    try:
        check_name(usable)
    except InputError:
        return ""
    return "" if usable.lower() == BACKGROUND else usable


def order_organs(mapped: Iterable[Iterable[str]], patterns: Patterns | None) -> list[str]:
    """Return the organs of all scans, each scan's as they come there, in the order of the labels.

    It is that of `--organs`. Without it, known organs come first, in our order. The others follow as they come.
    """
    found: dict[str, str] = {}
    for organs in mapped:
        for organ in organs:
            found.setdefault(organ.lower(), organ)
    if patterns is not None:
        return list(patterns)
    known = [organ for organ in KNOWN_ORGANS if organ.lower() in found]
    return known + [organ for lower, organ in found.items() if organ not in known]
