"""Weights that do not fit, number formats, channels, processors and foreign folders: used rightly, or one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerImageProcessorPil,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import load_checkpoint, load_model
from gi_segmentation.models.normalisation import find_normalisation
from tests.support.models import FAMILIES, SIZE, change_config, save_model, write_base

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours. Tests only read it."""
    return save_model(tmp_path_factory.mktemp("whole"), "segformer", seed=0)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def train_from(folder: Path, **arguments: Any) -> tuple[Any, Any]:
    return load_model(ModelArguments(model_name_or_path=str(folder), **arguments), GI_TRACT, SIZE)[:2]


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def refusals(folder: Path) -> tuple[str, str]:
    """Return the message of a training and that of a prediction."""
    said = []
    for load in (train_from, lambda folder: load_checkpoint(str(folder))):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
        said.append(str(caught.value))
    return said[0], said[1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_wrappers_are_taken_off(
    prefix: str, whole: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_tensors(copied, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    expected = load_checkpoint(str(whole))[0].state_dict()
    for model in (load_checkpoint(str(copied))[0], train_from(copied)[0]):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert f"names of a wrapper, such as {prefix}" in caplog.text


def test_prefixes_are_taken_off_within_a_model_and_in_shards(whole: Path, copied: Path) -> None:
    expected = load_checkpoint(str(whole))[0]
    change_tensors(copied, lambda ones: {n.replace("segformer.", "segformer._orig_mod."): t for n, t in ones.items()})
    found = [load_checkpoint(str(copied))[0]]
    (copied / "model.safetensors").unlink()
    expected.save_pretrained(copied, max_shard_size="3KB")
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"module.{name}": shard for name, shard in index["weight_map"].items()}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in copied.glob("*.safetensors"):
        save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    found.append(load_checkpoint(str(copied))[0])
    for model in found:
        assert all(torch.equal(one, expected.state_dict()[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "training", "prediction"),
    [
        (lambda name, n: f"foreign.{name}", "only 0 of the 52 tensors of a segformer's encoder (0 of 3,200 weights)",
         "lacks 64 tensors"),
        (lambda name, n: name if name.startswith("decode") else None, "only 0 of the 52", "lacks 52 tensors"),
        (lambda name, n: name if n % 3 == 0 else None, "of the 52 tensors of a", "lacks 42 tensors"),
        (lambda name, n: None if name.startswith("decode") else name, None, "lacks 12 tensors"),
        (lambda name, n: name.removeprefix("segformer.") if name.startswith("segf") else None, None, "lacks 12"),
    ],
    ids=["foreign", "only the head", "a third", "only the encoder", "an encoder alone"],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_numbers(
    change: Callable[[str, int], str | None], training: str | None, prediction: str, copied: Path
) -> None:
    def rename(tensors: Tensors) -> Tensors:
        names = {name: change(name, number) for number, name in enumerate(tensors)}
        return {new: tensors[name] for name, new in names.items() if new is not None}

    change_tensors(copied, rename)
    with pytest.raises(InputError, match=prediction):
        load_checkpoint(str(copied))
    if training is None:
        train_from(copied)
        return
    with pytest.raises(InputError) as caught:
        train_from(copied)
    assert training in str(caught.value)


def break_one(value: float) -> Callable[[Tensors], Tensors]:
    """Return a change that gives one weight another value."""

    def change(tensors: Tensors) -> Tensors:
        tensors["decode_head.classifier.weight"].view(-1)[3] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_one(float("nan")), "1 of the 32 values of decode_head.classifier.weight are NaN or infinite"),
        (break_one(float("-inf")), "decode_head.classifier.weight are NaN or infinite"),
        (lambda ones: {n: t.to(torch.int8) for n, t in ones.items()}, "is quantized (its numbers are I8)"),
        (lambda ones: {n: t.to(torch.float8_e4m3fn) for n, t in ones.items()}, "(its numbers are F8_E4M3)"),
    ],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(
    change: Callable[[Tensors], Tensors], message: str, copied: Path
) -> None:
    assert all(message in said for said in refusals(change_tensors(copied, change)))


def test_files_that_do_not_belong_together_are_refused(copied: Path) -> None:
    change_config(copied, hidden_sizes=[16, 16])
    assert "has the shape [8, 8] in its file, but its config.json makes it [8, 16]" in refusals(copied)[1]
    # Fewer layers than the file has: the model would load, and compute something else.
    change_config(copied, hidden_sizes=[8, 8], depths=[1, 1], num_encoder_blocks=2)
    change_tensors(copied, lambda ones: {**ones, "segformer.more.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"1 tensors for which its config\.json makes no place, the first segformer"):
        load_checkpoint(str(copied))
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    assert all("its weights are damaged (" in said for said in refusals(copied))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_in_32_bits(dtype: torch.dtype, copied: Path, tmp_path: Path) -> None:
    AutoModelForSemanticSegmentation.from_pretrained(copied, dtype=dtype).save_pretrained(copied)
    assert str(dtype).removeprefix("torch.") in (copied / "config.json").read_text()
    for model in (train_from(copied)[0], load_checkpoint(str(copied))[0]):
        assert {one.dtype for one in model.state_dict().values()} == {torch.float32, torch.int64}
        model.save_pretrained(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(InputError, match="--config_overrides: dtype cannot be set"):
        load_model(ModelArguments(model_type="segformer", config_overrides="dtype=float16"), GI_TRACT, SIZE)


@pytest.mark.parametrize(("family", "channels"), [("segformer", 1), ("segformer", 4), ("upernet", 1), ("beit", 1)])
def test_other_numbers_of_channels_are_refused(family: str, channels: int, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    getattr(config, "backbone_config", config).num_channels = channels
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(tmp_path)
    SegformerImageProcessorPil().save_pretrained(tmp_path)
    expected = "expected a model with 3 input channels"
    assert all(expected in said and f"num_channels {channels}" in said for said in refusals(tmp_path))
    if family == "segformer":
        change_config(tmp_path, num_channels=3)
        with pytest.raises(InputError, match=rf"has the shape \[8, {channels}, 7, 7\] in its file"):
            train_from(tmp_path)


def test_another_order_of_the_labels_makes_the_last_layer_new(
    copied: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(copied, id2label={0: "background", 1: "stomach", 2: "small_bowel", 3: "large_bowel"})
    model, theirs = train_from(copied)[0], load_checkpoint(str(whole))[0].state_dict()
    new = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[name])}
    assert new == {"decode_head.classifier.weight"} or new == {
        "decode_head.classifier.weight",
        "decode_head.classifier.bias",
    }
    assert "newly made: decode_head.classifier.weight" in caplog.text
    # Four labels of another task, too. And an encoder that was trained to classify is a normal start.
    caplog.clear()
    train_from(write_base(tmp_path / "foreign", "segformer", num_labels=4))
    assert "newly made: decode_head.classifier.weight" in caplog.text
    encoder = SegformerForImageClassification(SegformerConfig(**FAMILIES["segformer"]))
    encoder.save_pretrained(tmp_path / "encoder")
    SegformerImageProcessorPil().save_pretrained(tmp_path / "encoder")
    tensors = train_from(tmp_path / "encoder")[0].state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items() if name in tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3],
         "image_std": [0.4, 0.5, 0.6]},
        {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False},
        {"do_rescale": True, "rescale_factor": 1 / 127.5, "do_normalize": True, "image_mean": [1.0, 1.0, 1.0],
         "image_std": [1.0, 1.0, 1.0]},
        {"do_rescale": False, "do_normalize": True, "image_mean": [120.0, 110.0, 100.0],
         "image_std": [50.0, 60.0, 70.0]},
    ],
)  # fmt: skip
def test_a_processor_is_used_as_transformers_uses_it(settings: dict[str, Any], copied: Path) -> None:
    path = copied / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stock = SegformerImageProcessorPil.from_pretrained(copied)(image.numpy(), return_tensors="pt")["pixel_values"][0]
    for processor in (train_from(copied)[1], load_checkpoint(str(copied))[1]):
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        torch.testing.assert_close((image / 255 - mean) / std, stock, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_rescale": False, "image_mean": 0.5, "image_std": 0.5}, "does not say whether the model takes intens"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale is false, so"),
        ({"do_normalize": "no"}, "expected true or false as do_normalize, but got 'no'"),
        ({"rescale_factor": 0, "do_normalize": False}, "expected a number above 0 as rescale_factor, but got 0"),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"expected three numbers as image_mean, but got \[0.5\]"),
        ({"image_mean": [0.5] * 4, "image_std": 0.5}, "expected three numbers as image_mean"),
        ({"image_mean": 0.5, "image_std": [1, 0, 1]}, "expected three numbers above 0 as image_std"),
        ({"image_mean": float("nan"), "image_std": 1}, "expected three numbers as image_mean, but got nan"),
        ({"image_std": 1}, "expected three numbers as image_mean, but got None"),
        ({"image_mean": [123.7, 116.3, 103.5], "image_std": 58.4}, "within the range of the intensities, 0 to 1"),
        ({"rescale_offset": True}, "rescale_offset true is not supported"),
    ],
)
def test_a_processor_that_says_too_little_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_normalisation(settings)


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"size": {"shortest_edge": 64}}, {"do_center_crop": True}])
def test_a_processor_with_another_geometry_cannot_predict(settings: dict[str, Any], copied: Path) -> None:
    path = copied / "preprocessor_config.json"
    content = {**json.loads(path.read_text()), "image_processor_type": "BeitImageProcessor", **settings}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: expected "):
        load_checkpoint(str(copied))
    # A training makes its own geometry.
    train_from(copied)


CONFIG = json.dumps({"model_type": "segformer"})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json and no model.safetensors"),
        ({"config.json": CONFIG}, "no file named model.safetensors"),
        ({"config.json": CONFIG, "pytorch_model.bin": ""}, "a pickle (pytorch_model.bin), which may run any code"),
        ({"best.pt": "", "args.yaml": ""}, "a pickle (best.pt)"),
        ({"config.json": CONFIG, "tf_model.h5": ""}, "in another format (tf_model.h5)"),
        ({"onnx/model.onnx": "", "config.json": CONFIG}, "an ONNX file, which cannot be loaded"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "a PEFT adapter and no whole model"),
        ({"model_index.json": "{}"}, "a pipeline of diffusers"),
        ({"model.safetensors": ""}, "weights but no config.json"),
        ({"run.json": "{}", "checkpoint-3/model.safetensors": ""}, "a training that has not ended"),
        ({"config.json": "{", "model.safetensors": ""}, "is not a valid JSON file"),
        ({"config.json": "[]", "model.safetensors": ""}, "is no JSON object"),
        ({"config.json": "{}", "model.safetensors": ""}, "has no model_type; expected one of the families beit"),
        ({"config.json": '{"model_type": "own", "auto_map": {"AutoConfig": "o.O"}}', "model.safetensors": ""},
         "it is a own, which transformers does not know, and its own code is never run; expected one of"),
        ({"config.json": '{"model_type": "mask2former"}', "model.safetensors": ""},
         "it is a mask2former, which is no model for semantic segmentation; expected one of the families beit"),
        ({"config.json": '{"model_type": "detr", "architectures": ["D"]}', "model.safetensors": ""}, "a detr (D)"),
        ({"config.json": '{"model_type": "swin"}', "model.safetensors": ""}, "the --backbone of --model_type upernet"),
        ({"config.json": '{"model_type": "segformer", "quantization_config": {"bits": 8}}', "model.safetensors": ""},
         "its weights are quantized; name the segformer from which it was made"),
    ],
)  # fmt: skip
def test_a_folder_with_anything_else_is_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert all(message in said for said in refusals(tmp_path))
