"""The steps of `convert`: find, decide, write."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
from tqdm.auto import tqdm

from dataset_builder.convert.corrections import describe_corrections
from dataset_builder.convert.found import find_drawn_scans
from dataset_builder.convert.key_file import Key, read_key, updating_key
from dataset_builder.convert.listing import list_input
from dataset_builder.convert.options import ConvertOptions
from dataset_builder.convert.plan import Plan, count, describe_plan, plan_scans
from dataset_builder.convert.writing import (
    RECORDS,
    ScanOutcome,
    ScanTask,
    convert_scan,
    forget_index,
    remove_scan,
    write_index,
)
from gi_segmentation.errors import InputError, join_problems, list_some
from gi_segmentation.files import LOCK_FILE, is_hidden, writing_to
from gi_segmentation.formats.archives import unpacked
from gi_segmentation.processes import count_cores, process_pool
from gi_segmentation.schema import scan_name


def convert(path: Path, options: ConvertOptions, only_list: bool) -> str:
    """Convert the scans of an input, or say what would be done.

    Args:
        path: A folder or a zip.
        options: The other flags.
        only_list: Whether `--list` is given.

    Returns:
        Lines for the user.

    Raises:
        InputError: If nothing can be converted, or if a scan failed. All others are done then.
    """
    if not path.exists():
        raise InputError(f"--input {path}: no such file or folder")
    with unpacked(path) as folder:
        plan = plan_scans(find_drawn_scans(folder, options), options)
        if options.corrections:
            print("\n".join(describe_corrections(plan, path, options.corrections)), flush=True)
        if only_list:
            return list_input(plan, options)
        return write_output(plan, options)


def write_output(plan: Plan, options: ConvertOptions) -> str:
    """Convert the scans of a plan; see `convert`."""
    assert options.output_dir is not None and options.key_file is not None
    if plan.problems and not plan.scans:
        raise InputError(join_problems(plan.problems.values()))
    output_dir, labels = options.output_dir, plan.labels()
    print("".join(f"{line}\n" for line in describe_plan(plan)), end="")
    # A damaged key file is an error before there is a folder.
    read_key(options.key_file)
    with writing_to(output_dir, output_dir / LOCK_FILE):
        check_output_dir(output_dir)
        with updating_key(options.key_file) as key:
            number_scans(plan, key)
            tasks = list_tasks(plan, key, options)
            check_others(output_dir, [task.name for task in tasks], key, plan)
            (output_dir / RECORDS).mkdir(exist_ok=True)
        outcomes: dict[str, ScanOutcome] = {}
        for task, outcome in convert_scans(tasks, output_dir, options.num_proc):
            outcomes[task.name] = outcome
            name = task.planned.scan.name
            if outcome.status == "failed":
                plan.problems[name] = outcome.message
            if outcome.message:
                tqdm.write(f"{name}: {outcome.status}: {outcome.message}")
        done = [task.name for task in tasks if outcomes[task.name].status != "failed"]
        if done:
            write_index(output_dir, sorted(done, key=scan_order), labels, options.missing)
    if not done:
        remove_empty(output_dir)
    report = describe_outcome(plan, outcomes, tasks, options)
    if plan.problems:
        print(report)
        raise InputError(describe_failures(plan, len(done)))
    return report


def remove_empty(output_dir: Path) -> None:
    """Remove an output without any scan."""
    for folder in (output_dir / RECORDS, output_dir / "train", output_dir):
        # Whatever is not empty stays.
        with suppress(OSError):
            folder.rmdir()


def check_output_dir(output_dir: Path) -> None:
    """Check that a folder is empty, or has what an earlier `convert` has written.

    Raises:
        InputError: If not.
    """
    foreign = [path.name for path in output_dir.iterdir() if not is_hidden(path)]
    if foreign and not (output_dir / RECORDS).is_dir():
        raise InputError(
            f"--output_dir {output_dir}: expected a new folder, or one of an earlier `convert`, got {min(foreign)} in "
            f"it; name another one"
        )


def number_scans(plan: Plan, key: Key) -> None:
    """Give a number to each patient and each scan."""
    scans: dict[str, list[str]] = defaultdict(list)
    for one in plan.scans:
        scans[one.scan.patient].append(one.scan.name)
    key.add(scans)


def list_tasks(plan: Plan, key: Key, options: ConvertOptions) -> list[ScanTask]:
    """Return what is to be done for each scan."""
    tasks = []
    for one in plan.scans:
        name = scan_name(key.cases[one.scan.patient], key.days[one.scan.patient][one.scan.name])
        tasks.append(ScanTask(one, name, key.salt, options.missing))
    return tasks


def check_others(output_dir: Path, names: Sequence[str], key: Key, plan: Plan) -> None:
    """Check that all scans in the output come from this input. Those that cannot be converted now are removed.

    Raises:
        InputError: If others are there. They may be of patients whose files were moved, so nothing is removed.
    """
    failed = {
        scan_name(case, day)
        for patient, case in key.cases.items()
        for name, day in key.days.get(patient, {}).items()
        if name in plan.problems or name in plan.without
    }
    others = {path.stem for path in (output_dir / RECORDS).glob("case*.json")} - {*names}
    for name in others & failed:
        remove_scan(output_dir, name)
    if left := sorted(others - failed, key=scan_order):
        raise InputError(
            f"--output_dir {output_dir}: has {list_some(left)}, which is not in this --input; name the earlier input "
            f"and --key_file, or another --output_dir"
        )


def scan_order(name: str) -> tuple[int, int]:
    """Return the numbers of the case and the day in the name of a scan."""
    case, day = name.removeprefix("case").split("_day")
    return int(case), int(day)


def convert_scans(
    tasks: Sequence[ScanTask], output_dir: Path, num_proc: int | None
) -> Iterator[tuple[ScanTask, ScanOutcome]]:
    """Convert scans in several processes, with a progress bar. Yield each when it is done, in their order."""
    # The folder is not complete until the end.
    forget_index(output_dir)
    work = partial(convert_scan, output_dir=output_dir)
    bar = partial(tqdm, total=len(tasks), desc="Converting", unit="scan")
    workers = min(num_proc or count_cores(), len(tasks))
    if workers == 1:
        yield from zip(tasks, bar(map(work, tasks)), strict=True)
        return
    # New processes, because OpenCV and progress bars have threads, and a forked process may wait for them for ever.
    with process_pool(workers, cv2.setNumThreads, 1, context=get_context("spawn")) as pool:
        yield from zip(tasks, bar(pool.map(work, tasks)), strict=True)


def describe_outcome(
    plan: Plan, outcomes: dict[str, ScanOutcome], tasks: Sequence[ScanTask], options: ConvertOptions
) -> str:
    """Return lines about what was written."""
    counts = Counter(outcome.status for outcome in outcomes.values())
    done = [task for task in tasks if outcomes[task.name].status != "failed"]
    patients = {task.planned.scan.patient for task in done}
    lines = [
        f"{count(len(patients), 'patient')}, {count(len(done), 'scan')} in {options.output_dir}: "
        f"{counts['converted']} converted, {counts['kept']} kept from an earlier run",
        f"labels: {', '.join(plan.organs)}",
        f"who is who: {options.key_file} (private; keep it apart from the data)",
    ]
    if len(patients) == 1:
        lines.append(
            "only one patient: `build` needs two or more, to train on and to validate; if they are several, "
            "--patients tells them apart"
        )
    return "\n".join(lines)


def describe_failures(plan: Plan, done: int) -> str:
    """Return the message for the user if scans failed."""
    (first, why), *others = plan.problems.items()
    more = f"; {list_some([name for name, _ in others], 10)}" if others else ""
    total = len(plan.problems) + done
    rest = "The output has the others. " if done else ""
    return (
        f"{len(plan.problems)} of {total} scans failed: {first} ({why}){more}. {rest}"
        f"Start the same command again after a correction; what is done is not converted again"
    )
