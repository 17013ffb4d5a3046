"""The flags of `convert`. This module imports nothing slow."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from gi_segmentation.errors import InputError

Missing: TypeAlias = Literal["unknown", "empty"]


@dataclass(frozen=True)
class ConvertOptions:
    """The flags of `convert` that say what is taken, and where it goes.

    Attributes:
        output_dir: The folder to write; None with `--list`.
        organs: `--organs`; empty: by the names that are known.
        missing: What an organ is that nobody has drawn in a scan.
        patterns: `--images` and `--labels`; None: what is recognised.
        label_names: `--label_names`; empty: what is there.
        channel: `--channel`; None: `0000`.
        patients: `--patients`; empty: what names tell.
        structure_set: `--structure_set`; none: the newest approved.
        interpolate: `--interpolate`.
        corrections: `--corrections`; None: nothing is compared.
        key_file: The private key.
        num_proc: Number of processes; None: one per core.
    """

    output_dir: Path | None
    organs: str
    missing: Missing
    patterns: tuple[str, str] | None
    label_names: str
    channel: str | None
    patients: str
    structure_set: tuple[str, ...]
    interpolate: bool
    corrections: Path | None
    key_file: Path | None
    num_proc: int | None


def add_convert_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `convert`."""
    add = parser.add_argument
    add(
        "--input", type=Path, required=True, help="a folder or a zip: DICOM with structure sets, NIfTI with label maps"
    )
    add("--output_dir", type=Path, help="folder to write in Kaggle's layout; `verify` and `build` read it")
    add("--list", action="store_true", help="say what was found and what would be taken, and stop")
    add(
        "--organs",
        default="",
        metavar='"ORGAN=PATTERN,...;..."',
        help='which structures each organ is, for example "stomach=Stomach*,Magen;large_bowel=Colon*,Bowel_Large"; '
        "empty: known names of a structure set, all of a label map",
    )
    add(
        "--missing",
        choices=("unknown", "empty"),
        default="unknown",
        help="what an organ is that nobody has drawn in a scan: unknown (training and scores leave it out) or empty",
    )
    add_nifti_flags(parser)
    add(
        "--patients",
        default="",
        metavar="PATTERN",
        help='scans whose paths begin alike are of one patient, for example "*" for the first folder; empty: by '
        "PatientID, and NIfTI by names like sub-01_ses-02",
    )
    add(
        "--structure_set",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="of several structure sets of a scan, one with this in its name or file name; []: the newest approved",
    )
    add(
        "--interpolate",
        action="store_true",
        help="fill slices between those with contours, which are empty otherwise",
    )
    add(
        "--corrections",
        type=Path,
        metavar="PREDICTED",
        help="what a model has predicted for these scans (SEG, RTSTRUCT, NIfTI); a table says what people changed",
    )
    add("--key_file", type=Path, help="private file of patients and case numbers; None: OUTPUT_DIR.key.json")
    add("--num_proc", type=int, help="number of processes; None: one per core")


def add_nifti_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only NIfTI files need."""
    add = parser.add_argument
    add("--images", metavar="PATTERN", help='the NIfTI scans below --input, for example "*/t2.nii.gz"; with --labels')
    add("--labels", metavar="PATTERN", help='their label maps, for example "*/t2_seg.nii.gz" or "*/masks/*.nii.gz"')
    add(
        "--label_names",
        default="",
        metavar="NAMES|FILE",
        help='names of values in label maps, for example "1=stomach,2=duodenum", or a file of JSON, ITK-SNAP, 3D '
        "Slicer or FreeSurfer; empty: a file beside them, or label_1, label_2 and so on",
    )
    add("--channel", metavar="NUMBER", help="the channel of an nnU-Net dataset to take; None: 0000")


def read_options(arguments: argparse.Namespace) -> ConvertOptions:
    """Check the flags.

    Raises:
        InputError: If one is missing, or flags contradict each other.
    """
    output_dir, key_file = arguments.output_dir, arguments.key_file
    if output_dir is None and not arguments.list:
        raise InputError("--output_dir: expected the folder to write, got none; name it, or add --list")
    if (arguments.images is None) != (arguments.labels is None):
        raise InputError("--images and --labels: expected both or none; name the pattern of the other one, too")
    if arguments.num_proc is not None and arguments.num_proc < 1:
        raise InputError(f"--num_proc {arguments.num_proc}: expected at least 1")
    if arguments.channel is not None and not arguments.channel.isdecimal():
        raise InputError(f"--channel {arguments.channel}: expected a number, for example 0001")
    if output_dir is not None:
        # A path such as `.` has no name of its own.
        named = output_dir if output_dir.name.strip(".") else output_dir.resolve()
        key_file = key_file or named.with_name(f"{named.name}.key.json")
        if key_file.resolve().is_relative_to(output_dir.resolve()):
            raise InputError(f"--key_file {key_file}: lies in the output, which may be published; name another place")
    return ConvertOptions(
        output_dir,
        arguments.organs,
        arguments.missing,
        (arguments.images, arguments.labels) if arguments.images is not None else None,
        arguments.label_names,
        arguments.channel.zfill(4) if arguments.channel else None,
        arguments.patients,
        tuple(arguments.structure_set),
        arguments.interpolate,
        arguments.corrections,
        key_file,
        arguments.num_proc,
    )
