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
from gi_segmentation.cross_validation.postprocessing_search import (
    HeldBackScan,
    LearntPostprocessing,
    learn_from_folds,
    learn_postprocessing,
    predict_held_back_scans,
)
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.members import load_members
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.postprocessing.components import find_components
from gi_segmentation.postprocessing.limits import no_postprocessing
from gi_segmentation.rules import PRESETS, CompetitionRules
from tests.support.models import save_model
from tests.support.own_data import SLICE_SPACING_MM, build_own_dataset
from tests.support.postprocessing import limit, predict
from tests.support.scoring import score_submission

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
    components = {
        organ: find_components(mask, probability, SMALL_VOXEL, range(4))
        for organ, mask, probability in zip(GI_TRACT.names, preds, probabilities, strict=True)
    }
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
        assert learnt.settings == no_postprocessing(GI_TRACT.names) and learnt.to_config() is None and not learnt.helps
        assert (learnt.gain, learnt.interval) == (0.0, (0.0, 0.0))
        assert "it stays off" in learnt.describe()[-1]

    def test_limits_that_only_fold_0_wants_give_no_gain(self) -> None:
        # On all patients, the limit helps. But fold 1 cannot know it, so fold 0 is predicted without it. A gain that
        # was measured with the limits of all patients would be above 0.
        learnt = learn([held_back(patient % 2, patient, false_positive=patient % 2 == 0) for patient in range(8)])
        assert learnt.settings == limit(0.1)
        assert learnt.settings_by_fold == (no_postprocessing(GI_TRACT.names), limit(0.1))
        assert learnt.gain == 0.0 and not learnt.helps and learnt.to_config() is None

    def test_limits_that_hurt_the_other_fold_lose(self) -> None:
        # Fold 0 has false positives, and in fold 1 the far voxel is true.
        scans = [held_back(patient % 2, patient, patient % 2 == 0, patient % 2 == 1) for patient in range(8)]
        learnt = learn(scans)
        assert learnt.settings_by_fold == (no_postprocessing(GI_TRACT.names), limit(0.1))
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
    @pytest.mark.parametrize("label_mode", ["multiclass", pytest.param("multilabel", marks=pytest.mark.long)])
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
        assert learnt.settings != no_postprocessing(GI_TRACT.names)

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
        voxels, (volumes_ml, _) = (scans[0].labels[0].unpack() > 0).sum(), scans[0].sizes[0]
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
