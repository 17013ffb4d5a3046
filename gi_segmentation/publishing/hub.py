"""Push a folder to the Hub, tag it, read it back and compare: the same path for models and datasets."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from tqdm.auto import tqdm

from gi_segmentation.errors import InputError, hub_errors


@dataclass(frozen=True)
class Publication:
    """Where a folder was published: address, repository, commit and the tag that keeps this state."""

    url: str
    repo_id: str
    commit: str
    tag: str


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back(api: HfApi, folder: Path, repo_id: str, repo_type: str, commit: str) -> list[str]:
    """Download every published file anew and compare it with the local one.

    Returns:
        Names of the files that differ; empty where all is well.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    differing = []
    for path in tqdm(paths, desc="Reading back", unit="file"):
        name = path.relative_to(folder).as_posix()
        with tempfile.TemporaryDirectory() as scratch:
            copy = api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=commit, local_dir=scratch)
            if hash_file(Path(copy)) != hash_file(path):
                differing.append(name)
    return differing


def tag_commit(api: HfApi, repo_id: str, repo_type: str, commit: str, tag: str) -> str:
    """Tag a commit. A name that another commit bears already gets a number.

    Returns:
        The tag's name.
    """
    taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}
    names = [tag, *(f"{tag}-{number}" for number in range(2, len(taken) + 3))]
    name = next(name for name in names if taken.get(name, commit) == commit)
    if name not in taken:
        api.create_tag(repo_id, tag=name, revision=commit, repo_type=repo_type)
    return name


def publish_folder(
    folder: Path, repo_id: str, repo_type: str, tag: str, message: str, private: bool | None
) -> Publication:
    """Publish a folder so that the repository holds just its files, then check what arrived.

    Endpoint and token come from `HF_ENDPOINT` and `HF_TOKEN` (or `hf auth login`).

    Args:
        folder: What to publish.
        repo_id: `NAMESPACE/NAME`; made if it does not exist.
        repo_type: `model` or `dataset`.
        tag: Name for this state, so that it can be found when a newer one is pushed.
        message: Commit message.
        private: Visibility of a new repository; None leaves it to the Hub.

    Raises:
        InputError: If the Hub refuses or cannot be reached, or what arrived differs from what was sent.
    """
    api = HfApi()
    with hub_errors(repo_id):
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=folder, commit_message=message, delete_patterns="*"
        ).oid
        name = tag_commit(api, repo_id, repo_type, commit, tag)
        differing = read_back(api, folder, repo_id, repo_type, commit)
    if differing:
        raise InputError(f"{repo_id}: read back differently from what was sent: {', '.join(differing)}; push again")
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return Publication(f"{constants.ENDPOINT}/{kind}{repo_id}", repo_id, commit, name)
