"""The options of a publication, and the flags of a command line that set them."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Its module takes seconds to load, and `--help` does not need it.
    from gi_segmentation.arguments import RunArguments


@dataclass(frozen=True)
class PublicationOptions:
    """How a user wants something to be published.

    Attributes:
        private: Whether a new repository is private; None: as the Hub decides.
        overwrite: Whether files may be replaced that are not as our last publication left them.
        pictures: Whether pictures of patients may be in a public repository.
    """

    private: bool | None = True
    overwrite: bool = False
    pictures: bool = False

    def to_flags(self) -> list[str]:
        """Return the words of a command line that say the same."""
        words = [] if self.private is None else ["--hub_private_repo", str(self.private).lower()]
        words += ["--overwrite_repository"] if self.overwrite else []
        return words + (["--publish_pictures"] if self.pictures else [])


def add_publication_options(
    parser: argparse.ArgumentParser, private: str | None, private_help: str, pictures: bool = True
) -> None:
    """Add the flags for `read_publication_options` to a command line.

    Args:
        parser: The command line.
        private: Default of `--hub_private_repo`: true, false, or None.
        private_help: Help of this flag.
        pictures: Whether what is published has pictures of patients beside the data.
    """
    parser.add_argument(
        "--hub_private_repo", type=str.lower, choices=("true", "false"), default=private, help=private_help
    )
    parser.add_argument(
        "--overwrite_repository",
        action="store_true",
        help="replace everything in the repository, also files that this project did not publish, or that were "
        "changed since; without this flag, such files stop the command",
    )
    if pictures:
        parser.add_argument(
            "--publish_pictures",
            action="store_true",
            help="publish pictures that show slices of patients in a public repository too; without this flag, they "
            "stay out of it",
        )
    else:
        parser.set_defaults(publish_pictures=False)


def read_publication_options(arguments: argparse.Namespace) -> PublicationOptions:
    """Return what the flags of `add_publication_options` say. Without `--hub_private_repo`, `private` is None."""
    private = None if arguments.hub_private_repo is None else arguments.hub_private_repo == "true"
    return PublicationOptions(private, arguments.overwrite_repository, arguments.publish_pictures)


def find_publication_options(run_args: "RunArguments") -> PublicationOptions:
    """Return what the arguments of a training say about its publication."""
    return PublicationOptions(run_args.hub_private_repo, run_args.overwrite_repository, run_args.publish_pictures)
