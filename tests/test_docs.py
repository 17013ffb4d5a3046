"""README.md and docs/: every command runs as it stands, every link leads to a file, the tree names every file.

The commands run in the order in which the README links the pages, in one folder, as a reader would run them.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import HfApi
from pydicom import dcmread

from dataset_builder.phantom import write_phantom
from dataset_builder.series import write_scan_series
from gi_segmentation.formats.kaggle.folder import read_kaggle_scans
from gi_segmentation.formats.nifti import write_label_map
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.rle import decode
from loopback_hub import LoopbackHub
from tests.support.dicom import read_series
from tests.support.encoders import write_encoder
from tests.support.models import save_model, write_base
from tests.support.processes import ROOT, RunPython
from tests.support.warm_python import WarmPython

README = ROOT / "README.md"
MAX_README_LINES = 120
PAGES = [README, *(ROOT / path for path in dict.fromkeys(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text())))]

# The page goes its own way from patients to a model, so its commands run in a folder of their own.
OWN_DATA = ROOT / "docs" / "own_data.md"
TRY_IT = "## Try it without patients"

FOLDERS_WITH_README = ("accelerate_configs", "app", "benchmarks", "model_cards", "loopback_hub")
KAGGLE_ZIP = "uw-madison-gi-tract-image-segmentation"
# What a training of a few seconds needs. The last value of a flag wins, so the documented flags are parsed too.
TINY = (
    "--image_size 64 --max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --report_to none "
    "--eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2"
)
# A small head for the tiny encoder. The other checkpoints bring their own.
TINY_HEAD = '--config_overrides {"hidden_size":8,"pool_scales":[1,2],"auxiliary_channels":4}'
# Tiny random checkpoints under the names of those that the commands start from, by their family.
CHECKPOINTS = {
    "nvidia/segformer-b0-finetuned-ade-512-512": "segformer",
    "openmmlab/upernet-convnext-small": "upernet",
}
# A tiny random encoder under the name of the one to which a command gives a new head.
ENCODERS = {"microsoft/swin-base-patch4-window12-384-in22k": "swin"}
CROSS_VALIDATE = (
    "python -m gi_segmentation.cross_validate --config recipes/segformer-b0.yaml --output_dir runs/folds "
    "--config_file accelerate_configs/single_gpu.yaml"
)
# The commands that cannot run here: why, and what covers them instead.
NOT_RUN = {
    "make demo": "takes minutes; test_pipeline.py goes the same way, with real slices where there are some",
    "make test": "runs this test",
    "make app": "serves until it is stopped; tests/app clicks through the page",
    "make table DATASET=gi_tract": "trains eight models; the trainings of this test take the same path",
    "pip install -e .": "the environment of this test was made with it",
    "pip install -e .[notebook]": "needs a package registry; the extra is looked up",
    "pip install -e .[clinic]": "needs a package registry; the extra is looked up",
    "pip install -e .[onnx]": "needs a package registry; the extra is looked up",
    "python -m gi_segmentation.export --model NAMESPACE/NAME --output_dir exported --push_to_hub": "needs a published "
    "model; tests/test_export.py publishes one",
    "pip install -e .[timm]": "needs a package registry; the extra is looked up",
    "python -m gi_segmentation.models.efficientnet --output_dir backbones/efficientnet-lite0": "needs the extra timm; "
    "tests/models/test_encoders.py makes such a folder where timm is installed",
    "accelerate launch --config_file accelerate_configs/cpu.yaml run_segmentation.py --config "
    "recipes/upernet-efficientnet-lite0.yaml --output_dir runs/upernet-lite0": "needs the folder of the line above",
    "pip install -e .[kaggle]": "needs a package registry; the extra is looked up",
    "python -m gi_segmentation.kaggle_package --user YOUR_NAME --output_dir package": "needs a package registry; "
    "tests/test_kaggle_notebooks.py runs it where there is one",
    "python -m gi_segmentation.kaggle_package --user YOUR_NAME --output_dir submission --model runs/upernet-320 "
    "runs/other": "needs a package registry; tests/test_kaggle_package.py packs checkpoints",
    "kaggle datasets create -p package/dataset --dir-mode zip": "needs an account; tests/test_kaggle_package.py lets "
    "the client read the metadata",
    "kaggle kernels push -p package/training": "needs an account; the same test",
    "kaggle kernels push -p package/submission": "needs an account; the same test",
    f"kaggle competitions download -c {KAGGLE_ZIP}": "needs an account; a zip of a phantom lies in its place",
    "hf auth login": "asks for a token; HF_TOKEN has one here",
    "jupyter lab notebooks/visualisation.ipynb": "serves until it is stopped; test_notebook.py executes the notebook",
    f"{CROSS_VALIDATE} -- --image_size 320": "trains five models; tests/cross_validation trains three",
    f"{CROSS_VALIDATE} --collect --push_to_hub NAMESPACE/gi-tract-folds -- --image_size 320": (
        "needs the five models; tests/cross_validation publishes three"
    ),
    "reference_runs/gi_tract.sh uw-madison-gi-tract-image-segmentation.zip NAMESPACE/NAME": (
        "test_reference_run.py executes it with tiny settings"
    ),
    "sbatch --parsable --array=0-4 reference_runs/fold.slurm": "needs Slurm; test_reference_run.py executes the job",
    "python -m benchmarks.leakage --dataset_name gi_tract": "takes minutes; tests/benchmarks runs a small one",
}

RENT = "hf jobs run "
# All commands use one Hub, so these libraries are imported only once.
HUGGING_FACE = (
    "transformers.trainer",
    "transformers.image_processing_backends",
    "datasets",
    "evaluate",
    "albumentations",
)


class Documented(NamedTuple):
    """A command of a page, or a block of Python.

    Attributes:
        page: Where it stands.
        language: bash or python.
        text: A command in one line, or the whole block.
    """

    page: Path
    language: str
    text: str


def documented() -> Iterator[Documented]:
    """All commands and blocks of Python, in reading order."""
    for page in PAGES:
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.M | re.S):
            if language == "python":
                yield Documented(page, language, block)
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield Documented(page, language, " ".join(words))


def to_python_arguments(page: Path, command: str) -> list[str]:
    """The arguments with which `python` runs a documented command."""
    program, *words = command.split()
    if (program, words[:1]) == ("accelerate", ["launch"]):
        launched = launch_command_parser().parse_args(words[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file()
        # The launcher starts the script in a second process, which takes seconds. Only the README's command does so
        # here. Of the others, accelerate reads the flags, and the script starts at once.
        words = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
        if page == README:
            words = ["-m", "accelerate.commands.launch", *command.split()[2:]]
    elif program != "python":
        pytest.fail(f"{command}: this test runs `python` and `accelerate launch`; name any other command in NOT_RUN")
    if words[:2] == ["-m", "gi_segmentation.cross_validate"] and page == OWN_DATA:
        # What comes after `--` goes to the training.
        return words + TINY.split()
    if "run_segmentation.py" not in words:
        return words
    return words + TINY.split() + (TINY_HEAD.split() if "recipes/upernet-swin-base.yaml" in words else [])


def prepare_folder(folder: Path, hub: LoopbackHub) -> Path:
    """What a reader has: a clone, the zip from Kaggle, a DICOM series, and a Hub with checkpoints to start from."""
    phantom = folder / "phantom"
    write_phantom(phantom, num_cases=5, days_per_case=1, slices_per_scan=6, num_proc=1)
    clone = folder / "clone"
    clone.mkdir()
    shutil.make_archive(str(clone / KAGGLE_ZIP), "zip", phantom)
    write_drawings(clone, read_series(write_scan_series(clone / "series", phantom / "train")), phantom)
    for name in tracked_entries():
        (clone / name).symlink_to(ROOT / name)
    api = HfApi(endpoint=hub.endpoint, token="any")
    for name, family in CHECKPOINTS.items():
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=write_base(folder / family, family))
    for name, family in ENCODERS.items():
        write_encoder(folder / family, family)
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder / family)
    return clone


def write_drawings(clone: Path, volume: Volume, phantom: Path) -> None:
    """Write label maps of the series: what a person drew, and what another tool predicted."""
    scan = read_kaggle_scans(phantom)[0][0]
    assert scan.annotations is not None
    slices = [
        [decode(scan.annotations[one.id][organ].rle, one.height, one.width) for organ in GI_TRACT.names]
        for one in scan.slices
    ]
    masks = np.stack([volume.to_native(np.stack(organ)) for organ in zip(*slices, strict=True)])
    for folder, found in (("drawn", masks), ("nnunet", np.roll(masks, 2, axis=1))):
        (clone / folder).mkdir()
        write_label_map(volume, found, clone / folder / f"{volume.name}.nii.gz", GI_TRACT)


def tracked_entries() -> list[str]:
    """The files and folders at the top of the repository, without what is not committed."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git clone, so nobody knows which files belong to it")
    return sorted({name.split("/")[0] for name in done.stdout.split("\0") if name})


def run_commands(commands: Iterable[Documented], clone: Path, hub: LoopbackHub, hf_home: Path) -> None:
    """Run the commands of pages in a folder. Each must end with the status 0."""
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(hf_home)}
    # One documented command starts another one, which it finds on the PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with WarmPython(environment, HUGGING_FACE) as warm_python:
        for page, language, text in commands:
            # The command that rents a machine has a test of its own, below.
            if text in NOT_RUN or text.startswith(RENT):
                continue
            arguments = ["-c", text] if language == "python" else to_python_arguments(page, text)
            done = warm_python.run(arguments, clone, environment, timeout=200)
            assert done.returncode == 0, f"{page.name}: {text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            for printed in re.findall(r"^print\(.*\)  # (.+)$", text, re.M):
                assert printed.removesuffix("...") in done.stdout, f"{page.name}: {text}"


def test_every_documented_command_runs(tmp_path: Path, hub: LoopbackHub) -> None:
    clone = prepare_folder(tmp_path, hub)
    run_commands([one for one in documented() if one.page != OWN_DATA], clone, hub, tmp_path / "hf_home")


# It trains three models. Each of its steps has faster tests of its own.
@pytest.mark.long
def test_own_patients_become_a_model_and_contours_by_the_documented_commands(tmp_path: Path, hub: LoopbackHub) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in tracked_entries():
        (clone / name).symlink_to(ROOT / name)
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("NAMESPACE/segformer-b0-gi-tract")
    three_organs = save_model(tmp_path / "three_organs", "segformer", seed=0)
    api.upload_folder(repo_id="NAMESPACE/segformer-b0-gi-tract", folder_path=three_organs)
    organs = ["large_bowel", "small_bowel", "stomach", "liver", "spleen"]
    commands = [one for one in documented() if one.page == OWN_DATA]
    number = OWN_DATA.read_text().split(TRY_IT)[1].count("python -m")
    # The reader has patients at the beginning. Here they come from the end of the page.
    run_commands(commands[-number:], clone, hub, tmp_path / "hf_home")
    shutil.copytree(clone / "corrected", clone / "new_patients", ignore=shutil.ignore_patterns("RS"))
    run_commands(commands[:-number], clone, hub, tmp_path / "hf_home")
    config = json.loads(Path(api.hf_hub_download("NAMESPACE/abdomen", "config.json")).read_text())
    assert list(config["id2label"].values()) == ["background", *organs]
    (contours,) = (clone / "contours").glob("*.rtstruct.dcm")
    assert [str(roi.ROIName) for roi in dcmread(contours).StructureSetROISequence] == organs


def test_the_client_accepts_the_command_that_rents_a_machine(hub: LoopbackHub, run_python: RunPython) -> None:
    (text,) = {text for _, _, text in documented() if text.startswith(RENT)}
    # `documented` has removed the quotes around the last words, the command inside the machine.
    options, command = text.removeprefix(RENT).split(" bash -c ")
    words = ["-m", "huggingface_hub.cli.hf", "jobs", "run", "--dry-run", *options.split(), "bash", "-c", command]
    done = run_python(words, cwd=ROOT, env=hub.environment())
    assert done.returncode == 0 and "Job not submitted" in done.stdout, done.stdout + done.stderr
    assert command in done.stdout


def test_the_commands_that_cannot_run_here_are_documented_and_complete() -> None:
    assert set(NOT_RUN) <= {text for _, _, text in documented()}, "remove what no page has any more"
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.cfg").read_text()
    for words in map(str.split, NOT_RUN):
        if words[0] == "make":
            assert f"\n{words[1]}: " in makefile
        elif words[0].startswith("reference_runs/") or words[0] == "sbatch":
            (script,) = [word for word in words if word.startswith("reference_runs/")]
            assert (ROOT / script).is_file()
        elif words[:2] == ["python", "-m"]:
            source = (ROOT / words[2].replace(".", "/")).with_suffix(".py").read_text()
            # What comes after `--` goes to another command.
            own = words[: words.index("--")] if "--" in words else words
            assert all(f'"{flag}"' in source for flag in own if flag.startswith("--"))
        elif words[0] == "jupyter":
            assert (ROOT / words[-1]).is_file()
        elif extra := re.search(r"\[(\w+)\]", words[-1]):
            assert f"\n{extra[1]} =\n" in setup


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_every_page_can_be_found_from_the_readme() -> None:
    assert set(PAGES) == {README, *(ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in FOLDERS_WITH_README)],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, heading = link.partition("#")
        if not re.match(r"\w+:", link):
            target = (page.parent / path) if path else page
            assert target.exists(), f"{link} leads nowhere"
            assert not heading or heading in headings(target), f"{link}: there is no such heading"


def headings(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_tree_names_every_file_and_wing() -> None:
    tree = README.read_text().split("## The tree")[1].split("```")[1]
    named = {word.rstrip("/") for word in tree.split()}
    wings = {path.parent.name for path in (ROOT / "gi_segmentation").glob("*/__init__.py")}
    assert not {*tracked_entries(), *wings} - named
