"""Compare a build with the least work that it could do, and its seconds and memory at two sizes.

The slices have the four real sizes. Scans of a phantom are repeated under other names by hard links, so a large Kaggle
folder takes little space. Both sides of the first table use one process.
"""

import argparse
import csv
import itertools
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.process_memory import Measured, measure
from dataset_builder.phantom import write_phantom


def repeat_scans(phantom_dir: Path, kaggle_dir: Path, num_slices: int) -> None:
    """Write a Kaggle folder of `num_slices` slices, whose scans are those of the phantom in turn."""
    scans = sorted(phantom_dir.glob("train/*/*/scans"))
    with (phantom_dir / "train.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    organs: dict[str, list[list[str]]] = {}
    for slice_id, *columns in rows:
        organs.setdefault(slice_id, []).append(columns)
    kaggle_dir.mkdir()
    with (kaggle_dir / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        paths = ((copy, path) for copy in itertools.count() for scan in scans for path in sorted(scan.iterdir()))
        for copy, path in itertools.islice(paths, num_slices):
            # A scan of the phantom, for example case3_day0, is repeated as day 1, day 2 and so on of the same patient.
            number, scan = path.name.split("_")[1], path.parent.parent.name
            name = f"{scan.split('_day')[0]}_day{copy}"
            folder = kaggle_dir / "train" / path.parents[2].name / name / "scans"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.name)
            slice_id = f"{scan}_slice_{number}"
            writer.writerows([f"{name}_slice_{number}", *columns] for columns in organs[slice_id])


def measure_build(kaggle_dir: Path, num_proc: int) -> Measured:
    """Run the real command in a process of its own, so its start and its checks are part of the time."""
    with tempfile.TemporaryDirectory(dir=kaggle_dir.parent) as output_dir:
        command = ["-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_dir), "--num_proc", str(num_proc)]
        # A repeated scan may have the name of a faulty one.
        return measure([*command, "--include_faulty_scans", "--output_dir", output_dir])


def measure_floor(kaggle_dir: Path) -> Measured:
    """Run the floor, `benchmarks.build_floor`."""
    with tempfile.TemporaryDirectory(dir=kaggle_dir.parent) as output_dir:
        return measure(["-m", "benchmarks.build_floor", str(kaggle_dir), str(Path(output_dir) / "floor.parquet")])


def main() -> None:
    """Build and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_slices", type=int, default=4000, help="size of the comparison with the floor")
    parser.add_argument(
        "--large", type=int, default=12_000, help="slices of the large build; 38496, as on Kaggle, needs 5 GB of disk"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the medians are compared")
    parser.add_argument("--num_proc", type=int, default=1, help="processes of the builds of two sizes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # Eight patients take turns in the four real sizes.
        write_phantom(Path(scratch) / "phantom", num_cases=8, days_per_case=1, slices_per_scan=125)
        folders = {}
        for size in (arguments.num_slices, arguments.large):
            folders[size] = Path(scratch) / f"kaggle-{size}"
            repeat_scans(Path(scratch) / "phantom", folders[size], size)
        # The sides take turns, so that a change of the machine's speed meets both.
        pairs = [
            (measure_floor(folders[arguments.num_slices]), measure_build(folders[arguments.num_slices], num_proc=1))
            for _ in range(arguments.repeats)
        ]
        print(f"| {arguments.num_slices} slices, one process | floor | build | ratio |\n|---|---|---|---|")
        for name in ("seconds", "processor_seconds"):
            floor = statistics.median(getattr(run, name) for run, _ in pairs)
            build = statistics.median(getattr(run, name) for _, run in pairs)
            print(f"| {name.replace('_', ' ')} | {floor:.2f} | {build:.2f} | {floor / build:.2f} |")
        print(
            "\n| slices | seconds | processor seconds | ms of them a slice | peak memory, GB |\n|---|---|---|---|---|"
        )
        for size, folder in folders.items():
            built = measure_build(folder, arguments.num_proc)
            each = 1000 * built.processor_seconds / size
            print(
                f"| {size} | {built.seconds:.1f} | {built.processor_seconds:.1f} | {each:.2f} | {built.peak_gb:.2f} |"
            )


if __name__ == "__main__":
    main()
