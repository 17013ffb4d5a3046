"""The file `eval.yaml`, by which a Hub knows that a dataset is a benchmark and has leaderboards.

The Hub looks for it at the root of the dataset's repository. So `build` writes it into the dataset folder.

Source: https://huggingface.co/docs/hub/eval-results, section "Registering a Benchmark".
"""

import yaml

from dataset_builder.gi_tract import GiTractConfig
from gi_segmentation.labels import LabelSet
from gi_segmentation.publishing.eval_results import list_tasks

BENCHMARK = "eval.yaml"
# The Hub knows a list of frameworks (EVALUATION_FRAMEWORKS in `packages/tasks/src/eval.ts` of huggingface.js). They
# score language models, agents, documents or speech, and not one of them compares masks. The name of one of them would
# be wrong, because nobody could repeat our scores with it. The documentation says that one may add a name of one's own
# to the list. Until that is done, and the dataset is on the Hub's allow-list, the Hub shows no leaderboard.
FRAMEWORK = "gi-segmentation"


def benchmark_file(
    config: GiTractConfig, labels: LabelSet, split_hash: str, synthetic: bool, title: str | None = None
) -> str:
    """Return the text of `eval.yaml`.

    Args:
        config: How the patients were split.
        labels: The organs.
        split_hash: From `schema.hash_splits`.
        synthetic: Whether all slices are those of a phantom.
        title: Name of the data; None: Kaggle's.
    """
    real = "abdominal MR slices of patients" if title is None else "slices of patients"
    slices = "slices of synthetic patients" if synthetic else real
    *organs, last = [organ.replace("_", " ") for organ in labels.names]
    # Every score has a leaderboard of its own, and the description is the only place that explains them.
    description = (
        f"Segmentation of {', '.join(organs) + ' and ' if organs else ''}{last} on {slices} that the model has "
        "not seen. Scores lie between 0 and 1, and higher is better. dice is the mean over slices and organs on the "
        "grid of the slice, and dice_volume the mean over whole scans and organs. Both leave out pairs that are empty "
        "in truth and prediction. hausdorff_score and competition_score end with the name of their rules. flips_dice "
        "is dice averaged over four flips. macro_f1_seed pools all pixels at the size of the model's input. The "
        f"validation split is fold {config.fold} of {config.num_folds}, split hash {split_hash[:12]}. The notes of an "
        "entry name the split hash of its patients. Compare only entries with the same hash."
    )
    # `id` is required. The default of `split` would be `test`, which has no annotations here and cannot be scored.
    tasks = [{"id": task, "config": "default", "split": "validation"} for task in list_tasks(labels)]
    content = {
        "name": title or "UW-Madison GI Tract" + (" phantom" if synthetic else ""),
        "description": description,
        "evaluation_framework": FRAMEWORK,
        "tasks": tasks,
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
