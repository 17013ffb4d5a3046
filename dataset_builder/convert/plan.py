"""Decide what is taken of each scan: which structure sets, and which structure is which organ."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataset_builder.convert.found import DrawnScan, FoundScans, choose_sets
from dataset_builder.convert.options import ConvertOptions
from gi_segmentation.errors import InputError, list_some
from gi_segmentation.formats.organ_names import Patterns, format_organs, map_structures, order_organs, parse_organs
from gi_segmentation.formats.structures import StructureSet, describe_structures, is_meant
from gi_segmentation.labels import MAX_LABELS, LabelSet


@dataclass(frozen=True)
class PlannedScan:
    """A scan and what is taken of it.

    Attributes:
        scan: The scan.
        sets: The structure sets that are taken.
        organs: The structures of each organ: the number of the set, and the name there.
        remarks: What the user should know.
    """

    scan: DrawnScan
    sets: tuple[StructureSet, ...]
    organs: dict[str, tuple[tuple[int, str], ...]]
    remarks: tuple[str, ...] = ()


@dataclass
class Plan:
    """What is taken of an input.

    Attributes:
        organs: The organs of all scans, in the order of the labels.
        scans: The scans that can be converted.
        problems: Why others cannot be, by their names.
        remarks: Lines for the user.
        sources: The names of the structures of each organ, in all scans.
        left_out: The number of scans that have each structure that is not taken.
        without: The names of scans on which none of the organs is drawn. They are left out.
    """

    organs: list[str] = field(default_factory=list)
    scans: list[PlannedScan] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    without: list[str] = field(default_factory=list)

    def labels(self) -> LabelSet:
        """Return the labels of the output.

        Raises:
            InputError: If there are none or too many, or a name cannot be used.
        """
        if not self.organs:
            raise InputError(
                f"no structure is a known organ; there are {list_some(list(self.left_out), 20)}; choose some with "
                f'--organs "stomach=..."'
            )
        if len(self.organs) > MAX_LABELS:
            raise InputError(
                f"{len(self.organs)} structures would become labels, and a model has at most {MAX_LABELS}; choose "
                f'some with --organs, for example "{format_organs(dict(list(self.sources.items())[:3]))}"; --list '
                f"shows all"
            )
        if self.sources and not any(self.sources.values()):
            raise InputError(
                f"--organs: none of its patterns fits to a structure; there are {list_some(list(self.left_out), 20)}"
            )
        return LabelSet(tuple(self.organs))


def plan_scans(found: FoundScans, options: ConvertOptions) -> Plan:
    """Decide what is taken of each scan.

    Raises:
        InputError: If `--organs` cannot be used.
    """
    patterns = parse_organs(options.organs) if options.organs else None
    check_chosen(found, options.structure_set)
    plan = Plan(problems=dict(found.problems), remarks=list(found.remarks))
    for scan in found.scans:
        try:
            plan.scans.append(plan_scan(scan, patterns, options))
        except InputError as error:
            plan.problems[scan.name] = str(error)
    plan.organs = order_organs([one.organs for one in plan.scans], patterns)
    plan.sources = {organ: [] for organ in plan.organs}
    spelling = {organ.lower(): organ for organ in plan.organs}
    plan.scans = [rename(one, spelling) for one in plan.scans]
    for one in plan.scans:
        count_names(one, plan)
    if patterns and (unmatched := [organ for organ, names in plan.sources.items() if not names]):
        plan.remarks.append(f"in no scan: {', '.join(unmatched)}; correct the patterns of --organs if that is wrong")
    if options.missing == "unknown":
        plan.without = [one.scan.name for one in plan.scans if not one.organs]
        plan.scans = [one for one in plan.scans if one.organs]
    if plan.without:
        plan.remarks.append(f"left out, because none of the organs is drawn: {list_some(plan.without)}")
    return plan


def check_chosen(found: FoundScans, chosen: Sequence[str]) -> None:
    """Check that each text of `--structure_set` fits to a structure set.

    Raises:
        InputError: If not.
    """
    sets = [one for scan in found.scans for one in scan.sets]
    for text in chosen:
        if not any(is_meant(one, text) for one in sets):
            names = list_some(list(dict.fromkeys(map(describe_structures, sets))), 10)
            raise InputError(f"--structure_set {text}: fits to no label and no file name; there are {names}")


def plan_scan(scan: DrawnScan, patterns: Patterns | None, options: ConvertOptions) -> PlannedScan:
    """Decide what is taken of a scan.

    Raises:
        InputError: If it is not clear.
    """
    sets, remark = choose_sets(scan, options.structure_set)
    names = [(index, name) for index, one in enumerate(sets) for name in one.names]
    counts = Counter(name for _, name in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        files = " and ".join(describe_structures(one) for one in sets if twice[0] in one.names)
        raise InputError(f"{scan.name}: {twice[0]!r} is in {files}; choose one of them by --structure_set")
    kind = "rtstruct" if any(one.kind == "rtstruct" for one in sets) else sets[0].kind
    index_by_name = {name: index for index, name in names}
    try:
        mapped = map_structures(list(index_by_name), kind, patterns)
    except InputError as error:
        raise InputError(f"{scan.name}: {error}") from error
    organs = {organ: tuple((index_by_name[name], name) for name in own) for organ, own in mapped.items()}
    unions = [f"{organ} is {' and '.join(own)} together" for organ, own in mapped.items() if len(own) > 1]
    notes = [note for one in sets for note in one.notes]
    return PlannedScan(scan, sets, organs, tuple(filter(None, [remark, *unions, *notes])))


def rename(one: PlannedScan, spelling: dict[str, str]) -> PlannedScan:
    """Give the organs of a scan the spelling of all scans. Names may differ in case between them."""
    organs = {spelling[organ.lower()]: own for organ, own in one.organs.items()}
    return PlannedScan(one.scan, one.sets, organs, one.remarks)


def count_names(one: PlannedScan, plan: Plan) -> None:
    """Add the structures of a scan to those of the plan."""
    taken = set()
    for organ, own in one.organs.items():
        for _, name in own:
            taken.add(name)
            if name not in plan.sources[organ]:
                plan.sources[organ].append(name)
    plan.left_out.update(name for set_ in one.sets for name in set_.names if name not in taken)


def count(number: int, what: str) -> str:
    """Return a number of things in words.

    Example:
        >>> count(1, "scan"), count(2, "scan")
        ('1 scan', '2 scans')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def describe_plan(plan: Plan) -> list[str]:
    """Return lines about what is taken and what is left out."""
    remarks: dict[str, list[str]] = defaultdict(list)
    # Most scans of a clinic have the same remarks.
    for one in plan.scans:
        for remark in one.remarks:
            remarks[remark].append(one.scan.name)
    lines = [*plan.remarks, *(f"{list_some(names)}: {remark}" for remark, names in remarks.items())]
    if others := [f"{name} ({count})" for name, count in plan.left_out.most_common()]:
        lines.append(f"left out: {count(len(others), 'structure')} (in so many scans): {list_some(others, 20)}")
    return lines
