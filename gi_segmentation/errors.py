"""The error for every mistake that a user can make, and the way it ends a command."""

import errno
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from gi_segmentation.shortages import Advice, describe_full_cache, describe_shortage, unwrap

# The disk is full, the user may not store more, or a file may not become larger.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds in which the launcher ends all processes of a machine after one of them has failed. It takes about one.
LAUNCHER_S = 3
# More problems would make a message too long to read.
MAX_PROBLEMS = 10


class InputError(ValueError):
    """An input that cannot be used. The message says what was expected, what came, and what to do."""


class HubError(InputError):
    """A Hub that refused or failed, or that could not be reached."""


class StoppedError(Exception):
    """A command that has ended in order before all was done. The message says what is saved, and how to go on.

    Attributes:
        status: The exit status. After a signal it is what a shell gives to a process that a signal has ended: 128 plus
            its number. It is 0 if the user wanted only a part.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line, for a message of ours.

    Example:
        >>> one_line(OSError("no such\\n  file"))
        'no such file'
    """
    return " ".join(str(error).split())


def list_some(names: Sequence[str], limit: int = 3) -> str:
    """Return the first of many names.

    Example:
        >>> list_some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def join_problems(problems: Iterable[str]) -> str:
    """Return the problems of several scans as one message. Each is there once, and at most ten are.

    Example:
        >>> join_problems(["a.dcm: empty", "b.dcm: cut", "a.dcm: empty"])
        'a.dcm: empty. b.dcm: cut'
    """
    different = list(dict.fromkeys(problems))
    more = [f"{len(different) - MAX_PROBLEMS} more have other problems"] if different[MAX_PROBLEMS:] else []
    return ". ".join([*different[:MAX_PROBLEMS], *more])


def describe_fault(error: BaseException) -> str:
    """Return one line about an unexpected error, with its place in the code, as a part of a message.

    Example:
        >>> try:
        ...     {}["key"]
        ... except KeyError as error:
        ...     describe_fault(error)
        "unexpected KeyError in <doctest gi_segmentation.errors.describe_fault[0]>, line 2: 'key'; please report it"
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    text = one_line(error)
    return f"unexpected {type(error).__name__}{place}{': ' if text else ''}{text}; please report it"


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


def check_hub_variables() -> None:
    """Check the variables with secrets of a Hub, before a client can repeat them in a message.

    The client of the Hub puts a whole token into its error if the token cannot be sent. We put the address of the Hub
    into messages, and into the scores that are published.

    Raises:
        InputError: If a token has a character that no header of HTTP can have, or if the address has a password.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        # The client removes spaces and line breaks at both ends.
        token = os.environ.get(name, "").strip()
        wrong = [place for place, letter in enumerate(token, 1) if not "!" <= letter <= "~"]
        if wrong:
            raise InputError(
                f"{name}: expected letters, digits and underscores, but character {wrong[0]} of {len(token)} is "
                f"another one; copy the token again"
            )
    if "@" in urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc:
        raise InputError("HF_ENDPOINT: expected an address without a user and a password; put a token into HF_TOKEN")


def hide_token(text: str) -> str:
    """Return a message without the token of this user, which a Hub may have repeated in its answer."""
    # Imported here, because every command line imports this module, and `--help` must not wait for this package.
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "<token>") if token else text


def print_any_text() -> None:
    """Let a letter that the terminal does not have be printed as its number, instead of ending the program.

    A console of Windows has 256 letters, and a name in a DICOM file may be Japanese. A file name may be no UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        # A notebook has streams of another kind, which print everything.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(line: str) -> NoReturn:
    """Print a line about an error and end this process."""
    # If the first process has failed too, the launcher ends this one while it sleeps.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LAUNCHER_S)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


@contextmanager
def exit_on_input_error(advice: Advice = Advice()) -> Iterator[None]:  # noqa: B008 - it never changes
    """Turn an `InputError`, a `StoppedError`, Ctrl-C and a lack of memory into one line on stderr and an exit status.

    If all processes of a run find the same error, only the first one of each machine prints it.

    Args:
        advice: What a user of this command can do if there is not enough memory.
    """
    print_any_text()
    try:
        check_hub_variables()
        yield
        return
    except StoppedError as stopped:
        message, status = str(stopped), stopped.status
    except KeyboardInterrupt:
        message, status = "interrupted; what is written is whole, and the same command goes on", 128 + signal.SIGINT
    except Exception as error:
        line = describe_shortage(error, advice)
        if line is None and isinstance(error, InputError):
            line = hide_token(unwrap(str(error)))
        elif line is None and isinstance(error, OSError) and error.errno in DISK_FULL:
            line = f"{one_line(error)}; free some space, and run the same command again"
        # Any other exception is a bug in this program. It keeps its traceback, which shows where the bug is.
        if line is None:
            raise
        fail(line)
    # All processes of a training stop for the same reason, and one of them says it.
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    sys.exit(status)


def find_hub_cause(error: BaseException) -> BaseException:
    """Return the answer of the Hub, or the broken connection, behind an error of the client.

    The client wraps some of them: an upload ends in a `RuntimeError`, and a download in a `LocalEntryNotFoundError`.

    Returns:
        The first `HfHubHTTPError`, `httpx2.TransportError` or `JSONDecodeError` among the causes; the error itself if
        there is none.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError | httpx2.TransportError | JSONDecodeError):
            return cause
        cause = cause.__cause__
    return error


def describe_cause(cause: BaseException) -> str:
    """Return what `find_hub_cause` found, in one line without the link that explains a status in general.

    Example:
        >>> describe_cause(OSError("500 Server Error\\nFor more information check: https://example.org/500"))
        '500 Server Error'
    """
    # Some broken connections have no message.
    return hide_token(re.sub(r" ?For more information check: \S+", "", one_line(cause))) or type(cause).__name__


@contextmanager
def hub_errors(action: str, repo_id: str) -> Iterator[None]:
    """Turn an error of the Hub, or of the connection to it, into one line that says what to check.

    Args:
        action: What is done with the repository, for example `publishing`.
        repo_id: Name of the repository.

    Raises:
        InputError: If no repository can have this name.
        HubError: If the Hub refuses, fails or cannot be reached.
    """
    # Imported here, because every command line imports this module, and `--help` must not wait for these packages.
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{action} {repo_id}: expected NAMESPACE/NAME. {one_line(error)}") from error
    # The client lets errors of many kinds through, see `find_hub_cause`. A ValueError is a card that the Hub does not
    # accept, or an answer that is not JSON.
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if line := describe_full_cache(error, Path(constants.HF_HOME)):
            raise InputError(line) from error
        cause = find_hub_cause(error)
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        # After a refusal, another token helps. Every other failure comes from the Hub or from the connection to it.
        if status in (401, 403, 404):
            advice = f"check HF_TOKEN (write access to {repo_id.split('/')[0]}) and HF_ENDPOINT"
        else:
            advice = "check HF_ENDPOINT and the connection, or try again later"
        raise HubError(
            f"{action} {repo_id} at {constants.ENDPOINT} failed: {describe_cause(cause)}; {advice}"
        ) from error


def check_repo_id(flag: str, repo_id: str) -> None:
    """Check the name of a repository before there is any work for it.

    Args:
        flag: The flag that has the name, for the message.
        repo_id: Name of the repository.

    Raises:
        InputError: If no repository can have this name.

    Example:
        >>> check_repo_id("--push_to_hub", "../secrets")
        Traceback (most recent call last):
        ...
        gi_segmentation.errors.InputError: --push_to_hub: expected NAMESPACE/NAME, but got '../secrets'
    """
    # Imported here for the reason given in `hub_errors`.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{flag}: expected NAMESPACE/NAME, but got {repo_id!r}") from error


@contextmanager
def saying_how_to_go_on(advice: str) -> Iterator[None]:
    """Add to a `HubError` what is safe, and which command goes on."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}. {advice}") from error
