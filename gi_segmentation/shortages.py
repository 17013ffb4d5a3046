"""What ran out when a command fails, memory or disk space of a cache, and what a user can do about it."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

Resource = Literal["device", "machine", "shared", "files"]

# What the libraries say, the most special first. A process that loads slices is killed by "Bus error" if it writes to
# shared memory that is full, and by "Killed" if the system has no memory left.
SIGNS: dict[Resource, re.Pattern[str]] = {
    "files": re.compile(r"Too many open files|received \d+ items of ancdata", re.I),
    "shared": re.compile(r"Bus error|shared memory|torch_\w+>?: No space left", re.I),
    "device": re.compile(r"out of memory|CU\w+_STATUS_ALLOC_FAILED", re.I),
    "machine": re.compile(
        r"killed by signal: Killed|terminated abruptly|abruptly died|can't allocate memory|Cannot allocate memory|"
        r"Insufficient memory|not enough memory|Unable to allocate|can't start new thread|bad_alloc",
        re.I,
    ),
}
# The system refuses to write because there is no space, or no permission.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
SHARED_MEMORY = Path("/dev/shm")
# Less free space than this does not hold a slice.
LITTLE_BYTES = 2**20


class Advice(NamedTuple):
    """What a user of a command can do, for each thing that can run out.

    Attributes:
        device: The memory of the GPU, or on a CPU that of a model and its batch.
        machine: The memory of the machine.
        shared: Shared memory, through which the processes that read files pass slices on.
    """

    device: str = "use a machine with more memory"
    machine: str = "close other programs, or use a machine with more memory"
    shared: str = "enlarge /dev/shm (docker run --shm-size 8g)"


ENLARGE_SHARED_MEMORY = "enlarge /dev/shm (docker run --shm-size 8g, or --ipc host)"
# What helps for each command, with its own flags.
TRAINING = Advice(
    "take a smaller --per_device_train_batch_size with a larger --gradient_accumulation_steps, a smaller "
    "--per_device_eval_batch_size, --gradient_checkpointing true, or a smaller --image_size",
    "take fewer --dataloader_num_workers, a smaller --per_device_train_batch_size with a larger "
    "--gradient_accumulation_steps, a smaller --per_device_eval_batch_size, or a smaller --image_size",
    f"{ENLARGE_SHARED_MEMORY}, take fewer --dataloader_num_workers (0 needs no shared memory), or smaller batches",
)
PREDICTION = Advice(
    "take a smaller --batch_size, fewer checkpoints in --model, or --device cpu",
    "take fewer --num_workers, a smaller --batch_size, or fewer checkpoints in --model",
    f"{ENLARGE_SHARED_MEMORY}, take fewer --num_workers (0 needs no shared memory), or a smaller --batch_size",
)
CROSS_VALIDATION = Advice(*(f"after --, {one}" for one in TRAINING))
POOL = Advice(
    machine="take a smaller --num_proc, or a machine with more memory",
    shared=f"{ENLARGE_SHARED_MEMORY}, or --num_proc 1",
)

WHAT: dict[Resource, str] = {
    "device": "the memory of the device is full",
    "machine": "the memory of the machine is full",
    "shared": "the shared memory /dev/shm is full",
    "files": "too many files are open",
}


def find_shortage(error: BaseException) -> Resource | None:
    """Return what ran out; None if the error has another cause.

    Example:
        >>> find_shortage(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        'device'
        >>> find_shortage(MemoryError()), find_shortage(ValueError("no memory of it"))
        ('machine', None)
    """
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return "files"
        # A lock that processes share is a file of shared memory. Its error names no file.
        if error.errno == errno.ENOSPC and error.filename is None and is_full(SHARED_MEMORY):
            return "shared"
        return "machine" if error.errno == errno.ENOMEM else None
    # OpenCV has a class of its own. What a process that loads slices raises comes as text, even an `OSError`.
    if not isinstance(error, OSError | RuntimeError | MemoryError) and type(error).__module__ != "cv2":
        return None
    # PyTorch says that a process has ended, and in the cause by which signal.
    text = f"{error} {error.__cause__ or ''}"
    found = next((resource for resource, pattern in SIGNS.items() if pattern.search(text)), None)
    return found or ("machine" if isinstance(error, MemoryError) else None)


def is_full(folder: Path) -> bool:
    """Return whether a file system has almost no space left."""
    try:
        return shutil.disk_usage(folder).free < LITTLE_BYTES
    except OSError:
        return False


def unwrap(text: str) -> str:
    """Return the message of an error of a process that loads slices. PyTorch puts its whole traceback into the text.

    Example:
        >>> unwrap("Caught OSError in DataLoader worker process 0.\\nOriginal Traceback ...\\nOSError: no file")
        'no file'
    """
    if "\nOriginal Traceback" not in text:
        return text
    # Names of errors begin their lines, and everything else in a traceback has spaces in front.
    return re.split(r"^[A-Za-z_][\w.]*(?:: |\n|\Z)", text.strip(), flags=re.M)[-1].strip()


def shorten(text: str) -> str:
    """Return the beginning of a long message of PyTorch, whose end is about its internals.

    Example:
        >>> shorten("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB. Of this")
        'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB.'
    """
    # A point within a number ends no sentence.
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return " ".join(sentences[:3])[:300]


def describe_shortage(error: BaseException, advice: Advice) -> str | None:
    """Return one line about what ran out, and what helps; None if the error has another cause.

    Example:
        >>> describe_shortage(MemoryError(), Advice(machine="predict fewer scans"))
        'the memory of the machine is full (MemoryError); predict fewer scans'
    """
    resource = find_shortage(error)
    if resource is None:
        return None
    help_line = "`ulimit -n 65535` allows more" if resource == "files" else getattr(advice, resource)
    said = shorten(unwrap(str(error))) or type(error).__name__
    return f"{WHAT[resource]} ({said}); {help_line}"


def describe_full_cache(error: BaseException, cache: Path) -> str | None:
    """Return one line about a cache that is full or that this user may not write; None if the error has another cause.

    Args:
        error: What a library raised. The refusal of the system is the error itself or one of its causes.
        cache: Folder of the cache.

    Example:
        >>> describe_full_cache(OSError(errno.ENOSPC, "No space left"), Path("/cache")).split(";")[0]
        'the cache /cache cannot be written ([Errno 28] No space left)'
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in REFUSALS:
            path = cause.filename
            # A file elsewhere, such as one of the dataset, has nothing to do with the cache.
            if path is None or Path(os.fsdecode(path)).is_relative_to(cache):
                return (
                    f"the cache {cache} cannot be written ({' '.join(str(cause).split())}); free some space there, or "
                    f"let HF_HOME name a folder with room that you may write to"
                )
        cause = cause.__cause__ or cause.__context__
    return None
