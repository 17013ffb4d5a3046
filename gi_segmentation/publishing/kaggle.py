"""A package for Kaggle's notebooks: a dataset with wheels and checkpoints, and the notebooks, ready to upload."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from gi_segmentation.errors import InputError, hub_errors
from gi_segmentation.files import write_json, write_text, writing_folder
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_members
from gi_segmentation.publishing.wheels import (
    ROOT,
    build_own_wheel,
    check_torch,
    download_wheels,
    find_missing,
    read_packages,
)
from gi_segmentation.recipe_files import load_yaml

COMPETITION = "uw-madison-gi-tract-image-segmentation"
NOTEBOOKS = ROOT / "notebooks" / "kaggle"
IMAGE_PACKAGES = NOTEBOOKS / "image_packages.txt"
# Two T4 GPUs. Source: docs/kernels.md of Kaggle/kaggle-cli.
MACHINE = "NvidiaTeslaT4"
# What a prediction reads of a checkpoint. Its scores, pictures and facts stay out.
CHECKPOINT_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
# Kaggle's limits for titles. Source: the client, `kaggle` 2.2.5, and for the longest title of a notebook its website.
TITLE_LENGTHS = range(6, 51)
MIB = 2**20


@dataclass(frozen=True)
class PackagePlan:
    """What the user wants.

    Attributes:
        user: Name of the user on Kaggle, as in the address of the profile.
        title: The beginning of all titles.
        models: Folders or Hub ids of checkpoints for the submission; empty: those that the training notebook makes.
        recipe: The recipe of the training, which is packed if there are no models.
        image_packages: Output of `pip freeze` in a notebook of Kaggle.
        python_version: The Python there.
    """

    user: str
    title: str
    models: Sequence[str]
    recipe: Path
    image_packages: Path
    python_version: str

    @property
    def dataset_title(self) -> str:
        """The title of the dataset. A package with models is another dataset than one for the training."""
        return f"{self.title} {'models' if self.models else 'training files'}"

    def notebook_title(self, kind: str) -> str:
        """Return the title of the notebook `training` or `submission`."""
        return f"{self.title} {kind}"

    def slug(self, title: str) -> str:
        """Return the name of something of this user, which Kaggle makes from its title."""
        return f"{self.user}/{slugify(title)}"


def slugify(title: str) -> str:
    """Return the last part of the address that Kaggle gives to a title.

    Example:
        >>> slugify("GI tract: segmentation")
        'gi-tract-segmentation'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check_names(plan: PackagePlan) -> None:
    """Check what Kaggle or its client would refuse.

    Raises:
        InputError: If it is the name of no user, or a title is too short or too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", plan.user):
        raise InputError(
            f"--user: expected the name in the address of your profile, kaggle.com/NAME, but got {plan.user!r}"
        )
    titles = [plan.dataset_title, *map(plan.notebook_title, ("training", "submission"))]
    for title in titles:
        if len(title) not in TITLE_LENGTHS or len(slugify(title)) not in TITLE_LENGTHS:
            raise InputError(
                f"--title: expected a text with which {title!r} has {TITLE_LENGTHS[0]} to {TITLE_LENGTHS[-1]} "
                f"letters and digits, but that has {len(title)}; choose another one"
            )


def write_package(plan: PackagePlan, output_dir: Path) -> str:
    """Write the package, whole or not at all.

    Args:
        plan: What the user wants.
        output_dir: A folder that does not exist yet, or is empty.

    Returns:
        Lines for the user: what is in it, how large it is, and what to do next.

    Raises:
        InputError: If something in the plan cannot be used, if the folder has files, if a package is missing, or if a
            download fails.
    """
    check_names(plan)
    # It is needed last, after minutes of downloads.
    if find_spec("jupytext") is None:
        raise InputError("needs jupytext, which is not installed; run `pip install -e .[kaggle]`")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: expected a new folder, but this one has files; name another one")
    packages = read_packages(plan.image_packages)
    check_torch(packages)
    with writing_folder(output_dir) as folder:
        dataset = folder / "dataset"
        dataset.mkdir()
        if plan.models:
            pack_models(plan.models, dataset / "models")
        else:
            pack_recipe(plan.recipe, dataset)
        pack_wheels(dataset, packages, plan.python_version)
        write_json(dataset / "dataset-metadata.json", describe_dataset(plan))
        for kind in ("submission",) if plan.models else ("training", "submission"):
            write_notebook(plan, kind, folder / kind)
        text = describe_package(plan, folder)
        write_text(folder / "README.md", text)
    return text


def pack_models(names: Sequence[str], folder: Path) -> None:
    """Copy checkpoints, each into a folder of its own.

    Raises:
        InputError: If one is no checkpoint, or if they do not fit together.
    """
    # This loads them, as the prediction will do.
    load_members(list(names), None, Computation(device="cpu"))
    for number, name in enumerate(names, start=1):
        pack_checkpoint(name, folder / f"{number}-{slugify(Path(name).name)}")


def pack_checkpoint(name: str, target: Path) -> None:
    """Copy the configuration and the weights of a checkpoint, a folder or a Hub id.

    Raises:
        InputError: If it has none, or the Hub fails.
    """
    source = Path(name)
    if not source.is_dir():
        with hub_errors("downloading", name):
            source = Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES)))
    files = [path for pattern in CHECKPOINT_FILES for path in sorted(source.glob(pattern))]
    if not {"config.json"} < {path.name for path in files}:
        raise InputError(
            f"{name}: expected a checkpoint with config.json and weights as .safetensors, got no such files"
        )
    target.mkdir(parents=True)
    for path in files:
        # Files of the Hub's cache are links.
        shutil.copyfile(path, target / path.name)


def pack_recipe(recipe: Path, dataset: Path) -> None:
    """Copy a recipe, and the checkpoint or the encoder that its training starts from.

    Raises:
        InputError: If the recipe cannot be read, or its checkpoint cannot be found.
    """
    from gi_segmentation.command_line import parse_arguments

    # This finds unknown keys and wrong values.
    parse_arguments(["--config", str(recipe)])
    settings = load_yaml(recipe.read_text(encoding="utf-8"))
    for flag in ("model_name_or_path", "backbone"):
        if flag in settings:
            # In the notebook, the flag names this folder.
            pack_checkpoint(str(settings[flag]), dataset / "start")
    shutil.copyfile(recipe, dataset / "recipe.yaml")


def pack_wheels(dataset: Path, packages: dict[str, str], python_version: str) -> None:
    """Build our own wheel, and download those that the image of Kaggle lacks."""
    wheels = dataset / "wheels"
    wheels.mkdir()
    own = build_own_wheel(wheels)
    configurations = [path.read_text(encoding="utf-8") for path in dataset.rglob("config.json")]
    extra = "timm" if any('"timm_backbone"' in text for text in configurations) else ""
    download_wheels(find_missing(own, extra, packages, python_version), python_version, wheels)
    write_text(wheels / "requirements.txt", f"gi-segmentation{f'[{extra}]' if extra else ''}\n")


def describe_dataset(plan: PackagePlan) -> dict[str, Any]:
    """Return the metadata with which `kaggle datasets create` makes a private dataset."""
    return {
        "title": plan.dataset_title,
        "id": plan.slug(plan.dataset_title),
        # The packages have licences of their own, and what patients allow for the checkpoints is not established.
        "licenses": [{"name": "other"}],
    }


def write_notebook(plan: PackagePlan, kind: str, folder: Path) -> None:
    """Write a notebook without outputs, and the metadata with which `kaggle kernels push` runs it."""
    import jupytext
    import nbformat

    folder.mkdir()
    notebook = jupytext.read(NOTEBOOKS / f"{kind}.py")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    write_text(folder / f"{kind}.ipynb", nbformat.writes(notebook) + "\n")
    # The training goes on from its own last output. A submission takes its output, unless it has models.
    sources = [] if plan.models else [plan.slug(plan.notebook_title("training"))]
    metadata = {
        "id": plan.slug(plan.notebook_title(kind)),
        "title": plan.notebook_title(kind),
        "code_file": f"{kind}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": MACHINE,
        "dataset_sources": [plan.slug(plan.dataset_title)],
        "competition_sources": [COMPETITION],
        "kernel_sources": sources,
        "model_sources": [],
    }
    write_json(folder / "kernel-metadata.json", metadata)


def describe_package(plan: PackagePlan, folder: Path) -> str:
    """Return the README of the package: what is in it, and what to do next."""
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MIB
        for path in sorted((folder / "dataset").iterdir())
        if path.is_dir()
    }
    notebook = "submission" if plan.models else "training"
    steps = [
        "kaggle datasets create -p dataset --dir-mode zip   # for a new version: kaggle datasets version ... -m again",
        f"kaggle kernels push -p {notebook}",
    ]
    if not plan.models:
        steps += [
            "kaggle kernels push -p training   # again, until it is finished: each run goes on from the last one",
            "kaggle kernels push -p submission",
        ]
    lines = [
        f"# {plan.title}: a package for Kaggle's notebooks",
        "",
        *(f"- `dataset/{name}`: {size:.0f} MiB" for name, size in sizes.items()),
        f"- `dataset` in all: {sum(sizes.values()):.0f} MiB, for a private dataset",
        "",
        "In this folder, with `pip install kaggle` and a token of your account:",
        "",
        "```bash",
        *steps,
        "```",
        "",
        f"Then open the notebook {plan.notebook_title('submission')!r} on Kaggle and press Submit. Before, join the "
        f"competition and accept its rules: https://www.kaggle.com/c/{COMPETITION}",
        "",
        f"Assumed: Python {plan.python_version} and the packages of {plan.image_packages.name} in Kaggle's image. If "
        "the first cell fails, save the output of `pip freeze` in a notebook there, and make the package again with "
        "`--image_packages`.",
        "",
    ]
    return "\n".join(lines)
