"""Write the dataset folder `gi_tract`: Parquet shards and a card, whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset_builder.gi_tract import GiTract, GiTractConfig, split_scans
from dataset_builder.verify import Inspection, inspect_scans
from gi_segmentation.data.kaggle import FAULTY_SCANS, KaggleDataError, Scan, read_scans
from gi_segmentation.publishing.cards import render_card
from gi_segmentation.publishing.hub import Publication, hash_file, publish_folder
from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM, hash_splits

MARKER = "pretty_name: UW-Madison GI Tract"  # the line of the card by which an earlier build is known


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote.

    Attributes:
        output_dir: The dataset folder.
        config: How it was split.
        counts: Counts by split name, as `verify.Inspection.counts`, with `patients`.
        excluded: Scan names that the folder has and the dataset lacks.
        split_hash: Fingerprint of which scan is in which split.
    """

    output_dir: Path
    config: GiTractConfig
    counts: dict[str, Counter[str]]
    excluded: list[str]
    split_hash: str

    def summary(self) -> str:
        """The report as a few lines for a terminal."""
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
    """Refuse a folder that holds anything but an earlier build: it is going to be replaced, with all it holds.

    Raises:
        KaggleDataError: If there is something else.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    card = output_dir / "README.md"
    what = "exists and is no dataset of ours"
    if card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace"):
        ours = {card, output_dir / "data", *(output_dir / "data").glob("*.parquet")}
        foreign = sorted(set(output_dir.rglob("*")) - ours)
        if not foreign:
            return
        what = f"{foreign[0].relative_to(output_dir)} is no part of the dataset there, which is to be replaced"
    raise KaggleDataError([f"{output_dir}: {what}; name another --output_dir or remove it"])


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed build left beside the folder; if it was killed while replacing one, put that back first."""
    for leftover in output_dir.parent.glob(f".{output_dir.name}.building-*"):
        if (leftover / "replaced").is_dir() and not output_dir.exists():
            (leftover / "replaced").rename(output_dir)
        shutil.rmtree(leftover, ignore_errors=True)


def inspect_splits(splits: dict[str, list[Scan]], kaggle_dir: Path, num_proc: int | None) -> dict[str, Inspection]:
    """Read every file of the splits once.

    Raises:
        KaggleDataError: With every problem found.
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
    """Run the builder and lay its shards out as `data/SPLIT-00000-of-00001.parquet`."""
    builder = GiTract(
        cache_dir=str(folder / "cache"),
        data_dir=str(kaggle_dir),
        **{name: value for name, value in asdict(config).items() if name in GiTractConfig.__annotations__},
    )
    shards = folder / "shards"
    builder.download_and_prepare(str(shards), file_format="parquet", num_proc=num_proc)
    data = folder / "dataset" / "data"
    data.mkdir(parents=True)
    for split in builder.info.splits:
        paths = sorted(shards.glob(f"gi_tract-{split}*.parquet"))
        for index, path in enumerate(paths):
            path.rename(data / f"{split}-{index:05d}-of-{len(paths):05d}.parquet")


def hash_content(data: Path) -> str:
    """Fingerprint of the shards.

    It stands in the card because `load_dataset` caches a local folder by what the card says of its files, and would
    otherwise go on giving the rows of an earlier build, of another fold say, or of another folder of the same name.

    Args:
        data: Folder of the shards.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 of their names and bytes.
    """
    lines = [f"{path.name} {hash_file(path)}" for path in sorted(data.iterdir())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def dataset_card(report: BuildReport, content_hash: str) -> str:
    """The card of a built dataset, with its counts."""
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

    Everything is checked before anything is written, and the folder appears under its name only when it is whole:
    a build that is stopped half-way leaves at most a hidden folder beside it.

    Args:
        kaggle_dir: Folder with `train.csv` and `train/`.
        output_dir: Where the dataset goes; an earlier build there is replaced.
        config: How to split.
        num_proc: Processes; None takes one per core.

    Returns:
        What was written.

    Raises:
        KaggleDataError: If the data has problems or `output_dir` holds something else.
    """
    config = config or GiTractConfig()
    num_proc = num_proc or os.cpu_count()
    output_dir = output_dir.resolve()
    clear_leftovers(output_dir)
    check_output_dir(output_dir)
    splits = split_scans(kaggle_dir, config)
    found = inspect_splits(splits, kaggle_dir, num_proc)
    names = {split: [scan.name for scan in scans] for split, scans in splits.items()}
    kept = {name for members in names.values() for name in members}
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
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.building-") as scratch:
        write_parquet(config, kaggle_dir, Path(scratch), num_proc)
        dataset_dir = Path(scratch) / "dataset"
        card = dataset_card(report, hash_content(dataset_dir / "data"))
        (dataset_dir / "README.md").write_text(card, encoding="utf-8")
        if output_dir.exists():
            shutil.move(output_dir, Path(scratch) / "replaced")
        dataset_dir.rename(output_dir)
    return report


def push_dataset(report: BuildReport, repo_id: str) -> Publication:
    """Publish a built dataset, privately: the licence of the data is not established.

    Args:
        report: What `build` returned.
        repo_id: `NAMESPACE/gi_tract`.

    Raises:
        InputError: As `publish_folder`.
    """
    tag = f"fold-{report.config.fold}-of-{report.config.num_folds}-{report.split_hash[:8]}"
    message = f"Build gi_tract, fold {report.config.fold} of {report.config.num_folds}"
    return publish_folder(report.output_dir, repo_id, "dataset", tag, message, private=True)
