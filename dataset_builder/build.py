"""Write the dataset folder `gi_tract`, with Parquet files, a card and `eval.yaml`.

The folder is complete or it does not appear at all. Each slice is checked and written at once, to a hidden folder
beside the final one. If all slices are right, this folder is renamed at the end.
"""

import hashlib
import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dataset_builder.benchmark import BENCHMARK, benchmark_file
from dataset_builder.gi_tract import GiTractConfig, divide_scans, read_training_scans, slice_row
from dataset_builder.splits import MAX_COMBINED
from dataset_builder.verify import Inspection, inspect_slices
from gi_segmentation.data.synthetic import is_synthetic
from gi_segmentation.errors import saying_how_to_go_on
from gi_segmentation.files import check_utf8, clear_leftovers, hash_file, writing_folder, writing_to
from gi_segmentation.formats.kaggle.folder import KaggleScan
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.labels import LabelSet
from gi_segmentation.processes import count_cores, process_pool
from gi_segmentation.publishing.cards import render_card
from gi_segmentation.publishing.hub import Publication, prepare_repository, publish_folder
from gi_segmentation.publishing.options import PublicationOptions
from gi_segmentation.publishing.population import name_dataset
from gi_segmentation.publishing.repository import find_repository
from gi_segmentation.schema import SLICE_THICKNESS_MM, dataset_features, hash_splits

# The card of every build has one of these lines. A folder with such a card holds an earlier build.
MARKER = re.compile(
    r"^(pretty_name: UW-Madison GI Tract|  description: fold \d+ of \d+, seed \d+, content [0-9a-f]{16}$)",
    re.MULTILINE,
)
# Why a dataset does not go into a public repository.
DATASET_SHOWN = (
    "everybody could see the dataset; make the repository private in its settings, name another one, or add "
    "--hub_private_repo false if the rules of the data allow it"
)
# About 500 MB, the largest files that `datasets` writes.
MAX_SLICES_PER_FILE = 4000
# Slices that are checked and then written together. They form a group of rows in the file, about 4 MB, and a reader
# that streams gets at least one whole group. Whole scans at a time take a sixth more time, for memory that must be
# cleared first.
SLICES_PER_GROUP = 32

# Number of slices that all processes have done. Each worker process gets it when it starts.
progress: Synchronized


@dataclass(frozen=True)
class CardOptions:
    """What the user wants on the card of a dataset.

    Attributes:
        title: Name of the data; None: that of the repository or of the folder.
        license_name: Licence identifier of the Hub; None: nobody has stated one.
        repo_id: The repository where it will be published; None: it is not known.
    """

    title: str | None = None
    license_name: str | None = None
    repo_id: str | None = None


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote.

    Attributes:
        output_dir: The dataset folder.
        config: How the patients were split.
        labels: The organs.
        own: Whether the folder had `labels.json`.
        counts: For each split the counts of `verify.Inspection`, and the number of `patients`.
        shown: For each split, the number of slices that show an organ, by its name.
        drawn: For each split, the number of patients in whom somebody has drawn an organ, by its name.
        excluded: Names of the faulty scans that are in the Kaggle folder and not in the dataset.
        split_hash: Fingerprint that says which scan is in which split.
        synthetic: Whether all slices are those of a phantom.
        card: What the user wants on the card.
    """

    output_dir: Path
    config: GiTractConfig
    labels: LabelSet
    own: bool
    counts: dict[str, Counter[str]]
    shown: dict[str, Counter[str]]
    drawn: dict[str, Counter[str]]
    excluded: list[str]
    split_hash: str
    synthetic: bool
    card: CardOptions = field(default_factory=CardOptions)

    @property
    def title(self) -> str | None:
        """Name of the data on the card; None: the card speaks of Kaggle's data."""
        if not self.own and self.card.title is None and self.card.license_name is None:
            return None
        name = self.card.repo_id.split("/")[-1] if self.card.repo_id else self.output_dir.name
        return name_dataset(self.card.title or name, self.synthetic)

    def summary(self) -> str:
        """Return the report as a few lines for a terminal."""
        organs = () if self.own else self.labels.names
        header = f"{'split':<12}{'patients':>9}{'scans':>7}{'slices':>8}{'empty':>7}" + "".join(
            f"{organ:>13}" for organ in organs
        )
        lines = [header + f"{'overlap px':>12}"]
        for split, counts in self.counts.items():
            numbers = f"{counts['patients']:>9}{counts['scans']:>7}{counts['slices']:>8}{counts['empty']:>7}"
            shown = "".join(f"{self.shown[split][organ]:>13}" for organ in organs)
            lines.append(f"{split:<12}{numbers}{shown}{counts['overlap_pixels']:>12}")
        lines += self.list_organs() if self.own else []
        reason = "called faulty by the competition's hosts; --include_faulty_scans keeps them"
        lines.append(f"left out: {', '.join(self.excluded)} ({reason})" if self.excluded else "left out: nothing")
        lines.append(f"fold {self.config.fold} of {self.config.num_folds}, seed {self.config.seed}; "
                     f"split hash {self.split_hash[:12]}")  # fmt: skip
        lines.append(f"written to {self.output_dir}")
        return "\n".join(lines)

    def list_organs(self) -> list[str]:
        """Return a line for each organ, with its slices and patients by split."""
        width = max(len(organ) for organ in ("organ", *self.labels.names))
        lines = [f"{'organ':<{width}}" + "".join(f"{f'{split}: slices, patients':>30}" for split in self.drawn)]
        for organ in self.labels.names:
            numbers = "".join(
                f"{f'{self.shown[split][organ]}, {self.drawn[split][organ]}':>30}" for split in self.drawn
            )
            lines.append(f"{organ:<{width}}{numbers}")
        return lines


def check_dataset_dir(output_dir: Path) -> None:
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
    if card.is_file() and MARKER.search(card.read_text(encoding="utf-8", errors="replace")):
        ours = {card, output_dir / BENCHMARK, output_dir / "data", *(output_dir / "data").glob("*.parquet")}
        foreign = sorted(set(output_dir.rglob("*")) - ours)
        if not foreign:
            return
        what = f"the dataset there would be replaced, but {foreign[0].relative_to(output_dir)} is no part of it"
    raise KaggleDataError([f"{output_dir}: {what}; name another --output_dir or remove it"])


def share_progress(counter: Synchronized) -> None:
    """Let a worker process count the slices that it has done.

    Args:
        counter: The counter of all processes.
    """
    global progress
    progress = counter


def write_file(scans: list[KaggleScan], path: Path) -> Inspection:
    """Check scans and write them to a Parquet file. After the first problem, the rest is only checked."""
    found = Inspection()
    schema = dataset_features(scans[0].labels, own=scans[0].facts is not None).arrow_schema
    # PNGs are compressed already, and hardly two are equal. So further compression and a dictionary gain nothing.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for scan in scans:
            found.counts.update(scans=1)
            for start in range(0, len(scan.slices), SLICES_PER_GROUP):
                group = scan.slices[start : start + SLICES_PER_GROUP]
                inspection, slices = inspect_slices(scan, group)
                found.add(inspection)
                found.counts.update(synthetic=sum(is_synthetic(checked.image) for checked in slices))
                if not found.problems:
                    rows = [slice_row(checked, scan) for checked in slices]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                with progress.get_lock():
                    progress.value += len(group)
    return found


def write_splits(splits: dict[str, list[KaggleScan]], data: Path, num_proc: int) -> dict[str, Inspection]:
    """Check and write all scans in several processes, to files of the form that the Hub uses.

    Args:
        splits: The scans of each split.
        data: Where `SPLIT-00000-of-00001.parquet` and so on are written.
        num_proc: Number of processes.

    Returns:
        The counts of each split.

    Raises:
        KaggleDataError: With all problems of all splits, in the order of the scans.
    """
    data.mkdir(parents=True)
    files: list[tuple[str, list[KaggleScan], Path]] = []
    for split, scans in splits.items():
        slices = sum(len(scan.slices) for scan in scans)
        count = min(max(num_proc, math.ceil(slices / MAX_SLICES_PER_FILE)), len(scans))
        for index in range(count):
            part = scans[len(scans) * index // count : len(scans) * (index + 1) // count]
            files.append((split, part, data / f"{split}-{index:05d}-of-{count:05d}.parquet"))
    found = {split: Inspection() for split in splits}
    number = sum(len(scan.slices) for scans in splits.values() for scan in scans)
    counter = multiprocessing.Value("q", 0)
    with (
        tqdm(total=number, desc="Writing the dataset", unit="slice") as bar,
        process_pool(num_proc, share_progress, counter) as pool,
    ):
        written = [pool.submit(write_file, scans, path) for _, scans, path in files]
        while (state := wait(written, timeout=0.2)).not_done:
            # An error of one file ends the build before the others are written.
            for inspection in state.done:
                inspection.result()
            bar.update(counter.value - bar.n)
        # In the order of the files, so that the list of problems is the same for any `num_proc`.
        for (split, _, _), inspection in zip(files, written, strict=True):
            found[split].add(inspection.result())
        bar.update(counter.value - bar.n)
    problems = [problem for inspection in found.values() for problem in inspection.problems]
    if problems:
        raise KaggleDataError(problems)
    return found


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
    folder = report.output_dir.name if report.title else "gi_tract"
    return render_card(
        "dataset_card.md",
        counts=report.counts,
        shown=report.shown,
        drawn=report.drawn,
        own=report.own,
        title=report.title,
        license_name=report.card.license_name,
        folder=folder,
        repo_id=(report.title and report.card.repo_id) or f"NAMESPACE/{folder}",
        combined=len(report.labels) <= MAX_COMBINED,
        config=report.config,
        excluded=report.excluded,
        split_hash=report.split_hash,
        content_hash=content_hash,
        synthetic=report.synthetic,
        organs=report.labels.names,
        slice_thickness_mm=SLICE_THICKNESS_MM,
    )


def build(
    kaggle_dirs: Path | Sequence[Path],
    output_dir: Path,
    config: GiTractConfig | None = None,
    num_proc: int | None = None,
    card: CardOptions | None = None,
) -> BuildReport:
    """Build the dataset folder from Kaggle folders.

    A build that is stopped half-way leaves at most a hidden folder beside `output_dir`. The next build removes it.

    Args:
        kaggle_dirs: A folder with `train.csv` and `train/`, or several of them, each with other patients.
        output_dir: Where the dataset is written. An earlier build there is replaced.
        config: How to split the patients.
        num_proc: Number of processes; None takes one per core.
        card: What the user wants on the card.

    Returns:
        What was written.

    Raises:
        KaggleDataError: If the data has problems, or `output_dir` has anything but an earlier build.
        InputError: If another build writes to `output_dir`, or if the disk is full.
    """
    output_dir = output_dir.resolve()
    check_utf8("--output_dir", output_dir)
    # The folder itself is replaced at the end, so the lock is beside it.
    with writing_to(output_dir, output_dir.with_name(f".{output_dir.name}.lock")):
        folders = [kaggle_dirs] if isinstance(kaggle_dirs, Path) else kaggle_dirs
        return build_alone(
            folders, output_dir, config or GiTractConfig(), num_proc or count_cores(), card or CardOptions()
        )


def count_drawn(scans: list[KaggleScan]) -> Counter[str]:
    """Count for each organ the patients in whom somebody has drawn it."""
    return Counter(organ for organ, _ in {(organ, scan.case) for scan in scans for organ in scan.drawn})


def build_alone(
    kaggle_dirs: Sequence[Path], output_dir: Path, config: GiTractConfig, num_proc: int, card: CardOptions
) -> BuildReport:
    """Build the dataset folder while no other build does; arguments, result and errors as `build`."""
    # Leftovers come first: they may contain the earlier dataset, which the check must then see.
    clear_leftovers(output_dir, alone=True)
    check_dataset_dir(output_dir)
    # Names and CSV are checked first, which is quick. Then every image is read.
    scans, excluded = read_training_scans(kaggle_dirs, config)
    splits = divide_scans(scans, kaggle_dirs, config)
    with writing_folder(output_dir, alone=True) as dataset_dir:
        found = write_splits(splits, dataset_dir / "data", num_proc)
        report = BuildReport(
            output_dir=output_dir,
            config=config,
            labels=scans[0].labels,
            own=scans[0].facts is not None,
            card=card,
            shown={split: inspection.shown for split, inspection in found.items()},
            drawn={split: count_drawn(splits[split]) for split in found if split != "test"},
            counts={
                split: inspection.counts + Counter(patients=len({scan.case for scan in splits[split]}))
                for split, inspection in found.items()
            },
            excluded=[scan.name for scan in excluded],
            synthetic=all(one.counts["synthetic"] == one.counts["slices"] for one in found.values()),
            split_hash=hash_splits({split: [scan.name for scan in scans] for split, scans in splits.items()}),
        )
        text = dataset_card(report, hash_content(dataset_dir / "data"))
        (dataset_dir / "README.md").write_text(text, encoding="utf-8")
        benchmark = benchmark_file(config, report.labels, report.split_hash, report.synthetic, report.title)
        (dataset_dir / BENCHMARK).write_text(benchmark, encoding="utf-8")
    return report


def prepare_push(repo_id: str, options: PublicationOptions) -> str:
    """Create the repository before the build, so that a refusal is seen early; arguments as `push_dataset`.

    Returns:
        The whole name of the repository.

    Raises:
        InputError: If no repository can have this name, or if there is no token.
        RefusedError: If `push_dataset` would refuse the repository as it is now.
    """
    repo_id = find_repository("--push_to_hub", repo_id)
    prepare_repository(
        repo_id, options.private, "dataset", options.overwrite, DATASET_SHOWN if options.private else None
    )
    return repo_id


def push_dataset(report: BuildReport, repo_id: str, options: PublicationOptions) -> Publication:
    """Publish a built dataset, in a private repository unless the user wants a public one.

    Args:
        report: What `build` returned.
        repo_id: `NAMESPACE/gi_tract`.
        options: What the user wants. If a new repository is private, a public one is refused.

    Returns:
        Address, tag and commit of what was published.

    Raises:
        InputError: As `publish_folder`.
    """
    # Each split has a tag of its own, so that several folds of one dataset can be told apart in the repository.
    tag = f"fold-{report.config.fold}-of-{report.config.num_folds}-{report.split_hash[:8]}"
    message = f"Build {report.title or 'gi_tract'}, fold {report.config.fold} of {report.config.num_folds}"
    # A second build writes the same bytes, so what has arrived on the Hub is not sent again.
    go_on = f"The dataset in {report.output_dir} is complete; to publish it, run the same command again"
    with saying_how_to_go_on(go_on):
        return publish_folder(
            report.output_dir,
            repo_id,
            "dataset",
            tag,
            message,
            private=options.private,
            overwrite=options.overwrite,
            only_private=DATASET_SHOWN if options.private else None,
        )
