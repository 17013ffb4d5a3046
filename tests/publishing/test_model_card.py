"""The model card: each number is in the run's files, no fact may be missing, scores say how they were measured."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image

import run_segmentation
from gi_segmentation.arguments import shown_folder
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.publishing import figures
from gi_segmentation.publishing.eval_results import list_scores
from gi_segmentation.publishing.facts import RUN_FILE, RunResults, read_results
from gi_segmentation.publishing.figures import fullest_slice
from gi_segmentation.publishing.model_card import list_model_index_results, make_card, score_titles, write_card
from gi_segmentation.publishing.population import name_dataset
from gi_segmentation.publishing.results import format_run_scores, pick_cases
from gi_segmentation.rules import PRESETS, READ_BY_RULES
from gi_segmentation.scoring.scans import ScanScore
from loopback_hub import check_card
from tests.support.models import save_model
from tests.support.processes import ROOT
from tests.support.training import arguments


@pytest.fixture(scope="module")
def run_dir(dataset_dir: Path, blank_pictures: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model that predicts some pixels of each organ, scored with the preset first_place."""
    folder = tmp_path_factory.mktemp("card")
    base = save_model(folder / "base", "segformer", seed=0)
    flags = {"model_type": None, "config_overrides": None, "model_name_or_path": base, "max_eval_samples": None}
    flags |= {"learning_rate": 1e-6, "max_steps": 1, "test_time_flips": True, "preset": "first_place"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", blank_pictures)
        run_segmentation.main(arguments(dataset_dir, folder / "run", **flags))
    return folder / "run"


@pytest.fixture(scope="module")
def facts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / RUN_FILE).read_text())


def leaves(facts: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each single fact: the keys that lead to it."""
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def without(facts: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return the facts without one of them."""
    fewer = copy.deepcopy(facts)
    place = fewer
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return fewer


def test_a_card_cannot_be_rendered_without_one_of_its_facts(facts: dict[str, Any], tmp_path: Path) -> None:
    needless = set()
    for path in leaves(facts):
        (tmp_path / RUN_FILE).write_text(json.dumps(without(facts, path)))
        try:
            write_card(tmp_path, "tester/model", "other").unlink()
        except (InputError, jinja2.UndefinedError, KeyError):
            assert not (tmp_path / "README.md").exists()
        else:
            needless.add(path)
    # The card can be rendered without these facts. Versions and sizes are lists, of which it shows what is there.
    counted = {path for path in leaves(facts) if path[0] == "versions" or "sizes" in path}
    # Of the arguments, those that matter are facts of their own.
    told = {path for path in leaves(facts) if path[0] == "arguments"}
    # A fact with a default is one that older versions did not write.
    late = {one.name for one in fields(RunResults) if not (one.default is one.default_factory is MISSING)}
    told |= {path for path in leaves(facts) if path[0] in late}
    # The score with flips exists only if the user asked for it.
    flips = {("scores", "eval_flips_dice")}
    # Older versions did not measure all presets. If one of these scores is missing, the card has no table of them.
    presets = {("scores", f"eval_{name}_{preset}") for preset in PRESETS for name in READ_BY_RULES}
    assert needless == counted | told | flips | presets | {("scores", "eval_loss")}
    assert len(list(leaves(facts))) > 200


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])-?\d+\.\d+|(?<=, )\d{1,3}(?:,\d{3})+", text)


def test_every_number_in_the_section_on_evaluation_is_in_the_facts(run_dir: Path, facts: dict[str, Any]) -> None:
    text = (run_dir / "README.md").read_text()
    section = text[text.index("## 4. Evaluation") : text.index("**How it fails.**")]
    known = {f"{value:.{digits}f}" for value in values_of(facts) for digits in (1, 2, 3, 4)}
    # The two weights are from the competition's definition.
    known |= {"0.4", "0.6"}
    # The gain of the flips is the only number that is computed for the card, as a difference of two facts.
    found = [number for number in numbers(section) if number not in known]
    gain = facts["scores"]["eval_flips_dice"] - facts["scores"]["eval_dice"]
    assert found == [f"{abs(gain):.4f}" if gain > 0 else f"{gain:.4f}"]
    assert len(numbers(section)) > 100


def values_of(facts: Any) -> Iterator[float]:
    """Yield every number among the facts."""
    if isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            yield from values_of(value)
    elif isinstance(facts, int | float):
        yield facts


def test_the_scores_of_the_run_follow_from_the_scores_of_the_scans(run_dir: Path, facts: dict[str, Any]) -> None:
    rows, scores = pd.read_csv(run_dir / "scan_scores.csv"), facts["scores"]
    assert len(rows) == 2 * len(GI_TRACT.names)
    known = rows[rows["dice_slices"] > 0]
    assert np.average(known["dice"], weights=known["dice_slices"]) == pytest.approx(scores["eval_dice"])
    for organ, its in known.groupby("organ"):
        assert np.average(its["dice"], weights=its["dice_slices"]) == pytest.approx(scores[f"eval_dice_{organ}"])
    assert rows["volume_dice"].mean() == pytest.approx(scores["eval_dice_volume"])
    assert 1 - rows["hausdorff"].mean() == pytest.approx(scores["eval_hausdorff_score"])
    # With the preset first_place, a pair of slice and organ that is empty on both sides counts as a Dice of 1.
    perfect = (known["dice"] * known["dice_slices"]).sum() + (rows["slices"] - rows["dice_slices"]).sum()
    competition = 0.4 * perfect / rows["slices"].sum() + 0.6 * scores["eval_hausdorff_score"]
    assert competition == pytest.approx(scores["eval_competition_score"])
    for name, by_organ in facts["clinical"]["scores"].items():
        for organ, one in by_organ.items():
            its = rows.loc[(rows["organ"] == organ) & rows["volume_dice"].notna(), name].dropna()
            if one["mean"] is not None:
                assert (one["mean"], one["patients"]) == (pytest.approx(its.mean()), len(its))
    means = rows.assign(sum=rows["dice"].fillna(0) * rows["dice_slices"]).groupby("scan")[["sum", "dice_slices"]].sum()
    for case in facts["cases"].values():
        assert case["dice"] == pytest.approx(means["sum"][case["scan"]] / means["dice_slices"][case["scan"]])
    assert facts["cases"]["best"]["dice"] > facts["cases"]["worst"]["dice"]


def test_each_score_in_the_model_index_says_how_it_was_measured(run_dir: Path, facts: dict[str, Any]) -> None:
    results = ModelCard.load(run_dir / "README.md").data.eval_results
    names = score_titles(read_results(run_dir))
    assert {result.metric_name for result in results} == set(names.values())
    for key, name in names.items():
        (result,) = [result for result in results if result.metric_name == name]
        assert result.metric_value == round(facts["scores"][key], 4)
        low, high = result.metric_args["interval_95"]
        assert low <= result.metric_value <= high and result.metric_args["patients"] == 2
        assert result.dataset_args["split_hash"] == facts["split_hash"]
        if key in ("eval_hausdorff_score", "eval_competition_score"):
            assert "preset first_place" in name
            assert result.metric_args["preset"] == "first_place"
            assert result.metric_args.items() >= asdict(PRESETS["first_place"]).items()
        elif key != "eval_macro_f1_seed":
            assert result.metric_args["both_empty"] == "skipped"


def test_the_card_and_the_summary_have_the_scores_of_every_preset(run_dir: Path, facts: dict[str, Any]) -> None:
    results = read_results(run_dir)
    card, summary = (run_dir / "README.md").read_text(), "\n".join(format_run_scores(results))
    for preset in PRESETS:
        scores = [facts["scores"][f"eval_{name}_{preset}"] for name in READ_BY_RULES]
        marked = "**first_place**" if preset == "first_place" else preset
        row = rf"\| {re.escape(marked)} \| " + r"[^|]* \| ".join(f"{score:.4f}" for score in scores)
        assert re.search(row, card) and re.search(row, summary)
    assert facts["scores"]["eval_competition_score"] == facts["scores"]["eval_competition_score_first_place"]
    # The facts of an earlier version have the scores of one preset only, and their card has no such table.
    earlier = {key: score for key, score in results.scores.items() if not key.endswith(tuple(PRESETS))}
    assert "| host |" not in make_card(replace(results, scores=earlier), "tester/model", "other")


def test_the_card_has_the_sections_of_aid_rt(run_dir: Path) -> None:
    text = (run_dir / "README.md").read_text()
    sections = re.findall(r"^## (\d)\. (.*)$", text, re.M)
    assert sections == [
        ("0", "This card"),
        ("1", "Basic information"),
        ("2", "Technical specification"),
        ("3", "Training"),
        ("4", "Evaluation"),
        ("5", "Other considerations"),
    ]
    for told in (
        "Intended use.",
        "Not intended.",
        "Population and acquisition.",
        "How it fails.",
        "Risks.",
        "Monitor",
    ):
        assert f"**{told}" in text
    for name in ("cases.png", "overlay.png", "learning_curve.png"):
        assert f"]({name})" in text
        with Image.open(run_dir / name) as picture:
            assert np.array(picture.convert("L")).std() > 10


KAGGLE_WORDS = ("rules of the UW-Madison GI Tract competition", "0.35 T", "published without names", "competitions on")
SYNTHETIC_WORDS = ("synthetic", "has never seen a patient", "exact outlines above", "Nobody was scanned")


@pytest.mark.parametrize(
    ("title", "synthetic", "kaggle"),
    [
        (None, False, True),
        (None, True, False),
        ("Trial of our clinic", False, False),
        ("Trial of our clinic", True, False),
        ("UW-Madison GI Tract", True, False),
    ],
)
def test_the_card_follows_what_the_data_is(run_dir: Path, title: str | None, synthetic: bool, kaggle: bool) -> None:
    named = name_dataset(title, synthetic)
    facts = replace(read_results(run_dir), dataset_title=named, synthetic=synthetic, base_model=None)
    card = make_card(facts, "me/model", "other")
    assert f"Training data: {named}." in card and (title or "") in named
    assert [word in card for word in KAGGLE_WORDS] == [kaggle] * len(KAGGLE_WORDS)
    assert [word in card for word in SYNTHETIC_WORDS] == [synthetic] * len(SYNTHETIC_WORDS)
    assert ("by hand" in card) is not synthetic
    assert ("license_name: non-commercial-competition-data" in card) is kaggle
    assert "training_ranges" in card and "does not notice" not in card
    # Nobody knows what other weights were trained on.
    tuned = make_card(replace(facts, base_model="a/b"), "me/model", "other")
    assert "has never seen a patient" not in tuned and "Nobody checked whether `a/b`" in tuned
    assert ("does not know what `a/b` was trained on" in tuned) is synthetic
    assert ("Those of `a/b` may still apply" in tuned) is synthetic and "a/b" not in card


@pytest.mark.parametrize("synthetic", [True, False])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_the_card_of_own_data_has_its_labels_and_nothing_of_kaggle(
    run_dir: Path, number: int, synthetic: bool
) -> None:
    labels = LabelSet(("stomach", "Liver (whole)", *(f"organ_{index}" for index in range(12)))[:number])
    organs = labels.names
    scores: dict[str, float | None] = dict.fromkeys([*list_scores(labels), "eval_loss"], 0.5)
    scores[f"eval_dice_{organs[-1]}"] = None
    drawn = dict(zip(organs, [2] * (number - 1) + [1], strict=True))
    facts = replace(
        read_results(run_dir), own=True, dataset="my_clinic", dataset_title="My clinic", synthetic=synthetic,
        organs=list(organs), scores=scores, intervals=dict.fromkeys(scores), clinical={"scans": 0},
        drawn={"train": drawn, "validation": drawn},
        base_model="lab/gi", kept_labels=["background", "stomach"],
    )  # fmt: skip
    card = make_card(facts, "me/model", "other")
    told = re.sub("(?i)competition[ _]score", "", card)
    assert not re.search(
        "kaggle|madison|competition|MR-Linac|gi_tract|0.35 T|Observers who|bowel", told, re.IGNORECASE
    )
    assert check_card(card, "model") == ([], [])
    assert f"| {number} | {organs[-1]} | 1 of 2 | 1 of 2 |" in card
    assert f"Macro F1 over {'four' if number == 3 else number + 1} labels" in card
    new = f", and from random values for {', '.join(organs[1:])}" if organs[1:] else ""
    assert f"starts from its values for background, stomach{new}.\n" in card
    # Many organs have a table of their own.
    form = f"| {organs[-1]} | nothing to score | – | 0.5000 | – |" if number > 5 else "| nothing to score | – |"
    assert form in card and max(line.count("|") for line in card.splitlines()) <= 8
    assert "Nobody has drawn" not in card
    # The number of patients is that of the organ.
    entries = {entry.metric_name: entry.metric_args for entry in list_model_index_results(facts)}
    assert [entries[f"Dice over whole scans, {organ.replace('_', ' ')}"]["patients"] for organ in organs] == [
        *drawn.values()
    ]
    assert entries["Dice over whole scans, mean over scans and organs"]["patients"] == 2
    assert f"outlines {'12 organs' if number == 12 else 'stomach'}" in card


def test_a_card_names_organs_that_no_training_scan_has_drawn(run_dir: Path) -> None:
    facts = read_results(run_dir)
    nobody = dict.fromkeys(facts.organs, 0)
    facts = replace(facts, own=True, drawn={"train": nobody, "validation": nobody}, kept_labels=["stomach"])
    assert "**Nobody has drawn large_bowel, small_bowel in any scan of the training.**" in make_card(
        facts, "a/b", "other"
    )


def test_a_demo_and_a_recipe_do_not_say_what_the_data_is() -> None:
    texts = [path.read_text() for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "reference_runs").iterdir()]]
    assert not any("dataset_title" in text for text in texts)


def test_the_number_of_a_case_is_that_of_the_slice_in_the_picture(
    run_dir: Path, facts: dict[str, Any], dataset_dir: Path
) -> None:
    validation = load_dataset(str(dataset_dir), split="validation")
    card = (run_dir / "README.md").read_text()
    for name, case in facts["cases"].items():
        assert case["slice"] == validation[fullest_slice(validation, case["scan"])]["slice"]
        numbers = f"{case['dice']:.4f} | {case['slice']} | {case['slice_dice']:.4f}"
        assert f"| {name} | `{case['scan']}` | {numbers} |" in card


def test_a_run_that_is_not_published_names_its_folder(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (run_dir / "README.md").read_text()
    assert "The model is not published." in card and 'from_pretrained("run")' in card
    monkeypatch.chdir(tmp_path)
    assert shown_folder(Path("runs/b0")) == shown_folder(tmp_path / "runs" / "b0") == "runs/b0"
    assert shown_folder(tmp_path.parent / "other" / "b0") == "b0"


def scan(name: str, dice: float) -> ScanScore:
    slices = (0 if math.isnan(dice) else 1, 0, 0)
    return ScanScore(name, name, GI_TRACT.names, 1, (dice, 0, 0), slices, (dice,) * 3, slices, slices, {})


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.2, 0.9, 0.5, math.nan], {"best": "b", "median": "c", "worst": "a"}),
        ([0.2, 0.9, 0.5, 0.7], {"best": "b", "median": "d", "worst": "a"}),
        ([0.2, 0.9], {"best": "b", "worst": "a"}),
        ([0.2], {"only": "a"}),
    ],
)
def test_the_best_the_median_and_the_worst_case_are_picked(dice: list[float], expected: dict[str, str]) -> None:
    cases = pick_cases([scan(name, value) for name, value in zip("abcd", dice, strict=False)])
    assert {name: case["scan"] for name, case in cases.items()} == expected


def test_a_case_is_shown_on_the_slice_with_the_largest_outlines(dataset_dir: Path) -> None:
    validation = load_dataset(str(dataset_dir), split="validation")
    name = validation.unique("scan")[-1]
    areas = [(np.array(row["annotation"]) > 0).sum() if row["scan"] == name else 0 for row in validation]
    # `fullest_slice` counts a pixel in two organs twice, and the areas here count it once.
    assert areas[fullest_slice(validation, name)] == pytest.approx(max(areas), rel=0.05)
