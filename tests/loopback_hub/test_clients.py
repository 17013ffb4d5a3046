"""The loopback Hub does what the project needs of a Hub, seen through the real clients."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, RepoFile
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from loopback_hub import LoopbackHub
from tests.support.processes import RunPython

CARD = """---
license: mit
language: en
tags: [segmentation]
pipeline_tag: image-segmentation
model-index:
- name: m
  results:
  - task: {type: image-segmentation}
    dataset: {name: D, type: ns/d}
    metrics: [{type: dice, value: 0.5}]
---
# Model
"""
# These clients read HF_ENDPOINT when they are imported, so they run in a process of their own.
DATASETS = """
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import HfApi

parts = {"train": list(range(50)), "test": [7, 8, 9]}
DatasetDict({name: Dataset.from_dict({"n": rows}) for name, rows in parts.items()}).push_to_hub("ns/d")
Dataset.from_dict({"n": [1]}).push_to_hub("ns/d", config_name="small", split="validation")
loaded = load_dataset("ns/d", "default")
assert {name: list(loaded[name]["n"]) for name in loaded} == parts
for name, rows in parts.items():
    assert [row["n"] for row in load_dataset("ns/d", "default", split=name, streaming=True)] == rows
assert list(load_dataset("ns/d", "small", split="validation")["n"]) == [1]
HfApi().create_tag("ns/d", tag="v1", repo_type="dataset")
Dataset.from_dict({"n": [5]}).push_to_hub("ns/d", split="test")
assert list(load_dataset("ns/d", "default", split="test", revision="v1")["n"]) == parts["test"]
assert list(load_dataset("ns/d", "default", split="test")["n"]) == [5]
"""
TRANSFORMERS = """
from transformers import BertConfig, BertModel

config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model, fold = BertModel(config), BertModel(config)
model.push_to_hub("ns/bert")
fold.push_to_hub("ns/bert", revision="fold-3")
model.save_pretrained("saved", push_to_hub=True, repo_id="ns/bert-2")
for wanted, name, revision in ((model, "ns/bert", "main"), (model, "ns/bert-2", "main"), (fold, "ns/bert", "fold-3")):
    loaded = BertModel.from_pretrained(name, revision=revision).state_dict()
    assert all(loaded[key].equal(value) for key, value in wanted.state_dict().items())
assert not fold.embeddings.word_embeddings.weight.equal(model.embeddings.word_embeddings.weight)
"""


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="any")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_folder(folder: Path) -> Path:
    """A folder of regular, large and empty files."""
    (folder / "sub dir").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "sub dir" / "ünï code#1.txt").write_text("text\n")
    (folder / "model.safetensors").write_bytes(os.urandom(3_000_001))
    (folder / "sub dir" / "x.png").write_bytes(os.urandom(100))
    (folder / "empty.bin").write_bytes(b"")
    # A text, but over the limit for regular files.
    (folder / "big.txt").write_bytes(os.urandom(1 << 20) * 11)
    return folder


def test_files_come_back_with_the_same_hashes(api: HfApi, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    for repo_type in ("model", "dataset"):
        api.create_repo("ns/r", repo_type=repo_type)
        commit = api.upload_folder(folder_path=source, repo_id="ns/r", repo_type=repo_type)
        copy = Path(api.snapshot_download("ns/r", repo_type=repo_type, cache_dir=tmp_path / "cache"))
        assert copy.name == commit.oid == api.repo_info("ns/r", repo_type=repo_type).sha
        tree = api.list_repo_tree("ns/r", repo_type=repo_type, recursive=True)
        stored = {info.path: info for info in tree if isinstance(info, RepoFile)}
        for path in (path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source).as_posix()
            assert sha256(copy / name) == sha256(path), name
            assert stored[name].size == path.stat().st_size, name
            lfs = stored[name].lfs
            assert (lfs is not None) == (name in ("model.safetensors", "sub dir/x.png", "big.txt")), name
            assert (lfs.sha256 == sha256(path)) if lfs else (stored[name].blob_id == git_hash(path.read_bytes())), name
        again = api.upload_folder(folder_path=source, repo_id="ns/r", repo_type=repo_type)
        assert again.oid == commit.oid, "unchanged files make no commit"


def test_listings_and_repo_info(api: HfApi, tmp_path: Path) -> None:
    assert api.create_repo("ns/r").repo_id == "ns/r"
    assert api.create_repo("ns/r", exist_ok=True).repo_id == "ns/r"
    commit = api.upload_folder(folder_path=make_folder(tmp_path / "source"), repo_id="ns/r")
    info = api.model_info("ns/r")
    assert (info.sha, info.private, info.pipeline_tag) == (commit.oid, False, "image-segmentation")
    assert {"segmentation", "license:mit", "en"} <= set(info.tags or [])
    assert info.card_data is not None and info.card_data.eval_results is not None
    assert info.card_data.eval_results[0].metric_value == 0.5
    assert info.last_modified is not None
    names = [file.rfilename for file in info.siblings or []]
    assert names == api.list_repo_files("ns/r")
    assert {item.path for item in api.list_repo_tree("ns/r")} == {name.split("/")[0] for name in names}
    inside = {item.path for item in api.list_repo_tree("ns/r", "sub dir")}
    assert inside == {"sub dir/ünï code#1.txt", "sub dir/x.png"}
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("ns/r", "absent"))
    assert api.file_exists("ns/r", "sub dir/x.png") and not api.file_exists("ns/r", "absent")


def test_a_tag_keeps_the_old_version_and_a_branch_its_own(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("ns/r")
    put = partial(api.upload_file, path_in_repo="w.bin", repo_id="ns/r")
    first = put(path_or_fileobj=b"one")
    api.create_tag("ns/r", tag="v1.0")
    api.create_branch("ns/r", branch="feature/x")
    put(path_or_fileobj=b"two")
    put(path_or_fileobj=b"three", revision="feature/x")
    wanted = {"v1.0": b"one", first.oid: b"one", first.oid[:8]: b"one", "main": b"two", "feature/x": b"three"}
    for revision, content in wanted.items():
        copy = api.hf_hub_download("ns/r", "w.bin", revision=revision, cache_dir=tmp_path)
        assert Path(copy).read_bytes() == content, revision
    refs = api.list_repo_refs("ns/r")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1.0", first.oid)]
    assert [branch.name for branch in refs.branches] == ["feature/x", "main"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("ns/r", tag="v1.0")
    api.create_tag("ns/r", tag="v1.0", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        put(path_or_fileobj=b"four", revision="v1.0")
    with pytest.raises(RevisionNotFoundError):
        put(path_or_fileobj=b"four", revision="feature/y")


def test_tokens_guard_writes_and_private_repositories(api: HfApi) -> None:
    assert api.whoami()["name"] == "loopback"
    assert api.create_repo("short").repo_id == "loopback/short"
    api.create_repo("ns/open")
    api.create_repo("ns/closed", private=True)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="invalid")
    for token in ("invalid", False):
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("ns/new", token=token)
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("ns/open", token=token)
        with pytest.raises(HfHubHTTPError, match="401"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id="ns/open", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.list_repo_files("ns/closed", token=token)
        assert api.list_repo_files("ns/open", token=token) == [".gitattributes"]
    assert api.model_info("ns/closed").private is True


def test_what_is_missing_raises_the_clients_own_exceptions(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("ns/r")
    put = partial(api.upload_file, path_or_fileobj=b"x", path_in_repo="x")
    get = partial(api.hf_hub_download, cache_dir=tmp_path)
    cases: list[tuple[type[Exception], Callable[[], Any]]] = [
        (RepositoryNotFoundError, lambda: api.model_info("ns/absent")),
        (RepositoryNotFoundError, lambda: api.dataset_info("ns/r")),
        (RepositoryNotFoundError, lambda: get("ns/absent", "x")),
        (RepositoryNotFoundError, lambda: put(repo_id="ns/absent")),
        (RevisionNotFoundError, lambda: get("ns/r", "x", revision="absent")),
        (RevisionNotFoundError, lambda: api.model_info("ns/r", revision="0" * 40)),
        (RevisionNotFoundError, lambda: put(repo_id="ns/r", revision="absent")),
        (EntryNotFoundError, lambda: get("ns/r", "absent.txt")),
        (EntryNotFoundError, lambda: api.delete_file("absent.txt", "ns/r")),
        (BadRequestError, lambda: put(repo_id="ns/r", create_pr=True)),
    ]
    for number, (kind, act) in enumerate(cases):
        with pytest.raises(kind):
            print("case", number)
            act()


def test_commits_delete_and_check_the_parent(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("ns/r")
    base = api.upload_folder(folder_path=make_folder(tmp_path / "source"), repo_id="ns/r")
    deletions = [CommitOperationDelete("sub dir/"), CommitOperationDelete("empty.bin")]
    api.create_commit("ns/r", deletions, commit_message="tidy", parent_commit=base.oid)
    names = [".gitattributes", "README.md", "big.txt", "model.safetensors"]
    assert api.list_repo_files("ns/r") == names
    head = api.model_info("ns/r").sha
    stale = [CommitOperationAdd("late.txt", b"late")]
    with pytest.raises(HfHubHTTPError, match="412") as caught:
        api.create_commit("ns/r", stale, commit_message="late", parent_commit=base.oid)
    assert caught.value.response.status_code == 412
    assert api.model_info("ns/r").sha == head and api.list_repo_files("ns/r") == names


def test_concurrent_commits_do_not_lose_each_other(api: HfApi, hub: LoopbackHub) -> None:
    api.create_repo("ns/r")

    def add(name: str, parent: str | None = None) -> int:
        try:
            added = [CommitOperationAdd(f"{name}.bin", name.encode()), CommitOperationAdd(f"{name}.txt", b"x")]
            api.create_commit("ns/r", added, commit_message=name, parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, (f"free-{i}" for i in range(16)))) == [200] * 16
        head = api.model_info("ns/r").sha
        answers = sorted(pool.map(lambda i: add(f"bound-{i}", head), range(4)))
    assert answers == [200, 412, 412, 412]
    names = api.list_repo_files("ns/r")
    assert len([name for name in names if name.startswith("free-")]) == 32
    assert len([name for name in names if name.startswith("bound-")]) == 2
    assert len(list((hub.root / "models/ns/r/commits").iterdir())) == 1 + 16 + 1


def test_the_file_system(api: HfApi, hub: LoopbackHub) -> None:
    data = os.urandom(100_000)
    api.create_repo("ns/r", repo_type="dataset")
    api.upload_file(path_or_fileobj=data, path_in_repo="d/a.bin", repo_id="ns/r", repo_type="dataset")
    files = HfFileSystem(endpoint=hub.endpoint, token="any")
    with files.open("hf://datasets/ns/r/d/a.bin", "rb", block_size=1000) as file:
        file.seek(5000)
        assert file.read(100) == data[5000:5100]
    assert files.glob("datasets/ns/r/**/*.bin") == ["datasets/ns/r/d/a.bin"]
    with files.open("datasets/ns/r/new.txt", "w") as file:
        file.write("written")
    assert files.read_text("datasets/ns/r/new.txt") == "written"


@pytest.mark.parametrize("code", [DATASETS, TRANSFORMERS], ids=["datasets", "transformers"])
def test_push_and_load(code: str, hub: LoopbackHub, tmp_path: Path, run_python: RunPython) -> None:
    done = run_python(["-c", code], cwd=tmp_path, env=hub.environment())
    assert done.returncode == 0, done.stderr


def test_a_restarted_server_serves_the_same_repositories(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "root") as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        api.create_repo("ns/kept", private=True)
        commit = api.upload_file(path_or_fileobj=b"kept" * 1000, path_in_repo="k.bin", repo_id="ns/kept")
        api.create_tag("ns/kept", tag="v1")
        with pytest.raises(RuntimeError, match="a loopback Hub serves"), LoopbackHub(tmp_path / "root"):
            pass
    with LoopbackHub(tmp_path / "root") as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        info = api.model_info("ns/kept", revision="v1")
        assert (info.sha, info.private) == (commit.oid, True)
        path = api.hf_hub_download("ns/kept", "k.bin", local_dir=tmp_path / "fresh")
        assert Path(path).read_bytes() == b"kept" * 1000
