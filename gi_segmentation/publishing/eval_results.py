"""The scores of a run in the form in which model pages and leaderboards of a Hub read them: `.eval_results/*.yaml`.

An entry has a number, a dataset and a task. The file `eval.yaml` of the dataset lists its tasks, and each task has a
leaderboard. Entries and `eval.yaml` both take the names of the tasks from here.

Source: https://huggingface.co/docs/hub/eval-results, and `eval_results.yaml` of huggingface/hub-docs. The client has a
class for the entries (`huggingface_hub.EvalResultEntry`). It calls the older `model-index` of the card legacy.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

from gi_segmentation.files import write_text
from gi_segmentation.labels import LabelSet
from gi_segmentation.models.masks import name_flips
from gi_segmentation.rules import PRESETS, Preset

if TYPE_CHECKING:
    # This module also serves `dataset_builder`, which needs no PyTorch. `facts` would load it.
    from gi_segmentation.publishing.facts import RunResults

# Where the Hub looks for the entries of a model. The name of the file is free.
EVAL_RESULTS = f"{constants.EVAL_RESULTS_FOLDER}/gi_tract.yaml"
# These scores depend on the preset, so each preset has a task of its own.
OF_THE_PRESET = ("eval_hausdorff_score", "eval_competition_score")
FLIP_SCORE = "eval_flips_dice"  # only runs with `--test_time_flips` have it
SEED_SCORE = "eval_macro_f1_seed"  # the score that the original project calls Dice


def list_scores(labels: LabelSet) -> tuple[str, ...]:
    """Return the names of the scores on the card, for these organs.

    `model_card` has their titles, but it loads PyTorch too. A test compares both lists. The loss in `run.json` is left
    out here: another loss function gives another number for the same masks.
    """
    organs = ("", *(f"_{organ}" for organ in labels.names))
    dice = (f"eval_{name}{organ}" for name in ("dice", "dice_volume") for organ in organs)
    return (*dice, *OF_THE_PRESET, FLIP_SCORE, SEED_SCORE)


def name_task(score: str, preset: Preset) -> str:
    """Return the id of the task to which a score belongs.

    Args:
        score: Name of the score in `run.json`.
        preset: How the run read the competition's metric.

    Example:
        >>> name_task("eval_dice_stomach", "mle_bench")
        'dice_stomach'
        >>> name_task("eval_competition_score", "first_place")
        'competition_score_first_place'
    """
    # A leaderboard ranks by the number alone. Two presets give the same masks different numbers, so their scores must
    # not be in one list.
    return score.removeprefix("eval_") + (f"_{preset}" if score in OF_THE_PRESET else "")


def list_tasks(labels: LabelSet) -> list[str]:
    """Return the ids of all tasks for these organs, with those of every preset."""
    # A score that does not depend on the preset has the same task for every preset. A dictionary keeps it once.
    return list(dict.fromkeys(name_task(score, preset) for score in list_scores(labels) for preset in PRESETS))


def describe_measurement(facts: "RunResults", score: str) -> str:
    """Return how a score was measured: on which patients, how precisely and in which way.

    Args:
        facts: The facts of the run.
        score: Name of the score in `run.json`.
    """
    # A task names a split, but `--fold` divides the patients anew, and a cross-validation scores all of them. The Hub
    # has no field for that. So the notes say it, and the hash tells whether two models had the same patients.
    counts = facts.splits["validation"]
    if facts.folds:
        where = (
            f"cross-validation of {len(facts.folds)} folds, each patient scored by a model that never saw this patient"
        )
    else:
        where = "validation split as built" if facts.fold is None else f"fold {facts.fold} held back"
    notes = [where, f"{counts['patients']} patients", f"{counts['slices']} slices"]
    if interval := facts.intervals[score]:
        notes.append(f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}")
    if score == FLIP_SCORE:
        notes.append(f"averaged over {name_flips(facts.label_set)} flips")
    elif score == SEED_SCORE:
        notes.append(f"at {facts.image_size}×{facts.image_size} pixels")
    return ", ".join([*notes, f"split hash {facts.split_hash[:12]}"])


def list_measured(facts: "RunResults") -> dict[str, str]:
    """Return the score of each task for which a run has one, by the id of the task.

    The scores of every preset follow from one prediction, so a run takes part in the tasks of all presets.
    """
    own = {
        name_task(score, facts.competition_preset): score
        for score in list_scores(facts.label_set)
        if score in facts.scores
    }
    others = {
        name_task(score, preset): f"{score}_{preset}"
        for score in OF_THE_PRESET
        for preset in PRESETS
        # Earlier versions have the scores of the run's own preset only.
        if f"{score}_{preset}" in facts.scores
    }
    return others | own


def list_entries(facts: "RunResults", repo_id: str, branch: str | None = None) -> list[EvalResultEntry]:
    """Return an entry for each task for which a run has a score.

    Args:
        facts: The facts of the run.
        repo_id: Name of the model's repository, `NAMESPACE/NAME`.
        branch: Its branch; None: the main branch.

    Returns:
        The entries in the order of the tasks. There are none if the run has no scores, as with `--fold all`, or if
        its dataset is a local folder.
    """
    # The id of a dataset is required, and it must be one of the Hub. Only such a name has a slash: `facts` keeps just
    # the last part of a local path.
    if "/" not in facts.dataset:
        return []
    # The format asks for a commit. A branch or a tag may move, so another dataset could be there tomorrow.
    revision = str(facts.arguments.get("dataset_revision", ""))
    measured = list_measured(facts)
    return [
        EvalResultEntry(
            dataset_id=facts.dataset,
            task_id=task,
            # As many digits as in the card, so that both show the same number.
            value=round(value, 4),
            dataset_revision=revision if re.fullmatch("[0-9a-f]{40}", revision) else None,
            date=facts.date,
            # The entry leads to the card and to `run.json`. It is not known here whether the namespace is a user or an
            # organisation, so neither is named.
            source_url=f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{branch}" if branch else ""),
            source_name="Model card",
            notes=describe_measurement(facts, score),
        )
        for task in list_tasks(facts.label_set)
        # An entry must have a number, but a score may have had nothing to measure.
        if (score := measured.get(task)) is not None and (value := facts.scores[score]) is not None
    ]


def write_eval_results(output_dir: Path, facts: "RunResults", repo_id: str, branch: str | None = None) -> list[str]:
    """Write the entries of a run into its output folder. If there are none, remove the file of an earlier call.

    Args:
        output_dir: The output folder.
        facts: The facts of the run.
        repo_id: Name of the model's repository, `NAMESPACE/NAME`.
        branch: Its branch; None: the main branch.

    Returns:
        The names of the files to publish, relative to the folder: `EVAL_RESULTS` or nothing.
    """
    path = output_dir / EVAL_RESULTS
    entries = list_entries(facts, repo_id, branch)
    if not entries:
        # An old file would go on claiming scores that this run does not have.
        path.unlink(missing_ok=True)
        return []
    path.parent.mkdir(exist_ok=True)
    # YAML reads a bare 2026-01-31 as a date, but the format wants a string. PyYAML writes it in quotes.
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=120)
    write_text(path, text)
    return [EVAL_RESULTS]
