"""A Python that has imported the large libraries already, and becomes any program in a new process.

Importing PyTorch and the libraries of Hugging Face takes four seconds of processor time, and the tests start more than
a hundred programs. `WarmPython` starts this file once. For each program, the process divides itself in two (`fork`).
The new process takes over the arguments, the folder and the environment, and runs the program as `python` would.

The libraries of Hugging Face read their environment variables when they are imported. So the new process imports them
itself, unless the first process starts in the right environment.

A program that starts Python again, such as a launcher, divides itself in two as well. See `WarmPopen`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

LIBRARIES = (
    "torch._dynamo", "torch.distributed.tensor", "scipy.ndimage", "scipy.optimize", "scipy.stats", "pandas",
    "sklearn.model_selection", "pyarrow.dataset", "pyarrow.parquet", "matplotlib.pyplot", "nibabel", "cv2", "pydantic",
    "yaml", "jinja2", "aiohttp", "fsspec", "multiprocess", "httpx2", "requests", "accelerate", "tensorboard",
)  # fmt: skip


# They read their environment variables when they are imported.
HUGGING_FACE = (
    "transformers.trainer", "transformers.integrations", "transformers.image_processing_backends",
    "transformers.models.auto.modeling_auto", "transformers.models.segformer.modeling_segformer", "datasets",
    "evaluate", "albumentations", "scipy.special", "scipy.linalg", "monai.metrics",
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


class WarmPythons:
    """Runs each program in a Python that has imported the libraries of Hugging Face too, if one has its settings.

    Each Python starts when it is first needed.

    Args:
        environments: The environments of these Pythons. A program with other settings uses one without the libraries.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self.environments, self.started = environments, dict[str, WarmPython]()

    def __enter__(self) -> "WarmPythons":
        self.stack = contextlib.ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def run(
        self, args: list[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As `WarmPython.run`."""
        fitting = [one for one in self.environments if settings(one) == settings(env)]
        key = settings(env) if fitting else ""
        if key not in self.started:
            python = WarmPython(fitting[0], HUGGING_FACE) if fitting else WarmPython(os.environ)
            self.started[key] = self.stack.enter_context(python)
        return self.started[key].run(args, cwd, env, timeout)


def settings(env: Mapping[str, str]) -> str:
    """The variables that the libraries of Hugging Face read when they are imported. They read the token each time."""
    return str(
        sorted(
            item
            for item in env.items()
            if item[0].startswith(("HF_", "TRANSFORMERS_", "DATASETS_")) and item[0] != "HF_TOKEN"
        )
    )


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


class WarmPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Runs `python ARGS` in a copy of this process, which has imported most modules. Other programs start as usual.

    `Popen` calls `preexec_fn` in the new process, when its folder and its files are those of the program. There the
    program runs to its end, so that nothing else is executed.
    """

    def __init__(self, args: Any, **settings: Any) -> None:
        if isinstance(args, list | tuple) and args[0] == sys.executable:
            env = dict(os.environ if settings.get("env") is None else settings["env"])
            settings["preexec_fn"] = functools.partial(run_and_exit, [str(word) for word in args[1:]], env)
            # Otherwise both processes would write what is in the buffers.
            sys.stdout.flush()
            sys.stderr.flush()
        super().__init__(args, **settings)


def run_and_exit(args: list[str], env: Mapping[str, str]) -> None:
    """Run `python ARGS` in this new process, and end it as Python does."""
    # The process that started this one waits until a pipe is closed, as any other program closes it.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        # torchrun asks for output without a buffer.
        run_program(args[args[0] == "-u" :], env)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def become(program: dict[str, Any]) -> None:
    """Run a program in this process, as `python ARGS` does."""
    os.setsid()
    signal.setitimer(signal.ITIMER_REAL, program["timeout"])
    os.chdir(program["cwd"])
    for number, path in enumerate([os.devnull, *program["outputs"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    run_program(program["args"], program["env"])


def run_program(args: list[str], env: Mapping[str, str]) -> None:
    """Run `python ARGS` in this process, in this environment."""
    os.environ.clear()
    os.environ.update(env)
    first, *rest = args
    script = first not in ("-c", "-m")
    sys.orig_argv = [sys.executable, *args]
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
        sys.argv = args
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
