"""At each evaluation of a training, the log gets the same few slices with the outlines of this moment's model."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from gi_segmentation.inference.splits import predict_split
from gi_segmentation.review.overlays import draw_panels
from gi_segmentation.training.pictures import (
    TAG,
    PictureCallback,
    find_picture_callback,
    pick_slices,
    read_row,
    render,
    show_slice,
)
from gi_segmentation.training.trainer import SegmentationTrainer, train
from tests.support.training import arguments, make_trainer

EMPTY = {"large_bowel": "", "small_bowel": "", "stomach": ""}
SHOWN = {**EMPTY, "stomach": "1 4"}


def slices(*scans: tuple[int, str, int, int]) -> Dataset:
    """Make rows of scans: the patient, the name, some empty slices, and then some slices that show an organ."""
    rows = [(case, name, one) for case, name, empty, shown in scans for one in [EMPTY] * empty + [SHOWN] * shown]
    return Dataset.from_dict(dict(zip(("case", "scan", "segmentation"), zip(*rows, strict=True), strict=True)))


def read_pictures(log_dir: Path) -> dict[int, np.ndarray]:
    """Return the pictures in the log of TensorBoard by step."""
    found = {}
    for path in log_dir.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        for event in events.Images(TAG) if TAG in events.Tags()["images"] else ():
            assert event.step not in found
            found[event.step] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    return found


def find_callback(trainer: SegmentationTrainer) -> PictureCallback:
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, PictureCallback))
    return callback


def test_slices_come_from_different_scans() -> None:
    rows = slices((1, "a", 2, 3), (2, "b", 2, 5), (3, "c", 4, 0))
    assert pick_slices(rows, number=2) == [9, 3]


def test_slices_come_from_different_patients_before_a_second_scan_of_one() -> None:
    rows = slices((1, "a", 0, 5), (1, "b", 0, 5), (2, "c", 0, 3), (3, "d", 0, 1))
    assert pick_slices(rows, number=3) == [2, 11, 13]
    assert pick_slices(rows, number=4) == [2, 11, 13, 7]


def test_no_patient_is_left_out_if_there_are_fewer_patients_than_slices() -> None:
    rows = slices((1, "a", 0, 7), (2, "b", 0, 5), (3, "c", 0, 3))
    assert pick_slices(rows, number=4) == [2, 4, 9, 13]


def test_slices_of_one_scan_are_spread_over_the_organs() -> None:
    assert pick_slices(slices((1, "a", 10, 9)), number=3) == [12, 14, 16]


def test_if_few_slices_show_organs_fewer_are_picked() -> None:
    assert pick_slices(slices((1, "a", 3, 1)), number=4) == [3]


def test_tensorboard_gets_the_same_slices_at_each_evaluation_and_after_a_resumption(
    dataset_dir: Path, tmp_path: Path
) -> None:
    # The slices of the other tests are cached, and their models have one label per pixel.
    flags = {"label_mode": "multilabel", "streaming": True, "cache_slices": False, "learning_rate": 1e-4}
    settings = {"report_to": "tensorboard", "max_eval_samples": None, "max_steps": 2, **flags}
    words = arguments(dataset_dir, tmp_path, **settings)
    trainer, _ = make_trainer(words)
    save = trainer.save_model

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        trainer.control.should_training_stop = True

    trainer.save_model = save_and_stop  # type: ignore[method-assign]
    trainer.train()
    resumed, samples = make_trainer(words)
    train(resumed)
    pictures = read_pictures(tmp_path)
    # Each evaluation of the training has one. The scoring of the best checkpoint at the end has none.
    assert sorted(pictures) == [1, 2]
    indices, labels = find_callback(trainer).indices, find_callback(trainer).labels
    assert find_callback(resumed).indices == indices
    # Two patients are held back.
    assert len(indices) == 4 and len({samples["validation"][index]["case"] for index in indices}) == 2
    for step, picture in pictures.items():
        trainer.load_training_weights(tmp_path / f"checkpoint-{step}")
        model, dataset = trainer.model.eval(), trainer.eval_dataset
        preds = [next(predict_split(model, dataset.select([index]))) for index in indices]
        assert all(masks.any() for masks in preds)
        shown = [show_slice(read_row(dataset, index), masks) for index, masks in zip(indices, preds, strict=True)]
        panels = [*(one.truth for one in shown), *(one.predicted for one in shown)]
        assert np.array_equal(picture, render(draw_panels(panels, labels, columns=4))), step


@pytest.mark.parametrize(
    ("reporters", "where", "expected"),
    [
        ([], "all", False),
        (["tensorboard"], "local", True),
        (["tensorboard"], "none", False),
        (["tensorboard", "clearml"], "local", False),
        (["wandb", "trackio"], "local", False),
        (["wandb"], "all", True),
    ],
)
def test_pictures_leave_the_machine_only_if_somebody_says_so(
    reporters: list[str], where: str, expected: bool, dataset_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path))
    # Not from the command line, because not all of these programs are installed.
    trainer.args.report_to, trainer.args.log_pictures = reporters, where
    found = find_picture_callback(trainer.eval_dataset, trainer.compute_metrics, [], trainer.args)
    assert bool(found) == expected


def test_a_log_in_the_storage_of_a_cloud_gets_no_pictures(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The writer takes any address that its file system knows; `file://` stands for that of a cloud.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "file://log")
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path / "run", report_to="tensorboard", max_steps=1))
    trainer.train()
    assert list(tmp_path.rglob("events.out.tfevents.*")) and not read_pictures(tmp_path)


def test_a_log_that_fails_does_not_end_the_training(
    dataset_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = make_trainer(arguments(dataset_dir, tmp_path, report_to="tensorboard", max_steps=2))

    class Full:
        """The writer of a disk without room for pictures."""

        log_dir = str(tmp_path)

        def __getattr__(self, name: str) -> Any:
            def write(*args: Any, **kwargs: Any) -> None:
                if name == "add_image":
                    raise OSError("No space left on device")

            return write

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.tb_writer = Full()
    with caplog.at_level(logging.WARNING):
        train(trainer)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert caplog.text.count("no more pictures for the TensorBoardCallback: No space left on device") == 1
