"""The one kind of error that a user can cause, and how a command ends on it."""

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
