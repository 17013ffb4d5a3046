"""Publish a run on a Hub that fails, once for each fault, and write the table of the loopback Hub's page.

python -m tests.support.hub_faults
"""

import contextlib
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from huggingface_hub import HfApi, constants

from gi_segmentation import publish
from gi_segmentation.errors import InputError
from gi_segmentation.publishing import hub as publishing
from loopback_hub import Fault, LoopbackHub
from tests.support.pages import replace_table
from tests.support.processes import ROOT
from tests.support.runs import write_run

REPO_ID = "tester/model"
PAGE, START = ROOT / "loopback_hub" / "README.md", "<!-- faults -->\n"
COMMIT, TAG, LARGE, FILE, CREATE = "/commit/", "/tag/", "/lfs/[0-9a-f]{64}", "/resolve/", "/repos/create"
ALWAYS = math.inf
# What goes wrong, in the words of the table. The faults are made anew for each use, because they count.
FAULTS: dict[str, Callable[[], list[Fault]]] = {
    "a 500 for the commit, twice": lambda: [Fault("POST", COMMIT, status=500, times=2)],
    "a 500 for the commit, always": lambda: [Fault("POST", COMMIT, status=500, times=ALWAYS)],
    "a 503 for a large file, always": lambda: [Fault("PUT", LARGE, status=503, times=ALWAYS)],
    "a 500 while reading back, once": lambda: [Fault("GET", FILE, status=500)],
    "a reset amid a large file, once": lambda: [Fault("PUT", LARGE, action="reset")],
    "a reset amid a large file, always": lambda: [Fault("PUT", LARGE, action="reset", times=ALWAYS)],
    "a reset amid the commit, once": lambda: [Fault("POST", COMMIT, action="reset")],
    "a 401, always": lambda: [Fault("POST", ".", status=401, times=ALWAYS)],
    "a 403 for the commit": lambda: [Fault("POST", COMMIT, status=403)],
    "a 409 for the tag, once": lambda: [Fault("POST", TAG, status=409)],
    "a 412 for the commit, once": lambda: [Fault("POST", COMMIT, status=412)],
    "a 429 with `Retry-After: 7` for the commit": lambda: [
        Fault("POST", COMMIT, status=429, headers={"Retry-After": "7"})
    ],
    "a 429 with `Retry-After: 3600` for the commit": lambda: [
        Fault("POST", COMMIT, status=429, headers={"Retry-After": "3600"})
    ],
    "no answer to the commit within the limit, once": lambda: [Fault("POST", COMMIT, delay_s=1.5)],
    "no answer within the limit, always": lambda: [Fault("POST", CREATE, delay_s=1.5, times=ALWAYS)],
    "the answer to the commit cut short": lambda: [Fault("POST", COMMIT, action="cut")],
    "a file cut short while reading back, once": lambda: [Fault("GET", f"{FILE}.*safetensors", action="cut")],
    "a file that arrives damaged": lambda: [Fault("GET", f"{FILE}.*safetensors", action="damage")],
    "an HTML page of a proxy, always": lambda: [Fault("POST", CREATE, action="page", times=ALWAYS)],
    "a 500 for the tag, always": lambda: [Fault("POST", TAG, status=500, times=ALWAYS)],
}


@dataclass(frozen=True)
class Outcome:
    """What a fault led to.

    Attributes:
        hits: How many requests had the fault.
        error: The line that the user sees; empty if the publication succeeded all the same.
        waited_s: Seconds that the client and we would have waited between tries, added up over all files.
        files_whole: Whether the files of the run are as they were.
        state: The repository afterwards: `absent`, `empty`, `whole`, `half`, and `tagged` if a tag leads to a commit.
        completed: Whether the next run of the same command published everything, without the fault.
    """

    hits: int
    error: str
    waited_s: float
    files_whole: bool
    state: str
    completed: bool


@contextlib.contextmanager
def client_of(hub: LoopbackHub) -> Iterator[list[float]]:
    """Lead the client of this process to a Hub, and note waits between tries in place of waiting."""
    waits: list[float] = []
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    with (
        patch.object(constants, "ENDPOINT", hub.endpoint),
        # The client makes it of the endpoint when it is imported.
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
        patch.object(constants, "HF_HUB_DISABLE_XET", True),
        patch.dict(os.environ, {"HF_TOKEN": "loopback-token"}),
        patch.object(time, "sleep", waits.append),
        patch.object(publishing, "TIMEOUT_S", 1),
    ):
        yield waits


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder."""
    return {name: path.read_bytes() for name, path in publishing.files_by_name(folder).items()}


def describe_repository(hub: LoopbackHub, run: Path, scratch: Path) -> str:
    """Return the state of the repository, see `Outcome`."""
    api = HfApi(endpoint=hub.endpoint, token="any")
    if not api.repo_exists(REPO_ID):
        return "absent"
    names = set(api.list_repo_files(REPO_ID)) - {publishing.HUB_FILE}
    if not names:
        state = "empty"
    else:
        copies = {name: api.hf_hub_download(REPO_ID, name, local_dir=scratch) for name in sorted(names)}
        expected = {"README.md", "config.json", "learning_curve.png", "model.safetensors", "preprocessor_config.json"}
        same = all(Path(copy).read_bytes() == (run / name).read_bytes() for name, copy in copies.items())
        state = "whole" if same and names == expected | {"run.json"} else "half"
    return state + (", tagged" if api.list_repo_refs(REPO_ID).tags else "")


def call_publish(run: Path) -> str:
    """Run the command `publish`, and return its error line; empty if it succeeded."""
    try:
        publish.main(["--output_dir", str(run), "--hub_model_id", REPO_ID, "--hub_private_repo", "true"])
    except InputError as error:
        return str(error)
    return ""


def try_fault(name: str, run: Path, folder: Path) -> Outcome:
    """Publish a run with a fault, look at what is there, and publish it again without the fault.

    Args:
        name: One of `FAULTS`.
        run: From `write_run`, with a card that names the repository.
        folder: An empty folder.
    """
    before = contents(run)
    with LoopbackHub(folder / "hub") as hub:
        hub.faults.set(FAULTS[name]())
        with client_of(hub) as waits:
            error = call_publish(run)
            hits, waited_s = hub.faults.count, sum(waits)
            hub.faults.set()
            state = describe_repository(hub, run, folder / "first")
            again = call_publish(run)
            completed = not again and describe_repository(hub, run, folder / "second") == "whole, tagged"
    return Outcome(hits, error, waited_s, contents(run) == before, state, completed)


def shorten(error: str) -> str:
    """Return the part of an error line that differs between the faults."""
    what = error.split(" failed: ")[1].split(". The run in ")[0]
    # Addresses and ids differ each time.
    what = re.sub(r"\.? (for url:? |Cannot access content at: |Url: )\S+", "", what)
    return re.sub(r"commit [0-9a-f]{12}", "commit ...", what)


def make_table() -> str:
    """Return the outcome of each fault as a table."""
    lines = [
        "| what the Hub does | what the user sees | waits | files of the run | repository then | next run |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(Path(scratch) / "run")
        with LoopbackHub(Path(scratch) / "first") as hub, client_of(hub):
            call_publish(run)  # from now on, the card names the repository
        for number, name in enumerate(FAULTS):
            folder = Path(scratch) / str(number)
            outcome = try_fault(name, run, folder)
            shutil.rmtree(folder)
            seen = f"`{shorten(outcome.error)}`" if outcome.error else "published"
            whole = "whole" if outcome.files_whole else "changed"
            then = "publishes" if outcome.completed else "fails"
            lines.append(f"| {name} | {seen} | {outcome.waited_s:g} s | {whole} | {outcome.state} | {then} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    replace_table(PAGE, START, make_table())


if __name__ == "__main__":
    main()
