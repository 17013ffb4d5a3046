"""Find files; write files and folders that are whole or not there; let one process at a time write to a folder."""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gi_segmentation.errors import DISK_FULL, InputError, one_line

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

# The hidden file that says which process writes to the folder it is in.
LOCK_FILE = ".lock"
# Some network file systems have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# The user may not write there, or the disk is read-only.
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What a process of another machine has left may be removed after a day. No write takes as long.
DEAD_AFTER_S = 24 * 3600
# Arguments of `renameat2`: paths count from the working folder, and the two names are exchanged.
AT_FDCWD = -100
RENAME_EXCHANGE = 2
# A number for each write of this process.
WRITES = itertools.count()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_file(path: Path) -> None:
    """Wait until a file is on the disk, so that it outlives a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class FoundFiles(NamedTuple):
    """The files of a folder, and what a caller should say about the rest. Each list is sorted.

    Attributes:
        files: The files, and links to files.
        broken: Links whose target is missing or cannot be reached. A file of a series may be missing then.
        repeated: Links to folders whose files are in `files` already, under the name of another folder.
    """

    files: list[Path]
    broken: list[Path]
    repeated: list[Path]


def is_hidden(path: Path) -> bool:
    """Tell whether a file or folder is ignored everywhere, because a program made it for its own use.

    For a link, its own name counts and not that of its target: git-annex and DVC keep their files in a hidden folder.

    Example:
        >>> [is_hidden(Path(name)) for name in ("a/._x.png", "a/.ipynb_checkpoints", "__MACOSX", ".git/x.png")]
        [True, True, True, False]
    """
    # Archives made on a Mac have this folder, with a file `._x.png` for each `x.png`.
    return path.name.startswith(".") or path.name == "__MACOSX"


def check_utf8(flag: str, path: Path) -> None:
    """Check that a path is text in UTF-8, for the libraries that read and write datasets and weights.

    Raises:
        InputError: If not.

    Example:
        >>> check_utf8("--output_dir", Path(os.fsdecode(b"/caf\\xe9/run")))
        Traceback (most recent call last):
        ...
        gi_segmentation.errors.InputError: --output_dir: expected a path in UTF-8, but got '/caf\\udce9/run'; rename it
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{flag}: expected a path in UTF-8, but got {str(path)!r}; rename it") from error


def find_files(folder: Path, left_out: Path | None = None) -> FoundFiles:
    """List all files below a folder. Links are followed, and hidden names are passed over.

    Each folder is read once, so a circle of links ends, and a link to a folder that is also below `folder` itself adds
    nothing. Two links to one file are two files: git-annex links all files of equal content to one.

    Args:
        folder: Where to look. It may be a link, and may be hidden.
        left_out: A folder below it that is not looked into.

    Raises:
        InputError: If a folder cannot be read.
    """
    found = FoundFiles([], [], [])
    passed_over = identify(left_out) if left_out is not None and left_out.is_dir() else None
    seen: set[tuple[int, int]] = set()
    links = [folder]
    # Both lists grow in their loops. All real folders come before any link. So files have the names that they have
    # without the links, if there are such names.
    for link in links:
        folders = [link]
        for one in folders:
            identity = identify(one)
            if identity == passed_over and one != folder:
                continue
            if identity in seen:
                found.repeated.append(one)
            else:
                seen.add(identity)
                sort_entries(one, found, folders, links)
    return FoundFiles(*map(sorted, found))


def identify(folder: Path) -> tuple[int, int]:
    """Return the device and the number that tell a folder apart from all others, whatever its name is.

    Raises:
        InputError: If there is no such folder, or it cannot be read.
    """
    try:
        status = folder.stat()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be read ({one_line(error)}); correct the path or its permissions"
        ) from error
    return status.st_dev, status.st_ino


def sort_entries(folder: Path, found: FoundFiles, folders: list[Path], links: list[Path]) -> None:
    """Add what is in a folder to the files, to the folders, or to the links to folders; arguments as `find_files`."""
    try:
        with os.scandir(folder) as entries:
            # Sorted, so that of two links to a folder always the same one is followed.
            names = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"{folder}: this folder cannot be read ({one_line(error)}); correct its permissions"
        ) from error
    for entry in names:
        path = folder / entry.name
        if is_hidden(path):
            continue
        if entry.is_symlink():
            try:
                mode = path.stat().st_mode
            except OSError:
                found.broken.append(path)
                continue
            if stat.S_ISDIR(mode):
                links.append(path)
            elif stat.S_ISREG(mode):
                found.files.append(path)
        elif entry.is_dir():
            folders.append(path)
        # Opening a pipe or a socket could block forever.
        elif entry.is_file():
            found.files.append(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step. A reader finds the old text or the new one, even after a crash.

    A letter that UTF-8 does not have comes from a file name in another encoding. It is written as its number.
    """
    with writing_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def to_json(value: Any, digits: int | None = None) -> Any:
    """Return a value in the types of JSON. JSON has no NaN, so an undefined number becomes None.

    Args:
        value: Numbers, texts and None, also in dictionaries, lists, tuples and arrays.
        digits: Decimal places to which floats are rounded; None: not at all.

    Example:
        >>> to_json({"dice": (0.12345, math.nan)}), to_json(0.12345, digits=3)
        ({'dice': [0.12345, None]}, 0.123)
    """
    # Numbers and arrays of NumPy, which this module does not import.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: to_json(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, digits) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value if digits is None else round(float(value), digits)
    return value


def format_json(value: Any, **form: Any) -> str:
    """Return the text of a JSON file.

    Args:
        value: From `to_json` if a number may be undefined.
        **form: Arguments of `json.dumps`, where a file has another form than an indent of 2.

    Raises:
        ValueError: If a number is NaN or infinite. JSON has no such numbers.
    """
    return json.dumps(value, **{"indent": 2, "allow_nan": False, **form}) + "\n"


def write_json(path: Path, value: Any, **form: Any) -> None:
    """Write a JSON file in one step, as `write_text`; arguments and errors as `format_json`."""
    write_text(path, format_json(value, **form))


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside a file. What is written there becomes the file in one step, when the block ends.

    After an error nothing has changed. The file has the permissions that it would have without this function. If
    `path` is a link, the file that it points to is replaced. If that file is read-only, the link itself is: git-annex,
    for one, must find the content of its files unchanged.

    Args:
        path: The file to write. Its folder must exist. What is no file, such as `/dev/stdout`, is written to directly.

    Raises:
        OSError: If the file cannot be written.
    """
    if path.is_symlink() and not (path.exists() and not path.stat().st_mode & stat.S_IWUSR):
        path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    remove_dead(path.parent)
    # The end of the name is kept, because libraries choose the form of a file by it. A name has at most 255 bytes.
    scratch = path.with_name(f".writing-{name_writer()}-{path.name[-40:]}")
    try:
        yield scratch
        flush_file(scratch)
        if path.exists() and not path.is_symlink():
            keep_mode(path, scratch)
        # Replacing a file by another one in the same folder cannot be interrupted half-way.
        scratch.replace(path)
    finally:
        # After an error. Without one, the file has its name now.
        scratch.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write the file that the flag `--output` names, as `write_text`.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({one_line(error)}); name another file") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step, as `write_text`."""
    with writing_file(target) as scratch:
        shutil.copyfile(source, scratch)


@contextmanager
def writing_folder(folder: Path, alone: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the place of another one when the block ends. After an error, nothing changes.

    Linux exchanges the two folders in one step. Where the system cannot, an earlier folder is moved away first: if the
    process is killed in this moment, `clear_leftovers` moves it back.

    Args:
        folder: The folder to write. An earlier one is replaced, with everything in it: check it first. If it is a
            link, the folder that it points to is replaced. The folders above it are made.
        alone: As `clear_leftovers`.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder, alone)
    scratch = folder.with_name(f".{folder.name}.building-{name_writer()}")
    unfinished = scratch / "dataset"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if not (folder.exists() and exchange(unfinished, folder)):
            if folder.exists():
                folder.replace(scratch / "replaced")
            unfinished.replace(folder)
    finally:
        remove_leftover(scratch, folder)


def clear_leftovers(folder: Path, alone: bool = False) -> None:
    """Remove what killed processes left beside a folder that they wrote, and move an earlier folder back.

    Args:
        folder: As in `writing_folder`.
        alone: Whether no other process writes it now, because it is locked. Otherwise only the leftovers of processes
            that have ended are removed, as far as this machine can tell.
    """
    folder = folder.resolve()
    prefix = f".{folder.name}.building-"
    for leftover in folder.parent.glob(f"{escape(prefix)}*"):
        if alone or is_dead(leftover, leftover.name.removeprefix(prefix)):
            remove_leftover(leftover, folder)


def remove_leftover(scratch: Path, folder: Path) -> None:
    """Remove the hidden folder of `writing_folder`. If it has the only copy of the earlier folder, move this back."""
    if (scratch / "replaced").is_dir() and not folder.exists():
        (scratch / "replaced").replace(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def remove_dead(folder: Path) -> None:
    """Remove the hidden files that killed processes left in a folder, see `writing_file`."""
    for leftover in folder.glob(".writing-*"):
        if is_dead(leftover, leftover.name.removeprefix(".writing-")):
            leftover.unlink(missing_ok=True)


def name_machine() -> str:
    """Return eight digits for this machine, which any name of a file can have."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def name_writer() -> str:
    """Return a name that no other write has: of this machine, this process, and this call."""
    return f"{name_machine()}-{os.getpid()}-{next(WRITES)}"


def is_dead(path: Path, writer: str) -> bool:
    """Tell whether the process that writes a hidden file or folder has ended.

    Args:
        path: The file or folder.
        writer: The end of its name, from `name_writer` on.
    """
    machine, process, *_ = [*writer.split("-"), "", ""]
    if machine == name_machine() and process.isdecimal() and os.name == "posix":
        try:
            # The signal 0 does nothing, but it is an error if there is no process to receive it.
            os.kill(int(process), 0)
        except (ProcessLookupError, OverflowError):
            return True
        # It belongs to another user.
        except PermissionError:
            pass
        return False
    # The process runs on another machine, where it cannot be checked. So the age of the file decides.
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > DEAD_AFTER_S
    return False


def keep_mode(path: Path, scratch: Path) -> None:
    """Give a new file the permissions of the one that it will replace."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode != stat.S_IMODE(scratch.stat().st_mode):
        # Some mounted disks have no permissions.
        with contextlib.suppress(PermissionError):
            scratch.chmod(mode)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step, where the system can; return whether it did.

    Source: `man 2 renameat2`.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


@contextmanager
def writing_to(folder: Path, lock_file: Path) -> Iterator[None]:
    """Let no other process write to a folder until the block ends, and explain a full disk or missing permissions.

    Args:
        folder: For the messages.
        lock_file: The file that all processes lock which write to this folder. Its own folder is made if necessary.

    Raises:
        InputError: If another process writes to the folder, if it or a folder in it cannot be written, or if the
            disk is full.
    """
    try:
        lock = take_lock(folder, lock_file)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({one_line(error)}); name another one") from error
    try:
        yield
    except OSError as error:
        own = Path(str(error.filename)).is_relative_to(folder)
        if error.errno not in DISK_FULL and not (own and error.errno in NOT_ALLOWED):
            raise
        remedy = "free some space" if error.errno in DISK_FULL else "correct its permissions"
        raise InputError(
            f"--output_dir {folder}: cannot be written ({one_line(error)}); {remedy}, and run the same command again"
        ) from error
    finally:
        # The file is removed while this process still holds the lock. `FileLock` notices if a file that it has opened
        # was removed, and opens a new one. So another process never locks the removed file.
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
