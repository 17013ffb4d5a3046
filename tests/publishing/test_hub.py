"""Publishing: the repository has exactly the pushed files, earlier states keep their tags, differences are found."""

from pathlib import Path

from huggingface_hub import HfApi

from loopback_hub import LoopbackHub
from tests.support.processes import RunPython

REPO_ID = "tester/model"
# These programs run in processes of their own, because the client reads HF_ENDPOINT when it is imported.
PUBLISH = """
import sys
from pathlib import Path
from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.publishing.hub import publish_folder
with exit_on_input_error():
    published = publish_folder(Path(sys.argv[1]), sys.argv[2], "model", sys.argv[3], "Publish", private=None)
    print(published.tag, published.commit)
"""
ADD = """
import sys
from pathlib import Path
from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.publishing.hub import add_files
with exit_on_input_error():
    print(add_files(Path(sys.argv[1]), sys.argv[2], "Add", branch=None, parent=sys.argv[3]))
"""
READ_BACK = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from gi_segmentation.publishing.hub import read_back
print(read_back(HfApi(), Path(sys.argv[1]), sys.argv[2], "model", "main"))
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_new_state_replaces_the_old_one_and_the_old_tag_stays(
    tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    first = write(tmp_path / "first", {"config.json": "{}", "model.safetensors": "weights", "old.png": "picture"})
    second = write(tmp_path / "second", {"config.json": "{}", "model.safetensors": "better weights"})
    tags, commits = [], []
    for folder in (first, second, second):
        done = run_python(["-c", PUBLISH, str(folder), REPO_ID, "best"], cwd=tmp_path, env=hub.environment())
        assert done.returncode == 0, done.stderr
        tag, commit = done.stdout.split()
        tags.append(tag)
        commits.append(commit)
    assert tags == ["best", "best-2", "best-2"], "the same state pushed twice is one state"
    assert commits[1] == commits[2] != commits[0]
    api = HfApi(endpoint=hub.endpoint, token="any")
    assert set(api.list_repo_files(REPO_ID)) - {".gitattributes"} == {"config.json", "model.safetensors"}
    for tag, folder in (("best", first), ("best-2", second)):
        copy = api.hf_hub_download(REPO_ID, "model.safetensors", revision=tag, local_dir=tmp_path / tag)
        assert Path(copy).read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_hidden_folder_is_published_and_deleted_like_any_other(
    tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    entries = ".eval_results/gi_tract.yaml"
    first = write(tmp_path / "first", {"config.json": "{}", entries: "[]"})
    second = write(tmp_path / "second", {"config.json": "{}"})
    api = HfApi(endpoint=hub.endpoint, token="any")
    for folder, expected in ((first, {"config.json", entries}), (second, {"config.json"})):
        done = run_python(["-c", PUBLISH, str(folder), REPO_ID, "best"], cwd=tmp_path, env=hub.environment())
        assert done.returncode == 0, done.stderr
        assert set(api.list_repo_files(REPO_ID)) - {".gitattributes"} == expected


def test_files_are_added_only_to_the_commit_that_they_belong_to(
    tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo(REPO_ID)
    commits = [
        api.upload_folder(repo_id=REPO_ID, folder_path=write(tmp_path / name, {"config.json": name})).oid
        for name in ("first", "second")
    ]
    more = write(tmp_path / "more", {"onnx/model.onnx": "weights"})
    for parent, expected in zip(commits, (1, 0), strict=True):
        done = run_python(["-c", ADD, str(more), REPO_ID, parent], cwd=tmp_path, env=hub.environment())
        assert done.returncode == expected, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        added = {"onnx/model.onnx"} if expected == 0 else set()
        assert set(api.list_repo_files(REPO_ID)) - {".gitattributes"} == {"config.json"} | added


def test_reading_back_finds_a_file_that_differs(tmp_path: Path, hub: LoopbackHub, run_python: RunPython) -> None:
    folder = write(tmp_path / "folder", {"config.json": "{}", "model.safetensors": "weights"})
    done = run_python(["-c", PUBLISH, str(folder), REPO_ID, "best"], cwd=tmp_path, env=hub.environment())
    assert done.returncode == 0, done.stderr
    (folder / "model.safetensors").write_text("weighty")
    done = run_python(["-c", READ_BACK, str(folder), REPO_ID], cwd=tmp_path, env=hub.environment())
    assert done.stdout.strip() == "['model.safetensors']"


def test_an_impossible_repository_name_ends_in_one_error(
    tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    folder = write(tmp_path / "folder", {"config.json": "{}"})
    done = run_python(["-c", PUBLISH, str(folder), "two//slashes", "best"], cwd=tmp_path, env=hub.environment())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "two//slashes" in done.stderr
