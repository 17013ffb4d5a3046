"""`--config_overrides` and `--model_type` say which model is made with random weights."""

from typing import Any

import pytest

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import load_model
from gi_segmentation.models.random import parse_overrides
from tests.support.models import FAMILIES, SIZE, new_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("depths=[1,2],drop_path_rate=0.1", {"depths": [1, 2], "drop_path_rate": 0.1}),
        ("initializer_range=2e-2, rates=[1e-3]", {"initializer_range": 0.02, "rates": [0.001]}),
        ('{"a": {"b": 1e-05}, "c": null}', {"a": {"b": 1e-5}, "c": None}),
        ("use_mean_pooling=false,hidden_act=gelu", {"use_mean_pooling": False, "hidden_act": "gelu"}),
    ],
)
def test_overrides_are_parsed(text: str, expected: dict[str, Any]) -> None:
    assert parse_overrides(text) == expected


@pytest.mark.parametrize("text", ["depths", "depths=", "depths=[1,1", "a=b=c", "1=2", '{"a": ', "a=1}", "[1, 2]"])
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected key=value,key=value or JSON"):
        parse_overrides(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depht": [1, 1]}, "segformer has no depht"),
        ({"to_dict": 1}, "segformer has no to_dict"),
        ({"image_size": 32}, "segformer has no image_size"),
        ({"num_labels": 7}, "num_labels cannot be set"),
        ({"num_channels": 1}, "num_channels cannot be set"),
        ({"depths": "many"}, "depths"),
        ({"hidden_sizes": [8]}, "these values make no segformer"),
    ],
)
def test_overrides_that_no_segformer_has_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"--config_overrides: .*{message}"):
        new_model("segformer", overrides)


def test_an_override_must_not_contradict_the_image_size() -> None:
    assert new_model("beit", {**FAMILIES["beit"], "image_size": SIZE})[0].config.image_size == SIZE
    with pytest.raises(InputError, match="image_size is 32, but --image_size 64"):
        new_model("beit", {**FAMILIES["beit"], "image_size": 32})


def test_overrides_need_a_model_type() -> None:
    with pytest.raises(InputError, match="needs --model_type"):
        load_model(ModelArguments(config_overrides="depths=[1,1]"), GI_TRACT, SIZE)


@pytest.mark.parametrize("family", ["segfromer", "vit", "bert", ""])
def test_an_unknown_family_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"--model_type: expected one of .*segformer.*; got"):
        load_model(ModelArguments(model_type=family), GI_TRACT, SIZE)
