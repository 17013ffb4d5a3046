"""Build 4,000 slices of real size with two processes: seconds and memory against their limits."""

import tempfile
from pathlib import Path

from benchmarks.process_memory import measure
from dataset_builder.phantom import write_phantom

MAX_SECONDS, MAX_GB = 60.0, 1.5


def main() -> None:
    """Build and print a table."""
    with tempfile.TemporaryDirectory() as scratch:
        kaggle_dir = Path(scratch) / "kaggle"
        summary = write_phantom(kaggle_dir, num_cases=16, days_per_case=2, slices_per_scan=125)
        command = ["-m", "dataset_builder", "build", "--kaggle_dir", str(kaggle_dir), "--num_proc", "2"]
        built = measure([*command, "--output_dir", str(Path(scratch) / "gi_tract")])
    print(f"| build of {summary.slices} slices | measured | limit | ratio |\n|---|---|---|---|")
    print(f"| seconds | {built.seconds:.1f} | {MAX_SECONDS:.0f} | {built.seconds / MAX_SECONDS:.2f} |")
    print(f"| peak memory, GB | {built.peak_gb:.2f} | {MAX_GB} | {built.peak_gb / MAX_GB:.2f} |")


if __name__ == "__main__":
    main()
