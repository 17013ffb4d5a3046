"""Let a command fail at a place of our choice, in a real process and without a change of its code.

The variable `FAULT` names the place, the error, the process (`RANK`) and the call at which it comes, as JSON. With the
folder `tests/support/faulty` in PYTHONPATH, every Python obeys it. `python -m tests.support.faults MODULE WORDS` runs
one module so.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FAULT = "GI_SEGMENTATION_TEST_FAULT"
# Where the function is that fails: module, class or nothing, function.
PLACES: dict[str, tuple[str, str, str]] = {
    "import": ("gi_segmentation.publishing.facts", "", ""),
    "preparation": ("gi_segmentation.data.prepared", "", "prepare_annotations"),
    "loader": ("gi_segmentation.data.transforms", "SliceTransform", "__call__"),
    "step": ("gi_segmentation.training.trainer", "SegmentationTrainer", "compute_loss"),
    "callback": ("gi_segmentation.training.averaging", "AverageCallback", "on_step_end"),
    "evaluation": ("gi_segmentation.training.trainer", "SegmentationTrainer", "prediction_step"),
    "metrics": ("gi_segmentation.training.evaluation", "ComputeMetrics", "__call__"),
    "scoring thread": ("gi_segmentation.scoring.streaming", "StreamingScorer", "measure"),
    "checkpoint": ("gi_segmentation.training.trainer", "SegmentationTrainer", "save_model"),
    "results": ("gi_segmentation.publishing.results", "", "write_results"),
    "held-back scans": ("gi_segmentation.cross_validation.report", "", "load_held_back"),
    "model": ("gi_segmentation.inference.members", "", "load_members"),
    "forward pass": ("gi_segmentation.inference.members", "Member", "logits"),
    "reader": ("gi_segmentation.inference.batches", "SliceFolder", "__getitems__"),
    "writer thread": ("gi_segmentation.inference.outputs", "", "write_label_map"),
    "pool": ("dataset_builder.verify", "", "inspect_slices"),
    "scoring pool": ("gi_segmentation.scoring.submissions", "", "measure_pair"),
}


def run_out_of_gpu_memory() -> None:
    """Raise what PyTorch raises without room on the GPU. There need not be one."""
    import torch

    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.01 GiB is "
        "free. Including non-PyTorch memory, this process has 14.76 GiB memory in use."
    )


def mix_dtypes() -> None:
    """Multiply matrices of two kinds of numbers."""
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16)


def allocate_with_torch() -> None:
    """Ask PyTorch for more memory than any machine has."""
    import torch

    torch.empty(10**15)


def allocate() -> None:
    """Ask Python for more memory than any machine has."""
    bytearray(10**17)


def die(number: int) -> Callable[[], None]:
    """Return a function that sends a signal to this very process, as the system does."""
    return lambda: os.kill(os.getpid(), number)


ERRORS: dict[str, Callable[[], None]] = {
    "CUDA out of memory": run_out_of_gpu_memory,
    "two dtypes": mix_dtypes,
    "no memory for PyTorch": allocate_with_torch,
    "no memory for Python": allocate,
    "SIGKILL": die(signal.SIGKILL),
    "SIGBUS": die(signal.SIGBUS),
    "Ctrl-C": die(signal.SIGINT),
}


# These need PyTorch, whose import takes seconds that are not those of the command.
OF_TORCH = ("CUDA out of memory", "two dtypes", "no memory for PyTorch")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as the module was imported."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self.name, self.call = name, call

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find our module by the other finders, and lengthen its execution."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self.call(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Let this process fail as `FAULT` says; nothing without this variable."""
    if FAULT not in os.environ:
        return
    fault = json.loads(os.environ[FAULT])
    module, owner, name = PLACES[fault["place"]]
    if os.environ.get("RANK", "0") != str(fault.get("rank", 0)):
        return
    if fault["error"] == "Ctrl-C":
        # A program in the background of a script ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == fault.get("call", 1):
            if fault["error"] in OF_TORCH:
                importlib.import_module("torch")
            # From here on, all processes have ten seconds.
            Path(fault["log"]).write_text(str(time.time()))
            ERRORS[fault["error"]]()

    def patch(loaded: ModuleType) -> None:
        if not name:
            fail()
            return
        place = getattr(loaded, owner) if owner else loaded
        original = getattr(place, name)

        # With the name of the original, another process finds it too.
        @functools.wraps(original)
        def failing(*args: Any, **kwargs: Any) -> Any:
            fail()
            return original(*args, **kwargs)

        setattr(place, name, failing)
        if fault["place"] == "preparation":
            loaded.SLICES_PER_PROCESS = 5  # type: ignore[attr-defined]

    sys.meta_path.insert(0, AfterImport(module, patch))


def main(words: Sequence[str]) -> None:
    """Run a module with its words, as `python -m` does."""
    install()
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
