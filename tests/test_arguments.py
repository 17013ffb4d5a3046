"""Flags, recipes and the original project's flags give the same arguments, and a mistake gives one clear sentence."""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.command_line import ALIASES, SECTIONS, expand_aliases, parse_arguments
from gi_segmentation.errors import InputError
from gi_segmentation.rules import DEFAULT_PRESET
from tests.support.processes import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ORIGINAL_COMMAND = [
    *("--base_model", "openmmlab/upernet-convnext-small", "--train_batch_size", "32", "--weight_decay", "1e-4"),
    *("--optimizer", "AdamW", "--scheduler_name", "MultiStepLR", "--epochs", "6", "--lr", "2e-4"),
]
# The fields that our dataclasses declare. Some of them replace fields of TrainingArguments.
OWN_FIELDS = [
    item
    for group in (ModelArguments, DataArguments, RunArguments)
    for item in fields(group)
    if item.name in vars(group)["__annotations__"]
]


@pytest.fixture(autouse=True)
def no_usage(capsys: pytest.CaptureFixture[str]) -> object:
    """Check that no test prints a page of usage. Only the tests of `--help` may."""
    yield
    captured = capsys.readouterr()
    assert "usage:" not in captured.out + captured.err


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_the_original_projects_but_for_what_trials_changed() -> None:
    model_args, data_args, run_args = parse_arguments([])
    assert model_args.model_name_or_path == "nvidia/segformer-b0-finetuned-ade-512-512"
    assert (data_args.dataset_name, data_args.image_size, data_args.augmentation) == ("gi_tract", 288, True)
    assert (run_args.per_device_train_batch_size, run_args.learning_rate, run_args.weight_decay) == (32, 2e-4, 1e-4)
    assert (run_args.num_train_epochs, run_args.metric_for_best_model) == (6, "eval_dice")
    assert (run_args.head_lr_multiplier, run_args.ema_decay, run_args.warmup_steps) == (10, 0.999, 0.05)
    assert (data_args.slice_context, data_args.slice_sampling) == (0, "balanced")


@pytest.mark.parametrize("joined", [False, True], ids=["--flag value", "--flag=value"])
def test_the_original_command_line_keeps_its_meaning(joined: bool) -> None:
    words = ORIGINAL_COMMAND
    if joined:
        words = [f"{flag}={value}" for flag, value in zip(words[::2], words[1::2], strict=True)]
    model_args, _, run_args = parse_arguments(words)
    assert model_args.model_name_or_path == "openmmlab/upernet-convnext-small"
    assert (run_args.per_device_train_batch_size, run_args.num_train_epochs) == (32, 6)
    assert (run_args.weight_decay, run_args.learning_rate) == (1e-4, 2e-4)
    assert (run_args.optim, run_args.optim_args) == (OptimizerNames.ADAMW_TORCH, "amsgrad=True")
    assert (run_args.lr_scheduler_type, run_args.lr_drop_at) == (SchedulerType.CONSTANT, 0.5)


def test_a_recipe_sets_defaults_and_flags_win_wherever_they_stand(tmp_path: Path) -> None:
    text = "image_size: 96\nlearning_rate: 1.0e-3\nnum_train_epochs: 2\naugmentation: false\nlabel_names: [a, b]\n"
    recipe = write_recipe(tmp_path, text)
    for words in (["--config", recipe, "--lr", "5e-3"], ["--lr=5e-3", f"--config={recipe}"]):
        _, data_args, run_args = parse_arguments(words)
        assert (data_args.image_size, data_args.augmentation) == (96, False)
        assert (run_args.learning_rate, run_args.num_train_epochs) == (5e-3, 2)
        assert run_args.label_names == ["a", "b"]


def test_a_recipe_may_use_the_original_names_and_nested_values(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, "base_model: some/model\nscheduler_name: MultiStepLR\nconfig_overrides:\n  depths: [1, 1]\n"
    )
    model_args, _, run_args = parse_arguments(["--config", recipe])
    assert (model_args.model_name_or_path, model_args.config_overrides) == ("some/model", '{"depths": [1, 1]}')
    assert run_args.lr_drop_at == 0.5


def test_a_checkpoint_on_the_command_line_replaces_the_new_model_of_a_recipe(tmp_path: Path) -> None:
    text = "model_type: upernet\nbackbone: some/encoder\nconfig_overrides:\n  hidden_size: 32\nimage_size: 96\n"
    recipe = write_recipe(tmp_path, text)
    for start in (["--model_name_or_path", "runs/a"], ["--base-model=runs/a"]):
        model_args, data_args, _ = parse_arguments(["--config", recipe, *start])
        assert (model_args.model_name_or_path, data_args.image_size) == ("runs/a", 96)
        assert model_args.model_type is model_args.backbone is model_args.config_overrides is None
        with pytest.raises(InputError, match="the training starts from one of them; leave one out"):
            parse_arguments([*start, "--model_type", "segformer"])
    assert parse_arguments(["--config", recipe])[0].backbone == "some/encoder"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_parses(path: Path) -> None:
    model_args, _, _ = parse_arguments(["--config", str(path)])
    assert model_args.model_type or "/" in model_args.model_name_or_path


def test_there_are_recipes() -> None:
    assert "demo.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("epoch: 1\n", "unknown key 'epoch'; did you mean epochs?"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("help: true\n", "unknown key 'help'"),
        ("on: 1\n", "unknown key True"),
        ("save_total_limit:\n", "save_total_limit has no value"),
        ("- learning_rate\n", "got list"),
        ("", "got NoneType"),
        ("a: [1\n", "not a readable YAML file"),
        ("image_size: [288, 288]\n", "unexpected word '288'"),
        ("image_size: wide\n", "invalid int value: 'wide'"),
        ("accelerator_config: {bogus: 1}\n", "bogus"),
        ("license: --push_to_hub", "looks like a flag"),
        ("seed: &a [1]\nfold: *a", "aliases like"),
        ("seed: 2026-99-99", "not a readable YAML file"),
        ("[" * 3000, "not a readable YAML file"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        parse_arguments(["--config", write_recipe(tmp_path, text)])
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_an_unreadable_recipe_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=f"--config .*{kind}: not a readable YAML file"):
        parse_arguments(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "unknown argument --learning_rat; did you mean learning_rate?"),
        ("--epoch=1", "unknown argument --epoch; did you mean epochs?"),
        ("--max_train_sample 1", "unknown argument --max_train_sample; did you mean max_train_samples?"),
        ("--xyzzy 1", "unknown argument --xyzzy; --help lists every flag"),
        ("stray", "unexpected word 'stray'"),
        ("--lr 1 2", "unexpected word '2'"),
        ("--config", "--config: expected one argument"),
        ("--output_dir", "expected one argument"),
        ("--lr fast", "invalid float value: 'fast'"),
        ("--lr=", "invalid float value: ''"),
        ("--epochs=six", "invalid float value: 'six'"),
        ("--train_batch_size 1.5", "invalid int value: '1.5'"),
        ("--augmentation perhaps", "Truthy value expected"),
        ("--optimizer SGD", "invalid choice: 'SGD'"),
        ("--label_mode both", "--label_mode: invalid choice: 'both' (choose from 'multiclass', 'multilabel')"),
        ("--slice_sampling some", "invalid choice: 'some' (choose from 'all', 'balanced', 'patients')"),
        ("--preset mine", "--preset: invalid choice: 'mine' (choose from 'mle_bench', 'first_place', 'host')"),
        ("--lr_scheduler_kwargs {bad", "expected JSON, got '{bad'"),
        ("--accelerator_config nowhere.json", "nowhere.json"),
        ("--max_steps 0", "--max_steps must be greater than 0, or -1"),
    ],
)
def test_a_wrong_word_ends_in_one_sentence(words: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arguments(words.split())
    assert message in str(caught.value)


# Flags of TrainingArguments that the pipeline fixes: the only accepted value, and a value that is refused.
FIXED = [
    ("load_best_model_at_end", "True", "false"),
    ("metric_for_best_model", "eval_dice", "loss"),
    ("greater_is_better", "True", "false"),
    ("remove_unused_columns", "False", "true"),
    ("batch_eval_metrics", "True", "false"),
    ("hub_strategy", "end", "every_save"),
    ("save_only_model", "False", "true"),
    ("restore_callback_states_from_checkpoint", "True", "false"),
    ("prediction_loss_only", "False", "true"),
    ("logging_nan_inf_filter", "False", "true"),
    ("dataloader_drop_last", "False", "true"),
    ("label_smoothing_factor", "0.0", "0.1"),
    ("do_predict", "False", "true"),
    ("enable_jit_checkpoint", "False", "true"),
]


@pytest.mark.parametrize(("name", "value", "refused"), FIXED, ids=[name for name, *_ in FIXED])
def test_a_fixed_flag_accepts_only_its_value(name: str, value: str, refused: str) -> None:
    *_, run_args = parse_arguments([f"--{name}", value])
    assert getattr(run_args, name) == getattr(parse_arguments([])[2], name)
    with pytest.raises(InputError, match=rf"^--{name} must be {re.escape(value)} in this pipeline, but got .+$"):
        parse_arguments([f"--{name}", refused])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--no_load_best_model_at_end", "--load_best_model_at_end must be True"),
        ("--save_only_model", "--save_only_model must be False"),
        ("--resume_from_checkpoint run/checkpoint-1", "leave it out"),
        ("--eval_strategy steps --eval_steps 5", "save and eval strategy to match"),
        ("--lr_drop_at 0", "between 0 and 1, but got 0.0"),
        ("--lr_drop_at 1.5", "between 0 and 1, but got 1.5"),
        ("--lr_drop_at 0.5", "needs --lr_scheduler_type constant, but got linear"),
        ("--scheduler_name MultiStepLR --lr_scheduler_type cosine", "constant, but got cosine"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
        ("--hub_model_id ../secrets", "--hub_model_id: expected NAMESPACE/NAME, but got '../secrets'"),
        ("--streaming", "--streaming needs --slice_sampling all, but got balanced"),
        ("--license <b>mit</b>", "--license: expected an identifier of the Hub"),
        ("--output_dir runs/a`b", "--output_dir: the card shows the name of this folder"),
        ("--image_size 0", "--image_size must be at least 32, but got 0"),
        ("--max_train_samples 0", "--max_train_samples must be at least 1"),
        ("--max_eval_samples -3", "--max_eval_samples must be at least 1"),
        ("--train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
        ("--early_stopping_patience 0", "--early_stopping_patience must be at least 1"),
        ("--lr -1", "--learning_rate must be at least 0"),
        ("--lr nan", "--learning_rate must be at least 0, but got nan"),
        ("--ema_decay 1", "--ema_decay must be at least 0 and below 1, but got 1.0"),
        ("--seed -1", "--seed must be at least 0"),
        ("--epochs 0", "--num_train_epochs must be greater than 0"),
    ],
)
def test_values_that_the_pipeline_cannot_use_are_refused(words: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arguments(words.split())
    assert message in str(caught.value)


class TestSharding:
    def arguments_on_gpus(self, *words: str) -> RunArguments:
        _, _, run_args = parse_arguments(list(words))
        run_args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
        return run_args

    def test_fsdp_without_a_gpu_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(InputError, match=r"^FSDP needs a GPU; take accelerate_configs/multi_cpu.yaml$"):
            parse_arguments([])

    @pytest.mark.parametrize("words", ["--fsdp true", "--deepspeed zero.json"])
    def test_the_flags_are_refused(self, words: str) -> None:
        with pytest.raises(InputError, match=r"leave it out; the folder accelerate_configs"):
            parse_arguments(words.split())

    @pytest.mark.parametrize(
        ("config", "words", "settings", "message"),
        [
            ("fsdp2", [], {}, "--ema_decay does not work with FSDP; add --ema_decay 0, or take"),
            ("fsdp2", ["--ema_decay", "0"], {"FSDP_VERSION": "1"}, "from accelerate_configs/fsdp2.yaml"),
            ("fsdp2", ["--ema_decay", "0"], {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "full state"),
            ("deepspeed", [], {}, "--ema_decay does not work with DeepSpeed"),
        ],
    )
    def test_what_would_go_wrong_is_refused_by_name(
        self, config: str, words: list[str], settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_args = self.arguments_on_gpus(*words)
        shipped = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"} if config == "fsdp2" else {}
        used = "ACCELERATE_USE_FSDP" if config == "fsdp2" else "ACCELERATE_USE_DEEPSPEED"
        for name, value in {used: "true", **shipped, **settings}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            run_args.check_sharding()


def test_a_number_of_steps_may_replace_the_epochs() -> None:
    _, _, run_args = parse_arguments(["--max_steps", "3", "--epochs", "0"])
    assert run_args.max_steps == 3


def test_values_that_look_like_aliases_are_not_changed() -> None:
    words = ["--run_name", "AdamW", "--output_dir", "lr", "--config_overrides=depths=[1,1]"]
    model_args, _, run_args = parse_arguments(words)
    assert (run_args.run_name, run_args.output_dir) == ("AdamW", "lr")
    assert model_args.config_overrides == "depths=[1,1]"
    assert expand_aliases(["--optimizer=adafactor"]) == ["--optim", "adafactor"]


def test_flags_may_have_dashes_instead_of_underscores() -> None:
    words = ["--image-size=96", "--train-batch-size", "4", "--no-augmentation", "--run-name", "a-b"]
    _, data_args, run_args = parse_arguments(words)
    assert (data_args.image_size, data_args.augmentation) == (96, False)
    assert (run_args.per_device_train_batch_size, run_args.run_name) == (4, "a-b")


class TestHelp:
    @pytest.fixture(autouse=True)
    def no_usage(self) -> None:
        """Replace the check above, because `--help` prints a page of usage."""

    @pytest.fixture
    def page(self, capsys: pytest.CaptureFixture[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            parse_arguments(["--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    def test_our_sections_come_first(self, page: str) -> None:
        titles = re.findall(r"^\n(\w+):$", page, re.MULTILINE)
        assert titles == ["General", "Model", "Data", "Training", "Scoring", "Publishing", "TrainingArguments"]
        flags = re.findall(r"^  --(\w+)", page, re.MULTILINE)
        # `max_steps` is the first flag of TrainingArguments that we leave as it is.
        theirs = flags[flags.index("max_steps") :]
        assert not {item.name for item in OWN_FIELDS} & set(theirs)
        assert set(theirs) < {item.name for item in fields(TrainingArguments)}

    def test_every_flag_but_the_fixed_ones_shows_its_default(self, page: str) -> None:
        hidden = {name for name, *_ in FIXED} | {"resume_from_checkpoint", "hub_token"}
        # Each flag starts a line; its text follows on that line and on those below, which are indented further.
        entries = re.findall(r"^  --(\w+)(.*?)(?=^ {0,2}\S|\Z)", page, re.MULTILINE | re.DOTALL)
        assert [name for name, text in entries if "(default:" not in text] == []
        names = [name for name, _ in entries]
        shown = {item.name for group in (ModelArguments, DataArguments, RunArguments) for item in fields(group)}
        assert sorted(names) == sorted(shown - hidden | {"config"})

    def test_the_help_shows_defaults_the_recipe_flag_and_aliases(self, page: str) -> None:
        text = " ".join(page.split())
        assert "(default: gi_tract)" in text and "(default: 288)" in text and "--config FILE.yaml" in text
        assert f"(default: {DEFAULT_PRESET})" in text
        assert all(f"{alias} means {flag}" in text for alias, flag in ALIASES.items())

    def test_each_of_our_flags_has_a_text_and_a_section(self) -> None:
        assert all(item.metadata.get("help") and item.metadata.get("group") in SECTIONS for item in OWN_FIELDS)
