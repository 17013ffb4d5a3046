"""Numbers in place of names: which patient is which case. The key file is private, and lies outside of the output."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gi_segmentation.errors import InputError, reading
from gi_segmentation.files import NO_LOCKS, format_json, writing_file

ABOUT = "Private: which patient is which case. Whoever has this file can name the patients of the dataset."
# Seconds in which another command has numbered its scans.
WAIT_S = 60
REMEDY = "name the right --key_file, or remove it to number the patients anew"


@dataclass
class Key:
    """The numbers of patients and of their scans.

    Attributes:
        salt: A secret, so that no fingerprint in the output can be compared with files.
        cases: The number of each patient.
        days: The number of each scan, by patient and scan.
    """

    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    cases: dict[str, int] = field(default_factory=dict)
    days: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, scans: Mapping[str, Sequence[str]]) -> None:
        """Number patients and scans that have no numbers yet.

        New patients are numbered in a random order. The scans of a patient are numbered in their order from 0 on, and
        new ones after those that have numbers.

        Args:
            scans: The names of the scans of each patient, in the order of time.
        """
        first = max(self.cases.values(), default=0) + 1
        new = [patient for patient in scans if patient not in self.cases]
        secrets.SystemRandom().shuffle(new)
        self.cases |= {patient: number for number, patient in enumerate(new, start=first)}
        for patient, names in scans.items():
            days = self.days.setdefault(patient, {})
            for name in names:
                days.setdefault(name, max(days.values(), default=-1) + 1)


def read_key(path: Path) -> Key:
    """Read a key file; an empty key if there is none.

    Raises:
        InputError: If it is no key file.
    """
    if not path.exists():
        return Key()
    with reading(path, "not a key file of `convert`", REMEDY):
        content = json.loads(path.read_text(encoding="utf-8"))
        key = Key(str(content["salt"]))
        for patient, entry in content["patients"].items():
            key.cases[patient] = check_number(entry["case"])
            key.days[patient] = {name: check_number(day) for name, day in entry["days"].items()}
    for what, numbers in (("case", key.cases.values()), *(("day", days.values()) for days in key.days.values())):
        if len(set(numbers)) < len(numbers):
            raise InputError(f"{path}: expected each {what} once, got {twice(numbers)} twice; {REMEDY}")
    return key


def check_number(value: Any) -> int:
    """Check the number of a case or a day."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def twice(numbers: Iterable[int]) -> int:
    """Return a number that is there more than once."""
    ordered = sorted(numbers)
    return next(first for first, second in pairwise(ordered) if first == second)


@contextmanager
def updating_key(path: Path) -> Iterator[Key]:
    """Read a key file, and write it when the block has ended well.

    Another command with the same key file waits meanwhile, so that no two patients get the same number.

    Raises:
        InputError: If it is no key file, if it cannot be written, or if another process has it for too long.
    """
    from filelock import FileLock, Timeout

    lock_file = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_file, timeout=WAIT_S, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"--key_file {path}: another process writes to it; wait for its end") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(path, error) from error
    try:
        key = read_key(path)
        yield key
        write_key(path, key)
    finally:
        # See `files.writing_to`.
        lock_file.unlink(missing_ok=True)
        lock.release()


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error of a key file that cannot be written."""
    return InputError(f"--key_file {path}: cannot be written ({error}); name another file")


def write_key(path: Path, key: Key) -> None:
    """Write a key file that only this user can read.

    Raises:
        InputError: If it cannot be written.
    """
    patients = {patient: {"case": case, "days": key.days.get(patient, {})} for patient, case in key.cases.items()}
    text = format_json({"about": ABOUT, "salt": key.salt, "patients": patients})
    try:
        with writing_file(path) as scratch:
            # From its first moment, nobody else can open the file.
            number = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise cannot_write(path, error) from error
