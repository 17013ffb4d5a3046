"""Publish a folder on a Hub: upload it, tag the commit, download it again and compare. For models and datasets."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from tqdm.auto import tqdm

from gi_segmentation.errors import InputError, hub_errors


@dataclass(frozen=True)
class Publication:
    """The place where a folder was published.

    Attributes:
        url: Address of the repository.
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        commit: The commit that holds this state of the folder.
        tag: Name of this commit.
    """

    url: str
    repo_id: str
    commit: str
    tag: str

    def describe(self) -> str:
        """Return a line for the terminal."""
        return f"published: {self.url} (tag {self.tag}, commit {self.commit[:12]})"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back(api: HfApi, folder: Path, repo_id: str, repo_type: str, commit: str) -> list[str]:
    """Download each published file and compare it with the local one.

    Args:
        api: The client.
        folder: The folder that was published.
        repo_id: Name of the repository.
        repo_type: `model` or `dataset`.
        commit: The commit to read.

    Returns:
        Names of the files that differ; empty if all are the same.
    """
    # A success of the upload only says that the Hub accepted it. A proxy or a full disk can still damage a file.
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    differing = []
    for path in tqdm(paths, desc="Reading back", unit="file"):
        name = path.relative_to(folder).as_posix()
        # Each file gets a new folder. From its usual cache, the client could return a copy that it already has. After
        # the comparison the file is removed, because a dataset may be large.
        with tempfile.TemporaryDirectory() as scratch:
            copy = api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=commit, local_dir=scratch)
            if hash_file(Path(copy)) != hash_file(path):
                differing.append(name)
    return differing


def check_upload(api: HfApi, folder: Path, repo_id: str, repo_type: str, commit: str) -> None:
    """Check that each published file is the same as the local one; arguments as `read_back`.

    Raises:
        InputError: If a file differs.
    """
    if differing := read_back(api, folder, repo_id, repo_type, commit):
        raise InputError(
            f"{repo_id}: after the upload, these files differ from the local ones: {', '.join(differing)}; run the "
            f"same command again"
        )


def tag_commit(api: HfApi, repo_id: str, repo_type: str, commit: str, tag: str) -> str:
    """Tag a commit. If another commit has this tag, the new tag gets a number.

    Returns:
        The name of the tag.
    """
    # A tag must stay with its commit, because others may have cited it. After `best` come `best-2`, `best-3` and so
    # on. There are more of these names than tags in the repository, so at least one is free.
    taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}
    names = [tag, *(f"{tag}-{number}" for number in range(2, len(taken) + 3))]
    # A name is free if no commit has it. It may also be reused if this very commit has it, as after a second push of
    # the same files.
    name = next(name for name in names if taken.get(name, commit) == commit)
    if name not in taken:
        api.create_tag(repo_id, tag=name, revision=commit, repo_type=repo_type)
    return name


def publish_folder(
    folder: Path, repo_id: str, repo_type: str, tag: str, message: str, private: bool | None, branch: str | None = None
) -> Publication:
    """Publish a folder. The branch then has the files of this folder and no others.

    The address of the Hub comes from `HF_ENDPOINT`, and the token from `HF_TOKEN` or from `hf auth login`.

    Args:
        folder: The folder to publish.
        repo_id: Name of the repository, `NAMESPACE/NAME`. It is created if it does not exist.
        repo_type: `model` or `dataset`.
        tag: Name of this state. It leads to these files after newer ones were published.
        message: Commit message.
        private: Whether a new repository is private; None: as the Hub decides.
        branch: Branch of the repository, which is created if it does not exist; None: the main branch.

    Raises:
        InputError: If the Hub refuses or cannot be reached, or if a file arrives changed.
    """
    api = HfApi()
    # Each of these calls waits for the answer of the Hub. An upload in the background, as `Trainer` makes it, would
    # lose its errors: the run would report success although nothing was published.
    with hub_errors(repo_id):
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo_id, repo_type=repo_type, branch=branch, exist_ok=True)
        # One commit adds the new files and deletes the old ones, so that nobody ever sees a mixture.
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            delete_patterns="*",
        ).oid
        name = tag_commit(api, repo_id, repo_type, commit, tag)
        check_upload(api, folder, repo_id, repo_type, commit)
    # Addresses of datasets contain `datasets/`. Those of models contain nothing like it.
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return Publication(f"{constants.ENDPOINT}/{kind}{repo_id}", repo_id, commit, name)


def add_files(folder: Path, repo_id: str, message: str, branch: str | None, parent: str | None) -> str:
    """Add the files of a folder to the repository of a model, in one commit. Its other files stay.

    Args:
        folder: The files, with the same paths as in the repository.
        repo_id: Name of the repository, which must exist.
        message: Commit message.
        branch: Branch of the repository; None: the main branch.
        parent: The last commit of the branch, or the Hub refuses; None: any commit may be the last.

    Returns:
        A line for the terminal.

    Raises:
        InputError: If the Hub refuses or cannot be reached, or if a file arrives changed.
    """
    api = HfApi()
    with hub_errors(repo_id):
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=branch, parent_commit=parent
        ).oid
        check_upload(api, folder, repo_id, "model", commit)
    return f"published: {constants.ENDPOINT}/{repo_id} (commit {commit[:12]})"
