"""`python -m gi_segmentation.predict`: predict slices or volumes with one or several checkpoints."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.inference.arguments import (
    FORMAT_NAMES,
    Computation,
    OnError,
    add_prediction_flags,
    check_prediction_flags,
)
from gi_segmentation.memory import keep_freed_memory
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.shortages import PREDICTION

if TYPE_CHECKING:
    from accelerate import PartialState

    from gi_segmentation.formats.inputs import InputScan, InputScans, Kind
    from gi_segmentation.inference.batches import PredictionSettings
    from gi_segmentation.inference.members import Member
    from gi_segmentation.inference.sample_submission import Sample
    from gi_segmentation.schema import FieldOfView


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: If a number is too small, or if flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_prediction_flags(parser)
    parser.add_argument(
        "--test_time_flips",
        action="store_true",
        help="average over flipped slices in up to four forward passes; for a model that was trained with flips",
    )
    parser.add_argument(
        "--folds",
        action="store_true",
        help="average the models of all folds of --model: branches fold-K on the Hub, or folders fold-K",
    )
    parser.add_argument(
        "--no_postprocessing",
        action="store_true",
        help="keep every component, even if the checkpoint has limits for the volume and confidence of components",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="Kaggle's slices (caseN_dayN/scans/slice_*.png), NIfTI files, or DICOM series; a file, a folder or a zip",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the prediction files")
    parser.add_argument(
        "--series",
        nargs="+",
        default=[],
        metavar="TEXT|UID",
        help="predict only these scans of the input: the UID of a series, or a part of a name or a description",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMAT_NAMES,
        help="kaggle writes submission.csv, nifti a label map per scan, dicom-seg a segmentation and "
        "rtstruct a structure set per series, report two files per scan with its measures and a triage; "
        "None: what fits the input",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="with --format nifti, write the probabilities before post-processing, too: a NIfTI file per organ",
    )
    parser.add_argument(
        "--sample_submission",
        type=Path,
        metavar="CSV",
        help="submission.csv gets the rows of this file, in its order; without rows in it, those of the slices that "
        "are found, and none is no error",
    )
    parser.add_argument(
        "--on_error",
        choices=get_args(OnError),
        default="stop",
        help="empty: a slice of Kaggle's that cannot be read, or an id without a slice, gets empty rows and a "
        "warning, and is no error; for a hidden test set, which nobody can repair",
    )
    parser.add_argument("--list", action="store_true", help="say what was found and what would be written, and stop")
    arguments = check_prediction_flags(parser.parse_args(argv))
    if arguments.folds and (len(arguments.model) > 1 or arguments.revision):
        raise InputError("--folds takes all folds of one --model; leave out the other ones, and --revision")
    return arguments


def main(argv: list[str] | None = None) -> list[Path]:
    """Predict slices or volumes.

    Returns:
        The paths of the prediction files; with `--list`, of those that would be written.

    Raises:
        InputError: If a checkpoint or the input cannot be used, if a scan failed, or if a format of `--format` could
            not be written. All other scans are done then.
    """
    arguments = parse_arguments(argv)
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.formats.archives import unpacked

    # Each process would unpack its own copy.
    if arguments.input.suffix.lower() == ".zip" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--input {arguments.input}: unpack it first, because several processes read it")
    keep_freed_memory()
    with unpacked(arguments.input) as path:
        return predict_input(arguments, path)


def predict_input(arguments: argparse.Namespace, path: Path) -> list[Path]:
    """Predict what lies at a path; see `main`."""
    from gi_segmentation.inference.output_folder import check_submission
    from gi_segmentation.inference.outputs import add_probabilities, list_outputs
    from gi_segmentation.inference.sample_submission import check_classes, read_sample

    output_dir = arguments.output_dir
    sample = read_sample(arguments.sample_submission) if arguments.sample_submission else None
    scans, formats = find_input(arguments, path, sample)
    submits = "kaggle" in formats.get("kaggle", ())
    # This check comes first, because a prediction may take an hour and must not overwrite an earlier one.
    if submits:
        check_submission(output_dir)
    if arguments.list:
        print_found(scans, formats, read_field(arguments.model[0]))
    # This is the last check without a model.
    paths = [output_dir / name for name in list_outputs(scans, formats)]
    if arguments.list:
        print("\n".join(f"would write {path}" for path in paths))
        if arguments.probabilities:
            print("would write a file with the probabilities of each organ beside each .nii.gz")
        return paths
    import torch
    from accelerate import PartialState

    from gi_segmentation.files import LOCK_FILE, writing_to
    from gi_segmentation.inference.duration import estimate_hidden_test

    # Started by `accelerate launch`, there are several processes. Started alone, this is the only one. A process waits
    # at the end for all others, which may take hours longer.
    # Without `cpu`, the processes would not find each other on a machine without a GPU.
    cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    members, settings = load(arguments, str(state.device) if state.num_processes > 1 else None, scans.usable)
    if sample is not None and (line := check_classes(sample, members[0].labels.names)):
        scans.left_out.append(line)
    if arguments.probabilities:
        formats = add_probabilities(formats, members[0].labels)
        paths = [output_dir / name for name in list_outputs(scans, formats)]
    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(writing_to(output_dir, output_dir / LOCK_FILE))
            # While the checkpoints were loaded, another prediction may have ended.
            if submits:
                check_submission(output_dir)
            print("".join(f"{line}\n" for line in scans.left_out), end="", flush=True)
            if sample is not None and not sample.rows and not scans.scans:
                # Nobody sees the notebook again when Kaggle runs it on the hidden test set.
                print(estimate_hidden_test(members, settings, state.num_processes), flush=True)
        # No process writes before the folder is locked.
        state.wait_for_everyone()
        asked = arguments.format is not None
        write_predictions(members, settings, scans.scans, formats, output_dir, state, asked, sample)
    return paths


def find_input(
    arguments: argparse.Namespace, path: Path, sample: "Sample | None"
) -> tuple["InputScans", dict["Kind", list[str]]]:
    """Find the scans to predict, and the formats to write.

    Args:
        arguments: The command line.
        path: Where the scans lie.
        sample: From `--sample_submission`.

    Returns:
        The scans; and the formats for each kind of scans.

    Raises:
        InputError: If the input cannot be used, or if the flags do not fit it.
    """
    from gi_segmentation.formats.inputs import find_scans
    from gi_segmentation.inference.outputs import choose_formats, leave_out
    from gi_segmentation.inference.sample_submission import choose_sampled, describe_missing

    forgiving = arguments.on_error == "empty"
    scans = find_scans(path, arguments.output_dir, arguments.series, sample is not None, forgiving)
    # Without a scan, a submission without rows is all that can be written.
    formats: dict[Kind, list[str]] = {"kaggle": ["kaggle"]}
    if scans.scans or arguments.format not in (None, ["kaggle"]):
        formats = choose_formats(scans, arguments.format, arguments.probabilities)
    if sample is not None and "kaggle" not in formats.get("kaggle", ()):
        raise InputError("--sample_submission: is for slices of Kaggle's with --format kaggle; leave it out")
    # An empty segmentation of a patient could be taken for a finding.
    if forgiving and formats != {"kaggle": ["kaggle"]}:
        raise InputError("--on_error empty: is for slices of Kaggle's with --format kaggle alone; leave it out")
    scans = leave_out(scans, formats)
    if sample is not None:
        scans = choose_sampled(scans, sample)
        if missing := describe_missing(sample, scans.scans):
            if not forgiving:
                raise InputError(f"--sample_submission {missing}; correct --input, or add --on_error empty")
            scans.left_out.append(f"warning: empty rows: {missing}")
    return scans, formats


def print_found(scans: "InputScans", formats: Mapping["Kind", Sequence[str]], field_mm: "FieldOfView") -> None:
    """Print what was found, and what cannot be written.

    Args:
        scans: The input.
        formats: The formats to write.
        field_mm: The field of view of the training.
    """
    from gi_segmentation.formats.inputs import describe_scan
    from gi_segmentation.inference.outputs import describe_plan

    lines = [describe_scan(scan.in_field(field_mm)) for scan in scans.scans]
    lines += [line for scan in scans.usable for line in describe_plan(scan, formats[scan.kind])]
    print("\n".join([*lines, *scans.left_out]))


def read_field(name: str) -> "FieldOfView":
    """Return the field of view of the training for `--list`, which loads no model.

    A checkpoint on the Hub is not read for it. It is taken for one that was trained on Kaggle's slices.

    Args:
        name: A folder or a Hub id.

    Raises:
        InputError: If the configuration has it in another form.
    """
    from gi_segmentation.formats.volumes import FIELD_MM

    # With --folds, the checkpoints are in the folders of a folder.
    folders = [path.parent for path in (Path(name) / "config.json", *Path(name).glob("fold-*/config.json"))]
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        return FIELD_MM
    from transformers import PreTrainedConfig

    from gi_segmentation.models.configuration import read_field_mm

    settings, _ = PreTrainedConfig.get_config_dict(found)
    return read_field_mm(PreTrainedConfig.from_dict({"field_mm": settings.get("field_mm")})) or FIELD_MM


def write_predictions(
    members: list["Member"],
    settings: "PredictionSettings",
    scans: Sequence["InputScan"],
    formats: Mapping["Kind", Sequence[str]],
    output_dir: Path,
    state: "PartialState",
    asked: bool,
    sample: "Sample | None" = None,
) -> None:
    """Predict the share of this process, and print a table of all scans.

    Args:
        members: The checkpoints.
        settings: How the scans are predicted.
        scans: The scans of all processes.
        formats: The formats to write.
        output_dir: Folder for the files.
        state: The processes.
        asked: Whether the user named the formats. Then each that cannot be written is an error.
        sample: From `--sample_submission`.

    Raises:
        InputError: If a scan failed, if all of them are empty, if a file that was asked for could not be written, or
            as `predict_files`.
    """
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from gi_segmentation.inference.output_folder import forget_rows, write_submission
    from gi_segmentation.inference.prediction import describe_failures, describe_results, forgive, predict_files

    share = scans[state.process_index :: state.num_processes]
    results = []
    for kind, names in formats.items():
        some = [scan for scan in share if scan.kind == kind]
        for result in predict_files(members, some, names, output_dir, settings):
            result = forgive(result) if settings.on_error == "empty" else result
            for problem in result.problems:
                tqdm.write(f"warning: empty rows: {problem}", file=sys.stderr)
            if result.message:
                tqdm.write(f"{result.name} failed: {result.message}", file=sys.stderr)
            results.append(result)
    results = gather_object(results)
    if not state.is_main_process:
        return
    order = {scan.name: index for index, scan in enumerate(scans)}
    results.sort(key=lambda result: order[result.name])
    if results:
        print(describe_results(results, output_dir))
    if not all(result.is_complete(asked) for result in results):
        raise InputError(describe_failures(results, formats.get("kaggle", ())))
    if results and all(one.status == "empty" for one in results):
        raise InputError("--on_error empty: expected some slices that can be read, but got none; see the warnings")
    if "kaggle" in formats.get("kaggle", ()):
        write_submission(scans, output_dir, members[0].labels.names, sample)
        forget_rows(scans, output_dir)


def load(
    arguments: argparse.Namespace, device: str | None, scans: Sequence["InputScan"]
) -> tuple[list["Member"], "PredictionSettings"]:
    """Load the checkpoints, and tell the user what they do.

    Args:
        arguments: The command line.
        device: The device if `--device` names none; None: the GPU if there is one.
        scans: What is predicted.

    Raises:
        InputError: If a checkpoint cannot be used.
    """
    from gi_segmentation.inference.batches import PredictionSettings
    from gi_segmentation.inference.members import (
        describe_computation,
        describe_field,
        find_postprocessing,
        load_folds,
        load_members,
    )

    computation = Computation.from_flags(arguments)
    computation = replace(computation, device=computation.device or device)
    if arguments.folds:
        members = load_folds(arguments.model[0], computation)
        print(f"averages {len(members)} models: {', '.join(member.name for member in members)}")
    else:
        members = load_members(arguments.model, arguments.revision, computation)
    print(describe_computation(members))
    if seen := describe_field(members, scans):
        print(seen)
    # With --no_postprocessing, the configuration is not even read, because it may be malformed.
    postprocessing, remark = (None, "") if arguments.no_postprocessing else find_postprocessing(members)
    if remark:
        print(remark)
    settings = PredictionSettings(
        arguments.batch_size, arguments.num_workers, arguments.test_time_flips, postprocessing, arguments.on_error
    )
    return members, settings


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(PREDICTION):
        main()
