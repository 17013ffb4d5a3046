"""A Python that has imported the large libraries already, and becomes any program in a new process.

Importing PyTorch and the libraries of Hugging Face takes four seconds of processor time, and the tests start more than
a hundred programs. `WarmPython` starts this file once. For each program, the process divides itself in two (`fork`).
The new process takes over the arguments, the folder and the environment, and runs the program as `python` would.

The libraries of Hugging Face read their environment variables when they are imported. So the new process imports them
itself, unless the first process starts in the right environment.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

LIBRARIES = (
    "torch._dynamo", "torch.distributed.tensor", "scipy.ndimage", "scipy.optimize", "scipy.stats", "pandas",
    "sklearn.model_selection", "pyarrow.dataset", "pyarrow.parquet", "matplotlib.pyplot", "nibabel", "cv2", "pydantic",
    "yaml", "jinja2", "aiohttp", "fsspec", "multiprocess", "httpx2", "requests", "accelerate", "tensorboard",
)  # fmt: skip


class WarmPython:
    """Runs programs in processes that have imported `LIBRARIES`, until the end of a `with` block.

    Args:
        env: Environment of the first process. The libraries read it when they are imported.
        more: Modules that are imported besides `LIBRARIES`.
    """

    def __init__(self, env: Mapping[str, str], more: Sequence[str] = ()) -> None:
        self.env, self.more = env, more

    def __enter__(self) -> "WarmPython":
        command = [sys.executable, __file__, *self.more]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(self.env)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(
        self, args: list[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGS`, with the same result as `subprocess.run`.

        Raises:
            subprocess.TimeoutExpired: If it takes longer than `timeout` seconds. Its processes are then killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            program = {"args": args, "cwd": str(cwd), "env": dict(env), "outputs": outputs, "timeout": timeout}
            print(json.dumps(program), file=self.process.stdin, flush=True)
            code = int(cast(Any, self.process.stdout).readline())
            stdout, stderr = (Path(path).read_text(errors="replace") for path in outputs)
        command = [sys.executable, *args]
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def wait_for_program() -> dict[str, Any]:
    """Return the next program, in a new process. The first process never returns."""
    for line in sys.stdin:
        program = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return program
        _, status = os.waitpid(pid, 0)
        # What the program left behind, such as the processes of a launcher that was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def become(program: dict[str, Any]) -> None:
    """Run a program in this process, as `python ARGS` does."""
    os.setsid()
    signal.setitimer(signal.ITIMER_REAL, program["timeout"])
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(program["env"])
    for number, path in enumerate([os.devnull, *program["outputs"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    first, *rest = program["args"]
    script = first not in ("-c", "-m")
    sys.orig_argv = [sys.executable, *program["args"]]
    sys.path[:1] = [str(Path(first).resolve().parent) if script else "", *filter(None, path_variable())]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        # A new module, so that the program finds no names of this file.
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        # While Python looks for the module, it has this name.
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program["args"]
        runpy.run_path(first, run_name="__main__")


def path_variable() -> list[str]:
    """The folders of PYTHONPATH."""
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


if __name__ == "__main__":
    for name in [*LIBRARIES, *sys.argv[1:]]:
        importlib.import_module(name)
    # The programs need not search what is imported for garbage.
    gc.freeze()
    become(wait_for_program())
