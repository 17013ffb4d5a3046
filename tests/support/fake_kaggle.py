"""A machine like that of a Kaggle notebook: its folders, its packages, and no network. Only root can make one.

The notebook runs in namespaces of its own: `/kaggle` is a folder of the test there, with read-only inputs, `/tmp` of
the notebook is empty, and there is no network. What it installs is gone when it ends.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from gi_segmentation.publishing.kaggle import COMPETITION

# The kernel of Kaggle's image. These have no influence on ours.
KERNEL = ("ipykernel==6.17.1", "ipython==7.34.0", "setuptools==75.2.0", "pip==24.1.2")
# The mounts of a notebook. Without the loopback device, Jupyter does not reach its kernel.
ENTER = """
set -e
ip link set lo up
mount --bind "$TREE" /kaggle
mount --bind /kaggle/input /kaggle/input
mount -o remount,bind,ro /kaggle/input
mkdir -p /tmp/gi_segmentation
mount --bind "$SCRATCH/tmp" /tmp/gi_segmentation
mount -t overlay overlay -o "lowerdir=$IMAGE,upperdir=$SCRATCH/image,workdir=$SCRATCH/work" "$IMAGE"
exec "$@"
"""


def can_make_one() -> bool:
    """Return whether this user may make namespaces, and mount in them."""
    words = ["unshare", "--net", "--mount", "sh", "-c", "ip link set lo up && mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def make_image(folder: Path, packages: Path) -> Path:
    """Make an environment with the packages of Kaggle's image, and PyTorch for this machine.

    Args:
        folder: Where it goes.
        packages: Output of `pip freeze`, in which torch is a release that this machine can install.

    Returns:
        Its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, "--no-deps", "--requirement", packages], check=True)
    subprocess.run([*install, "--constraint", packages, *KERNEL], check=True)
    return python


class FakeKaggle:
    """Runs notebooks one after the other, each on a fresh machine.

    Args:
        folder: An empty folder for everything.
        python: The Python of the image.
        old_mounts: Whether inputs are mounted as they were before 2026, without a folder for their kind.
    """

    def __init__(self, folder: Path, python: Path, old_mounts: bool = False) -> None:
        self.folder, self.input, self.working = folder, folder / "kaggle" / "input", folder / "kaggle" / "working"
        self.old_mounts, self.image = old_mounts, python.parents[1]
        self.input.mkdir(parents=True)
        kernel = folder / "jupyter" / "kernels" / "image"
        kernel.mkdir(parents=True)
        words = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(json.dumps({"argv": words, "display_name": "i", "language": "python"}))
        # The folder of the environment comes first on the PATH of Kaggle's image.
        self.path = f"{python.parent}:{os.environ['PATH']}"

    def mount(self, kind: str, name: str, source: Path) -> Path:
        """Add an input: a copy of a folder."""
        parts = [name.split("/")[-1]] if self.old_mounts else [kind, *name.split("/")]
        return Path(shutil.copytree(source, self.input.joinpath(*parts), dirs_exist_ok=True))

    def mount_competition(self, kaggle_dir: Path) -> Path:
        """Add the folder of the competition."""
        return self.mount("competitions", COMPETITION, kaggle_dir)

    def start(self, notebook: Path) -> subprocess.Popen[str]:
        """Start a notebook with an empty `/kaggle/working`."""
        scratch = self.folder / "scratch"
        for folder in (self.working, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.working, *(scratch / name for name in ("tmp", "image", "work"))):
            folder.mkdir(parents=True)
        Path("/kaggle").mkdir(exist_ok=True)
        environment = {**os.environ, "JUPYTER_PATH": str(self.folder / "jupyter"), "PATH": self.path}
        environment |= {"TREE": str(self.folder / "kaggle"), "SCRATCH": str(scratch), "IMAGE": str(self.image)}
        # The caches and settings of this machine, and the code in this folder, are not there. In a test, a notebook
        # would not keep what programs print that it starts.
        for name in ("HF_HOME", "PYTHONPATH", "VIRTUAL_ENV", "PIP_FIND_LINKS", "PYTEST_CURRENT_TEST"):
            environment.pop(name, None)
        enter = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", ENTER, "bash"]
        run = [str(Path(sys.executable).parent / "jupyter-execute"), "--kernel_name=image", "--timeout=3000"]
        run += [f"--output={self.folder / 'executed.ipynb'}", str(notebook)]
        return subprocess.Popen(
            [*enter, *run], cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, notebook: Path) -> NotebookNode:
        """Run a notebook to its end, and return it with its outputs."""
        process = self.start(notebook)
        said, _ = process.communicate()
        assert process.returncode == 0, said[-6000:]
        return nbformat.read(self.folder / "executed.ipynb", as_version=4)

    def kill(self, notebook: Path, when: Callable[[], bool], limit_s: float = 1500) -> None:
        """Run a notebook, and kill everything in its machine as soon as something is true."""
        process = self.start(notebook)
        end_s = time.monotonic() + limit_s
        while not when():
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < end_s, "it never became true"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def printed(notebook: NotebookNode) -> str:
    """Return what the cells of an executed notebook have printed."""
    outputs: Sequence[NotebookNode] = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.get("text", "") for out in outputs)
