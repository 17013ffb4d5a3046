"""Loopback Hub: a Hub server on 127.0.0.1, for this project's tests and for rehearsing a publication offline.

A TEST AND DEMO TOOL. It is never product code and never for a network: it binds 127.0.0.1 only, has one user, and
takes any token except the word "invalid". The unmodified clients (huggingface_hub, datasets, transformers) talk to it:

    python -m tests.support.loopback_hub --root DIR [--port 0] [--verbose]   # serves until SIGINT or SIGTERM
    python -m tests.support.loopback_hub --root DIR -- COMMAND ...           # runs COMMAND against it

    with LoopbackHub(root) as hub:                                    # in a test
        HfApi(endpoint=hub.endpoint, token="any").create_repo("ns/name")

The clients read HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET=1 when they are imported; `LoopbackHub.environment` has
all of them. Xet must be off: this server stores large files by the LFS protocol, which the clients then fall back to.
They cache by repository name, not by server: give a demo its own HF_HOME.

On disk, a folder per repository: `blobs/` (regular files by git blob SHA-1), `lfs/` (large files by SHA-256), `trees/`
and `commits/` (JSON by SHA-1), `refs.json` (branches and tags) and `repo.json`. Every write is a temporary file and an
`os.replace`, refs last, so a killed server leaves the last whole commit; a new one on the same root serves it.

Not here: pull requests, Spaces, listings of all repositories, Xet, pages of listings, and `.gitignore` filtering.
Only the standard library (on a POSIX system), and PyYAML, which huggingface_hub brings, to check the cards.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


def words(text: str) -> list[str]:
    """A list written as text."""
    return text.split()


USER = "loopback"
CHUNK = 1 << 20
REGULAR_LIMIT = 10 * 1024 * 1024  # a larger file must go through LFS, as on the real Hub
LFS_PATTERNS = words("""
*.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.lz4 *.mds *.mlmodel *.model *.msgpack *.npy
*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tar.* *.tflite *.tgz *.wasm
*.xz *.zip *.zst *tfevents* *.aac *.flac *.mp3 *.ogg *.pcm *.raw *.sam *.wav *.bmp *.gif *.jpeg *.jpg *.png *.tif
*.tiff *.webp *.mp4 *.webm
""")
LICENSES = words("""
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl
postgresql unknown unlicense wtfpl zlib
""")
FRONT_MATTER = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
REF_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*")
SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """A refusal: HTTP status, message, and the X-Error-Code from which the clients choose their exception class."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **(body or {})}
        self.headers = {"X-Error-Message": " ".join(message.split()).encode("ascii", "replace").decode()}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= headers or {}


@dataclass(frozen=True)
class Entry:
    """A file of a tree: git blob id and size. For LFS, `oid` is the pointer file's and `sha256` the object's."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def content_id(self) -> str:
        """What a client can compute from the bytes alone, and gets as ETag."""
        return self.sha256 or self.oid

    @property
    def pointer(self) -> bytes:
        """The pointer file git would store in place of an LFS object."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


Tree = Mapping[str, Entry]


def blob_id(data: bytes) -> str:
    """Git's name for a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_entry(sha256: str, size: int) -> Entry:
    """The tree entry of an LFS object."""
    return Entry(blob_id(Entry("", size, sha256).pointer), size, sha256)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `target` if the block ends well and disappears if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(target: Path, value: Any) -> None:
    """Write JSON atomically."""
    with replacing(target) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


@functools.lru_cache(maxsize=64)  # a tree never changes: its name is its content's hash
def read_tree(path: Path) -> Tree:
    """Load a stored tree."""
    return {name: Entry(**item) for name, item in json.loads(path.read_bytes()).items()}


class Repo:
    """One repository on disk. `lock` is held by whoever changes its refs."""

    def __init__(self, folder: Path, kind: str, repo_id: str) -> None:
        self.folder, self.kind, self.repo_id = folder, kind, repo_id
        self.lock = threading.RLock()

    @property
    def url_path(self) -> str:
        """Path of the repository in URLs: datasets are prefixed, models are not."""
        return self.repo_id if self.kind == "models" else f"{self.kind}/{self.repo_id}"

    @property
    def exists(self) -> bool:
        """Whether it has been created (and not deleted)."""
        return (self.folder / "refs.json").is_file()

    @property
    def settings(self) -> dict[str, Any]:
        """Type, privacy and date of creation."""
        return cast("dict[str, Any]", json.loads((self.folder / "repo.json").read_bytes()))

    def create(self, private: bool) -> None:
        """Lay out the folder with the first commit, `.gitattributes`, as the real Hub does."""
        write_json(self.folder / "repo.json", {"type": self.kind, "private": private, "createdAt": now()})
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        tree = {".gitattributes": self.add_blob(attributes.encode())}
        first = self.add_commit(tree, parent=None, title="initial commit", description="")
        write_json(self.folder / "refs.json", {"branches": {"main": first}, "tags": {}})

    def refs(self) -> dict[str, dict[str, str]]:
        """Branches and tags with the commits they stand for."""
        try:
            return cast("dict[str, dict[str, str]]", json.loads((self.folder / "refs.json").read_bytes()))
        except FileNotFoundError:
            raise repo_not_found(self.kind, self.repo_id) from None

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag or commit id (7 digits or more) stands for."""
        refs = self.refs()
        if commit := refs["branches"].get(revision) or refs["tags"].get(revision):
            return commit
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = list((self.folder / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        known = ", ".join([*refs["branches"], *refs["tags"]])
        message = f"Invalid rev id: {revision}. Expected a branch, tag or commit of {self.repo_id}; it has: {known}"
        raise HubError(404, message, "RevisionNotFound")

    def commit(self, commit_id: str) -> dict[str, Any]:
        """A commit's JSON: parent, tree, title, description, date, author."""
        return cast("dict[str, Any]", json.loads((self.folder / "commits" / f"{commit_id}.json").read_bytes()))

    def history(self, commit_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Commits from the given one back to the first."""
        following: str | None = commit_id
        while following:
            data = self.commit(following)
            yield following, data
            following = data["parent"]

    def tree(self, commit_id: str) -> Tree:
        """All files of a commit by path."""
        return read_tree(self.folder / "trees" / f"{self.commit(commit_id)['tree']}.json")

    def add_blob(self, data: bytes) -> Entry:
        """Store a regular file."""
        entry = Entry(blob_id(data), len(data))
        if not self.content(entry).exists():
            with replacing(self.content(entry)) as file:
                file.write(data)
        return entry

    def content(self, entry: Entry) -> Path:
        """Where an entry's bytes lie."""
        name = entry.content_id
        return self.folder / ("lfs" if entry.sha256 else "blobs") / name[:2] / name

    def lfs_object(self, sha256: str) -> Path:
        """Where an LFS object lies, or would."""
        if not SHA256.fullmatch(sha256):
            raise HubError(422, f"expected an LFS oid of 64 lower-case hex digits, got {sha256!r}")
        return self.content(Entry("", 0, sha256))

    def add_commit(self, tree: Tree, *, parent: str | None, title: str, description: str) -> str:
        """Store tree and commit; no branch moves yet."""
        files = {path: {k: v for k, v in vars(entry).items() if v is not None} for path, entry in tree.items()}
        tree_id = json_id(files)
        commit = {"parent": parent, "tree": tree_id, "title": title, "description": description}
        commit |= {"date": now(), "author": USER}
        write_json(self.folder / "trees" / f"{tree_id}.json", files)
        write_json(self.folder / "commits" / f"{json_id(commit)}.json", commit)
        return json_id(commit)

    def set_ref(self, group: str, name: str, commit_id: str | None) -> None:
        """Point a branch or tag at a commit, or remove it."""
        refs = self.refs()
        refs[group].pop(name, None)
        if commit_id is not None:
            refs[group][name] = commit_id
        write_json(self.folder / "refs.json", refs)

    def card(self, tree: Tree) -> dict[str, Any]:
        """The front matter of a tree's README.md; empty where there is none."""
        if "README.md" not in tree:
            return {}
        match = FRONT_MATTER.match(self.content(tree["README.md"]).read_text("utf-8", errors="replace"))
        with contextlib.suppress(yaml.YAMLError):
            data = yaml.safe_load(match[1]) if match else None
            return data if isinstance(data, dict) else {}
        return {}


class Storage:
    """All repositories under a root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._repos: dict[tuple[str, str], Repo] = {}
        self._lock = threading.Lock()

    def repo(self, kind: str, repo_id: str) -> Repo:
        """The repository, existing or not; the same object, and so the same lock, for the same name."""
        parts = repo_id.split("/")
        bad = [part for part in parts if not NAME.fullmatch(part) or ".." in part or part.endswith(".git")]
        if len(parts) != 2 or bad or kind not in ("models", "datasets"):
            raise repo_not_found(kind, repo_id)
        with self._lock:
            return self._repos.setdefault((kind, repo_id), Repo(self.root / kind / repo_id, kind, repo_id))


def now() -> str:
    """The time in the form the clients parse."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_id(value: Any) -> str:
    """A name for a JSON value: SHA-1 of its canonical form."""
    return hashlib.sha1(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def repo_not_found(kind: str, repo_id: str, status: int = 404) -> HubError:
    """The refusal for a repository that is missing, or private and asked for without a token."""
    message = f"Repository not found: no {kind[:-1]} {repo_id} here for this token. Create it, or check name and type"
    return HubError(status, message, "RepoNotFound")


def folder_ids(tree: Tree) -> dict[str, str]:
    """An id for each folder, which changes when anything below it does."""
    hashes: dict[str, Any] = {}
    for path in sorted(tree):
        for end in (i for i, letter in enumerate(path) if letter == "/"):
            hashes.setdefault(path[:end], hashlib.sha1()).update(f"{path}\0{tree[path].oid}\n".encode())
    return {folder: digest.hexdigest() for folder, digest in hashes.items()}


def path_info(path: str, item: Entry | str) -> dict[str, Any]:
    """A file or folder as the tree and paths-info answers show it."""
    if isinstance(item, str):
        return {"type": "directory", "oid": item, "size": 0, "path": path}
    info: dict[str, Any] = {"type": "file", "oid": item.oid, "size": item.size, "path": path}
    if item.sha256:
        info["lfs"] = {"oid": item.sha256, "size": item.size, "pointerSize": len(item.pointer)}
    return info


def add_last_commits(repo: Repo, commit_id: str, infos: list[dict[str, Any]]) -> None:
    """Note with each file and folder the last commit that changed it."""
    pending = {info["path"]: info for info in infos}
    for commit, data in repo.history(commit_id):
        before: dict[str, str] = {}
        if data["parent"]:
            tree = repo.tree(data["parent"])
            before = {path: entry.oid for path, entry in tree.items()} | folder_ids(tree)
        for path in [path for path, info in pending.items() if before.get(path) != info["oid"]]:
            pending.pop(path)["lastCommit"] = {"id": commit, "title": data["title"], "date": data["date"]}


def checked_path(path: Any) -> str:
    """A path inside a repository, or a refusal: nothing may climb out of it or shadow git's own files."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\x00-\x1f\\]", str(path)):
        raise HubError(400, f"expected a relative path like 'folder/file.txt', got {path!r}; rename the file")
    return cast("str", path)


# --- cards ---------------------------------------------------------------------------------------------------------


def is_text_or_texts(value: Any) -> bool:
    """One string, or a list of strings."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def check_fields(card: Mapping[str, Any]) -> Iterator[str]:
    """Errors in the plain fields of a card."""
    for key in ("language", "license", "base_model", "datasets", "metrics", "task_categories", "size_categories"):
        if card.get(key) is not None and not is_text_or_texts(card[key]):
            yield f'"{key}" must be a string or a list of strings, got {card[key]!r} (quote a bare `no`)'
    for key in ("pipeline_tag", "library_name", "license_name", "pretty_name"):
        if card.get(key) is not None and not isinstance(card[key], str):
            yield f'"{key}" must be a string, got {card[key]!r}'
    if card.get("tags") is not None and (isinstance(card["tags"], str) or not is_text_or_texts(card["tags"])):
        yield f'"tags" must be a list of strings, got {card["tags"]!r}'
    licenses = card.get("license") or []
    for name in [licenses] if isinstance(licenses, str) else licenses if isinstance(licenses, list) else []:
        if name not in LICENSES:
            yield f'"license" must be one of the Hub\'s identifiers (apache-2.0, mit, other, ...), got {name!r}'


def missing(item: Any, where: str, **wanted: type | tuple[type, ...]) -> Iterator[str]:
    """Errors for keys that a mapping lacks or has with a wrong type (True and False are no numbers here)."""
    if not isinstance(item, dict):
        yield f'"{where}" must be a mapping, got {item!r}'
        return
    for key, types in wanted.items():
        value = item.get(key)
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))
            yield f'"{where}.{key}" is required as {names}, got {value!r}'


def check_model_index(card: Mapping[str, Any]) -> Iterator[str]:
    """Errors in `model-index`: what `model_index_to_eval_results` needs, with a usable value for each metric."""
    index = card.get("model-index")
    if index is None:
        return
    if not isinstance(index, list) or not index:
        yield f'"model-index" must be a non-empty list, got {index!r}'
        return
    for i, model in enumerate(index):
        yield from missing(model, f"model-index[{i}]", name=str, results=list)
        results = model.get("results") if isinstance(model, dict) else None
        for j, result in enumerate(results if isinstance(results, list) else []):
            yield from check_result(result, f"model-index[{i}].results[{j}]")


def check_result(result: Any, where: str) -> Iterator[str]:
    """Errors in one result of a `model-index`."""
    problems = list(missing(result, where, task=dict, dataset=dict, metrics=list))
    yield from problems
    if problems:
        return
    yield from missing(result["task"], f"{where}.task", type=str)
    yield from missing(result["dataset"], f"{where}.dataset", name=str, type=str)
    for k, metric in enumerate(result["metrics"]):
        yield from missing(metric, f"{where}.metrics[{k}]", type=str, value=(int, float, str))


def check_configs(card: Mapping[str, Any]) -> Iterator[str]:
    """Errors in a dataset card's `configs` and `dataset_info`."""
    info = card.get("dataset_info")
    if info is not None and not isinstance(info, dict | list):
        yield f'"dataset_info" must be a mapping or a list of mappings, got {info!r}'
    configs = card.get("configs")
    if configs is None:
        return
    if not isinstance(configs, list):
        yield f'"configs" must be a list of mappings, got {configs!r}'
        return
    for i, config in enumerate(configs):
        where = f"configs[{i}]"
        problems = list(missing(config, where, config_name=str, data_files=(str, list)))
        yield from problems
        files = [] if problems or isinstance(config["data_files"], str) else config["data_files"]
        for j, item in enumerate(files):
            if not isinstance(item, str):
                yield from missing(item, f"{where}.data_files[{j}]", split=str, path=(str, list))


def check_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for a README.md of a model or dataset repository."""
    match = FRONT_MATTER.match(content)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"the front matter is not valid YAML: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return [f"the front matter must be a mapping of keys to values, got {type(card).__name__}"], []
    errors = [*check_fields(card), *check_model_index(card), *(check_configs(card) if kind == "dataset" else [])]
    warnings = []
    if card.get("license") == "other" and not card.get("license_name"):
        warnings.append('"license_name" should name the license when "license" is "other"')
    return errors, warnings


def card_tags(card: Mapping[str, Any], kind: str) -> list[str]:
    """The tags the Hub would show for a card."""

    def values(key: str) -> list[str]:
        value = card.get(key) or []
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    shown = values("library_name") + values("tags") + values("pipeline_tag")
    prefixed = {"license": "license", "task_categories": "task_categories", "size_categories": "size_categories"}
    prefixed |= {"base_model": "base_model", "datasets": "dataset"}
    shown += [f"{prefix}:{value}" for key, prefix in prefixed.items() for value in values(key)]
    shown += [code if kind == "models" else f"language:{code}" for code in values("language")]
    return list(dict.fromkeys(shown))


# --- requests --------------------------------------------------------------------------------------------------------


class Body:
    """A request's body, read once and in chunks, whether sent with a length or chunked."""

    def __init__(self, stream: BinaryIO, headers: Message) -> None:
        self._stream = stream
        chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._pieces = self._chunked() if chunked else self._counted(int(headers.get("Content-Length") or 0))

    def _counted(self, left: int) -> Iterator[bytes]:
        while left > 0:
            piece = self._stream.read(min(left, CHUNK))
            if not piece:
                raise ConnectionError(f"the client hung up with {left} bytes to come")
            left -= len(piece)
            yield piece

    def _chunked(self) -> Iterator[bytes]:
        while size := int(self._stream.readline(1024).split(b";")[0], 16):
            yield from self._counted(size)
            self._stream.readline(8)
        while self._stream.readline(1024).strip():
            pass

    def pieces(self) -> Iterator[bytes]:
        """What has not been read yet."""
        return self._pieces

    def json(self) -> dict[str, Any]:
        """The whole body as a JSON object."""
        try:
            value = json.loads(b"".join(self._pieces) or b"{}")
        except ValueError as error:
            raise HubError(400, f"expected a JSON body, got something else: {error}") from None
        if not isinstance(value, dict):
            raise HubError(400, f"expected a JSON object, got {type(value).__name__}")
        return value


@dataclass
class Call:
    """One request on its way to a handler. `repo` is set by the router for routes with a repository."""

    hub: LoopbackHub
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Body
    args: dict[str, str] = field(default_factory=dict)
    repo: Repo = field(init=False)

    @property
    def user(self) -> str | None:
        """The user of the token; None without a token or with the token "invalid"."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return USER if scheme.lower() == "bearer" and token.strip() not in ("", "invalid") else None

    @property
    def endpoint(self) -> str:
        """This server's address as the client wrote it, so that the answer's URLs match its HF_ENDPOINT."""
        return f"http://{self.headers.get('Host') or urlsplit(self.hub.endpoint).netloc}"

    @property
    def revision(self) -> str:
        """The branch, tag or commit in the path."""
        return self.args.get("rev", "main")

    def require_user(self) -> None:
        """Refuse a request without a valid token."""
        if self.user is None and self.headers.get("Authorization"):
            raise HubError(401, "Invalid credentials in Authorization header")  # the wording the clients compare with
        if self.user is None:
            raise HubError(401, "expected 'Authorization: Bearer TOKEN', got no token; set HF_TOKEN or pass token=")

    def open_repo(self, access: str) -> None:
        """Set `repo` from the path, or refuse: writes need a token, and so do reads of a private repository."""
        kind, repo_id = self.args.get("kind", "models"), self.args["repo"]
        if access == "write":
            self.require_user()
        ticket = self.query.get("ticket", [""])[0].encode()
        if access == "ticket" and not hmac.compare_digest(ticket, self.hub.ticket(self.path).encode()):
            raise HubError(403, "expected an upload URL from the LFS batch API of this run; repeat the upload")
        self.repo = self.hub.storage.repo(kind, repo_id)
        hidden = access == "read" and self.user is None and self.repo.exists and self.repo.settings["private"]
        if hidden or not self.repo.exists:
            raise repo_not_found(kind, repo_id, 404 if self.user else 401)


@dataclass
class Answer:
    """What a handler returns: a JSON value, or a piece of a file."""

    value: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int = 0

    @classmethod
    def of_error(cls, error: HubError) -> Answer:
        """The JSON and headers in which the clients look for an error."""
        return cls(error.body, error.status, error.headers)


# --- handlers --------------------------------------------------------------------------------------------------------


def whoami(call: Call) -> Answer:
    """Who the token belongs to."""
    call.require_user()
    token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
    user = {"type": "user", "id": "0" * 24, "name": USER, "fullname": "Loopback Hub's only user", "isPro": False}
    return Answer({**user, "email": f"{USER}@localhost", "orgs": [], "auth": token})


def named_repo(call: Call, payload: Mapping[str, Any]) -> Repo:
    """The repository that a body names by `name`, `organization` and `type`."""
    kind = str(payload.get("type") or "model")
    if kind not in ("model", "dataset"):
        raise HubError(400, f"expected repository type 'model' or 'dataset', got {kind!r}: this server has no others")
    repo_id = f"{payload.get('organization') or USER}/{payload.get('name')}"
    try:
        return call.hub.storage.repo(f"{kind}s", repo_id)
    except HubError:
        raise HubError(400, f"expected a name of letters, digits, '-', '_' and '.', got {repo_id!r}") from None


def create_repo(call: Call) -> Answer:
    """Create a repository; 409 with its URL where it exists already."""
    call.require_user()
    payload = call.body.json()
    repo = named_repo(call, payload)
    place = {"url": f"{call.endpoint}/{repo.url_path}", "name": repo.repo_id, "id": repo.repo_id}
    with repo.lock:
        if repo.exists:
            raise HubError(409, f"You already created this {repo.kind[:-1]} repo: {repo.repo_id}", body=place)
        repo.create(private=payload.get("visibility") == "private" or payload.get("private") is True)
    return Answer(place)


def delete_repo(call: Call) -> Answer:
    """Delete a repository with all its versions."""
    call.require_user()
    repo = named_repo(call, call.body.json())
    with repo.lock:
        if not repo.exists:
            raise repo_not_found(repo.kind, repo.repo_id)
        doomed = repo.folder.rename(repo.folder.parent / f".deleted-{secrets.token_hex(8)}")
    shutil.rmtree(doomed, ignore_errors=True)
    return Answer({})


def change_settings(call: Call) -> Answer:
    """Make a repository private or public."""
    payload = call.body.json()
    with call.repo.lock:
        private = payload.get("visibility", "private" if call.repo.settings["private"] else "public") == "private"
        write_json(call.repo.folder / "repo.json", call.repo.settings | {"private": private})
    return Answer({"private": private})


def auth_check(call: Call) -> Answer:
    """Nothing more to check than the router did."""
    return Answer({})


def validate_yaml(call: Call) -> Answer:
    """Check a card before it is pushed."""
    payload = call.body.json()
    errors, warnings = check_card(str(payload.get("content", "")), str(payload.get("repoType") or "model"))
    messages = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    status = 400 if errors else 200
    if call.headers.get("Accept") == "text/plain":  # ModelCard.validate() raises with the body as its text
        return Answer("\n".join(errors or warnings), status, {"Content-Type": "text/plain; charset=utf-8"})
    return Answer(messages, status)


def repo_info(call: Call) -> Answer:
    """A repository at a revision: commit, files, card and tags."""
    repo, commit = call.repo, call.repo.resolve(call.revision)
    tree, settings = repo.tree(commit), repo.settings
    card, date = repo.card(tree), repo.commit(commit)["date"]
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(tree)]
    for sibling in siblings if "blobs" in call.query else ():
        entry = tree[sibling["rfilename"]]
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    info: dict[str, Any] = {
        "_id": json_id(repo.url_path)[:24],
        "id": repo.repo_id,
        "author": repo.repo_id.split("/")[0],
    }
    info |= {"sha": commit, "lastModified": date, "createdAt": settings["createdAt"], "private": settings["private"]}
    info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": card_tags(card, repo.kind)}
    info |= {"cardData": card, "siblings": siblings, "usedStorage": sum(entry.size for entry in tree.values())}
    if repo.kind == "models":
        info |= {"modelId": repo.repo_id, "model-index": card.get("model-index")}
        info |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    if wanted := {*call.query.get("expand", ()), *call.query.get("expand[]", ())}:
        info = {key: value for key, value in info.items() if key in wanted | {"_id", "id"}}
    return Answer(info)


def list_tree(call: Call) -> Answer:
    """The files and folders under a path."""
    commit = call.repo.resolve(call.revision)
    tree, folder = call.repo.tree(commit), call.args.get("path", "").strip("/")
    items: dict[str, Entry | str] = {**folder_ids(tree), **tree}
    if folder and folder not in items:
        raise entry_not_found(call, folder, commit)
    recursive = flag(call, "recursive")
    prefix = f"{folder}/" if folder else ""
    paths = [path for path in items if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])]
    infos = [path_info(path, items[path]) for path in sorted([folder] if folder in tree else paths)]
    if flag(call, "expand"):
        add_last_commits(call.repo, commit, infos)
    return Answer(infos, headers={"X-Repo-Commit": commit})


def paths_info(call: Call) -> Answer:
    """What is at the given paths; those where nothing is are left out."""
    raw = b"".join(call.body.pieces()).decode()
    is_json = "json" in call.headers.get("Content-Type", "")
    wanted: dict[str, Any] = json.loads(raw or "{}") if is_json else parse_qs(raw)
    commit = call.repo.resolve(call.revision)
    tree = call.repo.tree(commit)
    items: dict[str, Entry | str] = {**folder_ids(tree), **tree}
    paths = (str(path).strip("/") for path in wanted.get("paths", ()))
    infos = [path_info(path, items[path]) for path in dict.fromkeys(paths) if path in items]
    if wanted.get("expand") in (True, ["true"], ["True"]):
        add_last_commits(call.repo, commit, infos)
    return Answer(infos)


def flag(call: Call, name: str) -> bool:
    """A switch in the query."""
    return call.query.get(name, ["false"])[0].lower() in ("true", "1")


def entry_not_found(call: Call, path: str, commit: str) -> HubError:
    """The refusal for a missing file; the commit in it lets the clients remember that the file is not there."""
    message = f"Entry not found: no {path!r} in {call.repo.repo_id} at {call.revision}; list_repo_files shows what is"
    return HubError(404, message, "EntryNotFound", headers={"X-Repo-Commit": commit})


def list_refs(call: Call) -> Answer:
    """Branches and tags."""

    def shown(group: str, where: str) -> list[dict[str, str]]:
        refs = sorted(call.repo.refs()[group].items())
        return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": commit} for name, commit in refs]

    refs = {"branches": shown("branches", "heads"), "tags": shown("tags", "tags"), "converts": [], "pullRequests": []}
    return Answer(refs)


def list_commits(call: Call) -> Answer:
    """The history of a revision, newest first."""
    keys = {"title": "title", "message": "description", "date": "date"}
    return Answer(
        [
            {"id": commit, "authors": [{"user": data["author"]}], **{key: data[name] for key, name in keys.items()}}
            for commit, data in call.repo.history(call.repo.resolve(call.revision))
        ]
    )


def add_ref(call: Call, group: str, name: str, revision: str) -> Answer:
    """Create a branch or tag; 409 where it exists already."""
    if not REF_NAME.fullmatch(name) or name.startswith("refs/") or ".." in name:
        raise HubError(400, f"expected a {group} name like 'v1.0', got {name!r}")
    with call.repo.lock:
        commit = call.repo.resolve(revision)
        if name in call.repo.refs()[group]:
            raise HubError(
                409, f"Reference already exists: {name!r} in {group} of {call.repo.repo_id}; delete it first"
            )
        call.repo.set_ref(group, name, commit)
    return Answer({"name": name, "targetCommit": commit})


def drop_ref(call: Call, group: str) -> Answer:
    """Delete a branch or tag."""
    name = call.revision
    if (group, name) == ("branches", "main"):
        raise HubError(403, "expected another branch than 'main', which cannot be deleted")
    with call.repo.lock:
        if name not in call.repo.refs()[group]:
            raise HubError(404, f"Reference not found: {name!r} in {group} of {call.repo.repo_id}", "RevisionNotFound")
        call.repo.set_ref(group, name, None)
    return Answer({})


def create_tag(call: Call) -> Answer:
    """Tag a revision."""
    return add_ref(call, "tags", str(call.body.json().get("tag")), call.revision)


def create_branch(call: Call) -> Answer:
    """Branch off a revision, or off main."""
    return add_ref(call, "branches", call.revision, str(call.body.json().get("startingPoint") or "main"))


def delete_tag(call: Call) -> Answer:
    """Delete a tag."""
    return drop_ref(call, "tags")


def delete_branch(call: Call) -> Answer:
    """Delete a branch."""
    return drop_ref(call, "branches")


def branch_head(call: Call) -> str:
    """The commit of the branch to write to, or a refusal."""
    if flag(call, "create_pr"):
        raise HubError(400, "expected a commit to a branch, got create_pr: this server has no pull requests")
    call.repo.resolve(call.revision)
    head = call.repo.refs()["branches"].get(call.revision)
    if head is None:
        raise HubError(400, f"expected a branch to write to, got the tag or commit {call.revision!r}; pass a branch")
    return head


def lfs_patterns(repo: Repo, tree: Tree) -> list[str]:
    """The patterns that the tree's own `.gitattributes` sends to LFS."""
    if ".gitattributes" not in tree:
        return LFS_PATTERNS
    lines = repo.content(tree[".gitattributes"]).read_text("utf-8", errors="replace").splitlines()
    return [line.split()[0] for line in lines if "filter=lfs" in line]


def preupload(call: Call) -> Answer:
    """Which files go as regular ones and which by LFS, and what is stored under their names now."""
    tree = call.repo.tree(branch_head(call))
    patterns = lfs_patterns(call.repo, tree)
    files = []
    for item in call.body.json().get("files", []):
        path = checked_path(item.get("path"))
        lfs = any(fnmatch.fnmatchcase(path if "/" in p else path.rpartition("/")[2], p) for p in patterns)
        mode = "lfs" if lfs or int(item.get("size") or 0) > REGULAR_LIMIT else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in tree:
            files[-1]["oid"] = tree[path].content_id
    return Answer({"files": files})


def put_file(repo: Repo, tree: dict[str, Entry], value: Mapping[str, Any]) -> None:
    """Commit line `file`: a regular file with its content."""
    path = checked_path(value.get("path"))
    try:
        data = base64.b64decode(value["content"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise HubError(400, f"expected base64 content for {path}, got something else: {error}") from None
    if len(data) > REGULAR_LIMIT:
        raise HubError(400, f"expected at most {REGULAR_LIMIT} bytes in regular file {path}, got {len(data)}; use LFS")
    tree[path] = repo.add_blob(data)


def put_lfs_file(repo: Repo, tree: dict[str, Entry], value: Mapping[str, Any]) -> None:
    """Commit line `lfsFile`: a name for an object that was uploaded before."""
    path, sha256 = checked_path(value.get("path")), str(value.get("oid"))
    stored = repo.lfs_object(sha256)
    if not stored.is_file() or value.get("size") not in (None, stored.stat().st_size):
        raise HubError(400, f"expected LFS object {sha256} of {path} to be here in full; upload it before the commit")
    tree[path] = lfs_entry(sha256, stored.stat().st_size)


def delete_file(repo: Repo, tree: dict[str, Entry], value: Mapping[str, Any]) -> None:
    """Commit line `deletedFile`."""
    if tree.pop(checked_path(value.get("path")), None) is None:
        message = f"A file with this name doesn't exist: {value.get('path')!r} in {repo.repo_id}"
        raise HubError(404, message, "EntryNotFound")


def delete_folder(repo: Repo, tree: dict[str, Entry], value: Mapping[str, Any]) -> None:
    """Commit line `deletedFolder`."""
    folder = checked_path(str(value.get("path")).rstrip("/"))
    doomed = [path for path in tree if path.startswith(f"{folder}/")]
    if not doomed:
        message = f"A file with this name doesn't exist: folder {folder!r} in {repo.repo_id}"
        raise HubError(404, message, "EntryNotFound")
    for path in doomed:
        del tree[path]


OPERATIONS: dict[str, Callable[[Repo, dict[str, Entry], Mapping[str, Any]], None]] = {
    "file": put_file,
    "lfsFile": put_lfs_file,
    "deletedFile": delete_file,
    "deletedFolder": delete_folder,
}


def apply_lines(repo: Repo, tree: dict[str, Entry], head: str, lines: Iterable[bytes]) -> dict[str, Any]:
    """Apply a commit's NDJSON lines to `tree`; returns the header."""
    header: dict[str, Any] = {}
    for number, line in enumerate(filter(bytes.strip, lines), 1):
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError):
            raise HubError(400, f'line {number}: expected {{"key": ..., "value": ...}}, got {line[:80]!r}') from None
        if key == "header":
            header = value
            if not head.startswith(value.get("parentCommit") or head):
                wanted = value["parentCommit"]
                raise HubError(
                    412, f"A commit has happened since: expected parent {wanted}, head is {head}; try again"
                )
        elif key in OPERATIONS:
            OPERATIONS[key](repo, tree, value)
        else:
            raise HubError(400, f"line {number}: expected one of {', '.join(OPERATIONS)}, got {key!r}")
    if not header.get("summary"):
        raise HubError(400, "expected a header line with a 'summary', got none; give the commit a message")
    return header


def check_tree(repo: Repo, tree: Tree, old: Tree) -> None:
    """Refuse a tree in which a path is both file and folder, or whose card is malformed."""
    if both := sorted(folder_ids(tree).keys() & tree.keys()):
        raise HubError(400, f"expected {both[0]!r} to be a file or a folder, got both; delete the file in this commit")
    card = tree.get("README.md")
    if card is not None and card != old.get("README.md"):
        errors, _ = check_card(repo.content(card).read_text("utf-8", errors="replace"), repo.kind[:-1])
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))


def make_commit(call: Call) -> Answer:
    """Apply the operations of an NDJSON body to a branch, all or none."""
    repo = call.repo
    with tempfile.TemporaryFile(dir=call.hub.storage.root) as lines:
        for piece in call.body.pieces():
            lines.write(piece)
        lines.seek(0)
        with repo.lock:
            head = branch_head(call)
            old = repo.tree(head)
            tree = dict(old)
            header = apply_lines(repo, tree, head, lines)
            check_tree(repo, tree, old)
            if tree != old:  # an unchanged tree makes no commit: the head is the answer
                text = str(header.get("description") or "")
                head = repo.add_commit(tree, parent=head, title=str(header["summary"]), description=text)
                repo.set_ref("branches", call.revision, head)
    url = f"{call.endpoint}/{repo.url_path}/commit/{head}"
    return Answer({"success": True, "commitOid": head, "commitUrl": url, "hookOutput": ""})


def lfs_batch(call: Call) -> Answer:
    """Where to send or fetch LFS objects."""
    payload = call.body.json()
    upload = payload.get("operation") == "upload"
    if upload:
        call.require_user()
    objects = [lfs_actions(call, upload, str(item["oid"]), int(item["size"])) for item in payload.get("objects", [])]
    return Answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def lfs_actions(call: Call, upload: bool, oid: str, size: int) -> dict[str, Any]:
    """What the client has to do for one object: nothing, if it is stored already."""
    here, item = call.repo.lfs_object(oid).is_file(), {"oid": oid, "size": size}
    base = f"/{call.repo.url_path}.git/lfs"
    path = f"{base}/{oid}/{size}"
    place = {"href": f"{call.endpoint}{path}?ticket={call.hub.ticket(path)}"}
    if upload and here:
        return item
    if upload:
        return {**item, "actions": {"upload": place, "verify": {"href": f"{call.endpoint}{base}/verify"}}}
    if here:
        return {**item, "actions": {"download": place}}
    return {**item, "error": {"code": 404, "message": f"LFS object {oid} is not stored in {call.repo.repo_id}"}}


def lfs_upload(call: Call) -> Answer:
    """Store an LFS object if it is what its name says."""
    oid, size = call.args["oid"], int(call.args["size"])
    digest, received = hashlib.sha256(), 0
    with replacing(call.repo.lfs_object(oid)) as file:
        for piece in call.body.pieces():
            digest.update(piece)
            received += len(piece)
            file.write(piece)
        if (digest.hexdigest(), received) != (oid, size):
            got = f"{received} bytes with sha256 {digest.hexdigest()}"
            raise HubError(
                422, f"expected {size} bytes with sha256 {oid}, got {got}; the file changed: upload it again"
            )
    return Answer({})


def lfs_verify(call: Call) -> Answer:
    """Confirm that an LFS object is stored."""
    payload = call.body.json()
    stored = call.repo.lfs_object(str(payload.get("oid")))
    if not stored.is_file() or stored.stat().st_size != payload.get("size"):
        raise HubError(404, f"expected LFS object {payload.get('oid')} to be stored in full; upload it again")
    return Answer({})


def lfs_download(call: Call) -> Answer:
    """Send an LFS object."""
    stored = call.repo.lfs_object(call.args["oid"])
    return Answer(file=stored, length=stored.stat().st_size)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of a Range header; None for the whole file, as for headers of several ranges."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not match or match[0] == "bytes=-":
        return None
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    end = min(int(match[2]) + 1, size) if match[1] and match[2] else size
    if start >= end:
        message = f"expected a range within {size} bytes, got {header!r}"
        raise HubError(416, message, headers={"Content-Range": f"bytes */{size}"})
    return start, end


def resolve_file(call: Call) -> Answer:
    """Send a file of a revision, or the range asked for."""
    commit_id, path = call.repo.resolve(call.revision), call.args["path"]
    entry = call.repo.tree(commit_id).get(path)
    if entry is None:
        raise entry_not_found(call, path, commit_id)
    headers = {"X-Repo-Commit": commit_id, "ETag": f'"{entry.content_id}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    answer = Answer(headers=headers, file=call.repo.content(entry), length=entry.size)
    if asked := byte_range(call.headers.get("Range", ""), entry.size):
        answer.status, answer.start, answer.length = 206, asked[0], asked[1] - asked[0]
        headers["Content-Range"] = f"bytes {asked[0]}-{asked[1] - 1}/{entry.size}"
    return answer


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<repo>(?!api/)[^/]+/[^/]+?)"
REV = r"/(?P<rev>[^/]+)"
# Method, path (still percent-encoded: a revision with a slash is one segment), access to the repository, handler.
ROUTES: list[tuple[str, re.Pattern[str], str, Callable[[Call], Answer]]] = [
    (method, re.compile(pattern), access, handler)
    for method, pattern, access, handler in [
        ("GET", "/api/whoami-v2", "", whoami),
        ("POST", "/api/repos/create", "", create_repo),
        ("DELETE", "/api/repos/delete", "", delete_repo),
        ("POST", "/api/validate-yaml", "", validate_yaml),
        ("GET", f"{API}(?:/revision{REV})?", "read", repo_info),
        ("PUT", f"{API}/settings", "write", change_settings),
        ("GET", f"{API}/auth-check", "read", auth_check),
        ("GET", f"{API}/auth-check/write", "write", auth_check),
        ("GET", f"{API}/tree{REV}(?:/(?P<path>.*))?", "read", list_tree),
        ("POST", f"{API}/paths-info{REV}", "read", paths_info),
        ("GET", f"{API}/refs", "read", list_refs),
        ("GET", f"{API}/commits{REV}", "read", list_commits),
        ("POST", f"{API}/tag{REV}", "write", create_tag),
        ("DELETE", f"{API}/tag{REV}", "write", delete_tag),
        ("POST", f"{API}/branch{REV}", "write", create_branch),
        ("DELETE", f"{API}/branch{REV}", "write", delete_branch),
        ("POST", f"{API}/preupload{REV}", "write", preupload),
        ("POST", f"{API}/commit{REV}", "write", make_commit),
        ("POST", f"{GIT}\\.git/info/lfs/objects/batch", "read", lfs_batch),
        ("POST", f"{GIT}\\.git/lfs/verify", "write", lfs_verify),
        ("PUT", f"{GIT}\\.git/lfs/(?P<oid>[0-9a-f]{{64}})/(?P<size>\\d+)", "ticket", lfs_upload),
        ("GET", f"{GIT}\\.git/lfs/(?P<oid>[0-9a-f]{{64}})/(?P<size>\\d+)", "ticket", lfs_download),
        ("GET", f"{GIT}/resolve{REV}/(?P<path>.+)", "read", resolve_file),
    ]
]


def answer_call(call: Call) -> Answer:
    """Find the route and run its handler."""
    method = "GET" if call.method == "HEAD" else call.method
    for route_method, pattern, access, handler in ROUTES:
        if route_method == method and (match := pattern.fullmatch(call.path)):
            call.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            if access:
                call.open_repo(access)
            return handler(call)
    raise HubError(404, f"no such endpoint on the Loopback Hub: {call.method} {call.path}; see ROUTES in its source")


# --- server ----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Turns HTTP into calls and answers into HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out apart; without this each answer waits for an ACK
    server: Server

    def handle_call(self) -> None:
        """Answer one request, and read its body to the end."""
        parts = urlsplit(self.path)
        body = Body(cast("BinaryIO", self.rfile), self.headers)
        call = Call(self.server.hub, self.command, parts.path, parse_qs(parts.query), self.headers, body)
        try:
            answer = answer_call(call)
        except HubError as error:
            answer = Answer.of_error(error)
        except ConnectionError:
            self.close_connection = True
            return
        except Exception as error:
            traceback.print_exc()
            answer = Answer.of_error(HubError(500, f"a fault of the Loopback Hub itself: {error!r}"))
        with contextlib.suppress(ConnectionError):
            for _ in body.pieces():  # the next request on this connection starts after this body
                pass
            self.reply(answer)
            return
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def reply(self, answer: Answer) -> None:
        """Send an answer."""
        headers = {"Content-Type": "application/json; charset=utf-8", **answer.headers}
        data = b""
        if answer.file is None:
            is_text = headers["Content-Type"].startswith("text/")
            data = (answer.value if is_text else json.dumps(answer.value, default=str, skipkeys=True)).encode()
        self.send_response(answer.status)
        for name, value in {**headers, "Content-Length": str(answer.length if answer.file else len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data)
        if answer.file:
            self.send_piece(answer.file, answer.start, answer.length)

    def send_piece(self, path: Path, start: int, left: int) -> None:
        """Send a part of a file, a chunk at a time."""
        with path.open("rb") as file:
            file.seek(start)
            while left > 0 and (data := file.read(min(left, CHUNK))):
                self.wfile.write(data)
                left -= len(data)

    def log_message(self, format: str, *args: Any) -> None:
        if self.server.hub.verbose:
            super().log_message(format, *args)


class Server(ThreadingHTTPServer):
    """A threading server that can also close the connections that clients keep alive."""

    request_queue_size = 128

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for our name, which may stall offline

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hangs up is no fault
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        """End kept-alive connections, so that no thread serves on after the server's end."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class LoopbackHub:
    """A running Loopback Hub, in a thread of this process: `with LoopbackHub(root) as hub: hub.endpoint`."""

    def __init__(self, root: str | Path, port: int = 0, verbose: bool = False) -> None:
        self.storage, self.verbose = Storage(Path(root).resolve()), verbose
        self._port, self._key = port, secrets.token_bytes(32)
        self._stack = contextlib.ExitStack()
        self.endpoint = ""

    def ticket(self, path: str) -> str:
        """A signature for an LFS URL, whose PUT carries no token (on the real Hub it goes to a storage service)."""
        return hmac.new(self._key, path.encode(), "sha256").hexdigest()

    def environment(self, token: str = "loopback-token") -> dict[str, str]:
        """The variables with which a subprocess's clients talk to this server."""
        reached = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**reached, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # else load_dataset also calls a counter on the internet

    def __enter__(self) -> LoopbackHub:
        root = self.storage.root
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((root / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                message = f"expected {root} to be free, but another Loopback Hub serves it; stop that or choose a root"
                raise RuntimeError(message) from None
            server = stack.enter_context(Server(self, self._port))
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="loopback-hub", daemon=True)
            thread.start()
            stack.callback(server.close_connections)
            stack.callback(server.shutdown)
            self._stack = stack.pop_all()
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def run_command(hub: LoopbackHub, command: list[str]) -> int:
    """Run a command against the server; returns its exit code, in the shell's way for signals."""
    try:
        process = subprocess.Popen(command, env={**os.environ, **hub.environment()})
    except OSError as error:
        print(f"expected a command that can be run, got {command[0]!r}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command too: its end is ours
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    own, dashes, command = arguments, False, []
    if "--" in arguments:
        cut = arguments.index("--")
        own, dashes, command = arguments[:cut], True, arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description="A Hub server on 127.0.0.1 for tests and demos, never for a network.")
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the repositories")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--verbose", action="store_true", help="log each request to stderr")
    parser.usage = f"{parser.format_usage()[7:].rstrip()} [-- COMMAND ...]"
    options = parser.parse_args(own)
    if dashes and not command:
        parser.error("expected a command after '--', got none")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with LoopbackHub(options.root, options.port, options.verbose) as hub:
            print(f"Loopback Hub on {hub.endpoint}, storage in {options.root}", flush=True)
            return run_command(hub, command) if command else int(not stop.wait())
    except (RuntimeError, OSError) as error:
        print(f"loopback_hub: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
