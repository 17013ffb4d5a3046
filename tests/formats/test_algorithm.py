"""A prediction says which checkpoints made it: by commit on the Hub, and by the weights of a folder."""

import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi

from gi_segmentation.formats.algorithm import Algorithm, hash_weights
from loopback_hub import LoopbackHub
from tests.support.models import save_model
from tests.support.processes import ROOT, RunPython

PROGRAM = """
import sys
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_member
for revision in (None, "other"):
    print(load_member("name/model", revision, Computation("cpu")).commit)
print(load_member(sys.argv[1], None, Computation("cpu")).commit)
"""


def test_a_checkpoint_of_the_hub_has_the_commit_of_its_branch(
    hub: LoopbackHub, run_python: RunPython, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "segformer", seed=0)
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("name/model")
    api.upload_folder(repo_id="name/model", folder_path=folder)
    api.create_branch("name/model", branch="other")
    (folder / "README.md").write_text("another commit")
    api.upload_folder(repo_id="name/model", folder_path=folder, revision="other")
    commits = [api.model_info("name/model", revision=revision).sha for revision in ("main", "other")]
    done = run_python(["-c", PROGRAM, str(folder)], cwd=ROOT, env={**os.environ, **hub.environment()})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*map(str, commits), hash_weights(folder)] and len(set(commits)) == 2


def test_a_folder_has_the_fingerprint_of_its_weights(tmp_path: Path) -> None:
    one, other = (save_model(tmp_path / str(seed), "segformer", seed) for seed in (0, 1))
    copy = shutil.copytree(one, tmp_path / "copy")
    assert hash_weights(one) == hash_weights(copy) != hash_weights(other)
    assert hash_weights(tmp_path / "nowhere") == "unknown"


def test_the_version_fits_into_the_64_characters_of_dicom() -> None:
    algorithm = Algorithm(dict.fromkeys(map(str, range(100)), "f" * 40))
    assert len(algorithm.version) <= 64 and "f" * 40 in algorithm.version
