"""Several processes of one run: how many there are, which one prints, and what happens when one of them ends.

`accelerate launch` and `torchrun` start the processes and give each of them its number: `RANK` among all, and
`LOCAL_RANK` on its machine. A run starts more of them to read files, and these must never outlive it.
"""

import atexit
import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from typing import Any

from gi_segmentation.errors import InputError
from gi_segmentation.internals import end_if_a_batch_is_lost

# What the libraries say when a process no longer answers: gloo on CPUs, and NCCL on GPUs.
LOST = re.compile(r"(closed|reset) by peer|Broken pipe|remote process", re.I)
# Seconds that Python gets to end after an error. Some libraries wait for ever for threads and connections.
ENDING_S = 4


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    # Linux can limit a process to some cores, and a cluster does. Other systems only know the cores of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_printing_to_the_main_process() -> None:
    """Keep warnings, log lines and progress bars of the other processes off the screen. Their errors are still shown.

    Call it before the libraries are imported, because they read these variables then.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        return
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turn the error of a process that has lost another process of its run into an `InputError`.

    Raises:
        InputError: If another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise InputError(
            "another process of this run has ended, so this one cannot go on; the messages of that process and of the "
            "launcher say why; run the same command again, and it continues from the last checkpoint"
        ) from error


@contextmanager
def leaving_no_process_behind() -> Iterator[None]:
    """Let this process and all that it has started end within seconds, if the block ends with an error.

    It stands around everything that a command does. Python would first wait for each process that it has started, and
    for each thread. But a process that loads slices may wait for this one, and a connection for a process that has
    ended.
    """
    statuses: list[int] = []
    # Python calls such functions in reverse order: this one after those of the libraries, which a command imports
    # later, and before that of `multiprocessing`, which waits.
    atexit.register(end_at_once, statuses)
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code not in (None, 0):
            statuses.append(code if isinstance(code, int) else 1)
            # PyTorch raises an error whenever a process that loads slices is killed.
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kill_children(set())
        if statuses == [1]:
            end_later()
        raise


def end_later() -> None:
    """End this process with status 1 in `ENDING_S` seconds, if it has not ended by then."""
    try:
        # This thread of C needs neither Python's interpreter nor its lock.
        faulthandler.dump_traceback_later(ENDING_S, exit=True, file=os.open(os.devnull, os.O_WRONLY))
    except (RuntimeError, OSError):
        # There is no memory for a thread, or no file may be opened. An alarm of the system needs neither.
        if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(ENDING_S)


def end_at_once(statuses: Sequence[int]) -> None:
    """End this process with the status of its error, if there was one."""
    if statuses:
        for stream in (sys.stdout, sys.stderr):
            # A program that has read our output may have ended.
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(statuses[0])


def kill_children(spared: set[Any]) -> None:
    """Kill the processes that this one has started by `multiprocessing`, or `datasets` by its own copy of it.

    Args:
        spared: Processes that go on.
    """
    for package in ("multiprocessing", "multiprocess"):
        if package in sys.modules:
            for child in set(sys.modules[package].active_children()) - spared:
                child.kill()


def start_loader(worker: int) -> None:
    """Prepare a process that reads for a `DataLoader`: it ends with its parent, and loses no batch in silence.

    Args:
        worker: Number of the process.
    """
    end_with_parent()
    end_if_a_batch_is_lost()


def end_with_parent() -> None:
    """Let this process end as soon as the one that has started it has ended, for whatever reason.

    Otherwise it would wait for its next task if its parent was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start_pool_process(initializer: Callable[..., object] | None, *arguments: Any) -> None:
    """Prepare a process of `process_pool`."""
    # Ctrl-C reaches all processes. The main process ends the others, and only it has something to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if initializer is not None:
        initializer(*arguments)


@contextmanager
def process_pool(
    number: int, initializer: Callable[..., object] | None = None, *arguments: Any, context: BaseContext | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that end with this one, and at once if the block ends with an error.

    Args:
        number: Number of processes.
        initializer: Called by each process when it starts.
        *arguments: Its arguments.
        context: How processes are started; None: as `multiprocessing` does.
    """
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(number, context, start_pool_process, (initializer, *arguments)) as pool:
        try:
            yield pool
        except BaseException:
            # The pool would first do all that was submitted.
            pool.shutdown(wait=False, cancel_futures=True)
            kill_children(before)
            raise
