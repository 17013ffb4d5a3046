"""Write the dataset folder `gi_tract`, with Parquet files, a card and `eval.yaml`.

The folder is complete or it does not appear at all. All files are checked first. The dataset is then written to a
hidden folder beside the final one, and this folder is renamed at the end.
"""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset_builder.benchmark import BENCHMARK, benchmark_file
from dataset_builder.gi_tract import GiTract, GiTractConfig, split_scans
from dataset_builder.verify import Inspection, inspect_scans
from gi_segmentation.data.kaggle import FAULTY_SCANS, KaggleDataError, Scan, read_scans
from gi_segmentation.publishing.cards import render_card
from gi_segmentation.publishing.hub import Publication, hash_file, publish_folder
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM, hash_splits

# A line that the card of every build has. A folder whose card has it holds an earlier build.
MARKER = "pretty_name: UW-Madison GI Tract"


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote.

    Attributes:
        output_dir: The dataset folder.
        config: How the patients were split.
        counts: For each split the counts of `verify.Inspection`, and the number of `patients`.
        excluded: Names of the faulty scans that are in the Kaggle folder and not in the dataset.
        split_hash: Fingerprint that says which scan is in which split.
    """

    output_dir: Path
    config: GiTractConfig
    counts: dict[str, Counter[str]]
    excluded: list[str]
    split_hash: str

    def summary(self) -> str:
        """Return the report as a few lines for a terminal."""
        header = f"{'split':<12}{'patients':>9}{'scans':>7}{'slices':>8}{'empty':>7}" + "".join(
            f"{organ:>13}" for organ in ORGANS
        )
        lines = [header + f"{'overlap px':>12}"]
        for split, counts in self.counts.items():
            numbers = f"{counts['patients']:>9}{counts['scans']:>7}{counts['slices']:>8}{counts['empty']:>7}"
            organs = "".join(f"{counts[organ]:>13}" for organ in ORGANS)
            lines.append(f"{split:<12}{numbers}{organs}{counts['overlap_pixels']:>12}")
        reason = "called faulty by the competition's hosts; --include_faulty_scans keeps them"
        lines.append(f"left out: {', '.join(self.excluded)} ({reason})" if self.excluded else "left out: nothing")
        lines.append(f"fold {self.config.fold} of {self.config.num_folds}, seed {self.config.seed}; "
                     f"split hash {self.split_hash[:12]}")  # fmt: skip
        lines.append(f"written to {self.output_dir}")
        return "\n".join(lines)


def check_output_dir(output_dir: Path) -> None:
    """Check that a folder may be replaced, because everything in it would be lost.

    Raises:
        KaggleDataError: If the folder has anything but an earlier build.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    card = output_dir / "README.md"
    what = "exists and is no dataset of ours"
    # An earlier build has a card with our marker, `eval.yaml`, Parquet files, and nothing else. One more file, for
    # example a user's notes, stops the build.
    if card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace"):
        ours = {card, output_dir / BENCHMARK, output_dir / "data", *(output_dir / "data").glob("*.parquet")}
        foreign = sorted(set(output_dir.rglob("*")) - ours)
        if not foreign:
            return
        what = f"the dataset there would be replaced, but {foreign[0].relative_to(output_dir)} is no part of it"
    raise KaggleDataError([f"{output_dir}: {what}; name another --output_dir or remove it"])


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed build left beside the folder.

    A build moves an earlier dataset into its hidden folder before the new one gets the name. If it was killed between
    these two steps, the earlier dataset is moved back.
    """
    for leftover in output_dir.parent.glob(f".{output_dir.name}.building-*"):
        if (leftover / "replaced").is_dir() and not output_dir.exists():
            (leftover / "replaced").rename(output_dir)
        shutil.rmtree(leftover, ignore_errors=True)


def inspect_splits(splits: dict[str, list[Scan]], kaggle_dir: Path, num_proc: int | None) -> dict[str, Inspection]:
    """Read every file of the splits once.

    Returns:
        The counts of each split.

    Raises:
        KaggleDataError: With all problems of all splits.
    """
    csv_path = kaggle_dir / "train.csv"
    found = {
        split: inspect_scans(scans, csv_path, num_proc, description=f"Checking {split}")
        for split, scans in splits.items()
    }
    problems = [problem for inspection in found.values() for problem in inspection.problems]
    if problems:
        raise KaggleDataError(problems)
    return found


def write_parquet(config: GiTractConfig, kaggle_dir: Path, folder: Path, num_proc: int | None) -> None:
    """Run the builder, and rename its files to `data/SPLIT-00000-of-00001.parquet`, the form that the Hub uses."""
    # The cache lies in the temporary folder, so nothing of the build stays in the user's cache of `datasets`.
    builder = GiTract(
        cache_dir=str(folder / "cache"),
        data_dir=str(kaggle_dir),
        # Only our own fields are passed on. The others (name, version, ...) are set by `datasets`.
        **{name: value for name, value in asdict(config).items() if name in GiTractConfig.__annotations__},
    )
    shards = folder / "shards"
    builder.download_and_prepare(str(shards), file_format="parquet", num_proc=num_proc)
    data = folder / "dataset" / "data"
    data.mkdir(parents=True)
    # There is one file for each process, and more if a file grows too large. So how many there are is known only now.
    for split in builder.info.splits:
        paths = sorted(shards.glob(f"gi_tract-{split}*.parquet"))
        for index, path in enumerate(paths):
            path.rename(data / f"{split}-{index:05d}-of-{len(paths):05d}.parquet")


def hash_content(data: Path) -> str:
    """Compute the fingerprint of the Parquet files, which is written into the card.

    `load_dataset` keeps local folders in a cache. It recognises a folder by what the card says of its files, not by
    the files themselves. With the fingerprint in the card, a new build has another card, so `load_dataset` reads it
    anew. Without it, a user could get the rows of an earlier build, for example of another fold.

    Args:
        data: Folder of the Parquet files.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 of their names and bytes.
    """
    lines = [f"{path.name} {hash_file(path)}" for path in sorted(data.iterdir())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def dataset_card(report: BuildReport, content_hash: str) -> str:
    """Return the text of the dataset's card, with its counts."""
    return render_card(
        "dataset_card.md",
        counts=report.counts,
        config=report.config,
        excluded=report.excluded,
        split_hash=report.split_hash,
        content_hash=content_hash,
        organs=ORGANS,
        slice_thickness_mm=SLICE_THICKNESS_MM,
    )


def build(
    kaggle_dir: Path, output_dir: Path, config: GiTractConfig | None = None, num_proc: int | None = None
) -> BuildReport:
    """Build the dataset folder from a Kaggle folder.

    A build that is stopped half-way leaves at most a hidden folder beside `output_dir`. The next build removes it.

    Args:
        kaggle_dir: Folder with `train.csv` and `train/`.
        output_dir: Where the dataset is written. An earlier build there is replaced.
        config: How to split the patients.
        num_proc: Number of processes; None takes one per core.

    Returns:
        What was written.

    Raises:
        KaggleDataError: If the data has problems, or `output_dir` has anything but an earlier build.
    """
    config = config or GiTractConfig()
    num_proc = num_proc or os.cpu_count()
    output_dir = output_dir.resolve()
    # Leftovers come first: they may contain the earlier dataset, which the check must then see.
    clear_leftovers(output_dir)
    check_output_dir(output_dir)
    # Names and CSV are checked first, which is quick. Then every image is read.
    splits = split_scans(kaggle_dir, config)
    found = inspect_splits(splits, kaggle_dir, num_proc)
    names = {split: [scan.name for scan in scans] for split, scans in splits.items()}
    kept = {name for members in names.values() for name in members}
    # `split_scans` drops faulty scans, so the folder is listed again to name those that it has.
    all_scans, _ = read_scans(kaggle_dir)
    report = BuildReport(
        output_dir=output_dir,
        config=config,
        counts={
            split: inspection.counts + Counter(patients=len({scan.case for scan in splits[split]}))
            for split, inspection in found.items()
        },
        excluded=[scan.name for scan in all_scans if scan.name in FAULTY_SCANS and scan.name not in kept],
        split_hash=hash_splits(names),
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is beside the final one, on the same disk. So the renaming at the end copies nothing, and it
    # cannot stop half-way.
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.building-") as scratch:
        write_parquet(config, kaggle_dir, Path(scratch), num_proc)
        dataset_dir = Path(scratch) / "dataset"
        card = dataset_card(report, hash_content(dataset_dir / "data"))
        (dataset_dir / "README.md").write_text(card, encoding="utf-8")
        (dataset_dir / BENCHMARK).write_text(benchmark_file(config, report.split_hash), encoding="utf-8")
        # A folder that is not empty cannot be replaced by renaming. So the earlier dataset is moved away first, into
        # the temporary folder, which removes it at the end.
        if output_dir.exists():
            shutil.move(output_dir, Path(scratch) / "replaced")
        dataset_dir.rename(output_dir)
    return report


def push_dataset(report: BuildReport, repo_id: str) -> Publication:
    """Publish a built dataset in a private repository, because the licence of the data is not established.

    Args:
        report: What `build` returned.
        repo_id: `NAMESPACE/gi_tract`.

    Returns:
        Address, tag and commit of what was published.

    Raises:
        InputError: As `publish_folder`.
    """
    # Each split has a tag of its own, so that several folds of one dataset can be told apart in the repository.
    tag = f"fold-{report.config.fold}-of-{report.config.num_folds}-{report.split_hash[:8]}"
    message = f"Build gi_tract, fold {report.config.fold} of {report.config.num_folds}"
    return publish_folder(report.output_dir, repo_id, "dataset", tag, message, private=True)
