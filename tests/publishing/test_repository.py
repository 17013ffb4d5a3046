"""What a publication must not do without a word: lose files of others, or show patients to everybody."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from gi_segmentation import publish
from gi_segmentation.errors import InputError
from gi_segmentation.publishing import hub as publishing
from gi_segmentation.publishing.eval_results import SEED_SCORE
from gi_segmentation.publishing.facts import write_facts
from gi_segmentation.publishing.model_card import CARD, CASES, OVERLAY, SCAN_SCORES, score_names, write_card
from gi_segmentation.publishing.repository import RefusedError, find_repository, sign
from loopback_hub import LoopbackHub
from tests.support.hub_faults import client_of
from tests.support.runs import FACTS, write_run

REPO_ID = "tester/model"
OTHERS = {"notes.txt": b"my notes", "README.md": b"# By hand\n"}


@pytest.fixture
def api(hub: LoopbackHub) -> Iterator[HfApi]:
    with client_of(hub):
        yield HfApi(endpoint=hub.endpoint, token="any")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def run_of_patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with real patients: its scores are made up, and its pictures are one byte."""
    folder = write_run(tmp_path_factory.mktemp("patients") / "run")
    # `score_titles` needs a value for each name.
    facts = replace(FACTS, synthetic=False, dataset_title="UW-Madison GI Tract", fold="0")
    names = [*score_names(FACTS.label_set), SEED_SCORE]
    cases = {name: {"scan": "case1_day0", "dice": 0.5, "slice": 3, "slice_dice": 0.25} for name in ("best", "worst")}
    scored = {"scores": dict.fromkeys(names, 0.5), "intervals": dict.fromkeys(names), "cases": cases}
    write_facts(folder, replace(facts, **scored, clinical={"scans": 0}))
    write_card(folder, "run", "other", published=False)
    for name in (OVERLAY, CASES, SCAN_SCORES):
        (folder / name).write_bytes(b"x")
    return folder


def call(run: Path, *flags: str, repo_id: str = REPO_ID) -> str:
    """Run the command `publish`, and return its error; empty if it succeeded."""
    try:
        publish.main(["--output_dir", str(run), "--hub_model_id", repo_id, *flags])
    except InputError as error:
        return str(error)
    return ""


def add(api: HfApi, files: dict[str, bytes], message: str = "mine", description: str | None = None) -> str:
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(REPO_ID, operations, commit_message=message, commit_description=description).oid


def read(api: HfApi, name: str, folder: Path, revision: str | None = None) -> bytes:
    return Path(api.hf_hub_download(REPO_ID, name, local_dir=folder, revision=revision)).read_bytes()


def test_files_of_others_stop_a_publication_and_stay(api: HfApi, run_dir: Path, tmp_path: Path) -> None:
    api.create_repo(REPO_ID)
    head = add(api, OTHERS)
    error = call(run_dir)
    assert "README.md, notes.txt" in error and "--overwrite_repository" in error
    assert error.endswith(f"--output_dir {run_dir} --hub_model_id {REPO_ID} --hub_private_repo true")
    assert api.model_info(REPO_ID).sha == head
    with pytest.raises(RefusedError, match=r"README\.md, notes\.txt"):
        publishing.prepare_repository(REPO_ID, True)
    assert call(run_dir, "--overwrite_repository") == ""
    assert "notes.txt" not in api.list_repo_files(REPO_ID)
    assert read(api, "notes.txt", tmp_path, head) == OTHERS["notes.txt"], "the history keeps it"
    assert call(run_dir) == "", "the last commit is ours"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"README.md": b"# By hand\n"}, "README.md"),
        ({"notes.txt": b"my notes"}, "notes.txt"),
        ({"model.safetensors": b"other weights"}, "model.safetensors"),
    ],
)
def test_what_was_changed_after_our_publication_is_not_lost(
    change: dict[str, bytes], named: str, api: HfApi, run_dir: Path, tmp_path: Path
) -> None:
    assert call(run_dir) == ""
    ours = api.list_repo_commits(REPO_ID)[0]
    # The message of our commit does not make the change ours.
    head = add(api, change, ours.title, ours.message)
    error = call(run_dir)
    assert f"lose them: {named}; name another" in error
    assert api.model_info(REPO_ID).sha == head
    # Whoever takes the change back loses nothing any more.
    before = {name: read(api, name, tmp_path, ours.commit_id) for name in change if name != "notes.txt"}
    if before:
        add(api, before)
    else:
        api.create_commit(REPO_ID, [CommitOperationDelete("notes.txt")], commit_message="remove")
    assert call(run_dir) == ""


def test_a_branch_is_looked_at_too(api: HfApi) -> None:
    api.create_repo(REPO_ID)
    api.create_branch(REPO_ID, branch="fold-0")
    operations = [CommitOperationAdd("notes.txt", b"mine")]
    api.create_commit(REPO_ID, operations, commit_message="mine", revision="fold-0")
    publishing.prepare_repository(REPO_ID, True, branches=[None, "fold-1"])
    with pytest.raises(RefusedError, match=r"the branch fold-0 has files .* notes\.txt"):
        publishing.prepare_repository(REPO_ID, True, branches=[None, "fold-0"])


def test_many_commits_of_others_do_not_hide_our_last_one(api: HfApi, run_dir: Path) -> None:
    assert call(run_dir) == ""
    for number in range(60):
        add(api, {"notes.txt": str(number).encode()})
    assert "lose them: notes.txt;" in call(run_dir)


def test_adding_files_keeps_the_repository_ours_and_only_then(api: HfApi, run_dir: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    (more / "onnx").mkdir(parents=True)
    (more / "onnx" / "model.onnx").write_bytes(b"onnx")
    assert call(run_dir) == ""
    publishing.add_files(more, REPO_ID, "Add", None, None)
    assert call(run_dir) == "" and "onnx/model.onnx" not in api.list_repo_files(REPO_ID)
    add(api, OTHERS)
    publishing.add_files(more, REPO_ID, "Add", None, None)
    assert "lose them: README.md, notes.txt, onnx/model.onnx;" in call(run_dir)


@pytest.mark.parametrize(
    ("flags", "exists_public", "private", "pictures"),
    [
        ((), False, True, True),
        (("--hub_private_repo", "false"), False, False, False),
        ((), True, False, False),
        (("--hub_private_repo", "true"), True, False, False),
        (("--publish_pictures",), True, False, True),
    ],
)
def test_pictures_of_patients_stay_out_of_a_public_repository(
    flags: tuple[str, ...], exists_public: bool, private: bool, pictures: bool, api: HfApi, run_of_patients: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if exists_public:
        api.create_repo(REPO_ID, private=False)
    assert call(run_of_patients, *flags) == ""
    assert api.model_info(REPO_ID).private is private
    names = set(api.list_repo_files(REPO_ID))
    assert (names & {OVERLAY, CASES} == {OVERLAY, CASES}) is pictures
    card = read(api, CARD, tmp_path).decode()
    assert (f"]({CASES})" in card and f"]({OVERLAY})" in card) is pictures
    assert ("There is no picture of a slice here" in card) is not pictures
    assert f'from_pretrained("{REPO_ID}")' in card
    printed = capsys.readouterr().out
    assert ("private" if private else "public") in printed and (f"{OVERLAY}" in printed) is not pictures
    # At home, the pictures are there.
    assert f"]({CASES})" in (run_of_patients / CARD).read_text()


@pytest.mark.parametrize("name", ["case12345678_day0", "case1_day20240131"])
def test_numbers_of_a_hospital_and_dates_stay_out_of_a_public_repository(
    name: str, api: HfApi, run_of_patients: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_of_patients, tmp_path / "run"))
    (run / SCAN_SCORES).write_text(f"scan,dice\n{name},0.5\n")
    error = call(run, "--hub_private_repo", "false")
    assert f"the files name scans like {name}" in error
    assert api.list_repo_files(REPO_ID) == [".gitattributes"]
    assert call(run, repo_id="tester/closed") == "", "a private repository has them"


def test_a_synthetic_patient_may_be_shown(api: HfApi, run_of_patients: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of_patients, tmp_path / "run"))
    facts = json.loads((run / "run.json").read_text()) | {"synthetic": True}
    (run / "run.json").write_text(json.dumps(facts))
    write_card(run, "run", "other", published=False)
    assert call(run, "--hub_private_repo", "false") == ""
    assert {OVERLAY, CASES} <= set(api.list_repo_files(REPO_ID))


@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_a_repository_that_becomes_public_meanwhile(moment: str, api: HfApi, run_of_patients: Path) -> None:
    real = publishing.commit_folder

    def commit(*arguments: object, **named: object) -> str:
        if moment == "before the commit":
            api.update_repo_settings(REPO_ID, private=False)
        oid = real(*arguments, **named)  # type: ignore[arg-type]
        api.update_repo_settings(REPO_ID, private=False)
        return oid

    with patch.object(publishing, "commit_folder", commit):
        error = call(run_of_patients)
    if moment == "before the commit":
        assert "the repository is public, and the pictures of the model show slices of patients" in error
        assert api.list_repo_files(REPO_ID) == [".gitattributes"]
        assert call(run_of_patients) == "" and CASES not in api.list_repo_files(REPO_ID)
    else:
        assert "became public meanwhile" in error and "make it private in its settings now" in error


def test_a_name_without_a_namespace_gets_that_of_the_token(api: HfApi, run_dir: Path) -> None:
    assert call(run_dir, repo_id="model") == ""
    assert api.repo_exists("loopback/model")


def test_without_a_token_or_an_answer_there_is_one_message(hub: LoopbackHub, run_dir: Path, tmp_path: Path) -> None:
    with client_of(hub), patch.dict(os.environ, {"HF_TOKEN": "invalid"}):
        assert "--hub_model_id: expected NAMESPACE/NAME, but got 'model', and" in call(run_dir, repo_id="model")
    with client_of(hub), patch.object(constants, "HF_TOKEN_PATH", str(tmp_path / "none")):
        os.environ.pop("HF_TOKEN")
        with pytest.raises(InputError, match="expected a token of the Hub, but there is none; run `hf auth login`"):
            find_repository("--hub_model_id", REPO_ID)


def test_the_signature_ignores_the_file_of_the_hub() -> None:
    assert sign({"a": 1, ".gitattributes": 5}) == sign({"a": 1})
