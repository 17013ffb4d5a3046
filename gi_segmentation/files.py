"""Files that are whole or not there, and folders that one process at a time writes to."""

import errno
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi_segmentation.errors import DISK_FULL, InputError, one_line

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

# The hidden file that says which process writes to the folder it is in.
LOCK_FILE = ".lock"
# Some network file systems have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_file(path: Path) -> None:
    """Wait until a file is on the disk, so that it outlives a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step. Whoever reads it, after a crash too, finds the old text or the new one."""
    # Two processes that publish a run write its card at the same time.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        flush_file(scratch)
        # Replacing a file by another one in the same folder cannot be interrupted half-way.
        scratch.replace(path)
    finally:
        # After an error. Without one, the file has its name now.
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, as `write_text`.

    Raises:
        ValueError: If a number is NaN or infinite. JSON has no such numbers; use None.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def writing_to(folder: Path, lock_file: Path) -> Iterator[None]:
    """Let no other process write to a folder until the block ends, and explain a disk that is full.

    Args:
        folder: For the messages.
        lock_file: The file that all processes lock which write to this folder. Its own folder is made if necessary.

    Raises:
        InputError: If another process writes to the folder, if it cannot be written, or if the disk is full.
    """
    try:
        lock = take_lock(folder, lock_file)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({one_line(error)}); name another one") from error
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise InputError(
            f"--output_dir {folder}: cannot be written ({one_line(error)}); free some space, and run the same command "
            f"again"
        ) from error
    finally:
        # While the lock is held. A process that has opened this file already will find that it has no name any more.
        lock_file.unlink(missing_ok=True)
        lock.release()


def take_lock(folder: Path, lock_file: Path) -> "FileLock":
    """Lock a folder; arguments as `writing_to`.

    Raises:
        InputError: If another process has locked it.
        OSError: If the file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    # The system itself frees the lock when the process ends, also if it is killed. So a file that a killed process
    # left does not stop the next one. Processes that this one starts do not inherit the lock.
    lock = FileLock(lock_file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = lock_file.read_text(encoding="utf-8", errors="replace").strip() if lock_file.exists() else ""
        raise InputError(
            f"--output_dir {folder}: {holder or 'another process'} writes to this folder; wait for its end, or name "
            f"another one"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): see to it that nothing else writes to it", folder, one_line(error))
    lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock
