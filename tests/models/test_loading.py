"""Each family starts from random weights or from a checkpoint, has our labels, and is loaded as it was saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.heads import enable_gradient_checkpointing, find_encoder
from gi_segmentation.models.loading import count_parameters, load_checkpoint, load_model
from tests.support.models import FAMILIES, ID2LABEL, MEAN, SIZE, STD, new_model, save_model, write_base


def random_tables(model: PreTrainedModel) -> None:
    """Fill the tables of positions with random values. They start as zeros, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "bias_table" in name:
            torch.nn.init.normal_(parameter)


def same_tensors(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_a_model_with_random_weights_has_our_labels(self, family: str) -> None:
        model, processor = new_model(family)
        assert (model.config.model_type, model.config.id2label) == (family, ID2LABEL)
        assert model.config.label2id == {label: index for index, label in ID2LABEL.items()}
        with torch.no_grad():
            logits = model.eval()(pixel_values=torch.randn(2, 3, SIZE, SIZE)).logits
        assert logits.shape[:2] == (2, 4) and torch.isfinite(logits).all()
        assert processor.size == {"height": SIZE, "width": SIZE}
        assert count_parameters(model) == sum(p.numel() for p in model.parameters()) < 100_000

    def test_saving_and_loading_keeps_every_tensor(self, family: str, tmp_path: Path) -> None:
        model, processor = new_model(family)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded, loaded_processor = load_checkpoint(str(tmp_path))
        assert same_tensors(model, loaded) and not loaded.training
        assert type(loaded) is type(model)
        assert loaded_processor.size == processor.size and loaded_processor.image_mean == processor.image_mean
        assert not list(tmp_path.glob("*.bin"))

    def test_fine_tuning_replaces_only_the_head(
        self, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base_folder = write_base(tmp_path, family)
        base = AutoModelForSemanticSegmentation.from_pretrained(base_folder)
        # The limits of a checkpoint that we published were learnt from its own predictions.
        path = base_folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "postprocessing": {"stomach": {}}}))
        model, processor, _ = load_model(ModelArguments(model_name_or_path=str(base_folder)), GI_TRACT, SIZE)
        old, new = base.state_dict(), model.state_dict()
        assert new.keys() == old.keys()
        changed = [name for name in new if old[name].shape != new[name].shape]
        assert changed and all(old[name].shape[0] == 150 and new[name].shape[0] == 4 for name in changed)
        assert all(torch.equal(old[name], new[name]) for name in new if name not in changed)
        assert all(
            "classifier" in name or name.startswith(("head.head.4", "auxiliary_head.head.4")) for name in changed
        )
        said = [record.getMessage() for record in caplog.records if record.name.startswith("gi_segmentation.models")]
        assert sorted(line.split()[2] for line in said[:-1]) == sorted(changed)
        assert said[-1] == f"all other {len(new) - len(changed)} tensors were loaded from the checkpoint"
        assert model.config.id2label == ID2LABEL and not hasattr(model.config, "postprocessing")
        assert (list(processor.image_mean), list(processor.image_std)) == (MEAN, STD)

    def test_a_multilabel_checkpoint_keeps_its_channels_and_context(self, family: str, tmp_path: Path) -> None:
        arguments = ModelArguments(
            model_type=family, config_overrides=json.dumps(FAMILIES[family]), label_mode="multilabel"
        )
        model, processor, _ = load_model(arguments, GI_TRACT, SIZE, slice_context=2)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded, _ = load_checkpoint(str(tmp_path))
        assert (
            list((loaded.config.id2label or {}).values()) == list(GI_TRACT.names) and loaded.config.slice_context == 2
        )
        with torch.no_grad():
            logits = loaded(pixel_values=torch.randn(1, 3, SIZE, SIZE)).logits
        assert logits.shape[1] == 3

    def test_another_input_size_keeps_the_weights_and_interpolates_position_tables(
        self, family: str, tmp_path: Path
    ) -> None:
        folder = write_base(tmp_path, family)
        base = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
        random_tables(base)
        base.save_pretrained(folder)
        same, _, _ = load_model(ModelArguments(model_name_or_path=str(folder)), GI_TRACT, SIZE)
        larger, processor, _ = load_model(ModelArguments(model_name_or_path=str(folder)), GI_TRACT, 96)
        assert processor.size == {"height": 96, "width": 96}
        old, kept, new = base.state_dict(), same.state_dict(), larger.state_dict()
        tables = {name for name in old if "position_embeddings" in name or "bias_table" in name}
        assert all(torch.equal(old[name], kept[name]) for name in old if old[name].shape == kept[name].shape)
        for name in tables:
            assert torch.equal(kept[name], old[name])
            assert new[name].shape != old[name].shape
        # Given a larger image, the base model interpolates its tables in each forward pass. Our tables were
        # interpolated once, when the model was loaded. Both must give the same features.
        image = torch.randn(1, 3, 96, 96)
        with torch.no_grad():
            theirs = find_encoder(base)(image)
            ours = find_encoder(larger.eval())(image)
        for one, other in zip(theirs.to_tuple(), ours.to_tuple(), strict=True):
            torch.testing.assert_close(other, one) if isinstance(one, torch.Tensor) else None

    def test_gradient_checkpointing_does_not_change_a_gradient(self, family: str) -> None:
        model, _ = new_model(family)
        model.train()
        images = torch.randn(2, 3, SIZE, SIZE)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                enable_gradient_checkpointing(model)
                model.activation_checkpointing_enable()
                assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            torch.manual_seed(0)
            model.zero_grad()
            model(pixel_values=images).logits.square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("image_size", [32, 48, 80, 112])
    def test_a_family_accepts_these_input_sizes(self, family: str, image_size: int) -> None:
        text = json.dumps(FAMILIES[family])
        model, _, _ = load_model(ModelArguments(model_type=family, config_overrides=text), GI_TRACT, image_size)
        with torch.no_grad():
            logits = model.eval()(pixel_values=torch.randn(2, 3, image_size, image_size)).logits
        assert logits.shape[:2] == (2, 4) and torch.isfinite(logits).all()

    def test_a_checkpoint_of_ours_keeps_its_head(self, family: str, tmp_path: Path) -> None:
        model, processor = new_model(family)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, _, _ = load_model(ModelArguments(model_name_or_path=str(tmp_path)), GI_TRACT, SIZE)
        assert same_tensors(model, again)

    def test_stock_transformers_reads_processor_and_labels(self, family: str, tmp_path: Path) -> None:
        model, processor, _ = load_model(
            ModelArguments(model_name_or_path=str(write_base(tmp_path / "base", family))), GI_TRACT, SIZE
        )
        model.save_pretrained(tmp_path / "ours")
        processor.save_pretrained(tmp_path / "ours")
        stock = AutoImageProcessor.from_pretrained(tmp_path / "ours")
        assert (list(stock.image_mean), list(stock.image_std)) == (MEAN, STD)
        assert dict(stock.size) == {"height": SIZE, "width": SIZE}
        image = torch.rand(1, 3, SIZE, SIZE)
        pixel_values = stock(image, do_resize=False, do_rescale=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixel_values[0, 2], (image[0, 2] - MEAN[2]) / STD[2])
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert config["id2label"] == {str(index): name for index, name in ID2LABEL.items()}


@pytest.mark.parametrize(
    ("family", "image_size", "nearest"),
    [("dpt", 100, "96 and 112"), ("beit", 33, "32 and 48"), ("upernet", 255, "252 and 256"), ("dpt", 36, "32 and 48")],
)
def test_an_input_size_that_a_family_cannot_take_is_refused(family: str, image_size: int, nearest: str) -> None:
    text = json.dumps(FAMILIES[family])
    with pytest.raises(InputError, match=f"--image_size {image_size}: .*the nearest it can take: {nearest}"):
        load_model(ModelArguments(model_type=family, config_overrides=text), GI_TRACT, image_size)


def test_an_input_size_that_a_checkpoint_cannot_take_is_refused(tmp_path: Path) -> None:
    base = str(write_base(tmp_path, "beit"))
    with pytest.raises(InputError, match=r"^--image_size 100: beit cuts patches of 16 pixels"):
        load_model(ModelArguments(model_name_or_path=base), GI_TRACT, 100)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small SegFormer of ours that a test may damage."""
    model, processor = new_model("segformer")
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class TestErrors:
    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        name = str(tmp_path / "nowhere")
        with pytest.raises(InputError, match="nowhere: not a checkpoint"):
            load_checkpoint(name)
        with pytest.raises(InputError, match=r"--model_name_or_path .*nowhere"):
            load_model(ModelArguments(model_name_or_path=name), GI_TRACT, SIZE)

    def test_a_folder_with_other_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("nothing here")
        with pytest.raises(InputError, match="not a checkpoint of this project"):
            load_checkpoint(str(tmp_path))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
    @pytest.mark.parametrize("damage", ["missing", "cut off"])
    def test_a_damaged_checkpoint_is_refused(self, name: str, damage: str, checkpoint: Path) -> None:
        path = checkpoint / name
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match="not a checkpoint of this project"):
            load_checkpoint(str(checkpoint))

    def test_a_checkpoint_that_lacks_a_tensor_is_refused(self, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors["decode_head.classifier.weight"]
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"lacks 1 tensors, the first decode_head\.classifier\.weight"):
            load_checkpoint(str(checkpoint))

    def test_other_labels_than_ours_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"got 150: LABEL_0, .*, \.\.\.; fine-tune it first"):
            load_checkpoint(str(write_base(tmp_path, "segformer")))

    def test_the_names_of_our_labels_in_another_order_are_refused_without_a_sign_of_our_training(
        self, checkpoint: Path
    ) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        del config["slice_context"]
        config["id2label"] = {"0": "background", "1": "stomach", "2": "small_bowel", "3": "large_bowel"}
        (checkpoint / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="got 4: background, stomach, small_bowel, large_bowel"):
            load_checkpoint(str(checkpoint))

    def test_a_pickle_is_not_loaded(self, checkpoint: Path) -> None:
        weights = checkpoint / "model.safetensors"
        torch.save(load_file(weights), checkpoint / "pytorch_model.bin")
        weights.unlink()
        with pytest.raises(InputError, match="not a checkpoint of this project"):
            load_checkpoint(str(checkpoint))

    @pytest.mark.parametrize("load", [load_checkpoint, lambda name: load_model(ModelArguments(name), GI_TRACT, SIZE)])
    def test_a_model_for_classification_is_refused(self, load: Any, tmp_path: Path) -> None:
        config = AutoConfig.for_model("convnext", depths=[1, 1], hidden_sizes=[4, 4], num_stages=2, num_labels=4)
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
        SegformerImageProcessorPil().save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"convnext|ConvNext"):
            load(str(tmp_path))


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    folder, marker = save_model(tmp_path / "model", "segformer", seed=0), tmp_path / "marker"
    (folder / "own_code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        path = folder / name
        kinds = ("AutoConfig", "AutoModelForSemanticSegmentation", "AutoImageProcessor")
        code = {"auto_map": dict.fromkeys(kinds, "own_code.Own"), "trust_remote_code": True}
        path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    # The families are known, so `transformers` has classes of its own for them and needs no other code.
    load_checkpoint(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(InputError):
        load_checkpoint(str(folder))
    with pytest.raises(InputError):
        load_model(ModelArguments(model_name_or_path=str(folder)), GI_TRACT, 64)
    assert not marker.exists()


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    folder, marker = save_model(tmp_path / "model", "segformer", seed=0), tmp_path / "marker"
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        load_checkpoint(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("preprocessor_config.json", "size", {"height": 60_000, "width": 60_000}),
        ("preprocessor_config.json", "image_std", [1, 0, 1]),
        ("preprocessor_config.json", "image_mean", ["a", 0, 1]),
        ("config.json", "slice_context", -1),
        ("config.json", "hidden_sizes", "x"),
    ],
)
def test_absurd_settings_of_a_checkpoint_are_refused(file: str, key: str, value: object, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", "segformer", seed=0) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError):
        load_checkpoint(str(path.parent))
