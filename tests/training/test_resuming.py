"""A run goes on, or is scored again, only with the arguments that made its weights. Its facts stay true."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import run_segmentation
from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.errors import InputError
from gi_segmentation.publishing import facts as facts_module
from gi_segmentation.publishing.facts import changed_arguments, continue_facts, describe_start, settle_facts
from gi_segmentation.publishing.model_card import make_card
from gi_segmentation.training import resuming
from gi_segmentation.training.resuming import describe_changes, describe_deciding, find_changes
from tests.support.models import write_base
from tests.support.runs import FACTS
from tests.support.training import arguments


def describe(words: str, train_batch_size: int | None = 32) -> dict[str, Any]:
    """Return the facts that `find_changes` takes, for words of the command line."""
    parsed = parse_arguments(words.split())
    deciding = describe_deciding(*parsed)
    return {"deciding": deciding, "arguments": changed_arguments(*parsed), "train_batch_size": train_batch_size}


def test_every_argument_is_compared_or_named() -> None:
    fields = [item for group in (ModelArguments, DataArguments, RunArguments) for item in dataclasses.fields(group)]
    named = {**resuming.START_ARGUMENTS, **resuming.MAY_CHANGE}
    assert named.keys() <= {item.name for item in fields} and all(named.values())
    free = {item.name for item in fields if item.metadata.get("group") in resuming.FREE_SECTIONS}
    assert {item.name for item in fields} == free | named.keys() | set(resuming.list_deciding())
    assert not (free | named.keys()) & set(resuming.list_deciding())
    assert not [
        name for name in free | named.keys() if re.match(r"lr_|adam|optim|ema|warmup|max_(?!hours)|seed", name)
    ]


@pytest.mark.parametrize(
    "words",
    [
        "--learning_rate 0.01", "--weight_decay 0.1", "--optim sgd", "--optim_args amsgrad=True", "--adam_beta1 0.8",
        "--adam_epsilon 1e-6", "--lr_scheduler_type cosine", "--lr_scheduler_type constant --lr_drop_at 0.5",
        "--warmup_steps 10", "--head_lr_multiplier 1", "--ema_decay 0.9", "--max_grad_norm 5", "--seed 1",
        "--num_train_epochs 7", "--max_steps 9", "--image_size 224", "--slice_context 1", "--slice_sampling all",
        "--augmentation false", "--strong_augmentation true", "--max_train_samples 9", "--max_eval_samples 9",
        "--label_mode multilabel", "--model_type segformer", "--model_revision abc", "--model_name_or_path a/b",
        "--per_device_train_batch_size 8", "--gradient_accumulation_steps 3", "--fold 1", "--fast_head false",
        "--eval_strategy steps --eval_steps 5 --save_strategy steps --save_steps 5", "--data_seed 3",
        '--lr_scheduler_kwargs {"a":1}',
    ],
)  # fmt: skip
def test_what_decides_the_weights_is_refused_by_name(words: str) -> None:
    before, now = describe(""), describe(words, 64)
    changes = find_changes(before, now)
    flags = re.findall(r"--(\w+)", words)
    assert set(flags) <= changes.keys()
    said = describe_changes(changes)
    assert all(any(text.startswith(f"--{flag} ") and "(here " in text for text in said) for flag in flags)
    # An older version wrote only what was not the default.
    old = {"arguments": before["arguments"], "train_batch_size": 32}
    hidden = {"model_name_or_path", "lr_scheduler_kwargs"}
    assert set(flags) - hidden <= find_changes(old, now).keys()
    assert not find_changes(before, describe("")) and not find_changes(now, describe(words, 64))


@pytest.mark.parametrize(
    "words",
    [
        "--license apache-2.0 --preset first_place --dataset_title Other --test_time_flips true",
        "--push_to_hub true --hub_model_id a/b --hub_private_repo true",
        "--output_dir elsewhere --max_hours 11.5 --save_total_limit 3 --logging_steps 3 --report_to none --run_name x",
        "--dataloader_num_workers 0 --per_device_eval_batch_size 3 --early_stopping_patience 3",
        "--gradient_checkpointing true --cache_slices false --disable_tqdm true",
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 4",
    ],
)
def test_what_does_not_decide_the_weights_may_change(words: str) -> None:
    assert not find_changes(describe(""), describe(words)) and not find_changes(describe(words), describe(""))


def test_two_texts_of_the_same_configuration_are_the_same() -> None:
    one = describe("--model_type segformer --config_overrides depths=[1,1],drop_path_rate=0")
    other = describe('--model_type segformer --config_overrides {"drop_path_rate":0,"depths":[1,1]}')
    assert not find_changes(one, other)
    third = describe("--model_type segformer --config_overrides depths=[1,2],drop_path_rate=0")
    assert find_changes(one, third).keys() == {"config_overrides"}


def test_a_folder_is_known_by_its_weights_and_its_path_is_not_written(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "secret-name", "segformer")
    before = describe(f"--model_name_or_path {folder}")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert not find_changes(before, describe(f"--model_name_or_path {moved}"))
    assert "secret-name" not in json.dumps(before) and str(tmp_path) not in json.dumps(before)
    (moved / "model.safetensors").write_bytes(b"other")
    assert find_changes(before, describe(f"--model_name_or_path {moved}")).keys() == {"model_name_or_path"}


def test_each_part_of_a_run_has_its_own_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = [10]
    monkeypatch.setattr(facts_module, "find_last_checkpoint", lambda folder: Path(f"checkpoint-{step[0]}"))
    own = {item.name for item in dataclasses.fields(facts_module.RunFacts)}
    first = facts_module.RunFacts(**{name: value for name, value in vars(FACTS).items() if name in own})
    same = continue_facts(tmp_path, vars(first), first)
    assert same == first
    # Two processes go on from step 10, and one from step 20, with newer code and another title.
    second = dataclasses.replace(first, num_processes=2, train_batch_size=2)
    both = continue_facts(tmp_path, vars(first), second)
    assert (both.num_processes, both.train_batch_size) == (2, 2)
    assert both.earlier_starts == [{"until_step": 10, **describe_start(vars(first))}]
    step[0] = 20
    new: dict[str, Any] = {"git_commit": "abc", "dataset_title": "New", "seed": 5, "fold": "3"}
    third = continue_facts(tmp_path, vars(both), dataclasses.replace(first, **new))
    assert [start["until_step"] for start in third.earlier_starts] == [10, 20]
    assert (third.seed, third.fold, third.dataset_title) == (first.seed, first.fold, "New")
    # The run ends at step 20, so the third start only scored.
    settled, scored_by = settle_facts(third, 20)
    assert (settled.num_processes, settled.git_commit, settled.dataset_title) == (2, None, "New")
    assert scored_by == {"project_version": "0", "git_commit": "abc"}
    assert settled.earlier_starts == both.earlier_starts and settle_facts(third, 21) == (third, None)
    # The checkpoint of step 20 was damaged. The steps after 7 are made anew.
    step[0] = 7
    again = continue_facts(tmp_path, vars(third), dataclasses.replace(first, num_processes=3))
    assert [(start["until_step"], start["num_processes"]) for start in again.earlier_starts] == [(7, 1)]


def test_precision_and_batches_of_each_part_of_a_run_are_on_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `accelerate launch --mixed_precision bf16` is no argument of the run. A GPU may begin what a CPU ends.
    for launched, words, expected in (
        ("bf16", "", "bf16"),
        ("no", "", "no"),
        ("no", "--bf16 true --use_cpu true", "bf16"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert parse_arguments(words.split())[2].mixed_precision == expected
    monkeypatch.setattr(facts_module, "find_last_checkpoint", lambda folder: Path("checkpoint-2"))
    first = dataclasses.replace(FACTS, mixed_precision="bf16", gradient_accumulation_steps=1, train_batch_size=4)
    second = dataclasses.replace(first, mixed_precision="no", gradient_accumulation_steps=4)
    both = continue_facts(tmp_path, vars(first), second)
    assert isinstance(both, facts_module.RunResults)
    card = make_card(both, "a/b", "other")
    assert "| until step 2 | 4 slices per step in 1 batch on 1 process (cpu, 16 bits (bf16)), code 0; " in card
    assert "| trained on cpu, in 32 bits |" in card and "| 4, in 4 batches, each with its own Dice |" in card
    # An older version wrote neither.
    old = [{name: value for name, value in start.items() if "mixed" not in name} for start in both.earlier_starts]
    made, _ = settle_facts(dataclasses.replace(second, earlier_starts=old), 2)
    assert made.mixed_precision is None
    assert "| trained on cpu |" in make_card(dataclasses.replace(FACTS, earlier_starts=old), "a/b", "other")


def test_a_finished_run_keeps_its_facts_and_refuses_other_values(dataset_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags: dict[str, Any] = {"max_steps": 1, "optim": "adamw_torch", "cache_slices": False}
    run_segmentation.main(arguments(dataset_dir, run, **flags))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = json.loads((run / "run.json").read_text())
    for change, said in (
        ({"learning_rate": 0.5, "weight_decay": 0.1}, r"--learning_rate 0.01 \(here 0.5\), --weight_decay 0.0001"),
        ({"optim": "sgd"}, r"--optim adamw_torch \(here sgd\); repeat the flags"),
        ({"max_steps": 2}, r"--max_steps 1 \(here 2\).*to train longer, start a new run with --model_name_or_path"),
        ({"head_lr_multiplier": 10}, "--head_lr_multiplier 1.0"),
        ({"config_overrides": "depths=[1,1]"}, "--config_overrides"),
        ({"per_device_train_batch_size": 2}, "--per_device_train_batch_size 4.*as many slices as before"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            run_segmentation.main(arguments(dataset_dir, run, **flags | change))
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    free = {"preset": "first_place", "dataset_title": "Renamed", "license": "apache-2.0"}
    run_segmentation.main(arguments(dataset_dir, run, **flags | free))
    second = json.loads((run / "run.json").read_text())
    changed = {name for name in first if first[name] != second[name]}
    assert changed <= {"dataset_title", "competition_preset", "arguments", "scores", "intervals", "clinical"}
    assert "Renamed" in (run / "README.md").read_text()
    # Without a checkpoint nothing was made, so other values may be tried.
    begun = tmp_path / "begun"
    begun.mkdir()
    names = {item.name for item in dataclasses.fields(facts_module.RunFacts)}
    (begun / "run.json").write_text(json.dumps({name: first[name] for name in names}))
    run_segmentation.main(arguments(dataset_dir, begun, **flags | {"learning_rate": 0.02}))
    assert json.loads((begun / "run.json").read_text())["learning_rate"] == 0.02
