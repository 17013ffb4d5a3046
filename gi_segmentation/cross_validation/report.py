"""What a cross-validation prints, writes and publishes."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from datasets import Dataset

from gi_segmentation.arguments import DataArguments, RunArguments, shown_folder
from gi_segmentation.cross_validation.pooling import choose_published, compare_folds, pool_folds, tabulate_folds
from gi_segmentation.cross_validation.postprocessing_search import LearntPostprocessing, learn_from_folds
from gi_segmentation.cross_validation.runs import CONFIG, FoldRun, fold_folder, read_everyone, read_model_config
from gi_segmentation.data.slices import attach_scoring_transform, load_slices
from gi_segmentation.errors import InputError, saying_how_to_go_on
from gi_segmentation.files import copy_file, write_json, write_text
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.publishing.facts import RunResults, fingerprint_dataset, read_results, write_facts
from gi_segmentation.publishing.figures import ShownSlice, add_shown_slices, compare_fullest_slice, draw_cases
from gi_segmentation.publishing.hub import Publication
from gi_segmentation.publishing.model_card import (
    CARD,
    CASES,
    CURVE,
    FOLD_SCORES,
    OOF_SCORES,
    describe_spread,
    make_card,
    write_card,
)
from gi_segmentation.publishing.options import PublicationOptions
from gi_segmentation.publishing.results import WEIGHTS, format_run_scores, publish_results
from gi_segmentation.rules import PRESETS
from gi_segmentation.schema import ALL_FOLDS
from gi_segmentation.scoring.tables import format_gains


def load_held_back(runs: Sequence[FoldRun], data_args: DataArguments) -> list[Dataset]:
    """Return, for each fold, the slices of the patients that it held back, without a transform.

    Raises:
        InputError: If the dataset is another one than that of the trainings.
    """
    splits = [load_slices(replace(data_args, fold=run.fold)) for run in runs]
    # The fingerprint is that of all slices, so it is the same for every fold. `pool_folds` has compared the trainings.
    if fingerprint_dataset(splits[0]) != runs[0].facts.dataset_fingerprint:
        raise InputError(
            f"--dataset_name {data_args.dataset_name}: the folds were trained on another dataset; give the same "
            f"recipe and flags as for the training"
        )
    return [split["validation"] for split in splits]


def learn_limits(
    runs: Sequence[FoldRun], held_back: Sequence[Dataset], run_args: RunArguments
) -> LearntPostprocessing:
    """Learn from the predictions of all folds which components of an organ to remove, and print what it gains."""
    folds = [(run.folder, dataset) for run, dataset in zip(runs, held_back, strict=True)]
    rules = PRESETS[runs[0].facts.competition_preset]
    learnt = learn_from_folds(folds, rules, str(run_args.device), run_args.eval_batch_size, 0)
    print(*learnt.describe(), sep="\n", flush=True)
    return learnt


def write_limits(folder: Path, limits: dict[str, dict[str, float]] | None) -> None:
    """Write limits for components into the configuration of a model, or remove those of an earlier call."""
    earlier = read_model_config(folder)
    config = {key: value for key, value in earlier.items() if key != "postprocessing"}
    if limits is not None:
        config["postprocessing"] = limits
    if config != earlier:
        # The form in which `transformers` writes the file.
        write_json(folder / CONFIG, config, sort_keys=True)


def show_held_back(run: FoldRun, dataset: Dataset, scans: Sequence[str]) -> dict[str, ShownSlice]:
    """Return one slice of each of these scans, predicted by the fold that held them back."""
    model, processor = load_checkpoint(str(run.folder))
    ready = attach_scoring_transform(dataset, processor, run.facts.label_mode, run.facts.slice_context)
    return {scan: compare_fullest_slice(model, ready, scan) for scan in scans}


def write_pooled(
    output_dir: Path,
    runs: Sequence[FoldRun],
    held_back: Sequence[Dataset],
    published: FoldRun,
    pooled: RunResults,
    learnt: LearntPostprocessing | None,
    license_name: str,
) -> None:
    """Write the pooled scores, a picture, the published weights and the card into the folder of the cross-validation.

    Args:
        output_dir: Folder of the cross-validation.
        runs: The training of each fold.
        held_back: From `load_held_back`, for the slices of the picture.
        published: The training whose weights are published.
        pooled: From `pooling.pool_folds`.
        learnt: From `learn_limits`. If they help, the configuration of every model gets the limits.
        license_name: Licence identifier of the Hub.
    """
    for name in (*WEIGHTS, CURVE):
        copy_file(published.folder / name, output_dir / name)
    for folder in (output_dir, *(run.folder for run in runs)):
        write_limits(folder, learnt.to_config() if learnt else None)
    write_text(output_dir / OOF_SCORES, tabulate_folds(runs).to_csv(index=False))
    shown: dict[str, ShownSlice] = {}
    names = {case["scan"] for case in pooled.cases.values()}
    for run, dataset in zip(runs, held_back, strict=True):
        # Each case is predicted by the model that never saw the patient.
        scans = [str(scan.name) for scan in run.scans["eval"] if scan.name in names]
        shown |= show_held_back(run, dataset, scans) if scans else {}
    draw_cases(pooled.cases, shown, pooled.label_set, output_dir / CASES)
    cases = add_shown_slices(pooled.cases, shown)
    write_facts(output_dir, replace(pooled, cases=cases, postprocessing=asdict(learnt) if learnt else None))
    write_card(output_dir, shown_folder(output_dir), license_name, published=False)


def pool_runs(
    output_dir: Path, runs: Sequence[FoldRun], data_args: DataArguments, run_args: RunArguments, postprocessing: bool
) -> RunResults:
    """Pool the scores of all folds, and write everything into the folder of the cross-validation.

    Args:
        output_dir: Folder of the cross-validation.
        runs: The training of each fold.
        data_args: Arguments of the data, the same for all folds.
        run_args: Arguments of the training.
        postprocessing: Whether to learn limits for components.

    Returns:
        The facts of the cross-validation.

    Raises:
        InputError: If the folds do not belong together, or were trained on another dataset.
    """
    published = choose_published(runs, read_everyone(output_dir))
    pooled = pool_folds(runs, published)
    held_back = load_held_back(runs, data_args)
    learnt = learn_limits(runs, held_back, run_args) if postprocessing else None
    write_pooled(output_dir, runs, held_back, published, pooled, learnt, run_args.license)
    return pooled


def say_why_published(pooled: RunResults) -> str:
    """Return why these weights are the published ones."""
    if pooled.published_fold == ALL_FOLDS:
        return "they were trained on all patients"
    return f"fold {pooled.published_fold} has the highest Dice, and there is no training on all patients (--fold all)"


def format_pooled(output_dir: Path, pooled: RunResults) -> str:
    """Return the summary of a cross-validation, for the terminal."""
    patients = pooled.splits["validation"]["patients"]
    lines = [f"{patients} patients, each scored once, by a model that never saw this patient in training:"]
    lines += format_run_scores(pooled)
    for fold in pooled.folds:
        scores = ", ".join(
            f"{title} {'none' if fold[name] is None else format(fold[name], '.4f')}"
            for name, title in FOLD_SCORES.items()
        )
        lines.append(f"fold {fold['fold']}: {scores} (patients: {fold['patients']})")
    lines += [f"between folds: {name} {spread}" for name, spread in describe_spread(pooled).items()]
    worst = ", ".join(f"{one['patient']} (fold {one['fold']}) {one['dice']:.3f}" for one in pooled.worst_patients)
    lines.append(f"patients with the lowest Dice: {worst}")
    source = fold_folder(output_dir, str(pooled.published_fold))
    lines.append(f"published weights: those of {source}, because {say_why_published(pooled)}")
    files = {"card": CARD, "scores of each scan": OOF_SCORES, "cases": CASES, "curve": CURVE}
    lines += [f"{label}: {output_dir / name}" for label, name in files.items()]
    return "\n".join(lines)


def format_compared_folds(runs: Sequence[FoldRun], baseline: Sequence[FoldRun]) -> str:
    """Return the comparison of two cross-validations, for the terminal."""
    lines = [f"compared with {baseline[0].folder.parent} over the same patients:"]
    return "\n".join(lines + format_gains(compare_folds(runs, baseline)))


def publish_folds(
    output_dir: Path, runs: Sequence[FoldRun], repo_id: str, run_args: RunArguments, options: PublicationOptions
) -> Publication:
    """Publish each fold on a branch `fold-K`, and then the pooled results on the main branch.

    The main branch comes last, so that its card never names a branch that does not exist yet.

    Args:
        output_dir: Folder of the cross-validation, after `write_pooled`.
        runs: The training of each fold.
        repo_id: Name of the repository, `NAMESPACE/NAME`.
        run_args: Arguments of the training. The licence is used.
        options: What the user wants of the publication.

    Returns:
        Where the main branch was published.

    Raises:
        InputError: As `hub.publish_folder`.
    """
    go_on = f"The cross-validation in {output_dir} is complete; the same command publishes it, and trains nothing anew"
    with saying_how_to_go_on(go_on):
        for run in runs:
            branch = run.folder.name
            card = partial(make_card, run.facts, repo_id, run_args.license, branch, True)
            publish_results(run.folder, run.facts, repo_id, options, card, branch)
            print(f"published: {repo_id}, branch {branch}", flush=True)
            write_card(run.folder, repo_id, run_args.license, branch)
        # With the slices of the picture, which only the file has.
        facts = read_results(output_dir)
        card = partial(make_card, facts, repo_id, run_args.license, None, True)
        publication = publish_results(output_dir, facts, repo_id, options, card)
        write_card(output_dir, repo_id, run_args.license)
        return publication
