"""Score what any tools, or people, have drawn against what others have drawn on the same scans.

Four steps: read all sides (`drawn_scans`), match their scans and their organs, bring each scan to one grid
(`common_grid`), and measure it. Every submission is measured on the same scans, organs and grids, so two of them can
be compared patient by patient.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.organ_names import Patterns, map_structures, order_organs
from gi_segmentation.formats.structures import StructureSet
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.memory import release_memory
from gi_segmentation.processes import count_cores
from gi_segmentation.rules import CompetitionRules
from gi_segmentation.scoring.clinical import compare_organs
from gi_segmentation.scoring.common_grid import check_grid, choose_grid, read_on_grid
from gi_segmentation.scoring.drawn_scans import Side, find_person
from gi_segmentation.scoring.intervals import compare_scans
from gi_segmentation.scoring.scans import ScanScore, compare_masks
from gi_segmentation.scoring.submissions import raise_first
from gi_segmentation.scoring.tables import format_gains

# What to do with a scan of the truth that a submission lacks: nothing is scored at all; the scan is left out of all
# scores; or it counts as predicted without any organ.
MissingScans: TypeAlias = Literal["error", "leave_out", "empty"]
# What programs add to the name of a scan: the channel of nnU-Net, and words for a segmentation.
ENDING = re.compile(r"([_.-](\d{4}|d?seg|segmentation|labels?|labelmap|mask|pred|prediction))+", re.IGNORECASE)
# At most this many scans per process wait to be measured, so that memory stays bounded.
MAX_WAITING = 2
# The scores by which two submissions are compared, and those of each organ.
COMPARED = ("dice", "dice_volume", "hausdorff_score", "competition_score")

# The structures of each organ.
Mapped: TypeAlias = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Drawn:
    """What one side has drawn on a scan.

    Attributes:
        structures: Its structures; None if it has none, and counts as empty.
        organs: The names of the structures of each organ.
    """

    structures: StructureSet | None
    organs: Mapped


@dataclass(frozen=True)
class MatchedScan:
    """A scan that the truth and the submissions have.

    Attributes:
        name: Its name in the truth.
        patient: What tells the patients apart.
        grid: The grid on which it is scored.
        sides: What the truth has drawn, and then each submission.
    """

    name: str
    patient: str
    grid: Volume
    sides: tuple[Drawn, ...]


@dataclass(frozen=True)
class Matches:
    """What is scored.

    Attributes:
        scans: The scans, in the order of the truth.
        organs: The organs that all sides have, in the order of the tables.
        notes: What was matched and what was left out: lines for the user.
    """

    scans: list[MatchedScan]
    organs: tuple[str, ...]
    notes: list[str]


def match_sides(sides: Sequence[Side], patterns: Patterns | None, missing: MissingScans) -> Matches:
    """Match the scans and the organs of all sides. No mask is made.

    Args:
        sides: The truth, and then each submission.
        patterns: Which structures each organ is, from `--organs`; None: by the names that are known.
        missing: What happens to a scan that a submission lacks.

    Raises:
        InputError: If a submission lacks a scan, if no scan or no organ is there on all sides, if it is not clear what
            a structure is, or if the grids of a scan differ.
    """
    truth, *submissions = sides
    notes = [f"{side.path}: {note}" for side in sides for note in side.notes]
    partners = [match_scans(truth, one, notes) for one in submissions]
    names = choose_names(truth, submissions, partners, missing, notes)
    # Names of organs that differ in case only are one.
    spellings: dict[str, str] = {}
    drawn = {
        name: (
            map_organs(truth.scans[name], patterns, spellings, False),
            *(
                map_organs(one.scans[own[name]] if name in own else None, patterns, spellings, True)
                for one, own in zip(submissions, partners, strict=True)
            ),
        )
        for name in names
    }
    organs = choose_organs(list(drawn.values()), sides, patterns, notes)
    drawn = {name: own for name, own in drawn.items() if own[0].organs.keys() & {*organs}}
    if left := [name for name in names if name not in drawn]:
        notes.append(f"left out, because the truth has none of these organs there: {list_some(left)}")
    patients = find_patients({name: truth.scans[name] for name in drawn}, notes)
    scans, problems = [], []
    for name, own in drawn.items():
        there = [one.structures for one in own if one.structures is not None]
        try:
            grid = choose_grid(there)
            for one in there:
                check_grid(one, grid)
            scans.append(MatchedScan(name, patients[name], grid, own))
        except InputError as error:
            problems.append(str(error))
    raise_first(problems)
    notes += describe_unknown(scans, organs)
    return Matches(scans, organs, notes)


def match_scans(truth: Side, other: Side, notes: list[str]) -> dict[str, str]:
    """Return which scan of a submission each scan of the truth is, by their names, and add notes.

    The names of DICOM files are the identifiers of their series. Other names are compared as they are, without their
    folders, or without what programs add to them: whichever matches most.

    Raises:
        InputError: If no scan matches.
    """
    best: dict[str, str] = {}
    ways: list[Callable[[str], str]] = [str, last_part, bare_name]
    for way in ways:
        ours, theirs = ({way(name): name for name in side.scans} for side in (truth, other))
        if len(ours) < len(truth.scans) or len(theirs) < len(other.scans):
            continue
        if len(common := ours.keys() & theirs.keys()) > len(best):
            best = {ours[key]: theirs[key] for key in ours if key in common}
    if not best and len(truth.scans) == len(other.scans) == 1:
        best = dict(zip(truth.scans, other.scans, strict=True))
        notes.append(f"{other.path}: taken for the same scan, because each side has one; their names differ")
    if not best:
        raise InputError(
            f"{other.path}: has no scan of {truth.path}: there are {list_some(list(other.scans))}, and in the truth "
            f"{list_some(list(truth.scans))}; name them alike"
        )
    return best


def last_part(name: str) -> str:
    """Return the name of a scan without its folders."""
    return name.rpartition("/")[2]


def bare_name(name: str) -> str:
    """Return the name of a scan without its folders and what programs add.

    Example:
        >>> bare_name("labels/case1_day0_0000"), bare_name("liver_7.seg")
        ('case1_day0', 'liver_7')
    """
    last = last_part(name)
    # A name that is nothing else stays.
    return re.sub(rf"(?<=.){ENDING.pattern}$", "", last, flags=re.IGNORECASE)


def choose_names(
    truth: Side,
    submissions: Sequence[Side],
    partners: Sequence[Mapping[str, str]],
    missing: MissingScans,
    notes: list[str],
) -> list[str]:
    """Return the scans of the truth that are scored, and add notes on the others.

    Raises:
        InputError: If a submission lacks one, and that is an error.
    """
    left: set[str] = set()
    for side, own in zip(submissions, partners, strict=True):
        if more := [name for name in side.scans if name not in own.values()]:
            notes.append(f"{side.path}: left out, because the truth lacks them: {describe_some(more, 'scan')}")
        lost = [name for name in truth.scans if name not in own]
        if lost and missing == "error":
            raise InputError(
                f"{side.path}: lacks {describe_some(lost, 'scan')} of the truth; predict them, or say by "
                f"--missing_scans whether to leave them out or to count them as empty"
            )
        if lost:
            what = "left out" if missing == "leave_out" else "counted as predicted without any organ"
            notes.append(f"{side.path}: lacks {describe_some(lost, 'scan')} of the truth, {what}")
        if missing == "leave_out":
            left.update(lost)
    return [name for name in truth.scans if name not in left]


def describe_some(names: Sequence[str], what: str) -> str:
    """Return a number of things with the first names.

    Example:
        >>> describe_some(["a", "b"], "scan")
        '2 scans (a, b)'
    """
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({list_some(names)})"


def map_organs(
    structures: StructureSet | None, patterns: Patterns | None, spellings: dict[str, str], is_prediction: bool
) -> Drawn:
    """Find the structures of each organ that a side has drawn on a scan.

    Args:
        structures: What it has drawn; None: nothing.
        patterns: As in `match_sides`.
        spellings: The organs so far, by their names in lower case. New ones are added.
        is_prediction: Whether it is a submission, and not the truth.

    Raises:
        InputError: If it is not clear which they are.
    """
    if structures is None:
        return Drawn(None, {})
    # A ROI without a contour says nothing in the truth. A program that predicts writes it for what it has not found.
    names = [*structures.names, *(structures.empty if is_prediction else ())]
    try:
        # As a segmentation, because each structure may be an organ of the other side.
        mapped = map_structures(names, "seg", patterns)
        return Drawn(structures, {spellings.setdefault(organ.lower(), organ): own for organ, own in mapped.items()})
    except InputError as error:
        raise InputError(f"{structures.paths[0]}: {error}") from error


def choose_organs(
    drawn: Sequence[Sequence[Drawn]], sides: Sequence[Side], patterns: Patterns | None, notes: list[str]
) -> tuple[str, ...]:
    """Return the organs that all sides have on some scan, and add notes on the others.

    Raises:
        InputError: If there is none.
    """
    have = [{organ for scan in drawn for organ in scan[place].organs} for place in range(len(sides))]
    order = order_organs((one.organs for scan in drawn for one in scan), patterns)
    organs = tuple(organ for organ in order if all(organ in own for own in have))
    if not organs:
        there = " and ".join(
            f"{side.path} has {list_some(sorted(own), 10) or 'none'}" for side, own in zip(sides, have, strict=True)
        )
        raise InputError(
            f"no organ is there on all sides: {there}; say which are which by --organs, or name the values of label "
            f"maps by --label_names"
        )
    for side, own in zip(sides, have, strict=True):
        if more := sorted(own - {*organs}):
            notes.append(f"{side.path}: left out, because not all sides have them: {list_some(more, 10)}")
    return organs


def find_patients(scans: Mapping[str, StructureSet], notes: list[str]) -> dict[str, str]:
    """Return what tells the patient of each scan, and add notes. Numbers of patients of a hospital are not shown."""
    people = {name: find_person(name, structures) for name, structures in scans.items()}
    hidden = [person for name, (person, _) in people.items() if scans[name].kind in ("rtstruct", "seg")]
    numbers = {person: f"patient{number}" for number, person in enumerate(dict.fromkeys(hidden), start=1)}
    patients = {name: numbers.get(person, person) for name, (person, _) in people.items()}
    number = len(set(patients.values()))
    notes.append(f"{len(scans)} scan{'s' * (len(scans) != 1)} of {number} patient{'s' * (number != 1)}")
    if unsure := [name for name, (_, known) in people.items() if not known]:
        notes.append(
            f"{describe_some(unsure, 'scan')} counted as a patient each, because they do not say whose they are; "
            f"names like case1_day0 and sub-01_ses-2 do"
        )
    return patients


def describe_unknown(scans: Sequence[MatchedScan], organs: Sequence[str]) -> Iterable[str]:
    """Yield notes about organs that are not drawn on all scans."""
    for organ in organs:
        known = sum(organ in scan.sides[0].organs for scan in scans)
        if known < len(scans):
            yield f"{organ} is known in {known} of {len(scans)} scans of the truth, and scored there"
    lacking = Counter(
        organ
        for scan in scans
        for one in scan.sides[1:]
        for organ in organs
        if organ in scan.sides[0].organs and organ not in one.organs and one.structures is not None
    )
    for organ, number in lacking.items():
        yield f"{organ} is missing in {number} of the predictions, and counted as predicted nowhere there"


def read_organs(drawn: Drawn, organs: Sequence[str], grid: Volume) -> np.ndarray:
    """Read the masks of organs: bool, shape `(organs, slices, rows, columns)`. Those that are not there are empty."""
    masks = np.zeros((len(organs), *grid.training_shape), dtype=bool)
    if drawn.structures is None:
        return masks
    names = [name for organ in organs for name in drawn.organs.get(organ, ())]
    if not names:
        return masks
    found = dict(zip(names, read_on_grid(drawn.structures, names, grid), strict=True))
    for mask, organ in zip(masks, organs, strict=True):
        for name in drawn.organs.get(organ, ()):
            mask |= found[name]
    return masks


def measure_matches(
    matches: Matches, rules: CompetitionRules, num_proc: int | None = None, clinical: bool = False
) -> list[list[ScanScore]]:
    """Measure each scan for each submission.

    Args:
        matches: From `match_sides`.
        rules: How to measure the competition's distance.
        num_proc: Number of scans that are measured at once; None: one per core.
        clinical: Whether to add the scores in millimetres.

    Returns:
        The scores of the scans, for each submission.

    Raises:
        InputError: If a file is damaged, or a mask lies outside of its scan.
    """
    organs, workers = matches.organs, num_proc or count_cores()

    def measure(scan: MatchedScan, preds: np.ndarray, target: np.ndarray) -> ScanScore:
        unknown = {organ for organ in organs if organ not in scan.sides[0].organs}
        scores = compare_organs(preds, target, scan.grid.spacing_mm if clinical else None)
        names = scan.patient, scan.name, organs
        return compare_masks(*names, preds, target, rules, clinical=scores, unknown=unknown, presets=True)

    measured: list[list[Future[ScanScore]]] = []
    # NumPy and SciPy let other threads run while they compute, and masks need not be copied to another process.
    with ThreadPoolExecutor(workers) as pool:
        for scan in tqdm(matches.scans, desc="Scoring", unit="scan"):
            target, *predicted = (read_organs(one, organs, scan.grid) for one in scan.sides)
            measured.append([pool.submit(measure, scan, preds, target) for preds in predicted])
            for future in measured[-1]:
                future.add_done_callback(lambda _: release_memory())
            waiting = [one for own in measured for one in own if not one.done()]
            if len(waiting) > MAX_WAITING * workers:
                waiting[0].result()
    return [[own[place].result() for own in measured] for place in range(len(matches.scans[0].sides) - 1)]


def format_pairs(scans: Mapping[str, Sequence[ScanScore]], rules: CompetitionRules) -> list[str]:
    """Compare each two submissions over the same patients, and return lines for the screen."""
    lines = []
    for (first, before), (second, after) in combinations(scans.items(), 2):
        names = (*COMPARED, *(f"dice_{organ}" for organ in before[0].organs))
        lines.append(f"{second} compared with {first} over the same patients:")
        lines += format_gains(compare_scans(after, before, rules, names))
    return lines
