"""Trainings on data with other labels than Kaggle's, with organs that nobody has drawn, and with other distances."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.dataset_scans import list_dataset_scans
from gi_segmentation.data.prepared import PreparedSlices
from gi_segmentation.data.sampling import shown_organs
from gi_segmentation.data.slices import load_slices, select_samples
from gi_segmentation.data.transforms import unpack_labels
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_member
from gi_segmentation.inference.splits import read_split
from gi_segmentation.labels import GI_TRACT, LabelMode, LabelSet, find_labels
from gi_segmentation.models.configuration import Task, find_task, read_field_mm
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.models.masks import find_flips
from gi_segmentation.publishing.figures import compare_slice, fullest_slice
from gi_segmentation.training.pictures import score_slice
from gi_segmentation.training.training_ranges import find_field_mm, find_training_ranges
from run_segmentation import main
from tests.support.models import STEADY, save_model
from tests.support.own_data import SIDE, SLICE_SPACING_MM, SLICES, build_own_dataset, organ_square
from tests.support.training import arguments, make_trainer

TWELVE = LabelSet((*(f"Organ {letter}" for letter in "ABCDEFGHIJ"), "left kidney (whole)", "stomach"))
# Organ A is unknown in every scan, and the stomach in two of four.
UNKNOWN = {case: ["Organ A", *(["stomach"] if case in (1, 2) else [])] for case in range(1, 5)}


@pytest.fixture(scope="module")
def twelve_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_own_dataset(tmp_path_factory.mktemp("twelve"), TWELVE.names, UNKNOWN)


@pytest.fixture(scope="module")
def everyone(twelve_dir: Path) -> Dataset:
    return load_slices(DataArguments(dataset_name=str(twelve_dir), fold="all", image_size=SIDE))["train"]


def test_twelve_organs_reach_the_labels_of_the_loss(everyone: Dataset) -> None:
    prepared = PreparedSlices(everyone, SIDE)
    ((_, organs),) = prepared.read([("case4_day0", 2)])
    assert organs.shape == (SIDE, SIDE, 2) and prepared.cache is not None
    masks = unpack_labels(torch.from_numpy(organs.copy())[None], "multilabel", 12)[0]
    expected = np.zeros((12, SIDE, SIDE))
    for index in range(1, 12):
        expected[index][organ_square(index)] = 1
    np.testing.assert_array_equal(masks, expected)
    ids = unpack_labels(torch.from_numpy(organs.copy())[None], "multiclass", 12)[0]
    np.testing.assert_array_equal(ids, (expected * np.arange(1, 13)[:, None, None]).max(axis=0))
    # Without the cache, the same.
    plain = PreparedSlices(everyone.remove_columns(["pixels", "organs"]), SIDE)
    np.testing.assert_array_equal(next(plain.read([("case4_day0", 2)]))[1], organs)


def test_what_is_unknown_is_known_to_the_sampling_and_to_the_ranges(everyone: Dataset) -> None:
    known = PreparedSlices(everyone, SIDE).known
    assert known is not None
    for row, one, shown in zip(everyone, known, shown_organs(everyone), strict=True):
        expected = [organ not in UNKNOWN[row["case"]] for organ in TWELVE.names]
        assert one.tolist() == expected
        # The first slice shows no organ.
        assert shown.tolist() == (expected if row["slice"] > 1 else [False] * 12)
    ranges = find_training_ranges(everyone).ranges
    # Five slices of 10 x 8 pixels of 1.5 mm.
    volume_ml = 5 * 80 * 1.5**3 / 1000
    assert ranges["stomach_volume_ml"] == pytest.approx((volume_ml, volume_ml)) and "Organ A_volume_ml" not in ranges
    assert ranges["slice_distance_mm"] == (SLICE_SPACING_MM, SLICE_SPACING_MM)


def test_the_distance_between_slices_travels(everyone: Dataset) -> None:
    assert all(scan.spacing_mm == (SLICE_SPACING_MM, 1.5, 1.5) for scan in list_dataset_scans(everyone).values())
    # The next slice of a training has a distance of 3 mm, which is two slices here.
    prepared = PreparedSlices(everyone, SIDE, slice_context=1)
    shown = [prepared.find_shown("case1_day0", number) for number in range(1, SLICES + 1)]
    assert np.subtract(shown, shown[0][1]).tolist() == [
        [0, 0, 2], [0, 1, 3], [0, 2, 4], [1, 3, 5], [2, 4, 5], [3, 5, 5],
    ]  # fmt: skip
    assert find_field_mm(everyone) == [[96.0, 96.0], [96.0, 96.0]]
    assert find_field_mm(everyone.remove_columns(["slice_spacing"])) is None


def test_streamed_slices_are_those_of_the_stored_dataset(everyone: Dataset, twelve_dir: Path) -> None:
    flags = {"dataset_name": str(twelve_dir), "fold": "all", "image_size": SIDE}
    streamed = load_slices(DataArguments(**flags, streaming=True, slice_sampling="all"))["train"]
    assert find_labels(streamed.features) == TWELVE
    one, other = (PreparedSlices(rows, SIDE, slice_context=2) for rows in (streamed, everyone))
    np.testing.assert_array_equal(one.known, other.known)
    names = list(zip(everyone["scan"], everyone["slice"], strict=True))
    for left, right in zip(one.read(names), other.read(names), strict=True):
        np.testing.assert_array_equal(left[0], right[0])
        np.testing.assert_array_equal(left[1], right[1])


def test_a_left_kidney_is_never_shown_as_a_right_one(twelve_dir: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(arguments(twelve_dir, tmp_path))
    changes = [type(one).__name__ for one in trainer.transform.augment.args[0].transforms]
    assert "VerticalFlip" in changes and "HorizontalFlip" not in changes
    assert find_flips(TWELVE) == ((), (-2,)) and len(find_flips(GI_TRACT)) == 4


def test_a_checkpoint_is_not_scored_on_data_with_other_labels(everyone: Dataset, tmp_path: Path) -> None:
    member = load_member(str(save_model(tmp_path, "segformer", seed=0)), None, Computation(device="cpu"))
    with pytest.raises(
        InputError, match=r"expected a checkpoint with the labels of the dataset \(Organ A, .*fine-tune"
    ):
        read_split([member], everyone)


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_nobody_learns_from_an_organ_that_was_not_drawn(
    label_mode: LabelMode, twelve_dir: Path, tmp_path: Path
) -> None:
    flags = arguments(twelve_dir, tmp_path, config_overrides=json.dumps(STEADY), label_mode=label_mode)
    trainer, _ = make_trainer(flags)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["known"].dtype == torch.bool and batch["known"].shape == (4, 12) and not batch["known"][:, 0].any()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    head = trainer.model.decode_head.classifier
    if label_mode == "multilabel":
        assert not head.weight.grad[0].any() and not head.bias.grad[0].any()
        assert all(head.weight.grad[organ].any() for organ in range(1, 11))
    else:
        # A pixel of the background may be organ A.
        del batch["known"]
        assert loss < trainer.compute_loss(trainer.model, batch)


def test_a_training_of_twelve_organs_is_scored_and_loaded_and_trained_on_for_two(
    twelve_dir: Path, tmp_path: Path, blank_pictures: None
) -> None:
    flags = {"config_overrides": json.dumps(STEADY), "max_steps": 2, "max_eval_samples": None}
    main(arguments(twelve_dir, tmp_path / "twelve", slice_context=1, **flags))
    scores = json.loads((tmp_path / "twelve" / "run.json").read_text())["scores"]
    # The organ that nobody has drawn has no score.
    assert scores["eval_dice_Organ A"] is None and 0 <= scores["eval_dice_Organ B"] <= 1
    assert 0 < scores["eval_loss"] < 2 + math.log(13)
    model, _ = load_checkpoint(str(tmp_path / "twelve"))
    assert find_task(model.config) == Task(TWELVE, "multiclass") and model.config.slice_context == 1
    assert read_field_mm(model.config) == ((96.0, 96.0), (96.0, 96.0))
    assert model(pixel_values=torch.zeros(1, 3, SIDE, SIDE)).logits.shape[1] == 13

    two_dir = build_own_dataset(tmp_path / "two", ("spleen", "stomach"))
    flags |= {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "twelve"}
    main(arguments(two_dir, tmp_path / "again", label_mode="multilabel", **flags))
    assert json.loads((tmp_path / "again" / "run.json").read_text())["kept_labels"] == ["stomach"]
    model, _ = load_checkpoint(str(tmp_path / "again"))
    assert find_task(model.config) == Task(LabelSet(("spleen", "stomach")), "multilabel")


def test_an_organ_that_no_training_slice_shows_is_named(twelve_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_args = DataArguments(dataset_name=str(twelve_dir), image_size=SIDE)
    select_samples(load_slices(data_args), data_args, seed=0)
    assert [
        record.getMessage().split(",")[0] for record in caplog.records if "no training" in record.getMessage()
    ] == ["no training slice shows Organ A"]


def test_a_picture_does_not_score_what_nobody_has_drawn(twelve_dir: Path, tmp_path: Path) -> None:
    trainer, _ = make_trainer(arguments(twelve_dir, tmp_path, label_mode="multilabel"))
    model, split = trainer.model.eval(), trainer.eval_dataset
    shown = compare_slice(model, split, fullest_slice(split, split.with_format(None)[0]["scan"]))
    preds, truth = shown.predicted.masks, shown.truth.masks
    # The random model finds something there.
    assert preds[0].any()
    assert "not drawn: Organ A" in shown.truth.title
    known = [organ not in shown.truth.title.split("not drawn: ")[1].split(", ") for organ in TWELVE.names]
    assert shown.dice == score_slice(preds[known], truth[known]) > score_slice(preds, truth)
