"""The scores of all patients of a cross-validation: each patient once, by a model that never saw this patient."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pandas as pd

from gi_segmentation.cross_validation.runs import FoldRun
from gi_segmentation.errors import InputError
from gi_segmentation.publishing.facts import RunResults
from gi_segmentation.publishing.model_card import FOLD_SCORES
from gi_segmentation.publishing.results import describe_scores
from gi_segmentation.rules import PRESETS
from gi_segmentation.schema import hash_splits
from gi_segmentation.scoring.intervals import Gains, compare_scans
from gi_segmentation.scoring.scans import ScanScore, score_scans
from gi_segmentation.scoring.tables import tabulate_scans
from gi_segmentation.training.trainer import Evaluation

# The facts that all folds must share. Otherwise their scores are not those of one recipe on one dataset.
SHARED_FACTS = (
    "dataset_fingerprint", "competition_preset", "architecture", "model_type", "base_model", "num_parameters",
    "image_size", "label_mode", "slice_context", "slice_sampling", "augmentation", "ema_decay", "learning_rate",
    "head_lr_multiplier", "weight_decay", "optimizer", "lr_scheduler", "train_batch_size",
)  # fmt: skip
NUM_WORST = 5
# The scores by which two cross-validations are compared.
COMPARED = ("dice", "dice_volume", "hausdorff_score", "competition_score")


def check_shared_facts(runs: Sequence[FoldRun]) -> None:
    """Check that trainings belong together.

    Raises:
        InputError: If one differs from the first in a fact that all must share.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in SHARED_FACTS:
            ours, theirs = getattr(run.facts, name), getattr(first.facts, name)
            if ours != theirs:
                raise InputError(
                    f"{run.folder} has {name} {ours}, but {first.folder} has {theirs}; pool only folds of one recipe, "
                    f"one dataset and one preset"
                )


def check_patients(runs: Sequence[FoldRun]) -> None:
    """Check that each patient was held back once.

    Raises:
        InputError: If a patient was held back by two folds.
    """
    folds: dict[str, str] = {}
    for run in runs:
        for patient in sorted({str(scan.patient) for scan in run.scans["eval"]}):
            if patient in folds:
                raise InputError(
                    f"patient {patient} was held back by fold {folds[patient]} and by fold {run.fold}; the folds come "
                    f"from different divisions of the patients, so train them anew on one dataset"
                )
            folds[patient] = run.fold


def pool_scans(runs: Sequence[FoldRun]) -> dict[str, list[ScanScore]]:
    """Return the scans of all folds by the way they were predicted, as far as every fold has this way."""
    ways = [way for way in runs[0].scans if all(way in run.scans for run in runs)]
    return {way: [scan for run in runs for scan in run.scans[way]] for way in ways}


def add_counts(runs: Sequence[FoldRun], name: str) -> dict[str, int]:
    """Return the sum of counts over the validation splits of all folds, for `splits`, `sizes` or `drawn`."""
    total: Counter[str] = Counter()
    for run in runs:
        total.update(getattr(run.facts, name)["validation"])
    return dict(total)


def choose_published(runs: Sequence[FoldRun], everyone: FoldRun | None) -> FoldRun:
    """Choose the training whose weights are published as the main ones.

    It is the one that was trained on all patients, if it exists: it has seen most. Otherwise it is the fold with the
    highest Dice. Its own patients may be the easiest ones, so this does not show that it is the best model.
    """
    return everyone or max(runs, key=lambda run: run.facts.scores["eval_dice"] or 0)


def pool_folds(runs: Sequence[FoldRun], published: FoldRun) -> RunResults:
    """Return the facts of a cross-validation: those of the published training, with the scores of all patients.

    Args:
        runs: The training of each fold, in the order of the folds.
        published: From `choose_published`.

    Raises:
        InputError: If the trainings do not belong together, or a patient was held back twice.
    """
    check_shared_facts([*runs, published])
    check_patients(runs)
    rules, scans = PRESETS[runs[0].facts.competition_preset], pool_scans(runs)
    scores = {
        f"{way}_{name}": score for way, ones in scans.items() for name, score in score_scans(ones, rules).items()
    }
    # A loss has no meaning over several models.
    evaluation = Evaluation({**scores, "eval_loss": math.nan}, scans)
    scans_by_fold = {f"fold-{run.fold}": [str(scan.name) for scan in run.scans["eval"]] for run in runs}
    return replace(
        published.facts,
        date=datetime.now(UTC).date().isoformat(),
        split_hash=hash_splits(scans_by_fold),
        splits={"train": published.facts.splits["train"], "validation": add_counts(runs, "splits")},
        sizes={"train": published.facts.sizes["train"], "validation": add_counts(runs, "sizes")},
        drawn={**published.facts.drawn, "validation": add_counts(runs, "drawn")} if published.facts.own else {},
        folds=[describe_fold(run) for run in runs],
        published_fold=published.fold,
        worst_patients=find_worst_patients(runs),
        **describe_scores(evaluation, published.facts.competition_preset, published.facts.label_set),
    )


def describe_fold(run: FoldRun) -> dict[str, object]:
    """Return what the card says of a fold."""
    facts = run.facts
    return {
        "fold": run.fold,
        "patients": facts.splits["validation"]["patients"],
        "scans": facts.splits["validation"]["scans"],
        **{name: facts.scores[f"eval_{name}"] for name in FOLD_SCORES},
        "best_step": facts.best_step,
        "split_hash": facts.split_hash,
    }


def tabulate_folds(runs: Sequence[FoldRun]) -> pd.DataFrame:
    """Return the scores of all scans, a row per scan and organ, with the fold that held the patient back."""
    rules = PRESETS[runs[0].facts.competition_preset]
    tables = [tabulate_scans(run.scans["eval"], rules).assign(fold=int(run.fold)) for run in runs]
    table = pd.concat(tables, ignore_index=True)
    return table[["fold", *table.columns.drop("fold")]]


def find_worst_patients(runs: Sequence[FoldRun]) -> list[dict[str, object]]:
    """Return the patients with the lowest Dice, the lowest first: `patient`, `fold` and mean `dice` of each."""
    scans_of: dict[tuple[str, str], list[ScanScore]] = {}
    for run in runs:
        for scan in run.scans["eval"]:
            scans_of.setdefault((run.fold, str(scan.patient)), []).append(scan)
    patients = [(score_scans(scans)["dice"], fold, patient) for (fold, patient), scans in scans_of.items()]
    # A patient has no Dice if no organ was annotated or predicted.
    scored = sorted(item for item in patients if not math.isnan(item[0]))
    return [{"patient": patient, "fold": fold, "dice": dice} for dice, fold, patient in scored[:NUM_WORST]]


def compare_folds(runs: Sequence[FoldRun], baseline: Sequence[FoldRun]) -> Gains:
    """Compare two cross-validations over the same patients.

    Args:
        runs: The folds of one cross-validation.
        baseline: Those of the other one.

    Returns:
        The scores of `COMPARED`, see `compare_scans`.

    Raises:
        InputError: If they were scored on other patients or by another preset.
    """
    for name in ("dataset_fingerprint", "competition_preset"):
        ours, theirs = getattr(runs[0].facts, name), getattr(baseline[0].facts, name)
        if ours != theirs:
            raise InputError(f"--baseline: its {name} is {theirs}, here it is {ours}; compare on the same patients")
    scans, others = pool_scans(runs)["eval"], pool_scans(baseline)["eval"]
    if {scan.name for scan in scans} != {scan.name for scan in others}:
        raise InputError("--baseline: it scored other scans; compare two cross-validations of one dataset")
    return compare_scans(scans, others, PRESETS[runs[0].facts.competition_preset], COMPARED)
