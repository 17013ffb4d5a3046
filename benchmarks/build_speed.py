"""Build a dataset of 4,000 slices of real size with two processes, and compare seconds and memory with their limits.

A ratio below 1 means that the limit is kept. The whole competition has 38,496 slices, ten times as many.
"""

import tempfile
from pathlib import Path

from benchmarks.process_memory import measure
from dataset_builder.phantom import write_phantom

# The limits that a build with two processes must keep.
MAX_SECONDS, MAX_GB = 60.0, 1.5


def main() -> None:
    """Build and print a table."""
    with tempfile.TemporaryDirectory() as scratch:
        kaggle_dir = Path(scratch) / "kaggle"
        # 16 patients take turns in the four real sizes. 16 x 2 x 125 slices are 4,000.
        summary = write_phantom(kaggle_dir, num_cases=16, days_per_case=2, slices_per_scan=125)
        # The real command in a process of its own, so its start and its checks are part of the time.
        command = ["-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_dir), "--num_proc", "2"]
        built = measure([*command, "--output_dir", str(Path(scratch) / "gi_tract")])
    print(f"| build of {summary.slices} slices | measured | limit | ratio |\n|---|---|---|---|")
    print(f"| seconds | {built.seconds:.1f} | {MAX_SECONDS:.0f} | {built.seconds / MAX_SECONDS:.2f} |")
    print(f"| peak memory, GB | {built.peak_gb:.2f} | {MAX_GB} | {built.peak_gb / MAX_GB:.2f} |")


if __name__ == "__main__":
    main()
