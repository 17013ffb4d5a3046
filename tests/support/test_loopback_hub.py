"""The Loopback Hub does what the project needs of a Hub, seen through the real clients.

The clients read HF_* when they are imported, so each `@through_clients` test runs its body in a process of its own
(this file, called with the test's name), with HF_ENDPOINT at a fresh server and HF_HOME in the test's folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.loopback_hub import LoopbackHub, check_card

HERE = Path(__file__).resolve()
SERVER = HERE.with_name("loopback_hub.py")
GOOD_CARD = """---
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


def environment(hub: LoopbackHub, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **quiet, **hub.environment(), "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}


def run_in_client(hub: LoopbackHub, folder: Path, name: str) -> None:
    """Run the function `name` of this file in a process that talks to `hub`."""
    command = [sys.executable, "-m", "tests.support.test_loopback_hub", name, str(folder)]
    result = subprocess.run(
        command, env=environment(hub, folder), cwd=HERE.parents[2], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{name} failed in its own process:\n{result.stdout}{result.stderr}"


BODIES: dict[str, Callable[[Path], None]] = {}


def through_clients(body: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make a test of a function that uses the clients."""
    BODIES[body.__name__] = body

    def test(tmp_path: Path) -> None:
        with LoopbackHub(tmp_path / "root") as hub:
            run_in_client(hub, tmp_path, body.__name__)

    return test


def send(
    url: str, method: str = "GET", data: bytes | Iterable[bytes] | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """A bare request, for what no client would send: status, body and headers."""
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_folder(folder: Path) -> Path:
    """A folder of regular, large and empty files."""
    (folder / "sub dir").mkdir(parents=True)
    (folder / "README.md").write_text(GOOD_CARD)
    (folder / "sub dir" / "ünï code#1.txt").write_text("text\n")
    (folder / "model.safetensors").write_bytes(os.urandom(3_000_001))
    (folder / "sub dir" / "x.png").write_bytes(os.urandom(100))
    (folder / "empty.bin").write_bytes(b"")
    (folder / "big.txt").write_bytes(os.urandom(1 << 20) * 11)  # over the limit for regular files
    return folder


@through_clients
def test_files_come_back_with_the_same_hashes(folder: Path) -> None:
    from huggingface_hub import HfApi, RepoFile, snapshot_download
    from huggingface_hub.utils.sha import git_hash

    source, api = make_folder(folder / "source"), HfApi()
    for repo_type in ("model", "dataset"):
        api.create_repo("ns/r", repo_type=repo_type)
        commit = api.upload_folder(folder_path=source, repo_id="ns/r", repo_type=repo_type)
        copy = Path(snapshot_download("ns/r", repo_type=repo_type))
        assert copy.name == commit.oid == api.repo_info("ns/r", repo_type=repo_type).sha
        tree = api.list_repo_tree("ns/r", repo_type=repo_type, recursive=True)
        stored = {info.path: info for info in tree if isinstance(info, RepoFile)}
        for path in (path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source).as_posix()
            assert sha256(copy / name) == sha256(path), name
            lfs = stored[name].lfs
            assert (lfs is not None) == (name in ("model.safetensors", "sub dir/x.png", "big.txt")), name
            assert (lfs.sha256 == sha256(path)) if lfs else (stored[name].blob_id == git_hash(path.read_bytes())), name
        again = api.upload_folder(folder_path=source, repo_id="ns/r", repo_type=repo_type)
        assert again.oid == commit.oid, "unchanged files make no commit"


@through_clients
def test_listings_and_repo_info(folder: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi()
    assert api.create_repo("ns/r").repo_id == "ns/r"
    assert api.create_repo("ns/r", exist_ok=True).repo_id == "ns/r"
    commit = api.upload_folder(folder_path=make_folder(folder / "source"), repo_id="ns/r", commit_message="add")
    info = api.model_info("ns/r", files_metadata=True)
    assert (info.sha, info.private, info.pipeline_tag) == (commit.oid, False, "image-segmentation")
    assert {"segmentation", "license:mit", "en"} <= set(info.tags or [])
    assert info.card_data is not None and info.card_data.eval_results is not None
    assert info.card_data.eval_results[0].metric_value == 0.5
    assert info.last_modified is not None
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings or []}
    assert sizes["model.safetensors"] == (3_000_001, True) and sizes["empty.bin"] == (0, False)
    assert {item.path for item in api.list_repo_tree("ns/r")} == {name.split("/")[0] for name in sizes}
    inside = {item.path for item in api.list_repo_tree("ns/r", "sub dir", expand=True)}
    assert inside == {"sub dir/ünï code#1.txt", "sub dir/x.png"}
    found = api.get_paths_info("ns/r", ["sub dir", "README.md", "absent"], expand=True)
    assert [(item.path, item.last_commit.title if item.last_commit else None) for item in found] == [
        ("sub dir", "add"),
        ("README.md", "add"),
    ]
    assert [item.title for item in api.list_repo_commits("ns/r")] == ["add", "initial commit"]
    narrow = api.model_info("ns/r", expand=["sha"])
    assert (narrow.sha, narrow.siblings, narrow.tags) == (info.sha, None, None)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("ns/r", "absent"))


@through_clients
def test_a_tag_keeps_the_old_version(folder: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    api = HfApi()
    api.create_repo("ns/r")
    put = functools.partial(api.upload_file, path_in_repo="w.bin", repo_id="ns/r")
    first = put(path_or_fileobj=b"one")
    api.create_tag("ns/r", tag="v1.0")
    api.create_branch("ns/r", branch="feature/x")
    put(path_or_fileobj=b"two")
    put(path_or_fileobj=b"three", revision="feature/x")
    wanted = {"v1.0": b"one", first.oid: b"one", first.oid[:8]: b"one", "main": b"two", "feature/x": b"three"}
    for revision, content in wanted.items():
        assert Path(hf_hub_download("ns/r", "w.bin", revision=revision)).read_bytes() == content, revision
    refs = api.list_repo_refs("ns/r")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1.0", first.oid)]
    assert [branch.name for branch in refs.branches] == ["feature/x", "main"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("ns/r", tag="v1.0")
    api.create_tag("ns/r", tag="v1.0", exist_ok=True)
    api.delete_tag("ns/r", tag="v1.0")
    api.delete_branch("ns/r", branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("ns/r", tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        put(path_or_fileobj=b"four", revision="feature/x")


@through_clients
def test_tokens_guard_writes_and_private_repositories(folder: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    assert api.whoami()["name"] == "loopback"
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
    api.update_repo_settings("ns/closed", private=False)
    assert api.list_repo_files("ns/closed", token=False) == [".gitattributes"]
    api.delete_repo("ns/closed")
    assert not api.repo_exists("ns/closed")


@through_clients
def test_what_is_missing_raises_the_clients_own_exceptions(folder: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        BadRequestError,
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    api.create_repo("ns/r")
    put = functools.partial(api.upload_file, path_or_fileobj=b"x", path_in_repo="x")
    cases: list[tuple[type[Exception], Callable[[], Any]]] = [
        (RepositoryNotFoundError, lambda: api.model_info("ns/absent")),
        (RepositoryNotFoundError, lambda: api.dataset_info("ns/r")),
        (RepositoryNotFoundError, lambda: hf_hub_download("ns/absent", "x")),
        (RepositoryNotFoundError, lambda: put(repo_id="ns/absent")),
        (RepositoryNotFoundError, lambda: api.delete_repo("ns/absent")),
        (RevisionNotFoundError, lambda: hf_hub_download("ns/r", "x", revision="absent")),
        (RevisionNotFoundError, lambda: api.model_info("ns/r", revision="0" * 40)),
        (RevisionNotFoundError, lambda: put(repo_id="ns/r", revision="absent")),
        (EntryNotFoundError, lambda: hf_hub_download("ns/r", "absent.txt")),
        (EntryNotFoundError, lambda: api.delete_file("absent.txt", "ns/r")),
        (BadRequestError, lambda: put(repo_id="ns/r", create_pr=True)),
        (BadRequestError, lambda: api.create_repo("ns/s", repo_type="space", space_sdk="static")),
    ]
    for number, (kind, act) in enumerate(cases):
        with pytest.raises(kind):
            print("case", number)
            act()


@through_clients
def test_commits_delete_copy_and_check_the_parent(folder: Path) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    api.create_repo("ns/r")
    base = api.upload_folder(folder_path=make_folder(folder / "source"), repo_id="ns/r")
    copies = [CommitOperationCopy("model.safetensors", "copy.safetensors"), CommitOperationCopy("README.md", "B.md")]
    deletions = [CommitOperationDelete("sub dir/"), CommitOperationDelete("empty.bin")]
    api.create_commit("ns/r", [*copies, *deletions], commit_message="tidy", parent_commit=base.oid)
    names = [".gitattributes", "B.md", "README.md", "big.txt", "copy.safetensors", "model.safetensors"]
    assert api.list_repo_files("ns/r") == names
    head = api.model_info("ns/r").sha
    stale = [CommitOperationAdd("late.txt", b"late")]
    with pytest.raises(HfHubHTTPError, match="412") as caught:
        api.create_commit("ns/r", stale, commit_message="late", parent_commit=base.oid)
    assert caught.value.response.status_code == 412
    assert api.model_info("ns/r").sha == head and api.list_repo_files("ns/r") == names


@through_clients
def test_concurrent_commits_do_not_lose_each_other(folder: Path) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
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
    assert len(api.list_repo_commits("ns/r")) == 1 + 16 + 1


@through_clients
def test_ranges_and_the_file_system(folder: Path) -> None:
    from huggingface_hub import HfApi, HfFileSystem

    api, data = HfApi(), os.urandom(100_000)
    api.create_repo("ns/r", repo_type="dataset")
    api.upload_file(path_or_fileobj=data, path_in_repo="d/a.bin", repo_id="ns/r", repo_type="dataset")
    files = HfFileSystem()
    with files.open("hf://datasets/ns/r/d/a.bin", "rb", block_size=1000) as file:
        file.seek(5000)
        assert file.read(100) == data[5000:5100]
    assert files.glob("datasets/ns/r/**/*.bin") == ["datasets/ns/r/d/a.bin"]
    with files.open("datasets/ns/r/new.txt", "w") as file:
        file.write("written")
    assert files.read_text("datasets/ns/r/new.txt") == "written"
    url = f"{os.environ['HF_ENDPOINT']}/datasets/ns/r/resolve/main/d/a.bin"
    for header, piece, total in (
        ("bytes=10-19", data[10:20], "bytes 10-19/100000"),
        ("bytes=99990-", data[99990:], "bytes 99990-99999/100000"),
        ("bytes=-5", data[-5:], "bytes 99995-99999/100000"),
        ("bytes=99999-200000", data[-1:], "bytes 99999-99999/100000"),
    ):
        status, body, headers = send(url, headers={"Range": header})
        assert (status, body, headers["Content-Range"]) == (206, piece, total), header
    status, _, headers = send(url, headers={"Range": "bytes=100000-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */100000")
    status, body, headers = send(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "100000")
    assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{hashlib.sha256(data).hexdigest()}"'


@through_clients
def test_datasets_push_load_and_stream(folder: Path) -> None:
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


@through_clients
def test_transformers_push_and_load(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model: Any = BertModel(config)
    model.push_to_hub("ns/bert")
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="ns/bert-2")
    for name in ("ns/bert", "ns/bert-2"):
        loaded = BertModel.from_pretrained(name, revision="main").state_dict()
        assert all(loaded[key].equal(value) for key, value in model.state_dict().items())


@through_clients
def test_cards_are_validated(folder: Path) -> None:
    from huggingface_hub import DatasetCard, HfApi, ModelCard

    api = HfApi()
    api.create_repo("ns/r")
    ModelCard(GOOD_CARD).validate()
    DatasetCard("---\nlicense: other\nlicense_name: own\nconfigs: []\n---\n").validate()
    bad = GOOD_CARD.replace("value: 0.5", "value: [0.5]")
    with pytest.raises(ValueError, match=r"metrics\[0\].value"):
        ModelCard(bad).validate()
    for card in (bad, GOOD_CARD.replace("type: dice, ", "")):  # ModelCard refuses or drops the second by itself
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md[\s\S]*metrics\[0\]"):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="ns/r")
    assert "README.md" not in api.list_repo_files("ns/r")
    with pytest.warns(UserWarning, match="license_name"):
        api.upload_file(path_or_fileobj=b"---\nlicense: other\n---\n", path_in_repo="README.md", repo_id="ns/r")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# No front matter", path_in_repo="README.md", repo_id="ns/r")


@pytest.mark.parametrize(
    ("kind", "front", "wanted"),
    [
        ("model", "license: apache", "license"),
        ("model", "tags: one", "tags"),
        ("model", "language: no", "language"),
        ("model", "pipeline_tag: [a]", "pipeline_tag"),
        ("model", "a: [", "not valid YAML"),
        ("model", "- a", "mapping"),
        ("model", "model-index: []", "model-index"),
        ("model", "model-index: [{results: []}]", "model-index[0].name"),
        ("model", "model-index: [{name: m, results: [{task: {type: t}, metrics: []}]}]", "results[0].dataset"),
        ("dataset", "configs: {a: b}", "configs"),
        ("dataset", "configs: [{config_name: a}]", "configs[0].data_files"),
        ("dataset", "configs: [{config_name: a, data_files: [{split: x}]}]", "data_files[0].path"),
    ],
)
def test_each_card_fault_is_named(kind: str, front: str, wanted: str) -> None:
    errors, _ = check_card(f"---\n{front}\n---\n", kind)
    assert len(errors) == 1 and wanted in errors[0], errors


def leave_a_repository(folder: Path) -> None:
    """Client's part before a restart."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("ns/kept", private=True)
    commit = api.upload_file(path_or_fileobj=b"kept" * 1000, path_in_repo="k.bin", repo_id="ns/kept")
    api.create_tag("ns/kept", tag="v1")
    (folder / "oid").write_text(commit.oid)


def find_the_repository(folder: Path) -> None:
    """Client's part after a restart."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info("ns/kept", revision="v1")
    assert (info.sha, info.private) == ((folder / "oid").read_text(), True)
    path = hf_hub_download("ns/kept", "k.bin", cache_dir=folder / "fresh")
    assert Path(path).read_bytes() == b"kept" * 1000


BODIES |= {body.__name__: body for body in (leave_a_repository, find_the_repository)}


def test_a_restarted_server_serves_the_same_repositories(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "root") as hub:
        run_in_client(hub, tmp_path, "leave_a_repository")
        first = hub.endpoint
        with pytest.raises(RuntimeError, match="another Loopback Hub"), LoopbackHub(tmp_path / "root"):
            pass
    with pytest.raises(urllib.error.URLError):
        send(f"{first}/api/whoami-v2")
    with LoopbackHub(tmp_path / "root") as hub:
        run_in_client(hub, tmp_path, "find_the_repository")


def test_what_no_client_sends_is_refused(tmp_path: Path) -> None:
    token = {"Authorization": "Bearer any", "Content-Type": "application/json"}
    with LoopbackHub(tmp_path / "root") as hub:
        base = hub.endpoint
        create = json.dumps({"name": "r", "organization": "ns"}).encode()
        assert send(f"{base}/api/repos/create", "POST", create, token)[0] == 200
        status, body, _ = send(f"{base}/api/nowhere")
        assert status == 404 and "GET /api/nowhere" in json.loads(body)["error"]

        climbing = json.dumps({"name": "..", "organization": ".."}).encode()
        assert send(f"{base}/api/repos/create", "POST", climbing, token)[0] == 400
        for path in ("../out", "/out", "a/../../out", ".git/config", "a\\b", ""):
            file = {"key": "file", "value": {"path": path, "content": "eA=="}}
            lines = [{"key": "header", "value": {"summary": "s"}}, file]
            data = "\n".join(map(json.dumps, lines)).encode()
            assert send(f"{base}/api/models/ns/r/commit/main", "POST", data, token)[0] == 400, path
        for path in ("..%2F..%2Frefs.json", "%2e%2e/refs.json"):
            assert send(f"{base}/ns/r/resolve/main/{path}")[0] == 404, path

        oid = hashlib.sha256(b"right").hexdigest()
        batch = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 5}]}).encode()
        assert send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch)[0] == 401
        _, body, _ = send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch, token)
        href = json.loads(body)["objects"][0]["actions"]["upload"]["href"]
        assert send(href[:-1], "PUT", b"right")[0] == 403, "a forged ticket"
        for wrong in (b"wrong", b"righ", b"right!"):
            assert send(href, "PUT", wrong)[0] == 422
        verify = json.dumps({"oid": oid, "size": 5}).encode()
        assert send(f"{base}/ns/r.git/lfs/verify", "POST", verify, token)[0] == 404
        assert send(href, "PUT", iter([b"ri", b"ght"]))[0] == 200, "a chunked body"
        assert send(f"{base}/ns/r.git/lfs/verify", "POST", verify, token)[0] == 200
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".new-", "out"))]


def test_command_line_runs_a_command_with_the_server(tmp_path: Path) -> None:
    check = "import os, sys; sys.exit(7 if os.environ['HF_HUB_DISABLE_XET'] == '1' and os.environ['HF_TOKEN'] else 1)"
    command = [sys.executable, str(SERVER), "--root", str(tmp_path), "--", sys.executable, "-c", check]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 7, result.stderr
    assert result.stdout.startswith("Loopback Hub on http://127.0.0.1:") and result.stdout.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(SERVER), "--root", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        endpoint = process.stdout.readline().split()[3].rstrip(",")
        status, body, _ = send(f"{endpoint}/api/whoami-v2", headers={"Authorization": "Bearer any"})
        assert (status, json.loads(body)["name"]) == (200, "loopback")
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


if __name__ == "__main__":
    BODIES[sys.argv[1]](Path(sys.argv[2]))
