"""Repositories on disk: their files, commits, branches and tags. The README shows the layout.

A commit never changes, because its name is a hash of its content. So a reader needs no lock, and only `repo.json` is
ever written twice. A commit is stored in this order: files, then the commit, then the branch in `repo.json`. If the
server is killed in between, `repo.json` still names the last complete commit.
"""

import contextlib
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

# File names that go to large file storage, as `.gitattributes` of a new repository says.
LARGE_FILE_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.jpeg *.jpg *.mp4 *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.png *.pt
*.pth *.safetensors *.tar *.tif *.tiff *.webp *.zip *tfevents*
"""
# A larger file goes to large file storage whatever its name, as on the real Hub.
MAX_REGULAR_BYTES = 10 * 1024 * 1024

REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
# `fold-3` or `feature/x`.
REF_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*")


class HttpError(Exception):
    """A refusal: HTTP status, message, and further headers and JSON keys of the answer.

    The clients choose their exception by `code`, for example `RepoNotFound`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **(body or {})}
        # A header must be one line of ASCII.
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": one_line, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Entry:
    """A file of a commit.

    Attributes:
        content_id: SHA-1 of the git blob for a regular file, SHA-256 of the bytes for a large one. Clients compute
            the same hash from their local file, so that they can skip an upload or a download.
        size: Bytes.
    """

    content_id: str
    size: int

    @property
    def is_large(self) -> bool:
        """Whether the file was uploaded by the LFS protocol: the length of a hash tells SHA-1 from SHA-256."""
        return len(self.content_id) == 64

    @property
    def pointer(self) -> bytes:
        """The small text that git stores in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.content_id}\nsize {self.size}\n".encode()


# All files of a commit, by path.
Tree = dict[str, Entry]


def hash_blob(data: bytes) -> str:
    """Return the name that git gives to a file's content, 40 hexadecimal digits."""
    # Source: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def hash_json(value: Any) -> str:
    """Return a name for a JSON value, 40 hexadecimal digits."""
    return hashlib.sha1(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_path(path: str) -> str:
    """Return a path if it stays inside a repository and does not hide git's own files; refuse it if not."""
    if re.search(r"[\x00-\x1f\\]", path) or {"", ".", "..", ".git"} & set(path.split("/")):
        raise HttpError(400, f"expected a relative path like 'folder/file.txt', got {path!r}; rename the file")
    return path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete.

    The block writes to a temporary file in the same folder. `os.replace` is atomic within a folder, so a reader, or a
    server that starts after a crash, finds either the old file or the new one, and never a part.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
        try:
            yield file
            file.flush()
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    with replacing(target) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(source: Path) -> dict[str, Any]:
    """Read a JSON object."""
    value: dict[str, Any] = json.loads(source.read_bytes())
    return value


class Repo:
    """A repository, which need not exist yet: its folder, its kind (`models`, `datasets` or `spaces`) and its name."""

    def __init__(self, folder: Path, kind: str, repo_id: str) -> None:
        self.folder, self.kind, self.repo_id = folder, kind, repo_id

    @property
    def url_path(self) -> str:
        """Path of the repository's page. Models have no prefix."""
        return self.repo_id if self.kind == "models" else f"{self.kind}/{self.repo_id}"

    @property
    def exists(self) -> bool:
        """Whether the repository was created."""
        return (self.folder / "repo.json").is_file()

    def not_found(self, status: int = 404) -> HttpError:
        """Return the refusal for a repository that does not exist, or that this user may not see."""
        message = f"Repository not found: no {self.kind[:-1]} {self.repo_id} for this token; check name and type"
        return HttpError(status, message, "RepoNotFound")

    def read_state(self) -> dict[str, Any]:
        """Return `private`, a Space's `variables`, and the commits of `branches` and `tags` by name."""
        return read_json(self.folder / "repo.json")

    def create(self, private: bool, variables: list[dict[str, str]]) -> None:
        """Create the repository with a first commit, which has `.gitattributes` as on the real Hub."""
        lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILE_PATTERNS.split()]
        tree = {".gitattributes": self.add_file("".join(lines).encode())}
        commit_id = self.add_commit(tree, parent=None, title="initial commit")
        # This file comes last, because a repository exists as soon as it has it.
        state = {"private": private, "variables": variables, "branches": {"main": commit_id}, "tags": {}}
        write_json(self.folder / "repo.json", state)

    def resolve(self, revision: str) -> str:
        """Return the commit that a branch, a tag, or 7 digits or more of a commit stand for. Refuse others."""
        state = self.read_state()
        # A branch wins over a tag of the same name.
        refs = {**state["tags"], **state["branches"]}
        if revision in refs:
            return str(refs[revision])
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = list((self.folder / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        message = f"Invalid rev id: {revision}. Expected a branch, tag or commit of {self.repo_id}: {', '.join(refs)}"
        raise HttpError(404, message, "RevisionNotFound")

    def set_ref(self, group: Literal["branches", "tags"], name: str, commit_id: str) -> None:
        """Point a branch or tag at a commit. The caller holds the lock."""
        state = self.read_state()
        state[group][name] = commit_id
        write_json(self.folder / "repo.json", state)

    def set_private(self, private: bool) -> None:
        """Make the repository private or public. The caller holds the lock."""
        write_json(self.folder / "repo.json", {**self.read_state(), "private": private})

    def read_commit(self, commit_id: str) -> dict[str, Any]:
        """Return a commit's `parent`, `title`, `message`, `date` and `files`."""
        return read_json(self.folder / "commits" / f"{commit_id}.json")

    def read_tree(self, commit_id: str) -> Tree:
        """Return all files of a commit."""
        return {path: Entry(*item) for path, item in self.read_commit(commit_id)["files"].items()}

    def add_commit(self, tree: Tree, parent: str | None, title: str, message: str = "") -> str:
        """Store a commit, and return its name. The caller moves the branch."""
        # The parent and the date make the name unique, even if earlier files come back.
        commit = {
            "parent": parent,
            "title": title,
            "message": message,
            "date": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "files": {path: [entry.content_id, entry.size] for path, entry in tree.items()},
        }
        commit_id = hash_json(commit)
        write_json(self.folder / "commits" / f"{commit_id}.json", commit)
        return commit_id

    def content(self, content_id: str) -> Path:
        """Return where the bytes of a file are, or would be."""
        # A name like `../repo.json` must not lead out of the folder.
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", content_id):
            raise HttpError(422, f"expected a hash of 40 or 64 hexadecimal digits, got {content_id!r}")
        return self.folder / "files" / content_id

    def add_file(self, data: bytes) -> Entry:
        """Store a regular file."""
        entry = Entry(hash_blob(data), len(data))
        with replacing(self.content(entry.content_id)) as file:
            file.write(data)
        return entry

    def read_card(self, tree: Tree) -> str:
        """Return the text of README.md; empty if the tree has none."""
        if "README.md" not in tree:
            return ""
        return self.content(tree["README.md"].content_id).read_text("utf-8", errors="replace")


class Storage:
    """All repositories under a root folder. A change of a `repo.json` needs `lock`."""

    def __init__(self, root: Path) -> None:
        # One lock is enough. An upload takes long but needs no lock, and moving a branch takes milliseconds.
        self.root, self.lock = root, threading.Lock()

    def repo(self, kind: str, repo_id: str) -> Repo:
        """Return a repository, whether it exists or not; refuse an impossible name."""
        repo = Repo(self.root / kind / repo_id, kind, repo_id)
        parts = repo_id.split("/")
        # A name like `../x` must not lead out of the root.
        if len(parts) != 2 or not all(REPO_NAME.fullmatch(part) and ".." not in part for part in parts):
            raise repo.not_found()
        return repo
