"""The one kind of error that a user can cause: how a command ends on it, and how a Hub's refusal becomes one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input we cannot work with; the message says what was expected, what came and what to do."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the program with the message alone, exit status 1, when an `InputError` reaches it."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the refusal of a Hub, or a Hub that cannot be reached, into an `InputError` that says what to check."""
    import httpx2  # imported here, because `errors` must stay light: every command line imports it
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"publishing {repo_id} to {constants.ENDPOINT} failed: {reason}. Nothing local is lost; check HF_TOKEN "
            f"(write access to {repo_id.split('/')[0]}) and HF_ENDPOINT, then run the command again"
        ) from error
