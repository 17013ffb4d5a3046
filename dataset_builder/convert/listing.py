"""`convert --list`: what is in an input, and what would be taken of it."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from statistics import median

import numpy as np
from tqdm.auto import tqdm

from dataset_builder.convert.found import sort_key
from dataset_builder.convert.options import ConvertOptions
from dataset_builder.convert.plan import Plan, PlannedScan, count, describe_plan
from dataset_builder.convert.writing import read_masks
from gi_segmentation.errors import InputError
from gi_segmentation.formats.organ_names import format_organs
from gi_segmentation.formats.structures import describe_structures
from gi_segmentation.labels import MAX_LABELS
from gi_segmentation.processes import count_cores, process_pool

MM3_PER_ML = 1000


def list_input(plan: Plan, options: ConvertOptions) -> str:
    """Return lines about the scans, their structures, what would be taken, and what is left over.

    The masks are read, because their volumes show what a name cannot: a margin, or the contour of a single slice.
    """
    volumes: dict[str, list[float]] = defaultdict(list)
    for one, measures in zip(plan.scans, measure_scans(plan.scans, options.num_proc), strict=True):
        taken = {name for own in one.organs.values() for _, name in own}
        for name, measure in measures.items():
            if isinstance(measure, float):
                volumes[name].append(measure)
            elif name in taken:
                plan.problems[one.scan.name] = measure
            else:
                plan.remarks.append(f"{one.scan.name}: {name!r} is left out, and cannot be read: {measure}")
    patients = {one.scan.patient for one in plan.scans}
    found = f"{count(len(patients), 'patient')}, {count(len(plan.scans), 'scan')} with structures"
    lines = [found, "", *list_scans(plan), "", *list_structures(plan, volumes), ""]
    lines += describe_plan(plan)
    lines += [f"cannot be converted: {name}: {problem}" for name, problem in plan.problems.items()]
    if len(plan.organs) > MAX_LABELS:
        lines.append(
            f"{len(plan.organs)} labels are too many for a model, which has at most {MAX_LABELS}; leave some out"
        )
    sources = {organ: names for organ, names in plan.sources.items() if names}
    nothing = "no structure is a known organ; choose with --organs"
    lines.append(f'--organs "{format_organs(sources)}"' if sources else nothing)
    return "\n".join(lines)


def measure_scans(scans: Sequence[PlannedScan], num_proc: int | None) -> list[dict[str, float | str]]:
    """Measure all structures of scans, with a progress bar; see `measure_scan`."""
    workers = max(min(num_proc or count_cores(), len(scans)), 1)
    bar = partial(tqdm, total=len(scans), desc="Measuring", unit="scan")
    if workers == 1:
        return list(bar(map(measure_scan, scans)))
    with process_pool(workers, context=get_context("spawn")) as pool:
        return list(bar(pool.map(measure_scan, scans)))


def measure_scan(one: PlannedScan) -> dict[str, float | str]:
    """Return the volume of each structure of a scan in millilitres, or why it cannot be read."""
    voxel_ml = abs(float(np.linalg.det(one.scan.volume.affine[:3, :3]))) / MM3_PER_ML
    measures: dict[str, float | str] = {}
    for own in one.sets:
        with suppress(InputError):
            measures |= {name: int(mask.sum()) * voxel_ml for name, mask in read_masks(own, own.names)}
            continue
        # One of them cannot be read.
        for name in own.names:
            try:
                measures[name] = int(own.read([name])[0].sum()) * voxel_ml
            except InputError as error:
                measures[name] = str(error)
    return measures


def list_scans(plan: Plan) -> list[str]:
    """Return a table of the scans by patient."""
    rows = [("patient", "scan", "slices", "drawn in")]
    earlier = ""
    for one in plan.scans:
        patient = one.scan.patient
        drawn = ", ".join(describe_structures(own) for own in one.sets[:2]) + ", ..." * (len(one.sets) > 2)
        rows.append((patient if patient != earlier else "", one.scan.name, one.scan.volume.describe(), drawn))
        earlier = patient
    return format_table(rows)


def list_structures(plan: Plan, volumes: dict[str, list[float]]) -> list[str]:
    """Return a table of the structures: in how many scans, their volumes, and the organ that each becomes."""
    organs = {name: organ for organ, names in plan.sources.items() for name in names}
    rows = [("structure", "scans", "ml (least - median - most)", "becomes")]
    for name in sorted(volumes, key=lambda one: (one not in organs, -len(volumes[one]), sort_key(one))):
        own = volumes[name]
        size = f"{min(own):.1f} - {median(own):.1f} - {max(own):.1f}"
        rows.append((name, str(len(own)), size, organs.get(name, "-")))
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as lines with columns of equal width.

    Example:
        >>> format_table([("a", "b"), ("long", "c")])
        ['a    | b', 'long | c']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
