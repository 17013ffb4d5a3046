"""Unpack a zip of scans into a temporary folder, after a check of what is in it."""

import hashlib
import lzma
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from gi_segmentation.errors import DISK_FULL, InputError, one_line

# A study has some thousand files and some gigabytes. More is a mistake, or an archive made to fill the disk.
MAX_FILES = 100_000
MAX_BYTES = 32 * 2**30
# Archives that are not unpacked here. A `.nii.gz` is no archive, and `formats.inputs` looks into other `.gz` files.
OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar", ".iso")
# Names that Windows does not allow, also with an ending.
RESERVED_NAMES = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")
# A name has at most 255 bytes, and the names of prediction files are longer by some letters.
MAX_NAME_BYTES = 200


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file is an archive of files.

    Example:
        >>> [is_archive(Path(name)) for name in ("a.ZIP", "a.tar.gz", "a.nii.gz")]
        [True, True, False]
    """
    return path.name.lower().endswith((".zip", *OTHER_ARCHIVES))


@contextmanager
def unpacked(path: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """Yield a temporary folder with the files of a zip; any other path is yielded as it is.

    The folder has the name of the zip, because the names of scans may come from it.

    Args:
        path: The zip, or another file or folder.
        max_files: The largest number of files in the zip.
        max_bytes: The largest size of all its files together.

    Raises:
        InputError: If the zip is damaged, encrypted or too large, if a file would be written outside the folder, or
            if the path is another archive.
    """
    if not (path.is_file() and is_archive(path)):
        yield path
        return
    if path.suffix.lower() != ".zip":
        raise InputError(f"{path}: expected a zip or a folder, got another archive; unpack it and name the folder")
    with tempfile.TemporaryDirectory(prefix="gi-segmentation-") as temporary:
        folder = Path(temporary) / safe_name(path.stem)
        folder.mkdir()
        try:
            with zipfile.ZipFile(path) as archive:
                check_archive(path, archive, folder, max_files, max_bytes)
                extract(archive, folder)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise InputError(f"{path}: cannot be unpacked ({one_line(error)}); unpack it yourself") from error
        # A ValueError is a name in a wrong encoding.
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a whole zip ({one_line(error)}); copy it again") from error
        try:
            yield folder
        except InputError as error:
            # The user knows the zip, and not the folder.
            raise InputError(str(error).replace(str(folder), str(path))) from error


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
        raise InputError(
            f"{path}: needs {size / 2**30:.1f} GiB in {folder.parent.parent}, more than is free; set TMPDIR"
        )
    for member in members:
        parts = split_path(member)
        kind = stat.S_IFMT(member.external_attr >> 16)
        # A letter and a colon at the start are a drive of Windows. A colon elsewhere may be that of a time.
        drive = re.match(r"[A-Za-z]:", member.filename)
        if ".." in parts or parts[:1] == ("/",) or drive or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{path}: {member.filename!r} would leave the folder; do not use this file")
        if member.flag_bits & 1:
            raise InputError(f"{path}: is encrypted; unpack it yourself and name the folder")


def split_path(member: zipfile.ZipInfo) -> tuple[str, ...]:
    """Return the folders and the name of a file in a zip. Some programs of Windows write backslashes."""
    return PurePosixPath(member.filename.replace("\\", "/")).parts


def extract(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write the files of a zip that was checked."""
    members = [member for member in archive.infolist() if not member.filename.endswith(("/", "\\"))]
    for member, place in zip(members, safe_places(map(split_path, members)), strict=True):
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, target.open("xb") as file:
            shutil.copyfileobj(source, file)


def safe_places(names: Iterable[tuple[str, ...]]) -> list[PurePosixPath]:
    """Return where files are written, so that every system allows the names, and no file takes the place of another.

    Args:
        names: Folders and name of each file. Two may be the same, or differ only by what a system does not allow.

    Example:
        >>> [str(place) for place in safe_places([("10:23", "a"), ("10_23", "a"), ("b",), ("B",), ("b", "c")])]
        ['10_23/a', '2_10_23/a', '2_b', '3_B', 'b/c']
    """
    names = list(names)
    folders: dict[tuple[str, ...], PurePosixPath] = {(): PurePosixPath()}
    taken: set[str] = set()

    def place(parts: tuple[str, ...]) -> PurePosixPath:
        """Return a free path for a file or a folder in a folder that has one."""
        name = safe_name(parts[-1])
        path, number = folders[parts[:-1]] / name, 2
        # Windows and Macs take capital letters for small ones.
        while str(path).casefold() in taken:
            path, number = path.with_name(f"{number}_{name}"), number + 1
        taken.add(str(path).casefold())
        return path

    for parts in names:
        for length in range(1, len(parts)):
            if parts[:length] not in folders:
                folders[parts[:length]] = place(parts[:length])
    return [place(parts) for parts in names]


def safe_name(name: str) -> str:
    r"""Return a name of a file or folder that every system allows, and that is not too long.

    Example:
        >>> [safe_name(name) for name in ("scan 10:23", "a. ", "nul.dcm", "a\nb", "IM0001.dcm")]
        ['scan 10_23', 'a__', '_nul.dcm', 'a_b', 'IM0001.dcm']
    """
    name = "".join("_" if letter in '<>:"|?*\\/' or not letter.isprintable() else letter for letter in name)
    kept = name.rstrip(". ")
    name = kept + "_" * (len(name) - len(kept))
    if RESERVED_NAMES.fullmatch(name):
        name = f"_{name}"
    data = name.encode(errors="replace")
    if len(data) > MAX_NAME_BYTES:
        digest = hashlib.sha256(data).hexdigest()[:8]
        # The ending says what the file is.
        name = f"{data[:100].decode(errors='ignore')}_{digest}{data[-20:].decode(errors='ignore')}"
    return name
