"""Score a submission in one call."""

from pathlib import Path

from gi_segmentation.rules import DEFAULT_RULES, CompetitionRules
from gi_segmentation.scoring.scans import score_scans
from gi_segmentation.scoring.submissions import measure_submission


def score_submission(
    truth: Path,
    submission: Path,
    kaggle_dir: Path | None = None,
    num_proc: int | None = None,
    rules: CompetitionRules = DEFAULT_RULES,
) -> dict[str, float]:
    """Return the scores by name, without clinical scores."""
    return score_scans(measure_submission(truth, submission, kaggle_dir, num_proc, rules), rules)
