"""Unpack a zip of scans into a temporary folder, after a check of what is in it."""

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from gi_segmentation.errors import InputError, one_line

# A study has some thousand files and some gigabytes. More is a mistake, or an archive made to fill the disk.
MAX_FILES = 100_000
MAX_BYTES = 32 * 2**30


@contextmanager
def unpacked(path: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """Yield a temporary folder with the files of a zip; any other path is yielded as it is.

    Args:
        path: The zip, or another file or folder.
        max_files: The largest number of files in the zip.
        max_bytes: The largest size of all its files together.

    Raises:
        InputError: If the zip is damaged, encrypted or too large, or if a file would be written outside the folder.
    """
    if not (path.is_file() and path.suffix.lower() == ".zip"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="gi-segmentation-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                check_archive(path, archive, Path(folder), max_files, max_bytes)
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise InputError(f"{path}: not a whole zip ({one_line(error)}); copy it again") from error
        yield Path(folder)


def check_archive(path: Path, archive: zipfile.ZipFile, folder: Path, max_files: int, max_bytes: int) -> None:
    """Check the table of contents of a zip.

    A file cannot become larger than this table says, because `zipfile` stops reading there.

    Raises:
        InputError: As `unpacked`.
    """
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    if len(members) > max_files or size > max_bytes:
        raise InputError(
            f"{path}: expected at most {max_files} files and {max_bytes / 2**30:.3g} GiB, got {len(members)} and "
            f"{size / 2**30:.1f} GiB; unpack it yourself and name the folder"
        )
    if size > shutil.disk_usage(folder).free:
        raise InputError(f"{path}: needs {size / 2**30:.1f} GiB in {folder.parent}, more than is free; set TMPDIR")
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        kind = stat.S_IFMT(member.external_attr >> 16)
        if (
            ".." in parts
            or parts[:1] == ("/",)
            or ":" in member.filename
            or kind not in (0, stat.S_IFREG, stat.S_IFDIR)
        ):
            raise InputError(f"{path}: {member.filename!r} would leave the folder; do not use this file")
        if member.flag_bits & 1:
            raise InputError(f"{path}: is encrypted; unpack it yourself and name the folder")
