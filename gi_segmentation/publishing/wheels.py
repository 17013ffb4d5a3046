"""The wheels that a machine without internet needs, beside the packages that it already has."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from gi_segmentation.errors import InputError, one_line

# The folder of the clone, which the wheel is built from.
ROOT = Path(__file__).resolve().parents[2]
# What belongs to the wheel, by setup.cfg.
SOURCES = (
    *("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "run_segmentation.py"),
    *("gi_segmentation", "dataset_builder", "loopback_hub", "model_cards"),
)
# These belong together and to the driver of the GPU. So the machine's own are used, whatever a package asks for.
OF_THE_MACHINE = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
# The oldest and the newest glibc of the wheels: 2.28 is older than that of any Linux that still gets updates.
GLIBC = range(5, 29)
# What the tools say when they reach no package index.
NO_NETWORK = re.compile(
    r"error sending request|dns error|failed to fetch|failed to resolve|connection|unreachable|timed out|retries",
    re.IGNORECASE,
)


def canonical(name: str) -> str:
    """Return the name of a package in the form in which names are compared.

    Example:
        >>> canonical("Typing_Extensions")
        'typing-extensions'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def read_packages(path: Path) -> dict[str, str]:
    """Read the output of `pip freeze`: the version of each package. Lines without `==` are passed over.

    Raises:
        InputError: If the file cannot be read, or has no PyTorch. Then it is not that of a notebook.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--image_packages {path}: not a readable text file ({one_line(error)})") from error
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)$", text, re.M)
    packages = {canonical(name): version for name, version in found}
    if "torch" not in packages:
        raise InputError(
            f"--image_packages {path}: expected the output of `pip freeze` in a notebook with a GPU, but there is no "
            f"line torch==VERSION among its {len(packages)} packages"
        )
    return packages


def check_torch(packages: Mapping[str, str]) -> None:
    """Check that this project runs with the PyTorch of a machine.

    Args:
        packages: What the machine has, from `read_packages`.

    Raises:
        InputError: If it is too old, or too new.
    """
    requirements = map(Requirement, requires("gi-segmentation") or ())
    (needed,) = (one for one in requirements if one.name == "torch")
    if not needed.specifier.contains(packages["torch"], prereleases=True):
        raise InputError(f"--image_packages: expected torch{needed.specifier}, but the image has {packages['torch']}")


def run_tool(words: Sequence[object], purpose: str) -> None:
    """Run pip or uv, and wait for it.

    Args:
        words: The words after `python -m`.
        purpose: What it does, for the message.

    Raises:
        InputError: If it is missing, or fails.
    """
    if find_spec(str(words[0])) is None:
        raise InputError(f"needs {words[0]}, which is not installed; run `pip install -e .[kaggle]`")
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    # The end has the reason, and before it may be many warnings.
    if NO_NETWORK.search(said):
        reason = "the package index cannot be reached; it needs the internet once: run the command again"
    else:
        reason = f"... {said[-600:]}"
    raise InputError(f"{purpose} failed: {reason}")


def build_own_wheel(folder: Path) -> Path:
    """Build the wheel of this project into a folder.

    Raises:
        InputError: If this is not a clone, or the build fails.
    """
    if missing := [name for name in SOURCES if not (ROOT / name).exists()]:
        raise InputError(f"expected a clone of the project in {ROOT}, but there is no {missing[0]}; run it in a clone")
    with tempfile.TemporaryDirectory() as copy:
        # setuptools would leave its files in the clone, and pack what an earlier build has left there.
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(copy) / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / name, Path(copy) / name)
        words = ("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, copy)
        run_tool(words, "building the wheel of this project")
    (wheel,) = folder.glob("gi_segmentation-*.whl")
    return wheel


def find_missing(wheel: Path, extra: str, packages: Mapping[str, str], python_version: str) -> dict[str, str]:
    """Find the packages that our wheel needs, and that a machine lacks or has in another version.

    Args:
        wheel: Our wheel.
        extra: Name of an extra of it, or an empty text.
        packages: What the machine has, from `read_packages`. What fits stays as it is.
        python_version: The machine's Python, for example 3.12.

    Returns:
        Their versions: the newest that fit together and to the rest.

    Raises:
        InputError: If no versions fit together, or no index can be reached.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requirement, overrides, chosen = (folder / name for name in ("in.txt", "overrides.txt", "out.txt"))
        requirement.write_text(f"gi-segmentation{f'[{extra}]' if extra else ''} @ {wheel.as_uri()}\n")
        # The versions must fit to the machine's PyTorch, whose builds for GPUs no index has. No machine has a Python
        # below 3, so torchvision is needed by nobody.
        torch = packages["torch"].split("+")[0]
        overrides.write_text(f'torch=={torch}\ntorchvision; python_version < "3"\n')
        # uv keeps the versions of an earlier output, as long as they fit.
        chosen.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        words = (
            *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"),
            *("--python-version", python_version, "--python-platform", f"x86_64-manylinux_2_{GLIBC[-1]}"),
            *("--override", overrides, "--output-file", chosen, requirement),
        )
        run_tool(words, "choosing the packages")
        found = re.findall(r"^([\w.-]+)==(\S+)$", chosen.read_text(), re.M)
    wanted = {name: version for name, version in found if not OF_THE_MACHINE.fullmatch(name)}
    return {name: version for name, version in wanted.items() if packages.get(name) != version}


def download_wheels(versions: Mapping[str, str], python_version: str, folder: Path) -> None:
    """Download wheels for Linux on a processor of Intel or AMD.

    Args:
        versions: The packages, from `find_missing`.
        python_version: As there.
        folder: Where they go.

    Raises:
        InputError: If one of them cannot be downloaded.
    """
    if not versions:
        return
    platforms = ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    platforms += [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    words = (
        *("pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--implementation", "cp"),
        *("--python-version", python_version, "--dest", folder),
        *(word for platform in platforms for word in ("--platform", platform)),
        *(f"{name}=={version}" for name, version in versions.items()),
    )
    run_tool(words, "downloading the packages")
