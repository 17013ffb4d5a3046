"""Trainings that `accelerate launch` starts with the shipped configurations, on one machine or as if on several."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import CONFIGS, LAUNCH, ROOT, ROOT_ON_PATH

RUN = ROOT / "run_segmentation.py"
# `accelerate` divides a model on GPUs only. This program makes it do so on the CPU.
FSDP_ON_CPU = ROOT / "tests" / "support" / "fsdp_on_cpu.py"
# An address of a private network, for two network namespaces.
NETWORK = "10.213.47"


@dataclass(frozen=True)
class Machines:
    """Machines that train together. Without namespaces, all of them are this machine.

    Attributes:
        count: Number of machines.
        namespaces: Names of network namespaces, one per machine.
    """

    count: int = 1
    namespaces: tuple[str, ...] = ()

    def command(self, rank: int) -> list[str]:
        """Return the words before a command that runs on a machine."""
        return ["ip", "netns", "exec", self.namespaces[rank]] if self.namespaces else []

    def environment(self) -> dict[str, str]:
        """Return the variables by which the processes find each other in their namespaces."""
        return {"GLOO_SOCKET_IFNAME": "gi-veth"} if self.namespaces else {}


@contextmanager
def two_namespaces() -> Iterator[Machines]:
    """Two network namespaces with a cable between them, each with an address and a loopback of its own.

    Raises:
        OSError: If this machine or this user cannot make them; the message says why.
    """
    names = (f"gi-{os.getpid()}-0", f"gi-{os.getpid()}-1")

    def ip(words: str) -> None:
        try:
            subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"`ip {words}`: {error.stderr.strip()}") from error

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add gi-veth netns {names[0]} type veth peer name gi-veth netns {names[1]}")
        for number, name in enumerate(names, start=1):
            ip(f"-n {name} address add {NETWORK}.{number}/24 dev gi-veth")
            ip(f"-n {name} link set gi-veth up")
            ip(f"-n {name} link set lo up")
        yield Machines(2, names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def accelerate_commands(
    config: str, words: Sequence[str], num_processes: int, machines: Machines = Machines(), program: Path = RUN
) -> list[list[str]]:
    """Return the commands of `accelerate launch`, one for each machine.

    Args:
        config: Name of a configuration of `accelerate_configs/`.
        words: Words for the program.
        num_processes: Number of processes, on all machines together.
        machines: Where they run.
        program: What they run.
    """
    sizes = ["--num_processes", str(num_processes), "--num_machines", str(machines.count)]
    if machines.count > 1:
        address = f"{NETWORK}.1" if machines.namespaces else "127.0.0.1"
        sizes += ["--main_process_ip", address, "--main_process_port", str(free_port())]
    launcher = [sys.executable, *LAUNCH, str(CONFIGS / f"{config}.yaml"), *sizes, "--machine_rank"]
    return [[*machines.command(rank), *launcher, str(rank), str(program), *words] for rank in range(machines.count)]


class Launch:
    """A started training. At the end of a `with` block, all its processes are dead.

    Args:
        folder: For the logs.
        commands: The launcher of each machine.
        env: More environment variables.
        cwd: Folder in which they start; None: that of the logs.
    """

    def __init__(
        self, folder: Path, commands: list[list[str]], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs, self.errors = ([folder / f"{n}.{end}" for n in range(len(commands))] for end in ("out", "err"))
        self.started: list[subprocess.Popen[str]] = []
        place: dict[str, Any] = {"cwd": cwd or folder, "env": {**os.environ, **ROOT_ON_PATH, **(env or {})}}
        for command, output, error in zip(commands, self.outputs, self.errors, strict=True):
            with output.open("w") as out, error.open("w") as err:
                self.started.append(subprocess.Popen(command, text=True, stdout=out, stderr=err, **place))

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        # The launchers of `torchrun` start each process in a session of its own, so killing a group is not enough.
        for process in self.processes():
            process.kill()
        for launcher in self.started:
            launcher.wait()

    def processes(self) -> list[psutil.Process]:
        """Return all living processes: the launchers and what they have started."""
        living = []
        for launcher in self.started:
            try:
                process = psutil.Process(launcher.pid)
                living += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return living

    def kill(self, rank: int) -> None:
        """Kill the process with a rank, as a machine without memory would."""
        launchers = {launcher.pid for launcher in self.started}
        for process in self.processes():
            # A process that is alone has no number.
            if process.pid not in launchers and process.environ().get("RANK", "0") == str(rank):
                process.send_signal(signal.SIGKILL)
                return
        raise AssertionError(f"no process has the rank {rank}: {self.said()}")

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Wait until a file or a folder exists."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < deadline and self.started[0].poll() is None, self.said()
            time.sleep(0.02)

    def wait(self, timeout: float = 300) -> list[int]:
        """Return the exit status of the launcher of each machine, when all have ended.

        Raises:
            subprocess.TimeoutExpired: If one has not ended in time.
        """
        deadline = time.monotonic() + timeout
        return [launcher.wait(max(deadline - time.monotonic(), 0)) for launcher in self.started]

    def printed(self) -> str:
        """Return what all machines have written to stdout."""
        return "".join(path.read_text(errors="replace") for path in self.outputs)

    def said(self) -> str:
        """Return what all machines have written to stderr."""
        return "".join(path.read_text(errors="replace") for path in self.errors)


def doubled_lines(text: str) -> list[str]:
    """Return the lines that stand twice in an output, in the order of the alphabet.

    Progress bars count by the name in front of them.
    """
    lines = [re.split(r":\s+\d+%", line.rsplit("\r", 1)[-1])[0] for line in text.splitlines() if line.strip()]
    return sorted({line for line in lines if lines.count(line) > 1})
