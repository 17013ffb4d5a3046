"""Imports run one way: from the command lines through the folders (wings) of the package to the ground modules.

No test imports a test module.
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.processes import ROOT, RunPython

# The installed packages.
OURS = ("gi_segmentation", "dataset_builder", "loopback_hub")
# The modules on which everything stands.
GROUND = {
    *(
        "labels",
        "known_organs",
        "schema",
        "rules",
        "rle",
        "errors",
        "files",
        "memory",
        "processes",
        "shortages",
        "internals",
    ),
    *("arguments", "command_line", "recipe_files"),
}
# What each wing may import besides itself: other wings, or single modules of them. A wing's docstring says the same.
# A module that is not named here is a command line. It may import everything.
ALLOWED = {
    "ground": set(),
    "formats": {"ground"},
    "data": {"ground", "formats.kaggle"},
    "models": {"ground"},
    "scoring": {"ground", "formats", "data.dataset_scans"},
    "postprocessing": {"ground", "scoring.surface"},
    "review": {"ground", "formats", "data.intensity", "postprocessing"},
    "training": {"ground", "formats.algorithm", "data", "models", "scoring", "review"},
    "inference": {"ground", "formats", "data", "models", "scoring", "postprocessing", "review"},
    "publishing": {"ground", "data", "models", "scoring", "postprocessing", "review", "training", "inference"},
    "cross_validation": {
        *("ground", "formats", "data", "models", "scoring", "postprocessing", "training", "inference", "publishing")
    },
    "dataset_builder": {"ground", "formats", "scoring", "data.synthetic", "data.dataset_scans", "publishing"},
    "loopback_hub": set(),
}
# No module of these wings loads PyTorch.
WITHOUT_TORCH = ("formats", "scoring", "postprocessing", "review")
# The packages of the extra `clinic`, which only files of hospitals need.
CLINIC = {"nibabel", "pydicom", "highdicom"}
# Slow packages that modules do not need and must not load. The command lines are below.
LIGHT = {
    "gi_segmentation.inference.scans": {"datasets", "albumentations", *CLINIC},
    "gi_segmentation.inference.output_folder, gi_segmentation.scoring.submissions": {
        *("datasets", "torch", "transformers", "matplotlib"),
        *CLINIC,
    },
    "dataset_builder": {"torch", "transformers"},
}
# Slow packages that a command line must not load for its help. The key has the words after `python`.
LIGHT_HELP = {
    "-m dataset_builder": {"datasets", "pandas", "torch", "transformers", "cv2", "scipy", "sklearn", "numpy"},
    "-m dataset_builder build": {"datasets", "pandas", "torch", "transformers", "cv2", "scipy", "sklearn", "numpy"},
    "-m dataset_builder convert": {"datasets", "pandas", "torch", "transformers", "cv2", "scipy", "numpy", *CLINIC},
    "-m gi_segmentation.score": {"datasets", "pandas", "torch", "transformers", "scipy", "numpy"},
    "-m gi_segmentation.predict": {"datasets", "pandas", "torch", "transformers", *CLINIC},
    "-m gi_segmentation.compare": {"datasets", "pandas", "torch", "transformers"},
    "-m gi_segmentation.cross_validate": {"datasets", "pandas", "torch", "transformers"},
    "-m gi_segmentation.export": {"datasets", "pandas", "torch", "transformers", "onnx", "onnxruntime"},
    "-m gi_segmentation.kaggle_package": {"datasets", "pandas", "torch", "transformers", "huggingface_hub"},
    "-m gi_segmentation.publish": {"datasets", "pandas", "torch", "transformers", "huggingface_hub"},
    "-m gi_segmentation.table": {"datasets", "pandas", "torch", "transformers", "huggingface_hub"},
    "run_segmentation.py": {"datasets", "pandas", "matplotlib", "albumentations", "cv2", "sklearn"},
    "-m app": {"datasets", "torch", "transformers", *CLINIC},
}


def wing_of(module: str) -> str:
    """Return the wing that a module of ours belongs to."""
    package, *names = module.split(".")
    if package != "gi_segmentation" or not names:
        return package
    if names[0] in GROUND:
        return "ground"
    return names[0] if names[0] in ALLOWED else "commands"


def module_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports, at its top or inside a function."""
    modules: set[str] = set()
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of what is imported"
            # `from package import name` may mean a module of that package.
            names = [alias.name for alias in node.names if not alias.name.startswith("__")]
            modules |= {str(node.module), *(f"{node.module}.{name}" for name in names)}
        # `import_module("package.module")`, also by way of a list of names.
        elif isinstance(node, ast.Constant) and "import_module" in text and str(node.value) in OUR_MODULES:
            modules.add(str(node.value))
    return modules


def product_files() -> list[Path]:
    """Return the files of the installed packages."""
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


OUR_MODULES = {module_name(path) for path in product_files()} - set(OURS)


def is_allowed(module: str, allowed: set[str]) -> bool:
    """Return whether a wing may import a module of ours."""
    name = module.removeprefix("gi_segmentation.")
    # `from gi_segmentation.formats import kaggle` names the package `gi_segmentation.formats` too.
    of_a_part = any(one == name or one.startswith(f"{name}.") or name.startswith(f"{one}.") for one in allowed)
    return wing_of(module) in allowed or of_a_part


def test_imports_run_one_way() -> None:
    ours = (*OURS, "run_segmentation", "benchmarks", "tests")
    for path in product_files():
        wing = wing_of(module_name(path))
        allowed = ALLOWED.get(wing, set(ALLOWED) - {"dataset_builder", "loopback_hub"}) | {wing, "gi_segmentation"}
        modules = {module for module in imported_modules(path) if module.split(".")[0] in ours}
        backwards = sorted(module for module in modules if not is_allowed(module, allowed))
        assert not backwards, f"{path}: the wing {wing} may import {sorted(allowed)} only"


def test_no_modules_import_each_other() -> None:
    # A package stands in its own graph only through its modules: `from package import name` names it too.
    graph = {module_name(path): imported_modules(path) & OUR_MODULES for path in product_files()}
    packages = {module_name(path.parent / "__init__.py") for path in product_files() if path.name == "__init__.py"}
    graph = {name: modules - packages - {name} for name, modules in graph.items() if name not in packages}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_each_wing_says_what_it_imports() -> None:
    for wing in set(ALLOWED) - {"ground", "dataset_builder", "loopback_hub"}:
        source = (ROOT / "gi_segmentation" / wing / "__init__.py").read_text(encoding="utf-8")
        text = " ".join(str(ast.get_docstring(ast.parse(source))).split())
        sentence = text[text.rindex("Imports ") :]
        assert {"ground", *re.findall("`([a-z_.]+)`", sentence)} == ALLOWED[wing], f"{wing}: {sentence}"


def test_the_design_lists_what_each_wing_imports() -> None:
    listed = re.findall(r"^(\w+) +(ground.*)$", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.M)
    expected = {wing: allowed for wing, allowed in ALLOWED.items() if wing not in ("ground", *OURS)}
    assert {wing: set(names.split(", ")) for wing, names in listed} == expected


def test_wings_without_pytorch_do_not_load_it() -> None:
    # One after the other, so that the first module that loads it is found.
    modules = sorted(name for name in OUR_MODULES if name.split(".")[1] in WITHOUT_TORCH)
    program = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
        f"    assert not {{'torch', 'transformers'}} & set(sys.modules), name"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("modules", LIGHT)
def test_a_module_does_not_load_packages_that_it_does_not_need(modules: str) -> None:
    program = f"import sys, {modules}; print(*({LIGHT[modules]!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", LIGHT_HELP)
def test_help_does_not_load_slow_packages(command: str) -> None:
    # A real process, because the way in which a program is started decides what it imports. Python writes a line to
    # stderr for every module that it imports: `import time: self | cumulative | name`.
    words = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "argparse" in loaded and not loaded & LIGHT_HELP[command]


@pytest.mark.parametrize(
    "program",
    [
        "import dataset_builder; import datasets",
        "import datasets; import dataset_builder",
        # These words look like `python -m dataset_builder`, but the program is another one.
        "import sys; sys.argv = ['-m', 'dataset_builder']; import dataset_builder; import datasets",
    ],
)
def test_importing_the_dataset_builder_registers_the_name(program: str, run_python: RunPython) -> None:
    check = "import datasets.load; print(datasets.load.dataset_module_factory.__wrapped__.__name__)"
    done = run_python(["-c", f"{program}; {check}", "-m", "dataset_builder"], cwd=ROOT)
    assert done.stdout.split() == ["dataset_module_factory"], done.stderr


@pytest.mark.parametrize("package", ["", "import dataset_builder"], ids=["module", "package"])
def test_another_program_registers_the_name_too(package: str, tmp_path: Path, run_python: RunPython) -> None:
    # A program with `-m dataset_builder` among its own words must not be taken for `python -m dataset_builder`. It may
    # import the dataset builder in its package or in its module.
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text(package)
    (tmp_path / "tool" / "main.py").write_text(
        "import datasets.load, dataset_builder\nprint(datasets.load.dataset_module_factory.__wrapped__.__name__)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = run_python(["-m", "tool.main", "-m", "dataset_builder"], cwd=tmp_path, env=path)
    assert done.stdout.split() == ["dataset_module_factory"], done.stderr


def test_nothing_imports_a_test_module() -> None:
    tests = set((ROOT / "tests").rglob("*.py"))
    for path in tests | set((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        names = {name for module in imported_modules(path) for name in module.split(".")}
        assert not {name for name in names if name.startswith("test_") or name == "conftest"} - {"test_data"}, path
        # The text is put together here, so that this file does not contain it.
        assert "sys.path" + "." not in text, f"{path}: imports need no help"
        ours = {module for module in imported_modules(path) if module.split(".")[0] in ("tests", "benchmarks")}
        if path not in tests:
            ours = {module for module in ours if module.startswith("tests.")}
            assert all(module.startswith("tests.support.") for module in ours), f"{path}: import tests.support only"
        elif "support" in path.parts:
            assert not any(module.startswith("benchmarks") for module in ours), f"{path}: benchmarks import this"
