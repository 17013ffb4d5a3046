"""What the server answers: a handler for each route makes an `Answer` of a `Call`. `ROUTES` at the end lists them."""

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from loopback_hub.cards import SPACE_SDKS, card_tags, check_card, parse_front_matter
from loopback_hub.storage import (
    LARGE_FILE_PATTERNS,
    MAX_REGULAR_BYTES,
    REF_NAME,
    Entry,
    HttpError,
    Repo,
    Storage,
    Tree,
    check_path,
    hash_blob,
    hash_json,
    replacing,
)

# The only user of this server.
USER = "loopback"
COMMITS_PER_PAGE = 50


@dataclass
class Call:
    """A request. `path` is still percent-encoded, and the chunks of `body` can be read once.

    The route adds `args`, the decoded parts of its pattern, and `repo` if it has one.
    """

    storage: Storage
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: Iterator[bytes]
    args: dict[str, str] = field(default_factory=dict)
    repo: Repo = field(init=False)

    @property
    def has_user(self) -> bool:
        """Whether the request has a token. Every token is valid, except the word `invalid`."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return scheme == "Bearer" and token.strip() not in ("", "invalid")

    @property
    def endpoint(self) -> str:
        """Address of this server in the client's own words, so that the answer's URLs begin like its HF_ENDPOINT."""
        return f"http://{self.headers['Host']}"

    @property
    def revision(self) -> str:
        """The branch, tag or commit in the path."""
        return self.args.get("revision", "main")

    def has_flag(self, name: str) -> bool:
        """Return whether a flag of the query is set."""
        return self.query.get(name, [""])[0] in ("1", "true", "True")

    def read_json(self) -> Any:
        """Return the value that the body holds."""
        return json.loads(b"".join(self.body))

    def require_user(self) -> None:
        """Refuse a request without a valid token."""
        if self.has_user:
            return
        if self.headers.get("Authorization"):
            # The clients compare with this wording.
            raise HttpError(401, "Invalid credentials in Authorization header")
        raise HttpError(401, "expected 'Authorization: Bearer TOKEN', got no token; set HF_TOKEN or pass token=")

    def open_repo(self, access: str) -> None:
        """Set `repo` from the path; refuse if it does not exist, or is private and the request has no token."""
        self.repo = self.storage.repo(self.args.get("kind", "models"), self.args["repo"])
        needs_user = access == "reader" and self.repo.exists and self.repo.read_state()["private"]
        if not self.repo.exists or (needs_user and not self.has_user):
            # The same answer in both cases: the real Hub does not tell a stranger that a private repository exists.
            raise self.repo.not_found(404 if self.has_user else 401)


@dataclass
class Answer:
    """An answer: a text, a JSON value, or the bytes `start` to `end` of a file."""

    value: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    end: int = 0


def whoami(call: Call) -> Answer:
    """Tell whom the token belongs to."""
    call.require_user()
    return Answer({"type": "user", "name": USER, "fullname": "The only user of the loopback Hub", "orgs": []})


def create_repo(call: Call) -> Answer:
    """Create a repository. If it exists, refuse with its address, so that `exist_ok=True` can go on."""
    call.require_user()
    wanted = call.read_json()
    kind = wanted.get("type") or "model"
    # A name without a namespace belongs to the user.
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    if kind not in ("model", "dataset", "space"):
        raise HttpError(400, f"expected a repository type of model, dataset or space, got {kind!r}")
    if kind == "space" and wanted.get("sdk") not in SPACE_SDKS:
        raise HttpError(400, f"expected a Space's sdk to be one of {', '.join(SPACE_SDKS)}, got {wanted.get('sdk')!r}")
    try:
        repo = call.storage.repo(f"{kind}s", repo_id)
    except HttpError:
        raise HttpError(400, f"expected a name of letters, digits, '-', '_' and '.', got {repo_id!r}") from None
    place = {"url": f"{call.endpoint}/{repo.url_path}", "name": repo_id, "id": repo_id}
    with call.storage.lock:
        if repo.exists:
            raise HttpError(409, f"You already created this {kind} repo: {repo_id}", body=place)
        repo.create(private=wanted.get("visibility") == "private", variables=wanted.get("variables") or [])
    return Answer(place)


def list_variables(call: Call) -> Answer:
    """List the environment variables of a Space."""
    return Answer({entry["key"]: entry for entry in call.repo.read_state()["variables"]})


def validate_card(call: Call) -> Answer:
    """Check a card before it is pushed."""
    wanted = call.read_json()
    errors, warnings = check_card(wanted["content"], wanted.get("repoType") or "model")
    status = 400 if errors else 200
    # `ModelCard.validate` asks for plain text, and raises a ValueError with that text. `create_commit` wants JSON.
    if call.headers.get("Accept") == "text/plain":
        return Answer("\n".join(errors or warnings), status)
    return Answer({"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}, status)


def show_repo(call: Call) -> Answer:
    """Describe a repository at a revision: its commit, files, card and tags."""
    repo, commit_id = call.repo, call.repo.resolve(call.revision)
    tree = repo.read_tree(commit_id)
    # The card has no errors, or its commit would have been refused.
    card = parse_front_matter(repo.read_card(tree)) or {}
    # `snapshot_download` and `from_pretrained` ask for `sha` first, and then load every file at this commit.
    info = {
        "id": repo.repo_id,
        "sha": commit_id,
        "lastModified": repo.read_commit(commit_id)["date"],
        "private": repo.read_state()["private"],
        "tags": card_tags(card, repo.kind),
        "cardData": card,
        "siblings": [{"rfilename": path} for path in sorted(tree)],
    }
    if repo.kind == "models":
        # `pipeline("image-segmentation", REPO)` of transformers chooses its class by these.
        info |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return Answer(info)


def list_tree(call: Call) -> Answer:
    """List the files and folders in a folder, or everything below it."""
    commit_id, folder = call.repo.resolve(call.revision), call.args.get("path", "")
    tree = call.repo.read_tree(commit_id)
    # Only files are stored. The folders are whatever their paths pass through.
    folders = {path[:end] for path in tree for end, letter in enumerate(path) if letter == "/"}
    if folder and folder not in folders:
        raise entry_not_found(call, folder, commit_id)
    prefix = f"{folder}/" if folder else ""
    below = [path for path in sorted({*tree, *folders}) if path.startswith(prefix)]
    if not call.has_flag("recursive"):
        below = [path for path in below if "/" not in path.removeprefix(prefix)]
    return Answer([show_file(path, tree[path]) if path in tree else show_folder(path, tree) for path in below])


def show_file(path: str, entry: Entry) -> dict[str, Any]:
    """Return a file as a listing shows it."""
    if not entry.is_large:
        return {"type": "file", "path": path, "oid": entry.content_id, "size": entry.size}
    lfs = {"oid": entry.content_id, "size": entry.size, "pointerSize": len(entry.pointer)}
    return {"type": "file", "path": path, "oid": hash_blob(entry.pointer), "size": entry.size, "lfs": lfs}


def show_folder(path: str, tree: Tree) -> dict[str, Any]:
    """Return a folder as a listing shows it. Its id changes when anything below it does."""
    below = {name: entry.content_id for name, entry in tree.items() if name.startswith(f"{path}/")}
    return {"type": "directory", "path": path, "oid": hash_json(below), "size": 0}


def entry_not_found(call: Call, path: str, commit_id: str) -> HttpError:
    """Return the refusal for a missing file."""
    message = f"Entry not found: no {path!r} in {call.repo.repo_id} at {call.revision}; list_repo_files shows what is"
    # The clients cache, by this commit, that the file does not exist.
    return HttpError(404, message, "EntryNotFound", headers={"X-Repo-Commit": commit_id})


def list_commits(call: Call) -> Answer:
    """List the commits that lead to a revision, the newest first."""
    commits, commit_id = [], call.repo.resolve(call.revision)
    while commit_id:
        commit = call.repo.read_commit(commit_id)
        # A commit of an older server has no message.
        told = {"id": commit_id, "authors": [{"user": USER}], "message": commit.get("message", "")}
        commits.append(told | {"title": commit["title"], "date": commit["date"]})
        commit_id = commit["parent"]
    # The real Hub sends fifty at a time, and the address of the next page in a header.
    start = int(call.query.get("p", ["0"])[0]) * COMMITS_PER_PAGE
    headers = {}
    if len(commits) > start + COMMITS_PER_PAGE:
        following = f"{call.endpoint}{call.path}?p={start // COMMITS_PER_PAGE + 1}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer(commits[start : start + COMMITS_PER_PAGE], headers=headers)


def change_settings(call: Call) -> Answer:
    """Make a repository private or public."""
    wanted = call.read_json()
    with call.storage.lock:
        private = wanted["visibility"] == "private" if "visibility" in wanted else bool(wanted["private"])
        call.repo.set_private(private)
    return Answer({"private": private})


def list_refs(call: Call) -> Answer:
    """List branches and tags."""
    state = call.repo.read_state()

    def show(group: str, prefix: str) -> list[dict[str, str]]:
        refs = sorted(state[group].items())
        return [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": commit} for name, commit in refs]

    branches, tags = show("branches", "refs/heads"), show("tags", "refs/tags")
    # This server converts nothing and has no pull requests, but the client reads all four lists.
    return Answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def create_tag(call: Call) -> Answer:
    """Tag the revision in the path."""
    return add_ref(call, "tags", call.read_json()["tag"], call.revision)


def create_branch(call: Call) -> Answer:
    """Create the branch in the path, from a revision or from main."""
    return add_ref(call, "branches", call.revision, call.read_json().get("startingPoint") or "main")


def add_ref(call: Call, group: Literal["branches", "tags"], name: str, revision: str) -> Answer:
    """Create a branch or tag. If it exists, refuse with 409, which `exist_ok=True` accepts."""
    if not REF_NAME.fullmatch(name):
        raise HttpError(400, f"expected a name like 'v1.0' for one of the {group}, got {name!r}")
    with call.storage.lock:
        commit_id = call.repo.resolve(revision)
        if name in call.repo.read_state()[group]:
            raise HttpError(409, f"Reference already exists: {name!r} in {group} of {call.repo.repo_id}")
        call.repo.set_ref(group, name, commit_id)
    return Answer({})


def branch_head(call: Call) -> str:
    """Return the last commit of the branch to write to; refuse a tag, a commit and a pull request."""
    if call.has_flag("create_pr"):
        raise HttpError(400, "expected a commit to a branch, got create_pr: this server has no pull requests")
    head = call.repo.read_state()["branches"].get(call.revision)
    if head is None:
        message = f"Invalid rev id: {call.revision}. Expected a branch of {call.repo.repo_id}; create it first"
        raise HttpError(404, message, "RevisionNotFound")
    return str(head)


def plan_upload(call: Call) -> Answer:
    """Tell how to send each file: in the commit itself, or before it as a large file."""
    tree = call.repo.read_tree(branch_head(call))
    files = []
    for item in call.read_json()["files"]:
        path = check_path(item["path"])
        name = path.rpartition("/")[2]
        is_binary = any(fnmatch.fnmatchcase(name, pattern) for pattern in LARGE_FILE_PATTERNS.split())
        large = is_binary or item["size"] > MAX_REGULAR_BYTES
        files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if path in tree:
            # The client leaves a file out of the commit if its own hash of it is the same.
            files[-1]["oid"] = tree[path].content_id
    return Answer({"files": files})


def plan_large_uploads(call: Call) -> Answer:
    """Tell where to send each large file. A file without `actions` is here already."""
    objects = []
    for item in call.read_json()["objects"]:
        objects.append({"oid": item["oid"], "size": item["size"]})
        if not call.repo.content(item["oid"]).is_file():
            href = f"{call.endpoint}/{call.repo.url_path}.git/lfs/{item['oid']}"
            objects[-1]["actions"] = {"upload": {"href": href}}
    # `basic` means one PUT for each file. The other way of LFS sends a file in parts.
    return Answer({"transfer": "basic", "objects": objects})


def store_large_file(call: Call) -> Answer:
    """Store a large file if its bytes have the hash that its address names."""
    digest = hashlib.sha256()
    with replacing(call.repo.content(call.args["oid"])) as file:
        for piece in call.body:
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != call.args["oid"]:
            message = f"expected sha256 {call.args['oid']}, got {digest.hexdigest()}; upload the file again"
            raise HttpError(422, message)
    return Answer({})


def make_commit(call: Call) -> Answer:
    """Apply all operations of a commit to a branch, or none of them."""
    # The body is a JSON object on each line, {"key": ..., "value": ...}. The key is `header` or an operation.
    lines = [json.loads(line) for line in b"".join(call.body).splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    # Without the lock, two commits at the same time could both build on the same head, and one would be lost.
    with call.storage.lock:
        head = branch_head(call)
        if not head.startswith(header.get("parentCommit") or head):
            message = f"A commit has happened since {header['parentCommit']}: the head is {head} now; try again"
            raise HttpError(412, message)
        old = call.repo.read_tree(head)
        # The operations change a copy. If one of them fails, the branch stays as it was.
        tree = dict(old)
        for line in lines:
            apply_operation(call.repo, tree, line["key"], line["value"])
        # `create_commit` has asked for this check already, but the server must not rely on its clients.
        if errors := check_card(call.repo.read_card(tree), call.repo.kind.removesuffix("s"))[0]:
            raise HttpError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        # An unchanged tree makes no commit.
        if tree != old:
            head = call.repo.add_commit(tree, head, header["summary"], header.get("description") or "")
            call.repo.set_ref("branches", call.revision, head)
    return Answer({"commitOid": head, "commitUrl": f"{call.endpoint}/{call.repo.url_path}/commit/{head}"})


def apply_operation(repo: Repo, tree: Tree, key: str, value: Mapping[str, Any]) -> None:
    """Apply one operation of a commit to a tree, or refuse it."""
    if key == "header":
        return
    # A deleted folder comes with a slash at its end.
    path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        tree[path] = repo.add_file(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        # The bytes came earlier, by `store_large_file`. This gives them a name.
        stored = repo.content(value["oid"])
        if not stored.is_file():
            raise HttpError(400, f"expected large file {value['oid']} of {path} to be here; upload it first")
        tree[path] = Entry(value["oid"], stored.stat().st_size)
    elif key in ("deletedFile", "deletedFolder"):
        doomed = [name for name in tree if name.startswith(f"{path}/")] if key == "deletedFolder" else [path]
        if not doomed or doomed[0] not in tree:
            raise HttpError(404, f"Entry not found: cannot delete {path!r} of {repo.repo_id}", "EntryNotFound")
        for name in doomed:
            del tree[name]
    else:
        raise HttpError(400, f"expected a file or a deletion, got {key!r}: this server has no other operations")


def send_file(call: Call) -> Answer:
    """Send a file of a revision, or the part of it that the client asks for."""
    commit_id, path = call.repo.resolve(call.revision), call.args["path"]
    entry = call.repo.read_tree(commit_id).get(path)
    if entry is None:
        raise entry_not_found(call, path, commit_id)
    # In the client's cache the ETag is the name of the bytes, and each commit has a link to them.
    headers = {"X-Repo-Commit": commit_id, "ETag": f'"{entry.content_id}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    answer = Answer(headers=headers, file=call.repo.content(entry.content_id), end=entry.size)
    if wanted := parse_range(call.headers.get("Range", ""), entry.size):
        # 206 means a part of the file.
        answer.status, (answer.start, answer.end) = 206, wanted
        headers["Content-Range"] = f"bytes {answer.start}-{answer.end - 1}/{entry.size}"
    return answer


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the first byte that a Range header asks for, and the one after the last; None for the whole file.

    Streamed datasets and resumed downloads send it. `bytes=0-99` includes byte 99.

    Example:
        >>> parse_range("bytes=0-99", 1000), parse_range("bytes=-5", 1000), parse_range("", 1000)
        ((0, 100), (995, 1000), None)
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not match or match[0] == "bytes=-":
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
    else:
        start, end = max(size - int(match[2]), 0), size
    if start >= end:
        message = f"expected a range within {size} bytes, got {header!r}"
        raise HttpError(416, message, headers={"Content-Range": f"bytes */{size}"})
    return start, end


API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>(?!api/)[^/]+/[^/]+?)"
REVISION = r"/(?P<revision>[^/]+)"
# Method, pattern, access and handler. The pattern is matched while the path is percent-encoded: the branch `a/b` is
# `a%2Fb` there, which is one segment. A writer needs a token, and a reader needs one for a private repository.
ROUTES: list[tuple[str, str, str, Callable[[Call], Answer]]] = [
    ("GET", "/api/whoami-v2", "anyone", whoami),
    ("POST", "/api/repos/create", "anyone", create_repo),
    ("POST", "/api/validate-yaml", "anyone", validate_card),
    ("GET", f"{API}(?:/revision{REVISION})?", "reader", show_repo),
    ("GET", f"{API}/tree{REVISION}(?:/(?P<path>.+))?", "reader", list_tree),
    ("GET", f"{API}/refs", "reader", list_refs),
    ("GET", f"{API}/commits{REVISION}", "reader", list_commits),
    ("PUT", f"{API}/settings", "writer", change_settings),
    ("GET", f"{API}/variables", "writer", list_variables),
    ("POST", f"{API}/tag{REVISION}", "writer", create_tag),
    ("POST", f"{API}/branch{REVISION}", "writer", create_branch),
    ("POST", f"{API}/preupload{REVISION}", "writer", plan_upload),
    ("POST", f"{GIT}\\.git/info/lfs/objects/batch", "writer", plan_large_uploads),
    # The client sends no token here: on the real Hub this address is a storage service, and has a signature. This
    # server takes whatever has the right hash. No revision shows the bytes until a commit names them.
    ("PUT", f"{GIT}\\.git/lfs/(?P<oid>[0-9a-f]{{64}})", "anyone", store_large_file),
    ("POST", f"{API}/commit{REVISION}", "writer", make_commit),
    ("GET", f"{GIT}/resolve{REVISION}/(?P<path>.+)", "reader", send_file),
]


def answer_call(call: Call) -> Answer:
    """Find the route of a request, check that its user may take it, and run the handler."""
    # A HEAD request has the same answer as GET. The server leaves out the body.
    wanted = "GET" if call.method == "HEAD" else call.method
    for method, pattern, access, handler in ROUTES:
        match = re.fullmatch(pattern, call.path)
        if not match or method != wanted:
            continue
        call.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        if access == "writer":
            call.require_user()
        if "repo" in call.args:
            call.open_repo(access)
        return handler(call)
    raise HttpError(404, f"no such endpoint on this server: {call.method} {call.path}; see ROUTES in its routes.py")
