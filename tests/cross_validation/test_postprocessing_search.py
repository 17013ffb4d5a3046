"""The search keeps only limits that help."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import concatenate_datasets
from transformers import AutoConfig

from gi_segmentation import compare
from gi_segmentation.arguments import DataArguments
from gi_segmentation.cross_validation.held_back_scans import THRESHOLDS, HeldBackScan, predict_held_back_scans
from gi_segmentation.cross_validation.postprocessing_search import (
    MAX_LEFT_OUT_ALONE,
    STEPS,
    LearntPostprocessing,
    LearntStep,
    choose_settings,
    find_groups,
    learn_from_folds,
    learn_postprocessing,
)
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_members
from gi_segmentation.labels import GI_TRACT, LabelMode, LabelSet
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing, no_postprocessing
from gi_segmentation.rules import DEFAULT_RULES, PRESETS, CompetitionRules
from gi_segmentation.scoring.scans import score_scans
from tests.support.models import save_model
from tests.support.own_data import SLICE_SPACING_MM, build_own_dataset
from tests.support.postprocessing import limit, predict
from tests.support.scoring import score_submission

SHAPE = (3, 4, 30, 40)
# The organ lies in two slices. The far voxel is in the first of them, or alone on the last slice.
ORGAN, FAR, ALONE = (2, slice(0, 2), slice(5, 15), slice(5, 15)), (2, 0, 29, 39), (2, 3, 29, 39)
SMALL_VOXEL = (3.0, 1.5, 1.5)


def held_back(
    fold: int,
    patient: int,
    false_positive: bool = False,
    true_small: bool = False,
    doubt: float = 0.95,
    far: tuple[int, ...] = FAR,
) -> HeldBackScan:
    """Return a scan whose stomach is predicted without a fault, apart from a far voxel.

    Args:
        fold: Index of the fold.
        patient: Number of the patient.
        false_positive: Whether the far voxel is predicted.
        true_small: Whether the far voxel belongs to the organ, and is predicted.
        doubt: Probability of the far voxel.
        far: Where it lies.
    """
    target = np.zeros(SHAPE, dtype=bool)
    target[ORGAN] = True
    target[far] = true_small
    preds = target.copy()
    preds[far] |= false_positive
    probabilities = np.where(preds, 0.95, 0.0)
    probabilities[far] *= doubt / 0.95
    return pack(fold, patient, preds, probabilities, target)


def pack(
    fold: int,
    patient: int,
    preds: np.ndarray,
    probabilities: np.ndarray,
    target: np.ndarray,
    label_mode: LabelMode = "multiclass",
) -> HeldBackScan:
    """Return a scan with these masks and probabilities of the three organs."""
    masks = dict(zip(GI_TRACT.names, preds, strict=True))
    numbers, name = list(range(preds.shape[1])), f"case{patient}_day0"
    arrays = masks, probabilities.astype(np.float16), target
    return HeldBackScan(fold, patient, name, *arrays, SMALL_VOXEL, numbers, label_mode)


def learn(scans: list[HeldBackScan], rules: CompetitionRules = PRESETS["mle_bench"]) -> LearntPostprocessing:
    return learn_postprocessing(scans, rules)


def find_step(learnt: LearntPostprocessing, name: str) -> LearntStep:
    (step,) = [step for step in learnt.steps if step.name == name]
    return step


class TestComponents:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_false_positives_far_away_make_it_help(self, preset: Any) -> None:
        scans = [held_back(patient % 2, patient, false_positive=patient < 6) for patient in range(8)]
        learnt = learn(scans, PRESETS[preset])
        assert learnt.score_after == 1.0 > learnt.score_before
        before, after, interval = find_step(learnt, "components").gains["competition_score"]
        assert (before, after) == (learnt.score_before, 1.0)
        assert interval is not None and 0 < interval[0] < after - before < interval[1]
        assert learnt.helps and learnt.num_patients == 8 and learnt.left_out == "patient"
        # The far voxel has 0.007 ml and the organ 1.35 ml. The lowest limit between them is chosen, and no limit for
        # the organs that have no components.
        assert learnt.to_config() == limit(0.1).to_config() == learnt.settings.to_config()
        assert "components: it helps" in "\n".join(learnt.describe())
        # No step before can tell the slice with the far voxel from the others.
        assert [step.helps for step in learnt.steps] == [False, False, False, True]
        # The limits keep everything, the organ alone, nothing, or one of two slices. So few scores were measured.
        assert max(len(scan.scores) for scan in scans) <= 4

    def test_a_score_is_that_of_mle_bench_by_hand(self) -> None:
        learnt = learn([held_back(fold, fold, false_positive=True) for fold in (0, 1)])
        # Dice: a perfect slice and one with a voxel more. The far voxel is 15 rows and 25 columns from the organ.
        distance = np.sqrt((15 / 30) ** 2 + (25 / 40) ** 2) / np.sqrt(3)
        assert learnt.score_before == pytest.approx(0.4 * (1 + 200 / 201) / 2 + 0.6 * (1 - distance))

    def test_a_doubtful_component_is_told_from_a_sure_one_of_the_same_size(self) -> None:
        scans = [held_back(patient % 2, patient, true_small=patient < 4) for patient in range(4)]
        scans += [held_back(patient % 2, patient, false_positive=True, doubt=0.65) for patient in range(4, 8)]
        learnt = learn(scans)
        assert learnt.settings == limit(0.0, 0.7) and learnt.score_after == 1.0 and learnt.helps

    def test_without_false_positives_nothing_changes(self) -> None:
        learnt = learn([held_back(patient % 2, patient) for patient in range(6)])
        assert learnt.settings == no_postprocessing(GI_TRACT.names) and learnt.to_config() is None and not learnt.helps
        assert all(step.gains["competition_score"] == (1.0, 1.0, (0.0, 0.0)) for step in learnt.steps)
        assert "stays off" in learnt.describe()[-1]

    def test_limits_that_a_patient_alone_wants_give_no_gain(self) -> None:
        # On all patients, the limit helps. But without the patient who wants it, nobody does. A gain that was
        # measured with the limits of all patients would be above 0.
        learnt = learn([held_back(patient % 2, patient, false_positive=patient == 3) for patient in range(4)])
        step = find_step(learnt, "components")
        before, after, _ = step.gains["competition_score"]
        assert step.settings == limit(0.1) and before == after < 1.0
        assert not learnt.helps and learnt.to_config() is None

    def test_limits_that_hurt_others_lose(self) -> None:
        # The far voxel is wrong in one patient and true in another one, and each has the limits of the other.
        learnt = learn([held_back(0, 0, false_positive=True), held_back(1, 1, true_small=True)])
        before, after, _ = find_step(learnt, "components").gains["competition_score"]
        assert after < before and not learnt.helps and learnt.to_config() is None

    def test_many_patients_are_left_out_by_folds(self) -> None:
        # All patients of fold 0 want the limit, and those of fold 1 do not need it.
        count = MAX_LEFT_OUT_ALONE + 2
        scans = [held_back(patient % 2, patient, false_positive=patient % 2 == 0) for patient in range(count)]
        groups, left_out = find_groups(scans)
        assert left_out == "fold" and groups["case3_day0"] == 1
        nothing = no_postprocessing(GI_TRACT.names)
        chosen = choose_settings(
            scans, groups, dict.fromkeys([None, 0, 1], nothing), STEPS["components"], DEFAULT_RULES
        )
        assert chosen == {None: limit(0.1), 0: nothing, 1: limit(0.1)}

    def test_one_patient_in_each_fold_has_an_interval_too(self) -> None:
        learnt = learn([held_back(fold, fold, false_positive=True) for fold in (0, 1)])
        before, after, interval = find_step(learnt, "components").gains["competition_score"]
        # Both patients gain the same, so the interval has no width.
        assert interval == pytest.approx((after - before, after - before)) and learnt.helps

    def test_the_facts_fit_into_json(self) -> None:
        learnt = learn([held_back(patient % 2, patient, false_positive=True) for patient in range(4)])
        facts = json.loads(json.dumps(asdict(learnt)))
        assert facts["helps"] is True and facts["settings"]["organs"]["stomach"]["min_volume_ml"] == 0.1
        assert [step["name"] for step in facts["steps"]] == list(STEPS)


class TestGate:
    def test_a_doubtful_slice_is_emptied_and_one_beside_the_organ_stays(self) -> None:
        # In half of the patients, a slice far from the organ has a doubtful voxel. In the others, the organ ends with
        # a slice of the same doubt.
        scans = [held_back(patient % 2, patient, false_positive=True, doubt=0.65, far=ALONE) for patient in range(4)]
        for patient in range(4, 8):
            target, probabilities = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE)
            target[2, 0:3, 5:15, 5:15], probabilities[2, 0:2, 5:15, 5:15] = True, 0.95
            probabilities[2, 2, 5:15, 5:15] = 0.65
            scans.append(pack(patient % 2, patient, target, probabilities, target))
        learnt = learn(scans)
        step = find_step(learnt, "slices by confidence")
        before, after, interval = step.gains["dice"]
        assert after == 1.0 > before and interval is not None and interval[0] > 0 and step.helps
        stomach = step.settings.organs["stomach"]
        assert stomach.min_slice_confidence == 0.7 and stomach.min_neighbour_confidence == 0.5
        # The steps after it find nothing left, and do not count as a help.
        assert [one.helps for one in learnt.steps] == [True, False, False, False]
        assert learnt.to_config() is not None and learnt.settings == step.settings

    @pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
    def test_a_missed_organ_is_found_by_a_threshold(self, label_mode: LabelMode) -> None:
        scans = []
        for patient in range(6):
            target, probabilities = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE)
            target[2, 0:2, 5:15, 5:15] = True
            # On its second slice the organ has a probability of 0.35, and elsewhere one of 0.25 is wrong.
            probabilities[2, 0, 5:15, 5:15], probabilities[2, 1, 5:15, 5:15] = 0.95, 0.35
            probabilities[2, 3, 20:30, 20:30] = 0.25
            scans.append(pack(patient % 2, patient, probabilities > 0.5, probabilities, target, label_mode))
        learnt = learn(scans)
        assert find_step(learnt, "thresholds").helps and learnt.score_after == 1.0
        assert learnt.settings.organs["stomach"].threshold == 0.3

    def test_what_does_not_help_is_not_published(self) -> None:
        # A faint slice is right in one half of the patients and wrong in the other.
        scans = []
        for patient in range(8):
            target, probabilities = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE)
            target[2, 0, 5:15, 5:15], probabilities[2, 0, 5:15, 5:15] = True, 0.95
            probabilities[2, 1, 5:15, 5:15] = 0.35
            target[2, 1, 5:15, 5:15] = patient < 4
            scans.append(pack(patient % 2, patient, probabilities > 0.5, probabilities, target))
        learnt = learn(scans)
        assert not learnt.helps and learnt.to_config() is None
        assert learnt.settings == no_postprocessing(GI_TRACT.names) and learnt.score_after == learnt.score_before


class TestFolds:
    @pytest.mark.parametrize("label_mode", ["multiclass", pytest.param("multilabel", marks=pytest.mark.long)])
    def test_the_scores_equal_those_of_predict_and_score(
        self, label_mode: str, dataset_dir: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        settings = Postprocessing(
            {
                "large_bowel": OrganLimits(threshold=0.2, min_volume_ml=10.0),
                "small_bowel": OrganLimits(min_slice_confidence=0.6, min_neighbour_confidence=0.5),
                "stomach": OrganLimits(threshold=0.3, min_slice_area_mm2=400.0, min_confidence=0.4),
            }
        )
        nothing = no_postprocessing(GI_TRACT.names)
        scans: list[HeldBackScan] = []
        folds, rows = [], {"before": ["id,class,predicted"], "after": ["id,class,predicted"]}
        for fold in (0, 1):
            held = load_slices(DataArguments(dataset_name=str(dataset_dir), fold=str(fold)))["validation"]
            folder = save_model(tmp_path / f"fold-{fold}", "segformer", fold, label_mode)
            folds.append((folder, held))
            (member,) = load_members([str(folder)], None, Computation("cpu"))
            scans += predict_held_back_scans(member, held, fold, 5, 0)
            # The other way: `predict` with the limits in config.json, and the command that scores a submission.
            config = AutoConfig.from_pretrained(folder)
            config.postprocessing = settings.to_config()
            config.save_pretrained(folder)
            for way, flags in (("before", ["--no_postprocessing"]), ("after", [])):
                path = predict([folder], kaggle_dir / "train", tmp_path / f"{way}-{folder.name}", *flags)
                _, *lines = path.read_text().splitlines()
                rows[way] += [line for line in lines if line.split(",")[0] in set(held["id"])]
        for way, limits in (("before", nothing), ("after", settings)):
            for scan in scans:
                scan.measure([limits], DEFAULT_RULES)
            expected = score_scans([scan.score(limits) for scan in scans])["competition_score"]
            (tmp_path / f"{way}.csv").write_text("\n".join(rows[way]) + "\n")
            scores = score_submission(kaggle_dir / "train.csv", tmp_path / f"{way}.csv", kaggle_dir, num_proc=1)
            assert scores["competition_score"] == pytest.approx(expected, rel=1e-4), way
        assert rows["before"] != rows["after"]
        learnt = learn_from_folds(folds, DEFAULT_RULES, "cpu", batch_size=5, num_workers=0)
        assert learnt.num_patients == len(learnt.settings_by_group) == 4
        before = score_scans([scan.score(nothing) for scan in scans])["competition_score"]
        assert learnt.score_before == pytest.approx(before)

    def test_own_organs_some_of_them_unknown(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        labels = LabelSet(("liver", "spleen", "left kidney", "aorta", "colon"))
        own = build_own_dataset(tmp_path, labels.names, {1: ["spleen"], 2: ["spleen", "aorta"]})
        folds = []
        for fold in (0, 1):
            held = load_slices(DataArguments(dataset_name=str(own), fold=str(fold)))["validation"]
            folds.append((save_model(tmp_path / f"fold-{fold}", "segformer", fold, labels=labels), held))
        learnt = learn_from_folds(folds, PRESETS["first_place"], "cpu", batch_size=6, num_workers=0)
        assert tuple(learnt.settings.organs) == labels.names and 0 < learnt.score_before < 1
        (member,) = load_members([str(folds[0][0])], None, Computation("cpu"))
        scans = list(predict_held_back_scans(member, concatenate_datasets([held for _, held in folds]), 0, 6, 0))
        assert [scan.unknown for scan in scans] == [{"spleen"}, {"spleen", "aorta"}, set(), set()]
        # Each voxel of a label has the size that the folder says.
        liver = scans[0].organs["liver"]
        liver.keep(OrganLimits(min_volume_ml=0.1))
        ((volumes_ml, _),) = liver.sizes.values()
        voxels = (liver.levels.unpack() == len(THRESHOLDS)).sum()
        assert volumes_ml.sum() == pytest.approx(voxels * 1.5 * 1.5 * SLICE_SPACING_MM / 1000) and voxels > 0
        words = ["--model", str(folds[0][0]), "--dataset_name", str(own), "--device", "cpu", "--num_workers", "0"]
        scores = compare.main([*words, "--split", "train"])
        assert "dice_left kidney" in scores[str(folds[0][0])]
        assert re.search(r"\| spleen \(known in [01] of 2 scans\) \| left kidney \|", capsys.readouterr().out)

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
