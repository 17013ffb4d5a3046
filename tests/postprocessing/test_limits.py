"""Limits travel in config.json, and `predict` applies them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import load_members
from gi_segmentation.inference.scans import predict_scans
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.rle import decode
from tests.support.models import save_model
from tests.support.postprocessing import limit, predict

# These limits remove some of the patches that a tiny random model predicts on the phantom, and keep others.
LIMITS = Postprocessing(
    {
        "large_bowel": OrganLimits(min_volume_ml=30.0),
        "small_bowel": OrganLimits(),
        "stomach": OrganLimits(min_volume_ml=10.0, min_confidence=0.55),
    }
)


def save_with(folder: Path, value: Any, seed: int = 0, label_mode: str = "multiclass") -> Path:
    """Save a tiny random model with this value as `postprocessing` of its configuration."""
    save_model(folder, "segformer", seed, label_mode)
    config = AutoConfig.from_pretrained(folder)
    config.postprocessing = value
    config.save_pretrained(folder)
    return folder


GATE = OrganLimits(
    threshold=0.2,
    min_slice_confidence=0.4,
    min_neighbour_confidence=0.3,
    min_slice_area_mm2=50.0,
)


class TestConfiguration:
    def test_a_gate_is_written_only_where_it_changes_something(self) -> None:
        settings = Postprocessing({**LIMITS.organs, "small_bowel": GATE})
        written = json.loads(json.dumps(settings.to_config(), sort_keys=True))
        assert Postprocessing.from_config(written, GI_TRACT) == settings
        # What the first version wrote is read as before, and what it can read is written as before.
        assert written["stomach"] == {"min_confidence": 0.55, "min_volume_ml": 10.0}
        assert list(settings.to_config()["small_bowel"]) == [
            "threshold", "min_slice_confidence", "min_neighbour_confidence", "min_slice_area_mm2", "min_volume_ml",
            "min_confidence",
        ]  # fmt: skip

    def test_limits_travel_in_the_configuration(self, tmp_path: Path) -> None:
        model = AutoModelForSemanticSegmentation.from_pretrained(save_model(tmp_path / "one", "segformer", 0))
        model.config.postprocessing = LIMITS.to_config()
        model.save_pretrained(tmp_path / "two")
        read = AutoConfig.from_pretrained(tmp_path / "two").postprocessing
        assert Postprocessing.from_config(read, GI_TRACT) == LIMITS
        again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "two")
        assert again.config.postprocessing == LIMITS.to_config()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ([], "postprocessing: expected a dictionary with the keys large_bowel, small_bowel, stomach, but got []"),
            ("a\nb" * 200, "postprocessing: expected a dictionary"),
            ({"stomach": {}}, "postprocessing: expected a dictionary"),
            ({"stomach": LIMITS.to_config()["stomach"]}, "but it lacks large_bowel, small_bowel"),
            ({**LIMITS.to_config(), "liver": LIMITS.to_config()["stomach"]}, "stomach, but got 'liver'"),
            (
                "stomach.min_slice_confidence=1.5",
                "stomach.min_slice_confidence: expected a number of 0 to 1, but got 1.5",
            ),
            ("stomach.threshold=NaN", "but got nan"),
            ("stomach.threshold=[0.5]", "but got [0.5]"),
            ("stomach.min_neighbour_confidence=false", "but got False"),
            ("stomach.min_slice_area_mm2=1e7", "expected a number of 0 to 1e+06, but got 10000000.0"),
            ("stomach=3", "postprocessing.stomach: expected a dictionary with the keys min_volume_ml, min_confidence"),
            ("stomach.min_size=3", "min_slice_area_mm2), but got 'min_size'"),
            ('stomach.min_volume_ml="1"', "postprocessing.stomach.min_volume_ml: expected a number of 0 to 100000"),
            ("stomach.min_volume_ml=true", "but got True"),
            ("stomach.min_volume_ml=-1", "but got -1"),
            ("stomach.min_volume_ml=Infinity", "but got inf"),
            ("large_bowel.min_confidence=NaN", "but got nan"),
            ("large_bowel.min_confidence=null", "but got None"),
            ("large_bowel.min_confidence=1.5", "large_bowel.min_confidence: expected a number of 0 to 1, but got 1.5"),
        ],
    )
    def test_a_malformed_configuration_is_one_line(
        self, change: Any, expected: str, small_kaggle_dir: Path, tmp_path: Path
    ) -> None:
        value: Any = LIMITS.to_config()
        if isinstance(change, dict) and "liver" in change:
            value |= change
        elif isinstance(change, str) and "=" in change:
            # A path of keys, and JSON for the last of them.
            keys, text = change.split("=")
            *parents, last = keys.split(".")
            inner = value
            for key in parents:
                inner = inner[key]
            inner[last] = json.loads(text)
        else:
            value = change
        model = save_with(tmp_path / "model", value)
        with pytest.raises(InputError) as caught:
            predict([model], small_kaggle_dir / "train", tmp_path / "out")
        text = str(caught.value)
        assert text.startswith(f"{model}: config.json: postprocessing") and expected in text
        assert "\n" not in text and text.endswith("--no_postprocessing predicts without it") and len(text) < 600
        assert not (tmp_path / "out").exists()
        assert predict([model], small_kaggle_dir / "train", tmp_path / "out", "--no_postprocessing").is_file()


def read_masks(path: Path, folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Return the masks of a submission as volumes, by scan and organ: bool, shape `(D, H, W)`."""
    sizes = {one.id: (one.height, one.width) for one in find_slices(folder)[0]}
    slices: dict[tuple[str, str], list[np.ndarray]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["id"].rsplit("_slice_", 1)[0], row["class"])
            slices.setdefault(key, []).append(decode(row["predicted"], *sizes[row["id"]]))
    return {key: np.stack(masks) for key, masks in slices.items()}


def voxel_ml(scan: str, folder: Path) -> float:
    one = next(one for one in find_slices(folder)[0] if one.scan == scan)
    return 3.0 * one.pixel_spacing[0] * one.pixel_spacing[1] / 1000


class TestPredict:
    @pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
    def test_small_components_disappear_unless_the_flag_keeps_them(
        self, label_mode: str, kaggle_dir: Path, tmp_path: Path, capsys: Any
    ) -> None:
        settings = Postprocessing({organ: OrganLimits(min_volume_ml=30.0) for organ in GI_TRACT.names})
        model, folder = save_with(tmp_path / "model", settings.to_config(), 0, label_mode), kaggle_dir / "train"
        applied = predict([model], folder, tmp_path / "applied", "--batch_size", "5")
        printed = capsys.readouterr().out.splitlines()
        assert printed[1] == (
            "post-processing of the checkpoint: large_bowel from 30 ml; small_bowel from 30 ml; stomach from 30 ml "
            "(off: --no_postprocessing)"
        )
        off = predict([model], folder, tmp_path / "off", "--batch_size", "5", "--no_postprocessing")
        assert "post-processing" not in capsys.readouterr().out
        plain = predict([save_model(tmp_path / "plain", "segformer", 0, label_mode)], folder, tmp_path / "without",
                        "--batch_size", "5")  # fmt: skip
        assert "post-processing" not in capsys.readouterr().out
        assert off.read_bytes() == plain.read_bytes() != applied.read_bytes()

        before, after = read_masks(off, folder), read_masks(applied, folder)
        assert list(before) == list(after)
        removed = stayed = 0
        for (scan, organ), mask in before.items():
            labels, number = ndimage.label(mask, np.ones((3, 3, 3)))
            for label in range(1, number + 1):
                component = labels == label
                large = component.sum() * voxel_ml(scan, folder) >= 30
                # A component stays whole, or it disappears whole.
                assert after[scan, organ][component].all() if large else not after[scan, organ][component].any()
                removed, stayed = removed + (not large), stayed + large
            assert not (after[scan, organ] & ~mask).any()
        assert removed and stayed

    def test_the_confidence_is_the_probability_of_the_organ(self, small_kaggle_dir: Path, tmp_path: Path) -> None:
        # With four labels, the winner has at least 0.25, and with limits of 0 or of 0.25 everything stays. A mean
        # probability above 0.9999 is rare in a random model.
        files = {}
        for value in (0.0, 0.25, 0.9999):
            settings = Postprocessing({organ: OrganLimits(min_confidence=value) for organ in GI_TRACT.names})
            model = save_with(tmp_path / f"{value}", settings.to_config())
            files[value] = predict([model], small_kaggle_dir / "train", tmp_path / f"out {value}")
        assert files[0.0].read_bytes() == files[0.25].read_bytes()
        folder = small_kaggle_dir / "train"
        assert any(mask.any() for mask in read_masks(files[0.0], folder).values())
        assert not any(mask.any() for mask in read_masks(files[0.9999], folder).values())

    def test_an_ensemble_needs_the_same_limits_in_all_members(
        self, small_kaggle_dir: Path, tmp_path: Path, capsys: Any
    ) -> None:
        folder = small_kaggle_dir / "train"
        one, same = (save_with(tmp_path / f"{seed}", LIMITS.to_config(), seed) for seed in (0, 1))
        other, bare = save_with(tmp_path / "2", limit(1.0).to_config(), 1), save_model(tmp_path / "3", "segformer", 1)
        off = predict([one, same], folder, tmp_path / "off", "--no_postprocessing").read_bytes()
        for name, models, applied in (("a", [one, same], True), ("b", [one, other], False), ("c", [one, bare], False)):
            capsys.readouterr()
            path = predict(models, folder, tmp_path / name)
            line = capsys.readouterr().out.splitlines()[1]
            assert (path.read_bytes() != off) == applied == line.startswith("post-processing of the checkpoint: ")
            if not applied:
                assert line == "no post-processing is applied, because the checkpoints do not have the same"

    def test_a_scan_is_written_before_the_next_one_is_read(self, kaggle_copy: Path, tmp_path: Path) -> None:
        # Two scans of three slices. The last slice of the second one is damaged.
        slices, _ = find_slices(kaggle_copy / "train")
        slices[5].path.write_bytes(b"")
        members = load_members([str(save_model(tmp_path / "model", "segformer", 0))], None, Computation("cpu"))
        scans = find_scans(kaggle_copy / "train").scans
        settings = PredictionSettings(batch_size=1, num_workers=0, postprocessing=LIMITS)
        predictions = predict_scans(members, scans, settings)
        scan, first = next(predictions)
        assert scan.slices == slices[:3] and isinstance(first, PredictedScan) and len(first.slice_masks) == 3
        ((_, second),) = predictions
        assert isinstance(second, KaggleDataError)

    def test_slices_of_two_sizes_in_a_scan_are_refused(self, kaggle_copy: Path, tmp_path: Path) -> None:
        model = save_with(tmp_path / "model", LIMITS.to_config())
        path = find_slices(kaggle_copy / "train")[0][1].path
        name = path.name.rsplit("_", 2)[0]
        path.rename(path.with_name(f"{name}_2.00_2.00.png"))
        with pytest.raises(
            InputError,
            match=r"1 of 2 scans failed: case.*2\.00\.png: expected slices of.*add --no",
        ):
            predict([model], kaggle_copy / "train", tmp_path / "out")
        assert not list((tmp_path / "out").glob("*submission*"))
        predict([model], kaggle_copy / "train", tmp_path / "without", "--no_postprocessing")
