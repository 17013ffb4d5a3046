"""Compare our default recipe with the original project's: same slices, model, minutes and seeds.

Both recipes get the same time and not the same number of steps, because a recipe with slower steps would otherwise get
more computing. First, a few steps of each recipe are timed. From them follows the number of steps that fit into the
minutes, and the learning rate is planned for this number. The training ends when the minutes are over. Evaluations and
checkpoints do not count. Each training is a process of its own, and keeps its best checkpoint by `eval_dice`.

A small SegFormer is trained on 18 patients of the hard phantom, and six other patients are for validation.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.training import (
    NUM_EVALUATIONS,
    add_job_flag,
    do_job,
    evaluation_flags,
    flag_words,
    make_trainer,
    mean_and_spread,
    run_apart,
    write_phantom_dataset,
)
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import load_slices
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.masks import resize_logits
from gi_segmentation.training.losses import cross_entropy_loss
from gi_segmentation.training.trainer import SegmentationTrainer, train

ROOT = Path(__file__).resolve().parents[1]

# Steps of a timing run. The first ones are slower than the rest and are not counted.
CALIBRATION_STEPS, SLOW_STEPS = 24, 4
# Neighbouring slices are much alike, so every sixth validation slice is enough.
SCORE_EVERY = 6
SMALL_SEGFORMER = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [16, 32, 80, 128],
    "num_attention_heads": [1, 2, 4, 4],
    "decoder_hidden_size": 96,
}
# A recipe is a set of flags. The benchmark sets data, model, sizes and steps itself, and these win over the recipe.
RECIPES: dict[str, dict[str, Any]] = {"default": {}, "seed": {"config": ROOT / "recipes" / "seed.yaml"}}
SCORES = ("eval_dice", *(f"eval_dice_{organ}" for organ in GI_TRACT.names), "eval_macro_f1_seed")


class Trained(NamedTuple):
    """The scores of a training's best checkpoint, and the seconds of each step."""

    scores: dict[str, float]
    seconds: list[float]


class OriginalTrainer(SegmentationTrainer):
    """A trainer with the original project's loss: soft Dice of all four labels, plus cross-entropy."""

    def batch_loss(
        self, outputs: Any, labels: torch.Tensor, training: bool, known: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss of a batch at input resolution. It has no part for an auxiliary head."""
        (logits,) = resize_logits([outputs.logits], *labels.shape[-2:])
        probabilities, target = logits.softmax(dim=1), F.one_hot(labels, len(GI_TRACT.labels)).movedim(-1, 1)
        # The sums run over all slices of the batch. The background is one of the four labels. It is easy to find and
        # fills most pixels, so it hides part of the organs' errors. Our own loss leaves it out.
        overlap, total = (both.sum(dim=(0, 2, 3)) for both in (probabilities * target, probabilities + target))
        return 1 - (2 * overlap / total).mean() + cross_entropy_loss(logits, labels, "multiclass")


class Stopwatch(TrainerCallback):
    """Measures the seconds of each step. Reading slices counts; evaluating and saving do not.

    Args:
        limit: Seconds after which the training ends, with a last evaluation.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seconds: list[float] = []
        self.start = 0.0

    def restart(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the next step now, so that the time since the last step does not count."""
        self.start = time.perf_counter()

    on_train_begin = on_evaluate = on_save = restart

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Store the seconds of the step, and end the training when the time is over."""
        # A GPU works asynchronously. Without waiting for it, only the time for queueing its work would be measured.
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        self.start = now
        # The steps were planned for this time, but another program may have made the machine slower since.
        if sum(self.seconds) >= self.limit:
            control.should_evaluate = control.should_save = control.should_training_stop = True


def run_flags(dataset: Path, recipe: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the flags of one training without `output_dir`."""
    # In a dictionary the later value wins: the recipe first, then what the benchmark fixes.
    return {
        **RECIPES[recipe],
        "model_type": "segformer",
        "config_overrides": json.dumps(SMALL_SEGFORMER),
        "dataset_name": dataset,
        "seed": seed,
        "test_time_flips": False,
        **evaluation_flags(steps),
        "image_size": 96,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 0,
    }


def run(flags: dict[str, Any], original_loss: bool, limit: float) -> Trained:
    """Train in this process, for at most `limit` seconds."""
    model_args, data_args, run_args = parse_arguments(flag_words(flags))
    slices = load_slices(data_args)
    scored = slices["validation"].select(range(0, len(slices["validation"]), SCORE_EVERY))
    samples = DatasetDict(train=slices["train"], validation=scored)
    trainer = make_trainer(slices, samples, model_args, data_args, run_args)
    # The class is exchanged afterwards, so everything else is built by the same function for both recipes.
    if original_loss:
        trainer.__class__ = OriginalTrainer
    stopwatch = Stopwatch(limit)
    trainer.add_callback(stopwatch)
    scores = train(trainer).scores
    return Trained(scores, stopwatch.seconds)


def run_recipe(dataset: Path, recipe: str, seed: int, steps: int, minutes: float) -> Trained:
    """Train in a process of its own, for the given steps or until the minutes are over.

    Raises:
        RuntimeError: If the training fails.
    """
    flags = run_flags(dataset, recipe, seed, steps)
    job = {"flags": flags, "original_loss": recipe == "seed", "limit": 60 * minutes}
    return Trained(*run_apart("benchmarks.learning", f"{recipe}, seed {seed}", job))


def count_steps(dataset: Path, recipes: list[str], minutes: float) -> dict[str, int]:
    """Time two short trainings of each recipe, and return how many steps of each fit into the minutes."""
    tries: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    # The recipes take turns, so a slow minute of the machine does not hit only one of them.
    for recipe in recipes * 2:
        seconds = run_recipe(dataset, recipe, 0, CALIBRATION_STEPS, minutes=10).seconds[SLOW_STEPS:]
        tries[recipe].append(statistics.mean(seconds))
    return {recipe: max(NUM_EVALUATIONS, round(60 * minutes / statistics.mean(tries[recipe]))) for recipe in recipes}


def compare(dataset: Path, recipes: list[str], seeds: list[int], minutes: float) -> None:
    """Train every recipe with every seed, the recipes in turn, and print a table."""
    steps = count_steps(dataset, recipes, minutes)
    print(f"\n{minutes:g} minutes, seeds {', '.join(map(str, seeds))}; mean ± standard deviation\n")
    names = ["recipe", *(name.removeprefix("eval_") for name in SCORES), "steps", "seconds"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    trained_by: dict[str, list[Trained]] = {recipe: [] for recipe in recipes}
    for seed in seeds:
        for recipe in recipes:
            trained_by[recipe].append(run_recipe(dataset, recipe, seed, steps[recipe], minutes))
    for recipe, runs in trained_by.items():
        cells = [mean_and_spread([trained.scores[name] for trained in runs]) for name in SCORES]
        used = ", ".join(f"{sum(trained.seconds):.0f}" for trained in runs)
        made = ", ".join(str(len(trained.seconds)) for trained in runs)
        print(f"| {recipe} | {' | '.join(cells)} | {made} of {steps[recipe]} | {used} |", flush=True)


def main() -> None:
    """Train every recipe and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="recipes to compare")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of weights, order and augmentation"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="minutes of each training")
    add_job_flag(parser)
    arguments = parser.parse_args()
    if arguments.job:
        do_job(arguments.job, run)
        return
    with tempfile.TemporaryDirectory() as scratch:
        # 24 patients with a whole scan each; one of four folds, six patients, is for validation.
        dataset = write_phantom_dataset(Path(scratch), 24, 1, 144, num_folds=4)
        compare(dataset, arguments.recipes, arguments.seeds, arguments.minutes)


if __name__ == "__main__":
    main()
