"""Fixtures and settings of all tests.

Libraries of Hugging Face read their environment variables when they are imported. So this file sets them first.
"""

import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

from loopback_hub import LoopbackHub
from tests.support.processes import TEST_DATA, RunPython
from tests.support.warm_python import WarmPython

# The tests never use the user's cache, because an old entry there could hide a bug.
HF_HOME = tempfile.mkdtemp(prefix="gi-segmentation-hf-home-")
ENVIRONMENT = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ |= {**ENVIRONMENT, "HF_HOME": HF_HOME}
# With these variables of the user, the tests would reach a real Hub.
for variable in ("HF_ENDPOINT", "HF_TOKEN", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(variable, None)


# These have neither tests nor doctests, and import much.
collect_ignore_glob = ["fuzz/*", "support/*"]
# Fixtures of tests that start programs.
SLOW = {"run_python", "trained", "execution", "hub"}
# The modules that take longest, the longest first.
LONGEST = (
    "test_cross_validate.py", "test_docs.py", "test_pipeline.py", "test_export.py", "test_notebook.py",
    "test_accelerate.py", "test_app.py", "test_checkpoints.py", "test_compare.py", "test_faults.py",
)  # fmt: skip


# Last, when the long tests have been taken out. The halves would not be halves otherwise.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest modules first. So the processes that share the tests end at about the same time.

    The tests of a module stay together, so that its fixtures are made once. Two processes get half of the list each,
    so every second slow module begins the second half.
    """
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    slow = [
        path
        for path, tests in modules.items()
        if path.name in LONGEST or any(not SLOW.isdisjoint(getattr(test, "fixturenames", ())) for test in tests)
    ]
    slow.sort(key=lambda path: LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST))
    first, second = ([test for path in slow[start::2] for test in modules[path]] for start in (0, 1))
    others = [test for path, tests in modules.items() if path not in slow for test in tests]
    number = max(len(items) // 2 - len(first), 0)
    items[:] = [*first, *others[:number], *second, *others[number:]]


def pytest_collection_finish() -> None:
    """Keep what the imports have made out of every later search for garbage. A training makes several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def blank_pictures() -> Iterator[Callable[..., None]]:
    """Let trainings in this process write a picture of one pixel, since drawing takes as long as they do.

    Trainings in processes of their own draw real ones.

    Yields:
        The function that writes real ones.
    """
    from gi_segmentation.publishing import figures

    def save_figure(figure: object, path: Path) -> None:
        Image.new("L", (1, 1)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        drawing = figures.save_figure
        patch.setattr(figures, "save_figure", save_figure)
        yield drawing


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data. Tests that need it are skipped if it is missing."""
    if not (TEST_DATA / "uwmgi_rle" / "train.csv").is_file():
        pytest.skip(f"no test data in {TEST_DATA}: set GI_SEGMENTATION_TEST_DATA, or put it at ../shared/data")
    return TEST_DATA


@pytest.fixture(scope="session")
def kaggle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kaggle folder of 4 patients with one scan of 12 slices each. Tests only read it."""
    from dataset_builder.phantom import write_phantom

    folder = tmp_path_factory.mktemp("phantom") / "kaggle"
    write_phantom(folder, num_cases=4, days_per_case=1, slices_per_scan=12, num_proc=1)
    return folder


@pytest.fixture(scope="session")
def dataset_dir(kaggle_dir: Path, blank_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset `gi_tract` built from `kaggle_dir`, with 2 patients in each split. Tests only read it."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig

    folder = tmp_path_factory.mktemp("built") / "gi_tract"
    build(kaggle_dir, folder, GiTractConfig(num_folds=2), num_proc=1)
    return folder


@pytest.fixture(scope="session")
def small_kaggle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kaggle folder of 2 patients with one scan of 3 slices each. Tests only read it."""
    from dataset_builder.phantom import write_phantom

    folder = tmp_path_factory.mktemp("small_phantom") / "kaggle"
    write_phantom(folder, num_cases=2, days_per_case=1, slices_per_scan=3, num_proc=1)
    return folder


@pytest.fixture(scope="session")
def scan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last 12 slices of a scan, with the numbers 61 to 72, so that the names in the card's lines fit.

    Tests only read it.
    """
    from dataset_builder.phantom import write_phantom

    # The files are renamed from the last to the first, so no new name is the name of another file.
    folder = tmp_path_factory.mktemp("scans") / "kaggle"
    write_phantom(folder, num_cases=1, days_per_case=1, slices_per_scan=12, num_proc=1)
    for path in sorted(folder.rglob("slice_*.png"), reverse=True):
        number = int(path.name.split("_")[1])
        path.rename(path.with_name(path.name.replace(f"slice_{number:04d}", f"slice_{number + 60:04d}")))
    return folder / "train"


@pytest.fixture
def kaggle_copy(small_kaggle_dir: Path, tmp_path: Path) -> Path:
    """A copy of `small_kaggle_dir` that a test may damage."""
    return Path(shutil.copytree(small_kaggle_dir, tmp_path / "kaggle"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty Hub on this machine. A process started by `run_python(..., env=hub.environment())` uses it."""
    with LoopbackHub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """A Python that runs programs in new processes without importing the large libraries each time."""
    with WarmPython(os.environ) as running:
        yield running


@pytest.fixture
def run_python(warm_python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """A function that runs `python ARGS` in a new process. All calls in one test share an HF_HOME of their own."""
    hf_home = str(tmp_path_factory.mktemp("hf_home"))

    def run(
        args: list[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return warm_python.run(args, cwd, {**os.environ, "HF_HOME": hf_home, **(env or {})}, timeout)

    return run
