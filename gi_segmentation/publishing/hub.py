"""Publish a folder on a Hub: upload it, download it again, compare, and tag the commit. For models and datasets."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from tqdm.auto import tqdm

from gi_segmentation.errors import HubError, describe_cause, find_hub_cause, hub_errors
from gi_segmentation.files import hash_file
from gi_segmentation.publishing.repository import (
    HUB_FILE,
    BranchHead,
    RefusedError,
    check_foreign,
    check_private,
    find_foreign,
    find_head,
    list_commit_files,
    sign,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What is done before the publication, for messages.
WORK = {"model": "training", "dataset": "build"}

# A call that fails is repeated after these seconds. The client itself repeats only some requests (listing files,
# sending a large file): five times each, within 23 s. It repeats no commit, no tag and no creation of a repository.
WAITS_S = (1, 4, 15)
# The longest `Retry-After` of a Hub that is obeyed. After a longer one, the user has to publish again later.
MAX_WAIT_S = 300
# By default the client waits forever for most answers. With this limit, a Hub that does not answer counts as failed.
TIMEOUT_S = 120
# Answers after which another try makes sense: too busy, broken, or somebody else changed the repository meanwhile.
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Publication:
    """The place where a folder was published.

    Attributes:
        url: Address of the repository.
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        commit: The commit that holds this state of the folder.
        tag: Name of this commit.
        private: Whether the repository is private.
        left_out: Pictures of patients that stayed out of a public repository.
    """

    url: str
    repo_id: str
    commit: str
    tag: str
    private: bool
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return a line for the terminal."""
        line = f"published: {self.url} (tag {self.tag}, commit {self.commit[:12]}), "
        line += "private" if self.private else "public"
        if self.left_out:
            line += f"; left out, because everybody would see slices of patients: {', '.join(self.left_out)} "
            line += "(--publish_pictures publishes them)"
        return line


def find_wait(error: BaseException, usual_s: float) -> float | None:
    """Return how many seconds to wait before another try.

    Args:
        error: What the call raised.
        usual_s: The answer if the Hub names no time.

    Returns:
        Seconds; None if another try makes no sense.
    """
    cause = find_hub_cause(error)
    if not isinstance(cause, HfHubHTTPError):
        # A proxy may send an HTML page in place of the Hub's JSON.
        return usual_s if isinstance(cause, httpx2.TransportError | JSONDecodeError) else None
    if cause.response.status_code not in PASSING:
        return None
    wanted = cause.response.headers.get("Retry-After", "")
    wait_s = max(usual_s, float(wanted)) if wanted.isdecimal() else usual_s
    return wait_s if wait_s <= MAX_WAIT_S else None


def try_again(call: Callable[[], T]) -> T:
    """Call a function, and call it again if the Hub fails in a way that may pass.

    Args:
        call: It talks to the Hub. A second call must complete what the first one began.
    """
    for usual_s in WAITS_S:
        get_session().timeout = TIMEOUT_S
        try:
            return call()
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            wait_s = find_wait(error, usual_s)
            if wait_s is None:
                raise
            logger.warning("%s; trying again in %g s", describe_cause(find_hub_cause(error)), wait_s)
            time.sleep(wait_s)
    get_session().timeout = TIMEOUT_S
    return call()


def files_by_name(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by the names that they have in a repository, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_folder(
    api: HfApi,
    folder: Path,
    repo_id: str,
    repo_type: str,
    message: str,
    branch: str | None,
    head: str,
    only_private: str | None = None,
) -> str:
    """Make a branch hold the files of a folder and no others, in one commit.

    Args:
        api: The client.
        folder: The files.
        repo_id: Name of the repository.
        repo_type: `model` or `dataset`.
        message: Commit message.
        branch: Branch of the repository; None: the main branch.
        head: The last commit of the branch when this publication began.
        only_private: As in `publish_folder`.

    Returns:
        The commit; the last one of the branch if it holds these files already.

    Raises:
        HubError: If somebody else has changed the branch since then.
        RefusedError: If the repository has become public, but must not be.
    """
    files = files_by_name(folder)
    now, private = find_head(api, repo_id, repo_type, branch)
    if only_private:
        check_private(repo_id, BranchHead(now, private), only_private)
    if now != head:
        # Either an earlier try has arrived although its answer was lost, or somebody else has published.
        names = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=now)) - {HUB_FILE}
        if names == files.keys() and not read_back(api, folder, repo_id, repo_type, now):
            return now
        raise HubError(
            f"publishing {repo_id} failed: somebody else published there at the same time (commit {now[:12]}); our "
            f"files were not published, and would replace theirs"
        )
    # `upload_folder` would be shorter, but where the Hub has the Xet protocol, it makes several commits of an upload
    # that takes more than five minutes. Until the last of them, the repository would mix old and new files.
    old = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=head)) - files.keys() - {HUB_FILE}
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in sorted(old)),
        *(CommitOperationAdd(name, path) for name, path in files.items()),
    ]
    # With `parent_commit`, the Hub refuses (412) if somebody else has changed the branch meanwhile.
    return api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        commit_description=sign({name: path.stat().st_size for name, path in files.items()}),
        repo_type=repo_type,
        revision=branch,
        parent_commit=head,
    ).oid


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
    differing = []
    for name, path in tqdm(files_by_name(folder).items(), desc="Reading back", unit="file"):
        # Each file gets a new folder. From its usual cache, the client could return a copy that it already has. After
        # the comparison the file is removed, because a dataset may be large.
        with tempfile.TemporaryDirectory() as scratch:
            where = {"repo_type": repo_type, "revision": commit, "local_dir": scratch}
            copy = try_again(partial(api.hf_hub_download, repo_id, name, **where))
            if hash_file(Path(copy)) != hash_file(path):
                differing.append(name)
    return differing


def check_upload(api: HfApi, folder: Path, repo_id: str, repo_type: str, commit: str) -> None:
    """Check that each published file is the same as the local one; arguments as `read_back`.

    Raises:
        HubError: If a file differs.
    """
    if differing := read_back(api, folder, repo_id, repo_type, commit):
        raise HubError(
            f"publishing {repo_id} failed: after the upload, these files differ from the local ones: "
            f"{', '.join(differing)}; the commit {commit[:12]} has no tag"
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


def prepare_repository(
    repo_id: str,
    private: bool | None,
    repo_type: str = "model",
    overwrite: bool = False,
    only_private: str | None = None,
    branches: Sequence[str | None] = (None,),
) -> None:
    """Create a repository before a training or a build, so that a refusal is seen early.

    A Hub that refuses or fails is only a warning: the work needs no Hub, and its results can be published later.

    Args:
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        private: Whether a new repository is private; None: as the Hub decides.
        repo_type: `model` or `dataset`.
        overwrite: As in `publish_folder`.
        only_private: As in `publish_folder`.
        branches: The branches that will be published; None is the main branch.

    Raises:
        InputError: If no repository can have this name.
        RefusedError: If `publish_folder` would refuse the repository as it is now.
    """
    api = HfApi()
    try:
        with hub_errors("preparing", repo_id):
            get_session().timeout = TIMEOUT_S
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            for branch in branches:
                # A branch that does not exist yet will be a copy of the main branch.
                with suppress(RevisionNotFoundError):
                    check_repository(api, repo_id, repo_type, branch, overwrite, only_private)
    except RefusedError:
        raise
    except HubError as error:
        logger.warning("%s. The %s starts nevertheless, and publishes at its end", error, WORK[repo_type])


def check_repository(
    api: HfApi, repo_id: str, repo_type: str, branch: str | None, overwrite: bool, only_private: str | None
) -> str:
    """Return the last commit of a branch, if a folder may be published there; arguments as `publish_folder`.

    Raises:
        RefusedError: If not.
    """
    head = find_head(api, repo_id, repo_type, branch)
    if only_private:
        check_private(repo_id, head, only_private)
    if not overwrite:
        check_foreign(api, repo_id, repo_type, head.commit, branch)
    return head.commit


def is_repository_private(repo_id: str, private: bool | None) -> bool:
    """Tell whether the repository of a model is private, and create it if it does not exist.

    Args:
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        private: Whether a new repository is private; None: as the Hub decides.

    Raises:
        InputError: As `publish_folder`.
    """
    api = HfApi()
    with hub_errors("publishing", repo_id):
        try_again(partial(api.create_repo, repo_id, private=private, exist_ok=True))
        return try_again(partial(find_head, api, repo_id, "model", None)).private


def publish_folder(
    folder: Path,
    repo_id: str,
    repo_type: str,
    tag: str,
    message: str,
    private: bool | None,
    branch: str | None = None,
    overwrite: bool = False,
    only_private: str | None = None,
) -> Publication:
    """Publish a folder. The branch then has the files of this folder and no others.

    The address of the Hub comes from `HF_ENDPOINT`, and the token from `HF_TOKEN` or from `hf auth login`.

    If this fails half-way, the next call with the same folder completes it. Large files that have arrived are not sent
    again.

    Args:
        folder: The folder to publish.
        repo_id: Name of the repository, `NAMESPACE/NAME`. It is created if it does not exist.
        repo_type: `model` or `dataset`.
        tag: Name of this state. It leads to these files after newer ones were published.
        message: Commit message.
        private: Whether a new repository is private; None: as the Hub decides.
        branch: Branch of the repository, which is created if it does not exist; None: the main branch.
        overwrite: Whether files may be replaced that are not as our last publication left them.
        only_private: Nothing is published in a public repository. The text says what it would show, and what to do.
            None: the repository may be public.

    Raises:
        InputError: If no repository can have this name.
        RefusedError: If the repository is public or would lose files, against `only_private` or `overwrite`.
        HubError: If the Hub refuses, fails or cannot be reached, if a file arrives changed, or if somebody else
            publishes to the same branch at the same time.
    """
    api = HfApi()
    where = (api, repo_id, repo_type, branch)
    # Each of these calls waits for the answer of the Hub. An upload in the background, as `Trainer` makes it, would
    # lose its errors: the run would report success although nothing was published.
    with hub_errors("publishing", repo_id):
        try_again(partial(api.create_repo, repo_id, repo_type=repo_type, private=private, exist_ok=True))
        if branch:
            try_again(partial(api.create_branch, repo_id, repo_type=repo_type, branch=branch, exist_ok=True))
        head = try_again(partial(check_repository, *where, overwrite, only_private))
        commit = try_again(
            partial(commit_folder, api, folder, repo_id, repo_type, message, branch, head, only_private)
        )
        check_upload(api, folder, repo_id, repo_type, commit)
        # The tag comes last. So whatever has a tag was compared.
        name = try_again(partial(tag_commit, api, repo_id, repo_type, commit, tag))
        is_private = try_again(partial(find_head, *where)).private
        # The repository may have become public between the check and the commit.
        if only_private and not is_private:
            raise RefusedError(
                f"publishing {repo_id}: the repository became public meanwhile, and everybody can see the commit "
                f"{commit[:12]}; make it private in its settings now. If it must be public, delete it first: its "
                f"history keeps what was published"
            )
    # Addresses of datasets contain `datasets/`. Those of models contain nothing like it.
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return Publication(f"{constants.ENDPOINT}/{kind}{repo_id}", repo_id, commit, name, is_private)


def sign_addition(api: HfApi, folder: Path, repo_id: str, head: str) -> str | None:
    """Return the signature of a commit that adds the files of a folder to a model; None if not all files are ours."""
    if find_foreign(api, repo_id, "model", head):
        return None
    sizes = {name: file.size for name, file in list_commit_files(api, repo_id, "model", head).items()}
    return sign(sizes | {name: path.stat().st_size for name, path in files_by_name(folder).items()})


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
        HubError: If the Hub refuses, fails or cannot be reached, or if a file arrives changed.
    """
    api = HfApi()
    with hub_errors("adding files to", repo_id):
        head = parent or find_head(api, repo_id, "model", branch).commit
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            # So the next publication knows that nobody else has changed the repository.
            commit_description=sign_addition(api, folder, repo_id, head),
            revision=branch,
            parent_commit=parent,
        ).oid
        check_upload(api, folder, repo_id, "model", commit)
    return f"published: {constants.ENDPOINT}/{repo_id} (commit {commit[:12]})"
