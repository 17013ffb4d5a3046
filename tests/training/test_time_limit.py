"""When a training ends that has a limited time."""

import time

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from gi_segmentation.training.time_limit import ENDING_S, SPREAD, TimeLimit, count_evaluations


def make_limit(left_s: float) -> TimeLimit:
    """Return a limit that ends in some seconds. A step takes 2 s, an evaluation 100 s, and a checkpoint 10 s."""
    limit = TimeLimit(1, time.monotonic() - 3600 + left_s)
    limit.steps_s.extend((2.0, 1.0))
    limit.evaluation_s, limit.saving_s = 100.0, 10.0
    return limit


@pytest.mark.parametrize(
    ("step", "needed_s"),
    [
        # A step and a checkpoint.
        (3, 2 + 10),
        # The next step is followed by an evaluation.
        (4, 2 + 100 + 10),
    ],
)
def test_a_step_begins_only_if_all_that_follows_it_ends_in_time(step: int, needed_s: float) -> None:
    args = TrainingArguments(output_dir="none", eval_strategy="steps", eval_steps=5, use_cpu=True)
    state, control = TrainerState(global_step=step, max_steps=100, eval_steps=5), TrainerControl()
    needed_s = SPREAD * needed_s + ENDING_S
    assert not make_limit(needed_s + 1).is_nearly_up(args, state, control)
    assert make_limit(needed_s - 1).is_nearly_up(args, state, control)


def test_evaluations_after_epochs_are_foreseen() -> None:
    args = TrainingArguments(output_dir="none", eval_strategy="epoch", use_cpu=True)
    found = [
        [count_evaluations(args, TrainerState(global_step=step, epoch=step / 10), steps) for step in (17, 18, 19, 20)]
        for steps in (1, 2)
    ]
    # The evaluation after step 20 comes when this step has ended, so it counts there too.
    assert found == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_scoring_waits_for_the_next_part_if_there_is_no_time() -> None:
    assert make_limit(300).lacks_scoring(with_flips=False) and not make_limit(600).lacks_scoring(with_flips=False)
    assert make_limit(600).lacks_scoring(with_flips=True) and not make_limit(1700).lacks_scoring(with_flips=True)


def test_without_a_limit_there_is_always_time() -> None:
    limit = TimeLimit(None, time.monotonic() - 10**9)
    assert not limit.lacks(10**9)
