"""Entries of `.eval_results/`: they have the card's scores, the client parses them, a push renews them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, ModelInfo, constants, parse_eval_result_entries

import run_segmentation
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.publishing.eval_results import (
    EVAL_RESULTS,
    OF_THE_PRESET,
    list_entries,
    list_scores,
    list_tasks,
    write_eval_results,
)
from gi_segmentation.publishing.facts import RUN_FILE, RunResults, read_results
from gi_segmentation.publishing.model_card import score_titles, write_card
from gi_segmentation.rules import PRESETS
from loopback_hub import LoopbackHub
from tests.support.processes import RunPython
from tests.support.training import arguments

DATASET_ID, MODEL_ID, COMMIT = "tester/gi_tract", "tester/model", "0123456789" * 4
# A process of its own, because the client reads HF_ENDPOINT when it is imported.
PUBLISH = """
import sys
from pathlib import Path
from gi_segmentation.publishing.facts import read_results
from gi_segmentation.publishing.results import publish_results
from gi_segmentation.publishing.options import PublicationOptions
folder = Path(sys.argv[1])
branch = sys.argv[2] if len(sys.argv) > 2 else None
card = (folder / "README.md").read_text()
options = PublicationOptions()
print(publish_results(folder, read_results(folder), "tester/model", options, lambda pictures: card, branch).tag)
"""


@pytest.fixture(scope="module")
def run_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model, with flips, whose dataset has a name of the Hub."""
    folder = tmp_path_factory.mktemp("entries") / "run"
    flags = {"max_steps": 1, "max_eval_samples": None, "test_time_flips": True, "preset": "first_place"}
    run_segmentation.main(arguments(dataset_dir, folder, **flags))
    change_facts(folder, dataset=DATASET_ID)
    return folder


@pytest.fixture
def facts(run_dir: Path) -> RunResults:
    return read_results(run_dir)


def change_facts(folder: Path, **changed: Any) -> None:
    """Change facts in `run.json`, and write the card anew."""
    facts = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps(facts | changed))
    write_card(folder, MODEL_ID, "other")


def read_entries(path: Path) -> list[EvalResultEntry]:
    """Read a file as the client reads the answer of the Hub for a model."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The Hub parses each file and sends the entries with the name of their file.
    answer = [{"filename": path.name, "data": entry} for entry in content]
    entries = ModelInfo(id=MODEL_ID, evalResults=answer).eval_results
    assert entries == parse_eval_result_entries(content)
    return list(entries or [])


def test_the_file_has_the_scores_of_the_card(run_dir: Path, facts: RunResults, tmp_path: Path) -> None:
    assert write_eval_results(tmp_path, facts, MODEL_ID) == [EVAL_RESULTS] == [".eval_results/gi_tract.yaml"]
    entries = read_entries(tmp_path / EVAL_RESULTS)
    assert entries == list_entries(facts, MODEL_ID)
    of_the_card = ModelCard.load(run_dir / "README.md").data.eval_results
    # The front matter has the scores of the run's own preset. The entries have those of all presets.
    own = [entry for entry in entries if not entry.task_id.endswith(("mle_bench", "host"))]
    assert sorted(entry.value for entry in own) == sorted(result.metric_value for result in of_the_card)
    by_task = {entry.task_id: entry for entry in entries}
    assert len(by_task) == len(entries) and by_task.keys() <= set(list_tasks(GI_TRACT))
    for task, score in (
        ("dice", "eval_dice"),
        ("dice_volume_stomach", "eval_dice_volume_stomach"),
        ("competition_score_first_place", "eval_competition_score"),
        ("flips_dice", "eval_flips_dice"),
        ("macro_f1_seed", "eval_macro_f1_seed"),
    ):
        assert by_task[task].value == round(facts.scores[score] or 0, 4)
    for entry in entries:
        assert (entry.dataset_id, entry.dataset_revision, entry.date) == (DATASET_ID, None, facts.date)
        assert (entry.source_url, entry.source_name) == (f"{constants.ENDPOINT}/{MODEL_ID}", "Model card")
        assert entry.notes and entry.notes.endswith(f"split hash {facts.split_hash[:12]}")


def test_each_preset_has_tasks_of_its_own_for_the_scores_that_depend_on_it(facts: RunResults) -> None:
    names = [f"{name}_{preset}" for name in ("hausdorff_score", "competition_score") for preset in PRESETS]
    by_task = {entry.task_id: entry.value for entry in list_entries(facts, MODEL_ID)}
    assert {task for task in by_task if task.endswith(tuple(PRESETS))} == set(names)
    assert [by_task[name] for name in names] == [round(facts.scores[f"eval_{name}"] or 0, 4) for name in names]
    assert facts.scores["eval_competition_score"] == facts.scores["eval_competition_score_first_place"]
    assert by_task["competition_score_first_place"] > by_task["competition_score_mle_bench"]
    # A run of an earlier version has the scores of its own preset only.
    earlier = {key: score for key, score in facts.scores.items() if not key.endswith(tuple(PRESETS))}
    tasks = {entry.task_id for entry in list_entries(replace(facts, scores=earlier), MODEL_ID)}
    assert by_task.keys() - tasks == {name for name in names if not name.endswith("first_place")}


def test_the_tasks_cover_every_score_of_the_card(facts: RunResults) -> None:
    assert set(list_scores(GI_TRACT)) == set(score_titles(facts))
    further = len(OF_THE_PRESET) * (len(PRESETS) - 1)
    assert len(list_tasks(GI_TRACT)) == len(set(list_tasks(GI_TRACT))) == len(list_scores(GI_TRACT)) + further


def test_the_notes_say_which_patients_were_scored(facts: RunResults) -> None:
    counts = facts.splits["validation"]
    assert (counts["patients"], counts["slices"]) == (2, 24)
    fold = replace(facts, fold="1")
    pooled = replace(facts, folds=[{"fold": "0"}, {"fold": "1"}], intervals=dict.fromkeys(facts.intervals))
    for run, beginning in (
        (facts, "validation split as built, 2 patients, 24 slices, 95 % interval "),
        (fold, "fold 1 held back, 2 patients, 24 slices, 95 % interval "),
        (pooled, "cross-validation of 2 folds, each patient scored by a model that never saw this patient, "
                 "2 patients, 24 slices, split hash "),
    ):  # fmt: skip
        notes = list_entries(run, MODEL_ID)[0].notes
        assert notes and notes.startswith(beginning)
    by_task = {entry.task_id: entry.notes or "" for entry in list_entries(facts, MODEL_ID)}
    assert "averaged over four flips" in by_task["flips_dice"]
    assert "at 64×64 pixels" in by_task["macro_f1_seed"]


@pytest.mark.parametrize(("revision", "stated"), [(COMMIT, COMMIT), ("main", None), ("fold-0-of-5-01234567", None)])
def test_only_a_commit_is_stated_as_the_revision_of_the_dataset(
    facts: RunResults, revision: str, stated: str | None
) -> None:
    entries = list_entries(replace(facts, arguments={"dataset_revision": revision}), MODEL_ID)
    assert {entry.dataset_revision for entry in entries} == {stated}


def test_a_score_without_a_number_has_no_entry(facts: RunResults) -> None:
    fewer = replace(facts, scores=facts.scores | {"eval_dice_stomach": None})
    missing = {one.task_id for one in list_entries(facts, MODEL_ID)} - {
        one.task_id for one in list_entries(fewer, MODEL_ID)
    }
    assert missing == {"dice_stomach"}


@pytest.mark.parametrize(
    "changed", [{"dataset": "gi_tract"}, {"scores": {}, "intervals": {}, "fold": "all"}], ids=["local", "all"]
)
def test_without_a_dataset_of_the_hub_or_without_scores_an_old_file_is_removed(
    facts: RunResults, changed: dict[str, Any], tmp_path: Path
) -> None:
    nothing = replace(facts, **changed)
    assert write_eval_results(tmp_path, nothing, MODEL_ID) == []
    assert list(tmp_path.iterdir()) == []
    write_eval_results(tmp_path, facts, MODEL_ID)
    assert write_eval_results(tmp_path, nothing, MODEL_ID) == []
    assert not (tmp_path / EVAL_RESULTS).exists()


def test_a_published_model_has_its_entries_until_they_are_stale(
    run_dir: Path, facts: RunResults, tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    def publish(*words: str) -> None:
        done = run_python(["-c", PUBLISH, str(run_dir), *words], cwd=tmp_path, env=hub.environment())
        assert done.returncode == 0, done.stderr

    api = HfApi(endpoint=hub.endpoint, token="any")
    publish()
    publish("fold-1")
    for branch, place in (("main", ""), ("fold-1", "/tree/fold-1")):
        entries = read_entries(Path(api.hf_hub_download(MODEL_ID, EVAL_RESULTS, revision=branch, local_dir=tmp_path)))
        assert len(entries) == len(list_tasks(GI_TRACT))
        assert {entry.source_url for entry in entries} == {f"{hub.endpoint}/{MODEL_ID}{place}"}
    # The card with its `model-index` is read as before.
    info = api.model_info(MODEL_ID)
    assert EVAL_RESULTS in {file.rfilename for file in info.siblings or []}
    card = ModelCard.load(api.hf_hub_download(MODEL_ID, "README.md", local_dir=tmp_path))
    assert len(card.data.eval_results) == len(list_scores(GI_TRACT)) and card.data.datasets == DATASET_ID
    assert info.card_data and len(info.card_data.eval_results or []) == len(list_scores(GI_TRACT))

    change_facts(run_dir, dataset="gi_tract")
    publish()
    assert not {name for name in api.list_repo_files(MODEL_ID) if name.startswith(constants.EVAL_RESULTS_FOLDER)}
    assert EVAL_RESULTS in api.list_repo_files(MODEL_ID, revision="fold-1")
    change_facts(run_dir, dataset=DATASET_ID)
