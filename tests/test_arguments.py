"""Flags, recipes and the original project's flags end in the same arguments; a mistake ends in one clear sentence."""

from pathlib import Path

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from gi_segmentation.arguments import RunArguments, expand_aliases, parse_arguments
from gi_segmentation.errors import InputError
from tests.support.processes import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ORIGINAL_COMMAND = [
    *("--base_model", "openmmlab/upernet-convnext-small", "--train_batch_size", "32", "--weight_decay", "1e-4"),
    *("--optimizer", "AdamW", "--scheduler_name", "MultiStepLR", "--epochs", "6", "--lr", "2e-4"),
]


@pytest.fixture(autouse=True)
def no_usage(capsys: pytest.CaptureFixture[str]) -> object:
    """No test of this file but the one on --help may see a page of usage."""
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
def test_the_original_command_line_means_what_it_meant(joined: bool) -> None:
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
        ("--label_mode both", "invalid choice: 'both' (choose from 'multiclass', 'multilabel')"),
        ("--slice_sampling some", "invalid choice: 'some' (choose from 'all', 'balanced')"),
        ("--preset mine", "--preset: invalid choice: 'mine' (choose from 'mle_bench', 'first_place')"),
        ("--lr_scheduler_kwargs {bad", "expected JSON, got '{bad'"),
        ("--accelerator_config nowhere.json", "nowhere.json"),
    ],
)
def test_a_wrong_word_ends_in_one_sentence(words: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arguments(words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--load_best_model_at_end false", "--load_best_model_at_end must be True"),
        ("--metric_for_best_model loss", "--metric_for_best_model must be eval_dice"),
        ("--greater_is_better false", "--greater_is_better must be True"),
        ("--remove_unused_columns true", "--remove_unused_columns must be False"),
        ("--batch_eval_metrics false", "--batch_eval_metrics must be True"),
        ("--hub_strategy every_save", "--hub_strategy must be end"),
        ("--save_only_model", "--save_only_model must be False"),
        ("--restore_callback_states_from_checkpoint false", "--restore_callback_states_from_checkpoint must be True"),
        ("--prediction_loss_only", "--prediction_loss_only must be False"),
        ("--dataloader_drop_last", "--dataloader_drop_last must be False"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor must be 0.0"),
        ("--do_predict", "--do_predict must be False"),
        ("--resume_from_checkpoint run/checkpoint-1", "leave it out"),
        ("--eval_strategy steps --eval_steps 5", "save and eval strategy to match"),
        ("--lr_drop_at 0", "between 0 and 1, but got 0.0"),
        ("--lr_drop_at 1.5", "between 0 and 1, but got 1.5"),
        ("--lr_drop_at 0.5", "needs --lr_scheduler_type constant, but got linear"),
        ("--scheduler_name MultiStepLR --lr_scheduler_type cosine", "constant, but got cosine"),
        ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
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
def test_what_the_pipeline_cannot_honour_is_refused(words: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_arguments(words.split())
    assert message in str(caught.value)


def test_steps_may_stand_for_epochs() -> None:
    _, _, run_args = parse_arguments(["--max_steps", "3", "--epochs", "0"])
    assert run_args.max_steps == 3


def test_values_that_look_like_aliases_are_left_alone() -> None:
    words = ["--run_name", "AdamW", "--output_dir", "lr", "--config_overrides=depths=[1,1]"]
    model_args, _, run_args = parse_arguments(words)
    assert (run_args.run_name, run_args.output_dir) == ("AdamW", "lr")
    assert model_args.config_overrides == "depths=[1,1]"
    assert expand_aliases(["--optimizer=adafactor"]) == ["--optim", "adafactor"]


def test_every_flag_has_a_help_text_of_its_own() -> None:
    own = vars(RunArguments).get("__annotations__", {})
    fields = RunArguments.__dataclass_fields__
    assert all(fields[name].metadata.get("help") for name in own)


class TestHelp:
    @pytest.fixture(autouse=True)
    def no_usage(self) -> None:
        """Here a page of usage is what was asked for."""

    def test_help_shows_defaults_and_succeeds(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parse_arguments(["--help"])
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: gi_tract)" in text and "(default: 288)" in text and "--config FILE.yaml" in text
