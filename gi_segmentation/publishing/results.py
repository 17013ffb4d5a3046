"""The results of a run: best weights, scores, pictures and card in its output folder, and their publication."""

import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from datasets import Dataset

from gi_segmentation.arguments import RunArguments, shown_folder
from gi_segmentation.errors import InputError, one_line, saying_how_to_go_on
from gi_segmentation.files import copy_file, to_json, write_text
from gi_segmentation.labels import LabelSet
from gi_segmentation.publishing.eval_results import FLIP_SCORE, SEED_SCORE, write_eval_results
from gi_segmentation.publishing.facts import RUN_FILE, RunFacts, RunResults, read_results, settle_facts, write_facts
from gi_segmentation.publishing.figures import (
    add_shown_slices,
    compare_fullest_slice,
    draw_cases,
    draw_learning_curve,
    draw_overlay,
)
from gi_segmentation.publishing.hub import Publication, is_repository_private, publish_folder
from gi_segmentation.publishing.model_card import (
    CARD,
    CASES,
    CURVE,
    OOF_SCORES,
    OVERLAY,
    SCAN_SCORES,
    SLICE_PICTURES,
    card_to_publish,
    find_own_card,
    make_card,
    score_names,
    score_titles,
    write_card,
    write_own_card,
)
from gi_segmentation.publishing.options import PublicationOptions
from gi_segmentation.publishing.repository import RefusedError
from gi_segmentation.rules import PRESETS, READ_BY_RULES, Preset
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.records import write_scan_scores
from gi_segmentation.scoring.scans import ScanScore
from gi_segmentation.scoring.tables import describe_clinical, format_interval, format_presets, tabulate_scans
from gi_segmentation.training.trainer import Evaluation, SegmentationTrainer

# The files that `from_pretrained` needs.
WEIGHTS = ("model.safetensors", "config.json", "preprocessor_config.json")
# The scores of each scan as they were measured, from which they can be pooled again.
SCANS = "scans.json"
# A number of a patient or a day with so many digits may tell who it is.
TELLING_DIGITS = 5
# Why pictures do not go into a public repository.
PICTURES_SHOWN = (
    "the pictures of the model show slices of patients; run the same command again, which leaves them out, or make "
    "the repository private"
)


def pick_cases(scans: Sequence[ScanScore]) -> dict[str, dict[str, Any]]:
    """Choose the best, the median and the worst scan by mean Dice.

    Args:
        scans: The scores of all scans.

    Returns:
        The keys are `best`, `median` and `worst`; with two scans `best` and `worst`; with one scan `only`. Each value
        has the name of the `scan` and its mean `dice`.
    """
    # A scan whose Dice is NaN has no organ in either mask, so it is neither good nor bad. Scans with equal Dice are
    # sorted by their key, so that the choice does not depend on the order of the processes.
    ranked = sorted((scan for scan in scans if not math.isnan(scan.dice)), key=lambda scan: (-scan.dice, scan.key))
    last = len(ranked) - 1
    places = {"best": 0, "median": last // 2, "worst": last}
    if last < 2:
        places = {"best": 0, "worst": 1} if last else {"only": 0}
    return {name: {"scan": ranked[place].name, "dice": ranked[place].dice} for name, place in places.items()}


def describe_scores(evaluation: Evaluation, preset: Preset, labels: LabelSet) -> dict[str, Any]:
    """Return what `RunResults` needs of an evaluation: `scores`, `intervals`, `clinical` and `cases`.

    Args:
        evaluation: From `training.trainer.train`.
        preset: How to read the competition's metric.
        labels: The organs.
    """
    if not evaluation.scans:
        return {"scores": {}, "intervals": {}, "clinical": {}, "cases": {}}
    rules = PRESETS[preset]
    keys = [*score_names(labels), SEED_SCORE, *([FLIP_SCORE] if "eval_flips" in evaluation.scans else [])]
    keys += [f"eval_{name}_{one}" for one in PRESETS for name in READ_BY_RULES]
    # Intervals have the names of their scores, such as `eval_dice` and `eval_flips_dice`.
    intervals = {
        f"{prefix}_{name}": interval
        for prefix, scans in evaluation.scans.items()
        for name, interval in find_intervals(scans, rules).items()
    }
    return {
        "scores": to_json({key: evaluation.scores[key] for key in (*keys, "eval_loss")}),
        "intervals": {key: intervals[key] for key in keys},
        "clinical": describe_clinical(evaluation.scans["eval"]),
        "cases": pick_cases(evaluation.scans["eval"]),
    }


def find_date(output_dir: Path, steps: int) -> str:
    """Return the day on which a run ended: an earlier one if the run was finished and is only scored again."""
    try:
        earlier = read_results(output_dir)
    except (OSError, ValueError):  # the run was not finished
        return datetime.now(UTC).date().isoformat()
    return earlier.date if earlier.steps == steps else datetime.now(UTC).date().isoformat()


def write_results(
    trainer: SegmentationTrainer, validation: Dataset, facts: RunFacts, evaluation: Evaluation
) -> RunResults:
    """Write the weights, scores, pictures and card of the best checkpoint into the output folder.

    Only the main process calls this function.

    Args:
        trainer: The trainer after `training.trainer.train`. Its model holds the best weights.
        validation: The validation split, with its transform.
        facts: From `facts.describe_run`.
        evaluation: The scores of the best checkpoint.

    Returns:
        The facts of the finished run.
    """
    output_dir = Path(trainer.args.output_dir)
    # Until the end of this function, the folder counts as that of an unfinished run: its facts have no results, and it
    # has no card. So if this process is killed, these files are not mistaken for a finished run.
    facts, scored_by = settle_facts(facts, trainer.state.global_step)
    date = find_date(output_dir, trainer.state.global_step)
    write_facts(output_dir, facts)
    (output_dir / CARD).unlink(missing_ok=True)
    best_step = int(trainer.state.best_global_step or 0)
    best = Path(trainer.state.best_model_checkpoint or "")
    # Copies of the checkpoint's own files. So the published weights are, byte for byte, those that were scored.
    for name in WEIGHTS:
        copy_file(best / name, output_dir / name)
    trainer.save_state()
    results = RunResults(
        **asdict(facts),
        date=date,
        scored_by=scored_by,
        best_step=best_step,
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0), 2),
        **describe_scores(evaluation, facts.competition_preset, facts.label_set),
    )
    if evaluation.scans:
        trainer.save_metrics("eval", {**evaluation.scores, "competition_preset": trainer.args.preset})
        scans = evaluation.scans["eval"]
        write_scan_scores(evaluation.scans, output_dir / SCANS)
        write_text(
            output_dir / SCAN_SCORES, tabulate_scans(scans, PRESETS[facts.competition_preset]).to_csv(index=False)
        )
        draw_overlay(trainer.model, validation, output_dir / OVERLAY)
        names = [case["scan"] for case in results.cases.values()]
        shown = {scan: compare_fullest_slice(trainer.model, validation, scan) for scan in names}
        draw_cases(results.cases, shown, facts.label_set, output_dir / CASES)
        results = replace(results, cases=add_shown_slices(results.cases, shown))
    draw_learning_curve(trainer.state.log_history, facts.label_set, best_step, output_dir / CURVE)
    # The card comes last. `write_card` reads `run.json`.
    write_facts(output_dir, results)
    # If the run is not published, the code on the card loads the model from the output folder.
    published = trainer.args.push_to_hub
    name = str(trainer.args.hub_model_id) if published else shown_folder(output_dir)
    write_card(output_dir, name, trainer.args.license, published=published)
    return results


def published_files(facts: RunResults) -> tuple[str, ...]:
    """Return the names of the files that every such run publishes."""
    always = (*WEIGHTS, CARD, RUN_FILE, CURVE)
    if facts.folds:
        return (*always, OOF_SCORES, CASES)
    return (*always, SCAN_SCORES, OVERLAY, CASES) if facts.scores else always


def publish_results(
    output_dir: Path,
    facts: RunResults,
    repo_id: str,
    options: PublicationOptions,
    render: Callable[[bool], str],
    branch: str | None = None,
) -> Publication:
    """Publish the results in an output folder, without pictures of patients if the repository is public.

    Args:
        output_dir: The folder, after `write_results`.
        facts: The facts of its run.
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        options: What the user wants of the publication.
        render: Returns the card. It gets whether pictures of slices come with it.
        branch: Branch of the repository; None: the main branch.

    Returns:
        Where they were published.

    Raises:
        InputError: As `hub.publish_folder` and `render`.
    """
    hidden = facts.synthetic or is_repository_private(repo_id, options.private)
    harmless = facts.synthetic or options.pictures or not facts.scores
    pictures = harmless or hidden
    card = render(pictures)
    # `Trainer.push_to_hub` would replace our card by its own. `publish_folder` publishes all files of a folder. The
    # output folder also has the logs and the checkpoints, with the pickled state of the optimizer. So the results are
    # copied to a folder of their own.
    with tempfile.TemporaryDirectory() as scratch:
        # The entries name the repository and the branch as their source, and both are known only now.
        files = (*published_files(facts), *write_eval_results(output_dir, facts, repo_id, branch))
        left_out = () if pictures else tuple(name for name in files if name in SLICE_PICTURES)
        for name in set(files) - {*left_out, CARD}:
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(output_dir / name, Path(scratch) / name)
        (Path(scratch) / CARD).write_text(card, encoding="utf-8")
        if not hidden:
            check_no_telling_names(Path(scratch), repo_id)
        state = name_state(facts)
        # A tag and a branch must not have the same name.
        tag = f"{branch}-{state}" if branch else state
        publication = publish_folder(
            Path(scratch),
            repo_id,
            "model",
            tag=tag,
            message=f"Publish {state}",
            private=options.private,
            branch=branch,
            overwrite=options.overwrite,
            only_private=PICTURES_SHOWN if pictures and not harmless else None,
        )
    return replace(publication, left_out=left_out)


def check_no_telling_names(folder: Path, repo_id: str) -> None:
    """Check that no scan of a real patient has a number as of a hospital, or a date, before everybody can read it.

    Args:
        folder: The files to publish.
        repo_id: Name of the repository.

    Raises:
        RefusedError: If a file names such a scan.
    """
    texts = (path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix in (".md", ".csv", ".json"))
    names = {name for text in texts for name in re.findall(r"\bcase\d+_day\d+", text)}
    # The competition has patients up to 156, and days below 40.
    telling = sorted(name for name in names if re.search(rf"\d{{{TELLING_DIGITS},}}", name))
    if telling:
        raise RefusedError(
            f"publishing {repo_id} refused: the repository is public, and the files name scans like {telling[0]}, "
            f"whose numbers may be those of a hospital or a date; publish in a private repository, or give the "
            f"patients and days other numbers and train again"
        )


def name_state(facts: RunResults) -> str:
    """Return a short name of the results of a run, for a tag."""
    dice, step = facts.scores.get("eval_dice"), f"step-{facts.best_step}"
    if facts.folds:
        return f"{len(facts.folds)}-folds-dice-{dice or 0:.4f}"
    return f"all-patients-{step}" if dice is None else f"dice-{dice:.4f}-{step}"


def read_finished_run(output_dir: Path) -> RunResults:
    """Read the facts of a finished training, and check that its folder has all files to publish.

    Raises:
        InputError: If the folder is not that of a finished training.
    """
    train_again = "run the command of its training again, which goes on where it stopped"
    try:
        facts = read_results(output_dir)
    except (OSError, JSONDecodeError) as error:
        raise InputError(
            f"--output_dir {output_dir}: expected the folder of a finished training, but its {RUN_FILE} cannot be "
            f"read ({one_line(error)}); name the --output_dir of a training, or {train_again}"
        ) from error
    if facts.folds:
        raise InputError(
            f"--output_dir {output_dir}: this is a cross-validation, which is published with its folds; run `python "
            f"-m gi_segmentation.cross_validate` with --collect and --push_to_hub"
        )
    missing = [name for name in published_files(facts) if not (output_dir / name).is_file()]
    if missing:
        raise InputError(
            f"--output_dir {output_dir}: expected a finished training, but these files are missing: "
            f"{', '.join(missing)}; {train_again}"
        )
    return facts


def publish_run(output_dir: Path, repo_id: str, options: PublicationOptions) -> Publication:
    """Publish a finished training as it lies in its folder. Only the name of the model on the card may change.

    Args:
        output_dir: The folder, after `write_results`.
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        options: What the user wants of the publication.

    Raises:
        InputError: If the folder is not that of a finished training, or as `publish_results`. The message then has
            the command that publishes the run later.
    """
    facts = read_finished_run(output_dir)
    words = ["--output_dir", str(output_dir), "--hub_model_id", repo_id, *options.to_flags()]
    command = f"python -m gi_segmentation.publish {shlex.join(words)}"
    with saying_how_to_go_on(f"The run in {output_dir} is complete but not published. To publish it: {command}"):
        publication = publish_results(
            output_dir, facts, repo_id, options, partial(card_to_publish, output_dir, facts, repo_id)
        )
    # Here the pictures are beside the card.
    if find_own_card(output_dir, facts, repo_id) is None:
        write_own_card(output_dir, make_card(facts, repo_id, facts.arguments.get("license", "other")))
    return publication


def format_run_scores(facts: RunResults) -> list[str]:
    """Return the scores with their intervals, one line each, for the terminal."""
    lines = []
    for key, name in score_titles(facts).items():
        score, interval = facts.scores[key], format_interval(facts.intervals[key], ".3f")
        lines.append(f"  {'   none' if score is None else format(score, '7.4f')}  {name}{interval}")
    if table := format_presets(facts.scores, facts.intervals, facts.competition_preset, "eval_"):
        lines += ["the same predictions by every preset:", table]
    patients = facts.splits["validation"]["patients"]
    # One patient does not show how far the scores vary from patient to patient.
    lines.append(
        f"in brackets 95 % intervals over {patients} patients" if patients > 1 else "no intervals: one patient"
    )
    return lines


def summarize(run_args: RunArguments, facts: RunResults) -> str:
    """Return the summary of a run, a few lines for the terminal.

    Args:
        run_args: Arguments of the training.
        facts: From `write_results`.
    """
    output_dir = Path(run_args.output_dir)
    files = {"card": CARD, "curve": CURVE}
    if facts.scores:
        lines = [
            f"best checkpoint: step {facts.best_step} of {facts.steps}, scores on unseen patients:",
            *format_run_scores(facts),
        ]
        files |= {"overlay": OVERLAY, "cases": CASES, "scores of each scan": SCAN_SCORES}
    else:
        patients = facts.splits["train"]["patients"]
        lines = [
            f"last checkpoint: step {facts.best_step} of {facts.steps}. It was trained on all {patients} patients. "
            f"Nothing was held back, so nothing was scored."
        ]
    lines += [f"{label}: {output_dir / name}" for label, name in files.items()]
    return "\n".join(lines)
