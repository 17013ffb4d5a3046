"""`python -m gi_segmentation.publish`: publish a finished training, also one whose publication failed."""

import argparse
from pathlib import Path

from gi_segmentation.errors import check_repo_id, exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.publishing.options import add_publication_options, read_publication_options


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. The flags have the names of those of `run_segmentation.py`."""
    parser = argparse.ArgumentParser("python -m gi_segmentation.publish", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of a finished training")
    parser.add_argument(
        "--hub_model_id",
        metavar="NAMESPACE/NAME",
        required=True,
        help="name of the model on the Hub; without NAMESPACE/, it is that of the user of the token",
    )
    add_publication_options(parser, "true", "whether a new repository is private (default: true)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Publish the files of a run, as the training itself would have done at its end.

    Raises:
        InputError: If the folder is not that of a finished training, if no repository can have the name, or if the Hub
            fails.
    """
    arguments = parse_arguments(argv)
    # Before the card gets the new name.
    check_repo_id("--hub_model_id", arguments.hub_model_id)
    # This import stands here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.publishing.repository import find_repository
    from gi_segmentation.publishing.results import publish_run

    repo_id = find_repository("--hub_model_id", arguments.hub_model_id)
    print(publish_run(arguments.output_dir, repo_id, read_publication_options(arguments)).describe())


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error():
        main()
