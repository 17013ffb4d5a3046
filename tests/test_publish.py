"""`publish`: a finished run, whatever the Hub does, is published whole or can be published by the same command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from gi_segmentation import publish
from gi_segmentation.errors import InputError
from gi_segmentation.publishing.facts import read_results
from gi_segmentation.publishing.model_card import CARD, DIGEST, find_own_card, make_card, write_own_card
from loopback_hub import Fault, LoopbackHub
from tests.support.hub_faults import FAULTS, PAGE, REPO_ID, START, call_publish, client_of, contents, try_fault
from tests.support.pages import split_page
from tests.support.processes import ROOT
from tests.support.runs import write_run

# The faults that pass while the command waits. All others end in an error.
PASSING = {name for name in FAULTS if "once" in name or "twice" in name} | {
    "a 429 with `Retry-After: 7` for the commit",
    "the answer to the commit cut short",
}
# Faults after which everything has arrived, but nobody has compared it or the tag was refused.
ARRIVED = {
    "a file that arrives damaged": "whole",
    "a 500 for the tag, always": "whole",
}
# A short wait that the Hub asks for is kept. A long one ends the command, and so does a refusal.
WAITS = {
    "a 429 with `Retry-After: 7` for the commit": 7,
    "a 429 with `Retry-After: 3600` for the commit": 0,
    "a 403 for the commit": 0,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose card names the repository, as after a training with `--hub_model_id`."""
    folder = tmp_path_factory.mktemp("named")
    with LoopbackHub(folder / "hub") as hub, client_of(hub):
        assert call_publish(write_run(folder / "run")) == ""
    return folder / "run"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_hub_loses_nothing_and_the_same_command_goes_on(
    name: str, named_run: Path, tmp_path: Path
) -> None:
    outcome = try_fault(name, named_run, tmp_path)
    assert outcome.hits > 0, "the fault is in a request that nobody makes"
    assert outcome.files_whole and outcome.completed
    assert "half" not in outcome.state
    assert outcome.waited_s == WAITS.get(name, outcome.waited_s)
    if name in PASSING:
        assert (outcome.error, outcome.state) == ("", "whole, tagged")
        return
    assert "tagged" not in outcome.state
    assert outcome.state == ARRIVED.get(name, outcome.state)
    command = f"python -m gi_segmentation.publish --output_dir {named_run} --hub_model_id {REPO_ID}"
    assert outcome.error.endswith(f"To publish it: {command} --hub_private_repo true")
    assert "\n" not in outcome.error


def test_of_two_publications_at_once_one_wins_and_the_other_says_so(
    named_run: Path, tmp_path: Path, hub: LoopbackHub
) -> None:
    runs = [Path(shutil.copytree(named_run, tmp_path / name)) for name in ("slow", "fast")]
    for run in runs:
        (run / "learning_curve.png").write_bytes(run.name.encode())
    slow = ["-m", "gi_segmentation.publish", "--output_dir", str(runs[0]), "--hub_model_id", REPO_ID]
    # The first one has to try its commit again. In this second, the other one publishes.
    hub.faults.set([Fault("POST", "/commit/", status=503)])
    environment = {**os.environ, **hub.environment()}
    with subprocess.Popen(
        [sys.executable, *slow], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as waiting:
        deadline = time.monotonic() + 60
        while not hub.faults.count and time.monotonic() < deadline:
            time.sleep(0.01)
        waiting.send_signal(signal.SIGSTOP)
        with client_of(hub):
            assert call_publish(runs[1]) == ""
        waiting.send_signal(signal.SIGCONT)
        _, printed = waiting.communicate(timeout=60)
    assert waiting.returncode == 1 and "Traceback" not in printed, printed
    last = printed.splitlines()[-1]
    assert f"publishing {REPO_ID} failed: somebody else published there at the same time" in last
    api = HfApi(endpoint=hub.endpoint, token="any")
    (tag,) = api.list_repo_refs(REPO_ID).tags
    for name in set(api.list_repo_files(REPO_ID)) - {".gitattributes"}:
        copy = api.hf_hub_download(REPO_ID, name, local_dir=tmp_path / "copy", revision=tag.name)
        assert Path(copy).read_bytes() == (runs[1] / name).read_bytes(), name
    # The same command replaces the files of the other one.
    with client_of(hub):
        assert call_publish(runs[0]) == ""
    assert len(api.list_repo_refs(REPO_ID).tags) == 2


def test_the_page_has_every_fault() -> None:
    _, table, _ = split_page(PAGE, START)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in FAULTS]


def test_a_run_that_was_trained_without_the_hub_gets_a_card_with_its_new_name(
    run_dir: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run_dir)
    assert 'from_pretrained("run")' in before[CARD].decode()
    with client_of(hub):
        publish.main(["--output_dir", str(run_dir), "--hub_model_id", REPO_ID, "--hub_private_repo", "true"])
    assert f"published: {hub.endpoint}/{REPO_ID} (tag all-patients-step-3" in capsys.readouterr().out
    after = contents(run_dir)
    assert f'from_pretrained("{REPO_ID}")' in after.pop(CARD).decode()
    # The digest belongs to the card, and is not published.
    assert after.pop(DIGEST) != before[DIGEST]
    assert after == {name: data for name, data in before.items() if name not in (CARD, DIGEST)}
    api = HfApi(endpoint=hub.endpoint, token="any")
    assert api.model_info(REPO_ID).private
    assert set(api.list_repo_files(REPO_ID)) - {".gitattributes"} == after.keys() | {CARD}


def test_a_card_that_a_user_changed_is_not_replaced(run_dir: Path, hub: LoopbackHub) -> None:
    card = run_dir / CARD
    card.write_text(card.read_text() + "A word of mine.\n")
    before = contents(run_dir)
    with client_of(hub):
        assert f"write {REPO_ID} there" in call_publish(run_dir)
        assert contents(run_dir) == before
        card.write_text(card.read_text().replace('from_pretrained("run")', f'from_pretrained("{REPO_ID}")'))
        assert call_publish(run_dir) == ""
    copy = HfApi(endpoint=hub.endpoint, token="any").hf_hub_download(REPO_ID, CARD, local_dir=run_dir.parent / "copy")
    assert Path(copy).read_text().endswith("A word of mine.\n")


def test_a_card_of_an_earlier_version_is_no_card_that_a_user_changed(run_dir: Path) -> None:
    facts = read_results(run_dir)
    earlier = make_card(facts, "other/name", "other").replace("**Intended use.**", "**Use.**")
    write_own_card(run_dir, earlier)
    assert find_own_card(run_dir, facts, "a/b") is None
    # The user's words stay, also beside the digest of our card.
    (run_dir / CARD).write_text(f"{earlier}\nMy words.\n")
    with pytest.raises(InputError, match="changed by hand; write a/b there"):
        find_own_card(run_dir, facts, "a/b")
    assert str(find_own_card(run_dir, facts, "other/name")).endswith("My words.\n")


def test_an_impossible_name_is_refused_before_the_card_gets_it(run_dir: Path) -> None:
    before = contents(run_dir)
    with pytest.raises(InputError, match="--hub_model_id: expected NAMESPACE/NAME"):
        publish.main(["--output_dir", str(run_dir), "--hub_model_id", 'me/"); print("'])
    assert contents(run_dir) == before


@pytest.mark.parametrize("spoil", ["no folder", "no weights", "not finished", "cross-validation"])
def test_a_folder_that_is_no_finished_run_ends_in_one_error(spoil: str, run_dir: Path, hub: LoopbackHub) -> None:
    facts = json.loads((run_dir / "run.json").read_text())
    expected = {
        "no folder": "expected the folder of a finished training",
        "no weights": "these files are missing: model.safetensors",
        "not finished": "expected the facts of a finished run",
        "cross-validation": "gi_segmentation.cross_validate` with --collect and --push_to_hub",
    }[spoil]
    if spoil == "no weights":
        (run_dir / "model.safetensors").unlink()
    elif spoil == "not finished":
        del facts["best_step"]
    elif spoil == "cross-validation":
        facts["folds"] = [{}]
    (run_dir / "run.json").write_text(json.dumps(facts))
    output_dir = run_dir / "nowhere" if spoil == "no folder" else run_dir
    with client_of(hub), pytest.raises(InputError, match=expected):
        publish.main(["--output_dir", str(output_dir), "--hub_model_id", REPO_ID])
    assert not HfApi(endpoint=hub.endpoint, token="any").repo_exists(REPO_ID), "nothing was asked of the Hub"
