"""`python -m gi_segmentation.compare`: score checkpoints alone, with test-time flips, and as an ensemble."""

import argparse
from pathlib import Path

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.files import format_json, to_json, write_output
from gi_segmentation.inference.arguments import Computation, add_prediction_flags, check_prediction_flags
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.rules import DEFAULT_PRESET, PRESETS
from gi_segmentation.schema import SCAN_SLICES
from gi_segmentation.shortages import PREDICTION


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.compare",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_prediction_flags(parser)
    parser.add_argument("--dataset_name", default="gi_tract", help="folder of a built dataset, or a Hub id")
    parser.add_argument("--split", default="validation", help="split to score; no checkpoint may know its patients")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="how to read the competition's metric: as the public grader, the winner or the host's notes",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the scores to; None: only print them")
    return check_prediction_flags(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Compare checkpoints on a split and print a table.

    Returns:
        The scores of each way to predict: a checkpoint alone, a checkpoint with flips, and so on.

    Raises:
        InputError: If a checkpoint or the dataset cannot be used.
    """
    arguments = parse_arguments(argv)
    # These imports stand here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.data.slices import find_dataset
    from gi_segmentation.inference.comparison import compare_members, describe_ways, format_comparison
    from gi_segmentation.inference.members import load_members

    rules = PRESETS[arguments.preset]
    slices = find_dataset(arguments.dataset_name, None)
    if arguments.split not in slices:
        raise InputError(f"--split {arguments.split}: expected one of {', '.join(slices)}")
    dataset = slices[arguments.split]
    # The split `test` has no annotations: its `segmentation` is None, or all its texts are empty.
    if not any(rle for organs in dataset["segmentation"] for rle in (organs or {}).values()):
        raise InputError(f"--split {arguments.split}: expected annotations to compare with, but no slice has any")
    members = load_members(arguments.model, arguments.revision, Computation.from_flags(arguments))
    scans, seconds = compare_members(members, dataset, arguments.batch_size, arguments.num_workers, rules)
    # Each way is scored on the same scans, so the differences between the ways have intervals of their own.
    described = describe_ways(scans, rules)
    print(format_comparison(described))
    print(
        f"preset {arguments.preset}; the brackets show 95 % intervals over {len(dataset.unique('case'))} patients; a "
        f"gain compares scores of the same patients; if its interval contains 0, the gain may be chance"
    )
    print(
        f"{members[0].name} alone: {seconds:.2f} s for a scan of {SCAN_SLICES} slices, without the time to read files"
    )
    if arguments.output is not None:
        found = {"preset": arguments.preset, **described, "seconds_per_scan": seconds}
        write_output(arguments.output, format_json(to_json(found)))
    return described["scores"]


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error(PREDICTION):
        main()
