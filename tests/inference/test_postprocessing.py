"""Components below the limits disappear, limits travel in config.json, and the search keeps only limits that help."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from gi_segmentation.arguments import DataArguments
from gi_segmentation.data.kaggle import KaggleDataError, find_slices
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.inputs import find_scans
from gi_segmentation.inference.outputs import PredictedScan
from gi_segmentation.inference.postprocessing import (
    NO_POSTPROCESSING,
    OrganLimits,
    Postprocessing,
    find_components,
    remove_components,
)
from gi_segmentation.inference.postprocessing_search import (
    HeldBackScan,
    LearntPostprocessing,
    learn_from_folds,
    learn_postprocessing,
)
from gi_segmentation.inference.predictor import Settings, load_members, predict_scans
from gi_segmentation.predict import main
from gi_segmentation.rle import decode
from gi_segmentation.rules import PRESETS, CompetitionRules
from gi_segmentation.schema import ORGANS
from tests.support.models import save_model
from tests.support.scoring import score_submission

# A voxel of 2.5 x 20 x 20 mm has 1,000 mm³, which is 1 ml. So the volume in ml is the number of voxels.
ONE_ML = (2.5, 20.0, 20.0)
# These limits remove some of the patches that a tiny random model predicts on the phantom, and keep others.
LIMITS = Postprocessing(
    {"large_bowel": OrganLimits(30.0), "small_bowel": OrganLimits(), "stomach": OrganLimits(10.0, 0.55)}
)


def limit(min_volume_ml: float = 0.0, min_confidence: float = 0.0) -> Postprocessing:
    """Return limits for the stomach only."""
    return Postprocessing({**NO_POSTPROCESSING.organs, "stomach": OrganLimits(min_volume_ml, min_confidence)})


def clean_stomach(
    voxels: dict[tuple[int, int, int], float], settings: Postprocessing, numbers: Sequence[int] = (1, 2, 3)
) -> set[tuple[int, ...]]:
    """Return which voxels of a stomach stay. The voxels are given with their probabilities."""
    masks, probabilities = np.zeros((3, 3, 4, 8), dtype=bool), np.zeros((3, 3, 4, 8), dtype=np.float16)
    for place, probability in voxels.items():
        # The other organs have the same mask, and no limits.
        masks[(slice(None), *place)] = True
        probabilities[(slice(None), *place)] = probability
    cleaned = remove_components(masks, probabilities, ONE_ML, numbers, settings)
    assert cleaned.dtype == bool and np.array_equal(cleaned[:2], masks[:2])
    return {tuple(place) for place in np.argwhere(cleaned[2]).tolist()}


class TestComponents:
    def test_a_component_below_the_volume_disappears(self) -> None:
        large, small = {(0, 0, x): 1.0 for x in (0, 1, 2)}, {(0, 0, x): 1.0 for x in (5, 6)}
        assert clean_stomach({**large, **small}, limit(2.5)) == large.keys()
        # A component that is exactly as large as the limit stays.
        assert clean_stomach({**large, **small}, limit(2.0)) == large.keys() | small.keys()
        assert clean_stomach({**large, **small}, limit(3.5)) == set()

    def test_a_component_below_the_confidence_disappears(self) -> None:
        # The means are 0.75 and 0.625. The first has a voxel of lower probability than the second one has.
        sure, doubtful = {(0, 0, 0): 1.0, (0, 0, 1): 0.5}, {(0, 0, 5): 0.625}
        assert clean_stomach({**sure, **doubtful}, limit(0, 0.7)) == sure.keys()
        assert clean_stomach({**sure, **doubtful}, limit(0, 0.625)) == sure.keys() | doubtful.keys()
        # Each limit is enough to remove a component.
        assert clean_stomach({**sure, **doubtful}, limit(1.5, 0.8)) == set()

    def test_a_corner_joins_voxels_of_two_slices(self) -> None:
        diagonal = {(0, 0, 0): 1.0, (1, 1, 1): 1.0, (2, 2, 2): 1.0}
        assert clean_stomach(diagonal, limit(3.0)) == diagonal.keys()
        # Two columns apart is not a neighbour.
        assert clean_stomach({(0, 0, 0): 1.0, (1, 0, 2): 1.0}, limit(2.0)) == set()

    def test_a_gap_between_slices_does_not_join(self) -> None:
        column = {(0, 0, 0): 1.0, (1, 0, 0): 1.0, (2, 0, 0): 1.0}
        assert clean_stomach(column, limit(3.0), numbers=(7, 8, 9)) == column.keys()
        assert clean_stomach(column, limit(2.0), numbers=(7, 8, 10)) == {(0, 0, 0), (1, 0, 0)}
        assert clean_stomach(column, limit(2.0), numbers=(7, 10, 13)) == set()

    def test_components_of_a_random_volume_equal_a_search_voxel_by_voxel(self) -> None:
        random = np.random.default_rng(0)
        mask, probability = random.random((7, 9, 8)) < 0.1, random.random((7, 9, 8))
        numbers = np.array([1, 2, 3, 5, 6, 7, 8])
        found = find_components(mask, probability, ONE_ML, numbers.tolist())
        places = [tuple(place) for place in np.argwhere(mask)]
        remaining, components = set(places), []
        while remaining:
            grown, border = set(), [remaining.pop()]
            while border:
                here = border.pop()
                grown.add(here)
                near = {p for p in remaining if abs(numbers[p[0]] - numbers[here[0]]) <= 1}
                near = {p for p in near if max(abs(p[1] - here[1]), abs(p[2] - here[2])) <= 1}
                remaining -= near
                border += near
            components.append(grown)
        assert len(components) == len(found.volumes_ml) > 5
        for component in components:
            (label,) = {int(found.labels[place]) for place in component}
            assert found.volumes_ml[label - 1] == pytest.approx(len(component))
            mean = sum(probability[place] for place in component) / len(component)
            assert found.confidences[label - 1] == pytest.approx(mean)

    def test_half_precision_does_not_add_up(self) -> None:
        # A sum of 40,000 halves in half precision would stop growing at 1,024.
        mask = np.ones((1, 200, 200), dtype=bool)
        found = find_components(mask, np.full(mask.shape, 0.5, dtype=np.float16), ONE_ML, [1])
        assert found.confidences.tolist() == [0.5]


def save_with(folder: Path, value: Any, seed: int = 0, label_mode: str = "multiclass") -> Path:
    """Save a tiny random model with this value as `postprocessing` of its configuration."""
    save_model(folder, "segformer", seed, label_mode)
    config = AutoConfig.from_pretrained(folder)
    config.postprocessing = value
    config.save_pretrained(folder)
    return folder


class TestConfiguration:
    def test_limits_travel_in_the_configuration(self, tmp_path: Path) -> None:
        model = AutoModelForSemanticSegmentation.from_pretrained(save_model(tmp_path / "one", "segformer", 0))
        model.config.postprocessing = LIMITS.to_config()
        model.save_pretrained(tmp_path / "two")
        read = AutoConfig.from_pretrained(tmp_path / "two").postprocessing
        assert Postprocessing.from_config(read) == LIMITS
        again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "two")
        assert again.config.postprocessing == LIMITS.to_config()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ([], "postprocessing: expected a dictionary with the keys large_bowel, small_bowel, stomach, but got []"),
            ("a\nb" * 200, "postprocessing: expected a dictionary"),
            ({"stomach": {}}, "postprocessing: expected a dictionary"),
            ({"liver": LIMITS.to_config()["stomach"]}, "postprocessing: expected a dictionary"),
            ("stomach=3", "postprocessing.stomach: expected a dictionary with the keys min_volume_ml, min_confidence"),
            ("stomach.min_size=3", "postprocessing.stomach: expected a dictionary"),
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


def predict(models: list[Path], folder: Path, output_dir: Path, *flags: str) -> Path:
    words = ["--model", *map(str, models), "--input", str(folder), "--output_dir", str(output_dir)]
    (path,) = main([*words, "--device", "cpu", "--num_workers", "0", *flags])
    return path


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
        settings = Postprocessing({organ: OrganLimits(30.0) for organ in ORGANS})
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
            settings = Postprocessing({organ: OrganLimits(0.0, value) for organ in ORGANS})
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
        settings = Settings(batch_size=1, num_workers=0, postprocessing=LIMITS)
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


SHAPE = (3, 4, 30, 40)
# The organ lies in two slices. The far voxel is alone on another slice, so Dice of that slice is 0 / 0 without it.
ORGAN, FAR = (2, slice(0, 2), slice(5, 15), slice(5, 15)), (2, 3, 29, 39)
SMALL_VOXEL = (3.0, 1.5, 1.5)


def held_back(
    fold: int, patient: int, false_positive: bool = False, true_small: bool = False, doubt: float = 0.95
) -> HeldBackScan:
    """Return a scan whose stomach is predicted without a fault, apart from a far voxel.

    Args:
        fold: Index of the fold.
        patient: Number of the patient.
        false_positive: Whether the far voxel is predicted.
        true_small: Whether the far voxel belongs to the organ, and is predicted.
        doubt: Probability of the far voxel.
    """
    target = np.zeros(SHAPE, dtype=bool)
    target[ORGAN] = True
    target[FAR] = true_small
    preds = target.copy()
    preds[FAR] |= false_positive
    probabilities = np.where(preds, 0.95, 0.0)
    probabilities[FAR] *= doubt / 0.95
    components = [
        find_components(mask, probability, SMALL_VOXEL, range(4))
        for mask, probability in zip(preds, probabilities, strict=True)
    ]
    return HeldBackScan(fold, patient, f"case{patient}_day0", components, target)


def learn(scans: list[HeldBackScan], rules: CompetitionRules = PRESETS["mle_bench"]) -> LearntPostprocessing:
    return learn_postprocessing(scans, rules)


class TestSearch:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_false_positives_far_away_make_it_help(self, preset: Any) -> None:
        scans = [held_back(patient % 2, patient, false_positive=patient < 6) for patient in range(8)]
        learnt = learn(scans, PRESETS[preset])
        assert learnt.score_after == 1.0 > learnt.score_before
        assert learnt.interval is not None and 0 < learnt.interval[0] < learnt.gain < learnt.interval[1]
        assert learnt.helps and learnt.num_patients == 8
        # The far voxel has 0.007 ml and the organ 1.35 ml. The lowest limit between them is chosen, and no limit for
        # the organs that have no components.
        assert learnt.to_config() == limit(0.1).to_config() == learnt.settings.to_config()
        assert "it helps" in "\n".join(learnt.describe())
        # The 36 limits keep all components, the organ alone, or nothing. So no more than three scores were measured.
        assert [len(scan.scores) for scan in scans] == [3] * 6 + [2] * 2

    def test_a_score_is_that_of_mle_bench_by_hand(self) -> None:
        learnt = learn([held_back(fold, fold, false_positive=True) for fold in (0, 1)])
        # Dice: two perfect slices and one of 0. The far voxel is 2 slices, 15 rows and 25 columns from the organ.
        distance = np.sqrt((2 / 4) ** 2 + (15 / 30) ** 2 + (25 / 40) ** 2) / np.sqrt(3)
        assert learnt.score_before == pytest.approx(0.4 * 2 / 3 + 0.6 * (1 - distance))

    def test_a_doubtful_component_is_told_from_a_sure_one_of_the_same_size(self) -> None:
        scans = [held_back(patient % 2, patient, true_small=patient < 4) for patient in range(4)]
        scans += [held_back(patient % 2, patient, false_positive=True, doubt=0.65) for patient in range(4, 8)]
        learnt = learn(scans)
        assert learnt.settings == limit(0.0, 0.7) and learnt.score_after == 1.0 and learnt.helps

    def test_without_false_positives_nothing_changes(self) -> None:
        learnt = learn([held_back(patient % 2, patient) for patient in range(6)])
        assert learnt.settings == NO_POSTPROCESSING and learnt.to_config() is None and not learnt.helps
        assert (learnt.gain, learnt.interval) == (0.0, (0.0, 0.0))
        assert "it stays off" in learnt.describe()[-1]

    def test_limits_that_only_fold_0_wants_give_no_gain(self) -> None:
        # On all patients, the limit helps. But fold 1 cannot know it, so fold 0 is predicted without it. A gain that
        # was measured with the limits of all patients would be above 0.
        learnt = learn([held_back(patient % 2, patient, false_positive=patient % 2 == 0) for patient in range(8)])
        assert learnt.settings == limit(0.1)
        assert learnt.settings_by_fold == (NO_POSTPROCESSING, limit(0.1))
        assert learnt.gain == 0.0 and not learnt.helps and learnt.to_config() is None

    def test_limits_that_hurt_the_other_fold_lose(self) -> None:
        # Fold 0 has false positives, and in fold 1 the far voxel is true.
        scans = [held_back(patient % 2, patient, patient % 2 == 0, patient % 2 == 1) for patient in range(8)]
        learnt = learn(scans)
        assert learnt.settings_by_fold == (NO_POSTPROCESSING, limit(0.1))
        assert learnt.gain < 0 and not learnt.helps and learnt.to_config() is None

    def test_one_patient_in_each_fold_has_an_interval_too(self) -> None:
        learnt = learn([held_back(fold, fold, false_positive=True) for fold in (0, 1)])
        # Both patients gain the same, so the interval has no width.
        assert learnt.interval == pytest.approx((learnt.gain, learnt.gain)) and learnt.helps

    def test_the_facts_fit_into_json(self) -> None:
        learnt = learn([held_back(patient % 2, patient, false_positive=True) for patient in range(4)])
        facts = json.loads(json.dumps(asdict(learnt)))
        assert facts["helps"] is True and facts["settings"]["organs"]["stomach"]["min_volume_ml"] == 0.1


class TestFolds:
    @pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
    def test_the_scores_equal_those_of_predict_and_score(
        self, label_mode: str, dataset_dir: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        rows: dict[str, list[str]] = {}
        folds = []
        for fold in (0, 1):
            held = load_slices(DataArguments(dataset_name=str(dataset_dir), fold=str(fold)))["validation"]
            folds.append((save_model(tmp_path / f"fold-{fold}", "segformer", fold, label_mode), held))
        learnt = learn_from_folds(folds, PRESETS["mle_bench"], "cpu", batch_size=5, num_workers=0)
        assert learnt.num_patients == 4 and len(learnt.settings_by_fold) == 2
        # The other way: `predict` with the limits in config.json, and the command that scores a submission.
        for way, flags in (("before", ["--no_postprocessing"]), ("after", [])):
            for (folder, held), settings in zip(folds, learnt.settings_by_fold, strict=True):
                config = AutoConfig.from_pretrained(folder)
                config.postprocessing = settings.to_config()
                config.save_pretrained(folder)
                path = predict([folder], kaggle_dir / "train", tmp_path / f"{way}-{folder.name}", *flags)
                head, *lines = path.read_text().splitlines()
                rows.setdefault(way, [head])
                rows[way] += [line for line in lines if line.split(",")[0] in set(held["id"])]
            (tmp_path / f"{way}.csv").write_text("\n".join(rows[way]) + "\n")
        for way, expected in (("before", learnt.score_before), ("after", learnt.score_after)):
            scores = score_submission(kaggle_dir / "train.csv", tmp_path / f"{way}.csv", kaggle_dir, num_proc=1)
            assert scores["competition_score"] == pytest.approx(expected, rel=1e-4), way
        # A random model predicts patches everywhere, and limits remove some of them.
        assert learnt.settings != NO_POSTPROCESSING

    def test_one_fold_is_not_enough(self, dataset_dir: Path, tmp_path: Path) -> None:
        held = load_slices(DataArguments(dataset_name=str(dataset_dir), fold="0"))["validation"]
        with pytest.raises(InputError, match="needs at least 2 folds, but got 1"):
            learn_from_folds([(tmp_path, held)], PRESETS["mle_bench"], "cpu", 4, 0)

    def test_a_patient_in_two_folds_is_refused(self, dataset_dir: Path, tmp_path: Path) -> None:
        held = load_slices(DataArguments(dataset_name=str(dataset_dir), fold="0"))["validation"]
        with pytest.raises(InputError, match=r"patient \d+ was held back by .*one and by .*two"):
            learn_from_folds([(tmp_path / "one", held), (tmp_path / "two", held)], PRESETS["mle_bench"], "cpu", 4, 0)

    def test_a_gap_and_a_neighbouring_context_work(self, dataset_dir: Path, tmp_path: Path) -> None:
        folds = []
        for fold in (0, 1):
            held = load_slices(DataArguments(dataset_name=str(dataset_dir), fold=str(fold)))["validation"]
            # Without one of its slices, a scan has no voxel size for distances. A voxel still has a volume. The rows
            # are also turned round, because a dataset may have them in any order.
            kept = [row for row in range(len(held)) if held[row]["slice"] != 6]
            folds.append(
                (save_model(tmp_path / f"{fold}", "segformer", fold, slice_context=1), held.select(kept[::-1]))
            )
        learnt = learn_from_folds(folds, PRESETS["first_place"], "cpu", 16, 2)
        assert learnt.num_patients == 4 and 0 < learnt.score_before < 1
        shutil.rmtree(tmp_path / "0")
        with pytest.raises(InputError, match="not a checkpoint of this project"):
            learn_from_folds(folds, PRESETS["first_place"], "cpu", 16, 0)
