"""The model card. All its numbers come from the `run.json` of a finished run."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gi_segmentation.errors import InputError
from gi_segmentation.files import hash_file, write_text
from gi_segmentation.labels import LabelSet
from gi_segmentation.models.masks import name_flips
from gi_segmentation.publishing.cards import render_card
from gi_segmentation.publishing.eval_results import FLIP_SCORE, OF_THE_PRESET, SEED_SCORE
from gi_segmentation.publishing.facts import RunResults, read_results
from gi_segmentation.publishing.population import KAGGLE_TITLE
from gi_segmentation.rules import PRESETS
from gi_segmentation.schema import SLICE_THICKNESS_MM
from gi_segmentation.scoring.intervals import CONFIDENCE, NUM_RESAMPLES
from gi_segmentation.scoring.tables import MAX_COLUMNS, format_clinical, format_presets
from gi_segmentation.training.header import PRECISIONS

# Names of files in the output folder.
CARD, SCAN_SCORES, OOF_SCORES = "README.md", "scan_scores.csv", "oof_scores.csv"
# The digest of the card as this project wrote it.
DIGEST = ".README.sha256"
OVERLAY, CASES, CURVE = "overlay.png", "cases.png", "learning_curve.png"
# The pictures that show slices.
SLICE_PICTURES = (OVERLAY, CASES)
# The scores of each fold of a cross-validation, with their names on the card.
FOLD_SCORES = {"dice": "Dice", "competition_score": "competition score"}
# The Hub groups scores by this type. The type of all other scores is `dice`.
METRIC_TYPES = {SEED_SCORE: "f1", **{key: key.removeprefix("eval_") for key in OF_THE_PRESET}}


def score_names(labels: LabelSet) -> dict[str, str]:
    """Return the scores of every run in the order of the card, with their names there."""
    return {
        "eval_dice": "Dice, mean over slices and organs",
        **{f"eval_dice_{organ}": f"Dice, {organ.replace('_', ' ')}" for organ in labels.names},
        "eval_dice_volume": "Dice over whole scans, mean over scans and organs",
        **{f"eval_dice_volume_{organ}": f"Dice over whole scans, {organ.replace('_', ' ')}" for organ in labels.names},
        "eval_hausdorff_score": "1 − normalised 3D Hausdorff distance",
        "eval_competition_score": "Competition score, 0.4 Dice + 0.6 of the line above",
    }


def score_titles(facts: RunResults) -> dict[str, str]:
    """Return the names of a run's scores, in the order of the card.

    The names of the competition's scores contain the preset. The name of the score with flips contains its gain over
    `eval_dice`.
    """
    names, size = score_names(facts.label_set), facts.image_size
    for key in OF_THE_PRESET:
        names[key] += f" (preset {facts.competition_preset})"
    if FLIP_SCORE in facts.scores:
        gain = (facts.scores[FLIP_SCORE] or 0) - (facts.scores["eval_dice"] or 0)
        names[FLIP_SCORE] = (
            f"{names['eval_dice']}, averaged over {name_flips(facts.label_set)} flips of the slice ({gain:+.4f})"
        )
    number = {4: "four"}.get(len(facts.organs) + 1, len(facts.organs) + 1)
    names[SEED_SCORE] = f"Macro F1 over {number} labels with background, all pixels pooled, at {size}×{size} pixels"
    return names


def find_spread(values: Sequence[float]) -> str:
    """Return mean, standard deviation (n - 1) and range of the folds' values as text.

    Example:
        >>> find_spread([0.7, 0.8, 0.9])
        '0.8000 ± 0.1000 (0.7000 to 0.9000)'
    """
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def describe_spread(facts: RunResults) -> dict[str, str]:
    """Return how far the scores of the folds of a cross-validation lie apart, by the name of the score.

    A score that fewer than two folds have is left out.
    """
    spreads = {}
    for name, title in FOLD_SCORES.items():
        values = [fold[name] for fold in facts.folds if fold[name] is not None]
        if len(values) > 1:
            spreads[title] = find_spread(values)
    return spreads


def count_scored(facts: RunResults, key: str) -> int:
    """Return the number of patients that a score is about: of an organ, those in whom somebody has drawn it."""
    of_organs = {f"{kind}_{organ}": organ for kind in ("eval_dice", "eval_dice_volume") for organ in facts.organs}
    everybody = facts.splits["validation"]["patients"]
    return facts.drawn.get("validation", {}).get(of_organs.get(key, ""), everybody)


def list_model_index_results(facts: RunResults) -> list[EvalResult]:
    """Return the scores of a run as entries of the card's `model-index`, from which the Hub reads them.

    Two scores can only be compared if they were measured in the same way on the same slices. So each entry has the
    split, the interval, the number of patients, and the rules that it depends on.
    """
    rules = PRESETS[facts.competition_preset]
    results = []
    # A run with `--fold all` has no scores.
    for key, name in score_titles(facts).items() if facts.scores else ():
        score, interval = facts.scores[key], facts.intervals[key]
        # An entry must have a number. The table of the card says that there was nothing to score.
        if score is None:
            continue
        rounded = interval and [round(end, 4) for end in interval]
        # What the score depends on: the rules of the preset, or how slices without an organ count.
        how: dict[str, Any] = {"interval_95": rounded, "patients": count_scored(facts, key)}
        if key in OF_THE_PRESET:
            how |= {"preset": facts.competition_preset, **asdict(rules)}
        elif key != SEED_SCORE:
            how |= {"both_empty": "skipped"}
        results.append(
            EvalResult(
                task_type="image-segmentation",
                task_name="Semantic segmentation of unseen patients",
                dataset_type=facts.dataset if facts.own else "gi_tract",
                dataset_name=f"{facts.dataset_title} (split {facts.split_hash[:12]})",
                dataset_split="validation",
                dataset_args={"split_hash": facts.split_hash, "fingerprint": facts.dataset_fingerprint},
                metric_type=METRIC_TYPES.get(key, "dice"),
                metric_name=name,
                metric_value=round(score, 4),
                metric_args=how,
            )
        )
    return results


def from_kaggle(facts: RunResults) -> bool:
    """Tell whether the card speaks of the competition: of its patients, its scanner and its rules."""
    return not facts.synthetic and not facts.own and facts.dataset_title == KAGGLE_TITLE


def name_other_license(facts: RunResults) -> str:
    """Return the name of the licence `other` in the front matter."""
    return "non-commercial-competition-data" if from_kaggle(facts) else "non-commercial"


def list_tags(facts: RunResults) -> list[str]:
    """Return the tags that follow from the data. Own data may be of any modality, and for any use."""
    if facts.own:
        return ["synthetic"] if facts.synthetic else []
    return ["synthetic" if facts.synthetic else "mri", "radiotherapy"]


def card_metadata(facts: RunResults, model_name: str, license_name: str) -> str:
    """Return the front matter of the card as YAML, with the scores as `model-index`.

    Args:
        facts: The facts of the run.
        model_name: Name of the model, without a namespace.
        license_name: Licence identifier of the Hub.
    """
    data = ModelCardData(
        language="en",
        license=license_name,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        # The Hub makes links of these two. A name without `/` is that of a local folder.
        base_model=facts.base_model if facts.base_model and "/" in facts.base_model else None,
        datasets=facts.dataset if "/" in facts.dataset else None,
        tags=["medical", *list_tags(facts), "semantic-segmentation"],
        model_name=model_name,
        eval_results=list_model_index_results(facts) or None,
        # The Hub asks for a name if the licence is `other`.
        license_name=name_other_license(facts) if license_name == "other" else None,
    )
    return data.to_yaml()


def make_card(
    facts: RunResults,
    repo_id: str,
    license_name: str,
    revision: str | None = None,
    published: bool = True,
    pictures: bool = True,
) -> str:
    """Return the text of the model card.

    Args:
        facts: The facts of a finished run.
        repo_id: The name that users pass to `from_pretrained`: a repository, or a local folder.
        license_name: Licence identifier of the Hub.
        revision: The branch on which the model will be; None: the main branch.
        published: Whether `repo_id` is a repository.
        pictures: Whether the pictures of slices are beside the card.

    Raises:
        jinja2.UndefinedError: If a variable of the template has no value.
        KeyError: If a score or an interval is missing.
    """
    model_name = repo_id.split("/")[-1]
    return render_card(
        "model_card.md",
        metadata=card_metadata(facts, model_name, license_name),
        model_name=model_name,
        repo_id=repo_id,
        revision=revision,
        published=published,
        pictures=pictures,
        kaggle=from_kaggle(facts),
        outlines="exact outlines" if facts.synthetic else "outlines by hand",
        # More words for the calls of `from_pretrained` on the card.
        at_revision=f', revision="{revision}"' if revision else "",
        license_name=license_name,
        score_names=score_titles(facts),
        clinical_table=format_clinical(facts.clinical) if facts.clinical and facts.clinical["scans"] else None,
        by_organ=len(facts.organs) > MAX_COLUMNS,
        # A start from a checkpoint may know an organ that this training did not show.
        unlearnt=[
            organ
            for organ, patients in facts.drawn.get("train", {}).items()
            if not patients and organ not in (facts.kept_labels or ())
        ],
        organ_scores=[f"eval_{name}_{organ}" for name in ("dice", "dice_volume") for organ in facts.organs],
        channels=facts.label_set.channels(facts.label_mode),
        presets_table=format_presets(facts.scores, facts.intervals, facts.competition_preset, "eval_"),
        competition_rules=asdict(PRESETS[facts.competition_preset]),
        slice_thickness_mm=SLICE_THICKNESS_MM,
        confidence=CONFIDENCE,
        num_resamples=NUM_RESAMPLES,
        overlay=OVERLAY,
        cases_picture=CASES,
        curve=CURVE,
        scan_scores=OOF_SCORES if facts.folds else SCAN_SCORES,
        spreads=describe_spread(facts),
        precisions=PRECISIONS,
        **asdict(facts),
    )


def write_card(
    output_dir: Path, repo_id: str, license_name: str, revision: str | None = None, published: bool = True
) -> Path:
    """Write the model card from `run.json`.

    Args:
        output_dir: Folder with `run.json`. The card is written there as README.md.
        repo_id: As in `make_card`.
        license_name: As in `make_card`.
        revision: As in `make_card`.
        published: As in `make_card`.

    Returns:
        The path of the card.

    Raises:
        InputError: If `run.json` is not that of a finished run.
        jinja2.UndefinedError: As `make_card`.
        KeyError: As `make_card`.
    """
    # The facts are read from the file, so that the card agrees with the `run.json` that is published beside it.
    return write_own_card(output_dir, make_card(read_results(output_dir), repo_id, license_name, revision, published))


def write_own_card(output_dir: Path, text: str) -> Path:
    """Write a card of ours, and its digest beside it: a later version writes other cards, but knows this one.

    Args:
        output_dir: Folder of the run.
        text: From `make_card`.

    Returns:
        The path of the card.
    """
    path = output_dir / CARD
    write_text(path, text)
    # If the process ends between the two lines, the card counts as changed by hand, and nothing is lost.
    write_text(output_dir / DIGEST, f"{hash_file(path)}\n")
    return path


def is_own_card(output_dir: Path) -> bool:
    """Return whether the card of a run is as any version of this project left it, by its digest."""
    digest = output_dir / DIGEST
    if not digest.exists():
        return False
    return digest.read_text(encoding="utf-8", errors="replace").strip() == hash_file(output_dir / CARD)


def find_own_card(output_dir: Path, facts: RunResults, repo_id: str) -> str | None:
    """Return the card of a run if a user has changed it; None if the pipeline may write it anew.

    Args:
        output_dir: Folder with the card.
        facts: The facts of its run.
        repo_id: Name of the repository, `NAMESPACE/NAME`.

    Raises:
        InputError: If the card was changed and names another model.
    """
    if is_own_card(output_dir):
        return None
    text = (output_dir / CARD).read_text(encoding="utf-8")
    named = re.search(r'from_pretrained\("([^"]+)"', text)
    license_name = facts.arguments.get("license", "other")
    # A run that was not published names its output folder.
    if named and any(text == make_card(facts, named[1], license_name, published=known) for known in (True, False)):
        return None
    # What a user wrote into the card must not be lost.
    if not named or named[1] != repo_id:
        raise InputError(
            f"{output_dir / CARD}: expected a card that names {repo_id} in its call of from_pretrained, but it names "
            f"{named[1] if named else 'nothing'}, and it was changed by hand; write {repo_id} there"
        )
    return text


def card_to_publish(output_dir: Path, facts: RunResults, repo_id: str, pictures: bool) -> str:
    """Return the card of a run for its repository; arguments as `find_own_card`, and whether pictures come with it.

    Raises:
        InputError: If a user has changed the card, and it names another model or shows a picture that does not come.
    """
    own = find_own_card(output_dir, facts, repo_id)
    if own is None:
        return make_card(facts, repo_id, facts.arguments.get("license", "other"), pictures=pictures)
    shown = [name for name in SLICE_PICTURES if f"]({name})" in own]
    if shown and not pictures:
        raise InputError(
            f"{output_dir / CARD}: it was changed by hand, and shows {' and '.join(shown)}, but pictures of patients "
            f"stay out of a public repository; remove the picture from the card, or add --publish_pictures"
        )
    return own
