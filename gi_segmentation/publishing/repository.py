"""What a repository on a Hub holds: whose it is, whether it is public, and which files are not from us.

Each commit of ours has a signature in its message: a hash of the names and sizes of all files that it left there. If
the last commit has a signature that fits, nobody has changed the repository since.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from huggingface_hub import HfApi, RepoFile, get_token

from gi_segmentation.errors import HubError, InputError, check_repo_id, hub_errors, list_some

# The Hub itself adds this file to each repository.
HUB_FILE = ".gitattributes"
SIGNATURE = "Published by gi-segmentation. Names and sizes of all files: "
# More names would make the message too long to read.
MAX_NAMES = 10


class RefusedError(HubError):
    """A publication that this project refuses, because others could lose files or everybody could see patients."""


class BranchHead(NamedTuple):
    """The last commit of a branch, and whether the repository is private."""

    commit: str
    private: bool


class CommitFile(NamedTuple):
    """A file of a commit: its size in bytes, and the name that git gives to its content."""

    size: int
    blob_id: str


def find_repository(flag: str, repo_id: str) -> str:
    """Return the whole name of a repository, before there is any work for it.

    Args:
        flag: The flag that has the name, for messages.
        repo_id: `NAMESPACE/NAME`, or a name alone. Then the namespace is that of the user of the token.

    Raises:
        InputError: If no repository can have this name, if there is no token, or if the Hub does not say whose it is.
    """
    check_repo_id(flag, repo_id)
    if get_token() is None:
        raise InputError(
            f"{flag} {repo_id}: expected a token of the Hub, but there is none; run `hf auth login` once, or set "
            f"HF_TOKEN"
        )
    if "/" in repo_id:
        return repo_id
    try:
        with hub_errors("finding the namespace of", repo_id):
            user = HfApi().whoami()["name"]
    except HubError as error:
        raise InputError(f"{flag}: expected NAMESPACE/NAME, but got {repo_id!r}, and {error}") from error
    return f"{user}/{repo_id}"


def find_head(api: HfApi, repo_id: str, repo_type: str, branch: str | None) -> BranchHead:
    """Return the last commit of a branch, and whether the repository is private."""
    info = api.repo_info(repo_id, repo_type=repo_type, revision=branch)
    # If the Hub does not answer this, the repository counts as public.
    return BranchHead(str(info.sha), bool(info.private))


def check_private(repo_id: str, head: BranchHead, advice: str) -> None:
    """Check that a repository is private.

    Args:
        repo_id: Name of the repository.
        head: From `find_head`.
        advice: What a public repository would show, and what to do, for the message.

    Raises:
        RefusedError: If it is public.
    """
    if not head.private:
        raise RefusedError(f"publishing {repo_id} refused: the repository is public, and {advice}")


def list_commit_files(api: HfApi, repo_id: str, repo_type: str, commit: str) -> dict[str, CommitFile]:
    """Return the files of a commit by name, without the file of the Hub."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
    files = {item.path: CommitFile(item.size, item.blob_id) for item in tree if isinstance(item, RepoFile)}
    return {name: file for name, file in files.items() if name != HUB_FILE}


def sign(sizes: Mapping[str, int]) -> str:
    """Return the signature of a commit, for its message.

    Args:
        sizes: Sizes in bytes of all files that the commit leaves in the repository, by name.

    Example:
        >>> sign({"b": 2, "a": 1}) == sign({"a": 1, "b": 2}) != sign({"a": 1, "b": 3})
        True
    """
    lines = "\n".join(f"{name} {size}" for name, size in sorted(sizes.items()) if name != HUB_FILE)
    return SIGNATURE + hashlib.sha256(lines.encode()).hexdigest()


def find_foreign(api: HfApi, repo_id: str, repo_type: str, head: str) -> list[str]:
    """Return the files of a repository that are not as our last publication left them.

    Args:
        api: The client.
        repo_id: Name of the repository.
        repo_type: `model` or `dataset`.
        head: The last commit of the branch.

    Returns:
        Their names, sorted: files that somebody has added or changed since then. All files if we never published
        there.
    """
    files = list_commit_files(api, repo_id, repo_type, head)
    if not files:
        return []
    ours: dict[str, CommitFile] = {}
    # The newest one comes first.
    for commit in api.list_repo_commits(repo_id, repo_type=repo_type, revision=head):
        if SIGNATURE in commit.message:
            ours = files if commit.commit_id == head else list_commit_files(api, repo_id, repo_type, commit.commit_id)
            # A commit that was made anew with an old message has other files.
            if sign({name: file.size for name, file in ours.items()}) in commit.message:
                break
            ours = {}
    return sorted(name for name, file in files.items() if ours.get(name) != file)


def check_foreign(api: HfApi, repo_id: str, repo_type: str, head: str, branch: str | None) -> None:
    """Check that a publication, which replaces all files of a branch, loses none that is not ours.

    Raises:
        RefusedError: If it does. The message names the files.
    """
    foreign = find_foreign(api, repo_id, repo_type, head)
    if not foreign:
        return
    place = f"the branch {branch}" if branch else "the repository"
    raise RefusedError(
        f"publishing {repo_id} refused: {place} has files that are not as our last publication left them, and would "
        f"lose them: {list_some(foreign, MAX_NAMES)}; name another repository, or add --overwrite_repository, which "
        f"replaces everything there "
        f"(the history of the repository keeps the files)"
    )
