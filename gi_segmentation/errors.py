"""The error for every mistake that a user can make, and the way it ends a command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """An input that cannot be used. The message says what was expected, what came, and what to do."""


def one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line, for a message of ours.

    Example:
        >>> one_line(OSError("no such\\n  file"))
        'no such file'
    """
    return " ".join(str(error).split())


@contextmanager
def reading(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into an `InputError`.

    Damaged bytes can be read as anything, and the parsers of NIfTI and DICOM stumble over them with a dozen kinds of
    exceptions. One damaged file must not stop the prediction of all others.

    Args:
        path: The file.
        problem: What is wrong, for the message.
        remedy: What to do.

    Example:
        >>> with reading(Path("a.nii"), "not a whole NIfTI file", "copy it again"):
        ...     raise EOFError("no data")
        Traceback (most recent call last):
        ...
        gi_segmentation.errors.InputError: a.nii: not a whole NIfTI file (no data); copy it again
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {problem} ({one_line(error)}); {remedy}") from error


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 1."""
    # Any other exception is a fault of this program. It keeps its traceback, which shows where the fault is.
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn an error of the Hub, or of the connection to it, into an `InputError` that says what to check."""
    # Imported here, because every command line imports this module, and `--help` must not wait for these packages.
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError) as error:
        raise InputError(
            f"publishing {repo_id} to {constants.ENDPOINT} failed: {one_line(error)}. Nothing local is lost; check "
            f"HF_TOKEN (write access to {repo_id.split('/')[0]}) and HF_ENDPOINT, then run the command again"
        ) from error
