"""Several processes of one run: how many, who prints, and what the others do when one of them ends.

`accelerate launch` and `torchrun` start the processes and give each of them its number: `RANK` among all, and
`LOCAL_RANK` on its machine.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gi_segmentation.errors import InputError

# What the libraries say about a process that does not answer any more: gloo on CPUs, and NCCL on GPUs.
LOST = re.compile(r"(closed|reset) by peer|Broken pipe|remote process", re.I)


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
    """Turn the error of a process that waits for another one in vain into an `InputError`.

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
