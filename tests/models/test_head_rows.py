"""Which rows of the head a training keeps of a checkpoint with other labels, and which models are none of ours."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, SegformerConfig

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT, LabelMode, LabelSet
from gi_segmentation.models.configuration import Task, find_task, read_field_mm
from gi_segmentation.models.loading import load_checkpoint, load_model
from tests.support.models import FAMILIES, SIZE, save_model

# Two organs of Kaggle in another order, and a new one.
OTHER = LabelSet(("stomach", "liver (right)", "large_bowel"))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_head_are_kept_by_the_names_of_their_labels(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path, family, seed=0)
    base, _ = load_checkpoint(str(folder))
    model, _, kept = load_model(ModelArguments(model_name_or_path=str(folder)), OTHER, SIZE)
    assert find_task(model.config) == Task(OTHER, "multiclass")
    assert kept == ["background", "stomach", "large_bowel"]
    image = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        old, new = (one.eval()(pixel_values=image).logits for one in (base, model))
    # Background, large bowel, small bowel, stomach; and background, stomach, liver, large bowel.
    torch.testing.assert_close(new[:, [0, 1, 3]], old[:, [0, 3, 1]])
    assert not torch.isclose(new[:, 2], old[:, 2]).all()
    line = caplog.records[-1].getMessage()
    assert "rows for background, stomach, large_bowel, and starts anew for liver (right)" in line


@pytest.mark.parametrize("theirs", ["multiclass", "multilabel"])
def test_a_kept_organ_has_the_same_probability_in_the_other_mode_beside_the_background(
    theirs: LabelMode, tmp_path: Path
) -> None:
    ours: LabelMode = "multilabel" if theirs == "multiclass" else "multiclass"
    folder = save_model(tmp_path, "segformer", seed=0, label_mode=theirs)
    base, _ = load_checkpoint(str(folder))
    arguments = ModelArguments(model_name_or_path=str(folder), label_mode=ours)
    model, _, kept = load_model(arguments, LabelSet(("stomach",)), SIZE)
    assert kept == ["stomach"] and find_task(model.config) == Task(LabelSet(("stomach",)), ours)
    with torch.no_grad():
        image = torch.randn(1, 3, SIZE, SIZE)
        old, new = (one.eval()(pixel_values=image).logits for one in (base, model))
    expected = old[:, [0, 3]].softmax(dim=1)[:, 1] if theirs == "multiclass" else old[:, 2].sigmoid()
    found = new.softmax(dim=1)[:, 1] if ours == "multiclass" else new[:, 0].sigmoid()
    torch.testing.assert_close(found, expected)


def test_a_checkpoint_without_any_of_the_labels_starts_anew(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "segformer", seed=0, label_mode="multilabel")
    arguments = ModelArguments(model_name_or_path=str(folder), label_mode="multilabel")
    model, _, kept = load_model(arguments, LabelSet(("liver", "spleen", "bladder")), SIZE)
    assert kept == []
    # Three labels as before, so the rows of the checkpoint would fit by chance. Theirs have a deviation of 3.
    assert model.decode_head.classifier.weight.std() < 0.5


def test_the_task_of_a_checkpoint_survives_stock_transformers(tmp_path: Path) -> None:
    for number, mode in ((1, "multiclass"), (1, "multilabel"), (30, "multiclass"), (30, "multilabel")):
        labels = LabelSet(tuple(f"Organ {place}" for place in range(number)))
        arguments = ModelArguments(model_type="segformer", label_mode=mode)  # type: ignore[arg-type]
        model = load_model(arguments, labels, SIZE).model
        model.config.save_pretrained(tmp_path)
        AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        assert find_task(AutoConfig.from_pretrained(tmp_path / "again")) == Task(labels, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [
        [f"LABEL_{place}" for place in range(4)],
        ["road", "sidewalk", "building", "wall", "fence"],
        ["background", "aeroplane", "bicycle", "bird"],
        [f"thing {place}" for place in range(150)],
        ["background", "background", "liver"],
        ["background"],
    ],
)
def test_other_models_are_no_checkpoints_of_ours(names: list[str]) -> None:
    config = SegformerConfig(id2label=dict(enumerate(names)))
    assert find_task(config) is None
    # The first versions wrote nothing but the labels.
    for mode in ("multiclass", "multilabel"):
        channels = dict(enumerate(GI_TRACT.channels(mode)))  # type: ignore[arg-type]
        assert find_task(SegformerConfig(id2label=channels)) == Task(GI_TRACT, mode)  # type: ignore[arg-type]


def test_another_model_with_names_of_organs_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "segformer", seed=0)
    config = AutoConfig.from_pretrained(folder, id2label=dict(enumerate(["background", "wall", "sky", "tree"])))
    del config.slice_context
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(folder)
    with pytest.raises(InputError, match="got 4: background, wall, sky, tree; fine-tune it first"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("value", [[350, 400], [[400, 350], [1, 2]], [[0, 1], [1, 2]], "350", [["a", 2], [1, 2]]])
def test_a_field_of_view_of_another_form_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"config.json: expected the smallest .* as field_mm, but got"):
        read_field_mm(PreTrainedConfig(field_mm=value))
