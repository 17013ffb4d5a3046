"""From scans to scores and their intervals: by hand, against scikit-learn, in any order, and covering the truth."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.rules import DEFAULT_RULES, PRESETS, READ_BY_RULES, CompetitionRules
from gi_segmentation.scoring.clinical import compare_organs
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.records import read_scan_scores, write_scan_scores
from gi_segmentation.scoring.scans import ScanScore, average_patients, compare_masks, score_scans
from gi_segmentation.scoring.tables import describe_clinical, format_clinical, tabulate_scans

ORGANS = GI_TRACT.names


def random_scans(number: int, seed: int = 0, slices: int = 6) -> list[ScanScore]:
    """Scans of patients with one to three of them, some without an organ, with counts of labels."""
    rng = np.random.default_rng(seed)
    scans = []
    for patient in range(number):
        for day in range(int(rng.integers(1, 4))):
            target = rng.random((3, slices, 7, 8)) < rng.choice([0, 0.2, 0.5], (3, slices, 1, 1))
            preds = target ^ (rng.random(target.shape) < rng.uniform(0, 0.3))
            labels = rng.integers(0, 40, (4, 3))
            scans.append(compare_masks(patient, f"case{patient}_day{day}", ORGANS, preds, target, label_counts=labels))
    return scans


def dice_scan(patient: Any, dice: float, name: str = "day0") -> ScanScore:
    """A scan of one slice with a large bowel."""
    slices, distances = (1, 0, 0), {DEFAULT_RULES.distance: (0.1,)}
    volume_dice = (dice, math.nan, math.nan)
    names = patient, f"{patient}_{name}", ORGANS
    return ScanScore(*names, 1, (dice, 0, 0), slices, volume_dice, slices, slices, distances)


def clinical_scan(patient: int, name: str, **organs: tuple[float, float]) -> ScanScore:
    """A scan with volume Dice and Hausdorff distance of the organs named; the others are in neither mask."""
    values = [organs.get(organ, (math.nan, 0.0)) for organ in ORGANS]
    clinical = tuple({"volume_dice": dice, "hausdorff_mm": distance} for dice, distance in values)
    volume_dice = tuple(dice for dice, _ in values)
    none, distances = (0, 0, 0), {DEFAULT_RULES.distance: (math.nan,)}
    return ScanScore(patient, name, ORGANS, 1, none, none, volume_dice, none, none, distances, clinical=clinical)


class TestScores:
    def test_by_hand(self) -> None:
        # Large bowel: 2/3 and 1 on two slices of one scan, nothing on the other's; stomach only predicted there.
        target, preds = np.zeros((2, 3, 2, 1, 4), dtype=bool), np.zeros((2, 3, 2, 1, 4), dtype=bool)
        target[0, 0, :, 0, 0] = preds[0, 0, :, 0, 0] = preds[0, 0, 0, 0, 1] = preds[1, 2, 0, 0, 3] = True
        scans = [compare_masks("a", f"scan{index}", ORGANS, preds[index], target[index]) for index in range(2)]
        scores = score_scans(scans)
        assert scores["dice"] == pytest.approx((2 / 3 + 1 + 0) / 3)
        assert (scores["dice_large_bowel"], scores["dice_stomach"]) == (pytest.approx(5 / 6), 0)
        assert math.isnan(scores["dice_small_bowel"])
        assert scores["dice_volume"] == pytest.approx((2 * 2 / (3 + 2) + 0) / 2)
        distance = 0.25 / math.sqrt(3)  # a quarter of the width in the first scan; one side empty in the second
        assert scores["hausdorff_score"] == pytest.approx(1 - (distance + 1) / 2)
        assert scores["competition_score"] == pytest.approx(0.4 * scores["dice"] + 0.6 * scores["hausdorff_score"])
        assert "macro_f1_seed" not in scores, "nobody counted labels"

    def test_first_place_counts_slices_empty_in_both_as_perfect(self) -> None:
        empty = np.zeros((3, 2, 1, 4), dtype=bool)
        target = empty.copy()
        target[0, 0] = True
        rules = PRESETS["first_place"]
        scores = score_scans([compare_masks("a", "a", ORGANS, empty, target, rules)], rules)
        assert (scores["dice"], scores["competition_dice"]) == (0, pytest.approx(5 / 6))
        assert scores["hausdorff_score"] == pytest.approx(1 - 1 / 3)  # of each organ: 1, 0 and 0

    @pytest.mark.parametrize("seed", range(5))
    def test_order_changes_no_bit(self, seed: int) -> None:
        scans = random_scans(30)
        shuffled = random.Random(seed).sample(scans, len(scans))
        assert score_scans(shuffled) == score_scans(scans)
        assert find_intervals(shuffled, num_resamples=100) == find_intervals(scans, num_resamples=100)
        assert 0.1 < score_scans(scans)["dice"] < 0.9

    def test_macro_f1_is_scikit_learns(self) -> None:
        rng = np.random.default_rng(0)
        scans, masks = [], rng.integers(0, 4, (2, 5, 6, 7))
        for preds, target in masks.swapaxes(0, 1):
            counts = [
                [((preds == k) & (target == k)).sum(), (preds == k).sum(), (target == k).sum()] for k in range(4)
            ]
            empty = np.zeros((3, 1, 6, 7), dtype=bool)
            scans.append(compare_masks("a", len(scans), ORGANS, empty, empty, label_counts=np.array(counts)))
        expected = f1_score(masks[1].reshape(-1), masks[0].reshape(-1), average="macro")
        assert score_scans(scans)["macro_f1_seed"] == pytest.approx(expected, abs=1e-12)

    def test_nothing_to_score_is_nan_and_not_a_number_made_up(self) -> None:
        empty = np.zeros((3, 2, 4, 4), dtype=bool)
        for scans in ([], [compare_masks("a", "a", ORGANS, empty, empty)]):
            assert all(math.isnan(value) for value in score_scans(scans).values())

    @pytest.mark.parametrize(
        "shapes", [((3, 2, 4, 4), (3, 2, 4, 5)), ((2, 2, 4, 4), (2, 2, 4, 4)), ((3, 4, 4), (3, 4, 4))]
    )
    def test_masks_that_do_not_fit(self, shapes: Any) -> None:
        preds, target = (np.zeros(shape, dtype=bool) for shape in shapes)
        with pytest.raises(ValueError, match=r"case1: expected predicted and true masks of one shape \(3, D, H, W\)"):
            compare_masks(1, "case1", ORGANS, preds, target)

    def test_a_row_per_scan_and_organ_from_which_the_scores_follow(self) -> None:
        scans = random_scans(8)
        rows = tabulate_scans(scans)
        assert len(rows) == 3 * len(scans) and rows["case"].is_monotonic_increasing
        scores, known = score_scans(scans), rows["dice_slices"] > 0
        assert np.average(rows["dice"][known], weights=rows["dice_slices"][known]) == pytest.approx(scores["dice"])
        assert rows["volume_dice"].mean() == pytest.approx(scores["dice_volume"])
        assert 1 - rows["hausdorff"].mean() == pytest.approx(scores["hausdorff_score"])
        stomach = rows[rows["organ"] == "stomach"]
        assert stomach["volume_dice"].mean() == pytest.approx(scores["dice_volume_stomach"])


class TestEmptyTruth:
    """What a prediction counts where the truth is empty."""

    # Two scans of two slices of 1x4 pixels. First scan: large bowel on slice 1, found; on slice 2 only predicted;
    # small bowel in no mask; stomach on both slices, missed on slice 2. Second scan: only a stomach that is not there.
    @staticmethod
    def measured(wrong_pixels: int = 1) -> list[ScanScore]:
        target, preds = np.zeros((2, 3, 2, 1, 4), dtype=bool), np.zeros((2, 3, 2, 1, 4), dtype=bool)
        target[0, 0, 0, 0, 0] = preds[0, 0, :, 0, 0] = target[0, 2, :, 0, 3] = preds[0, 2, 0, 0, 3] = True
        preds[1, 2, 0, 0, :wrong_pixels] = True
        return [compare_masks("a", f"scan{n}", ORGANS, preds[n], target[n], presets=True) for n in range(2)]

    @pytest.mark.parametrize(
        ("choices", "dice", "hausdorff"),
        [
            # Dice: 1 and 0 of the large bowel, 1 and 0 of the stomach; 0 in the second scan.
            ({}, 2 / 5, (1 / 2, math.nan, 1 / 2, math.nan, math.nan, 1)),
            # Of the slices with truth: 1; 1 and 0.
            ({"target_empty_slices": "ignored"}, 2 / 3, (1 / 2, math.nan, 1 / 2, math.nan, math.nan, 1)),
            ({"target_empty_scans": "ignored"}, 2 / 4, (1 / 2, math.nan, 1 / 2, math.nan, math.nan, math.nan)),
            ({"target_empty_slices": "ignored", "target_empty_scans": "ignored"}, 2 / 3, None),
            # Both masks are empty on two slices of the first scan, and on five of the second.
            ({"both_empty": "perfect"}, (2 + 7) / 12, (1 / 2, 0, 1 / 2, 0, 0, 1)),
            ({"both_empty": "perfect", "target_empty_slices": "ignored"}, 2 / 3, None),
            # The small bowel of the first scan and the whole second one are left out, although nothing is wrong there.
            ({"both_empty": "perfect", "target_empty_scans": "ignored"}, 2 / 4, None),
        ],
    )
    def test_by_hand(self, choices: Any, dice: float, hausdorff: tuple[float, ...] | None) -> None:
        rules = replace(PRESETS["host"], target_empty_slices="worst", target_empty_scans="worst")
        rules, scans = replace(rules, **choices), self.measured()
        assert score_scans(scans, rules)["competition_dice"] == pytest.approx(dice)
        if hausdorff is not None:
            # The corners of one slice too many, or too few, are one of two slices away.
            expected = [value / math.sqrt(3) if value == 1 / 2 else value for value in hausdorff]
            found = [distance for scan in scans for distance in scan.hausdorff(rules)]
            assert found == pytest.approx(expected, nan_ok=True)

    def test_a_scan_of_all_organs_together_is_ignored_as_a_whole(self) -> None:
        rules = CompetitionRules(target_empty_scans="ignored")
        first, second = self.measured()
        both, alone = score_scans([first, second], rules), score_scans([first], rules)
        assert [both[name] for name in READ_BY_RULES] == [alone[name] for name in READ_BY_RULES]
        assert score_scans([first, second])["hausdorff_score"] < score_scans([first])["hausdorff_score"]

    @pytest.mark.parametrize("over", ["union", "organ"])
    @pytest.mark.parametrize("both_empty", ["skipped", "perfect"])
    def test_what_is_ignored_changes_nothing_whatever_is_predicted(self, over: Any, both_empty: Any) -> None:
        rng = np.random.default_rng(0)
        rules = replace(PRESETS["host"], hausdorff_over=over, both_empty=both_empty)
        names = ["hausdorff_score", "competition_dice", "competition_score"]
        for _ in range(10):
            target = rng.random((3, 4, 6, 7)) < rng.choice([0, 0.3], (3, 4, 1, 1))
            target[0, 0, 0, 0] = True
            drawn = compare_masks("a", "drawn", ORGANS, rng.random(target.shape) < 0.2, target, rules)
            expected = score_scans([drawn], rules)
            for share in (0, 0.01, 0.5):
                preds, nothing = rng.random(target.shape) < share, np.zeros_like(target)
                scans = [drawn, compare_masks("b", "nothing", ORGANS, preds, nothing, rules)]
                found = score_scans(scans, rules)
                assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        # Slices without the organ: another prediction there changes Dice neither.
        more = target | (~target.any(axis=(2, 3))[..., None, None] & (rng.random(target.shape) < 0.5))
        scores = [score_scans([compare_masks("a", "a", ORGANS, one, target, rules)], rules) for one in (target, more)]
        assert scores[0]["competition_dice"] == scores[1]["competition_dice"] == 1 and scores[1]["dice"] < 1


class TestAllPresets:
    def test_one_measurement_gives_the_scores_of_each_preset_alone(self, tmp_path: Path) -> None:
        rng, together, alone = np.random.default_rng(1), [], {preset: [] for preset in PRESETS}  # type: ignore[var-annotated]
        for patient in range(4):
            target = rng.random((3, 4, 6, 7)) < rng.choice([0, 0.3], (3, 4, 1, 1))
            masks = (rng.random(target.shape) < rng.choice([0, 0.2], (3, 1, 1, 1)), target)
            together.append(compare_masks(patient, "scan", ORGANS, *masks, presets=True))
            for preset, rules in PRESETS.items():
                alone[preset].append(compare_masks(patient, "scan", ORGANS, *masks, rules))
        write_scan_scores({"eval": together}, tmp_path / "scans.json")
        scores, copies = score_scans(together), read_scan_scores(tmp_path / "scans.json")["eval"]
        assert score_scans(copies) == pytest.approx(scores, abs=0, nan_ok=True)
        intervals = find_intervals(together, num_resamples=50)
        for preset, rules in PRESETS.items():
            expected = score_scans(alone[preset], rules)
            assert not any(name.endswith(preset) for name in expected), "only one was measured"
            around = find_intervals(alone[preset], rules, num_resamples=50)
            for name in READ_BY_RULES:
                assert scores[f"{name}_{preset}"] == expected[name] and 0 < expected[name] < 1
                assert intervals[f"{name}_{preset}"] == around[name]

    def test_rules_that_were_not_measured(self) -> None:
        empty = np.zeros((1, 1, 2, 2), dtype=bool)
        with pytest.raises(ValueError, match="a: expected a distance 'organ symmetric corners unit_cube measured'"):
            score_scans([compare_masks(1, "a", ("liver",), empty, empty)], PRESETS["host"])

    def test_the_records_of_an_earlier_version_say_what_to_do(self, tmp_path: Path) -> None:
        path = tmp_path / "scans.json"
        write_scan_scores({"eval": [dice_scan(1, 0.5)]}, path)
        records = json.loads(path.read_text())
        del records["eval"][0]["distances"]
        path.write_text(json.dumps({"eval": [{**records["eval"][0], "hausdorff": [0.1]}]}))
        with pytest.raises(InputError, match=r"of an earlier version.*; run the same training command again"):
            read_scan_scores(path)


class TestUnknownOrgans:
    """An organ that nobody drew is not an empty organ."""

    @pytest.mark.parametrize("preset", PRESETS)
    def test_scores_are_those_of_the_known_organs_alone(self, preset: Any) -> None:
        rules, rng, names = PRESETS[preset], np.random.default_rng(0), ("liver", "spleen", "aorta", "colon", "vein")
        with_unknown, known_alone = [], []
        for patient in range(6):
            target = rng.random((5, 4, 7, 8)) < rng.choice([0, 0.3], (5, 4, 1, 1))
            preds = target ^ (rng.random(target.shape) < 0.1)
            clinical = compare_organs(preds, target, (2.5, 1, 1))
            arguments = names, preds, target, rules, None, clinical
            with_unknown.append(compare_masks(patient, "scan", *arguments, unknown={"spleen", "vein"}))
            kept = [0, 2, 3]
            arguments = [names[i] for i in kept], preds[kept], target[kept], rules, None, [clinical[i] for i in kept]
            known_alone.append(compare_masks(patient, "scan", *arguments))
        scores, expected = score_scans(with_unknown, rules), score_scans(known_alone, rules)
        assert {name: scores[name] for name in expected} == expected and 0 < expected["dice"] < 1
        others = scores.keys() - expected.keys()
        assert {"dice_spleen", "dice_volume_vein", "hausdorff_mm_vein"} < others
        assert all(math.isnan(scores[name]) for name in others)
        intervals = find_intervals(with_unknown, rules, num_resamples=100)
        assert {name: intervals[name] for name in expected} == find_intervals(known_alone, rules, num_resamples=100)
        assert set(tabulate_scans(with_unknown, rules)["organ"]) == {"liver", "aorta", "colon"}

    def test_each_scan_counts_for_the_organs_that_it_has(self, tmp_path: Path) -> None:
        target = np.zeros((2, 2, 1, 4), dtype=bool)
        target[:, 0, 0, 0] = True
        missed = np.zeros_like(target)
        clinical = compare_organs(target, target, (2, 1, 1))
        counts = np.array([[5, 6, 6], [1, 2, 1], [1, 1, 1]])
        scans = [
            compare_masks(1, "a", ("liver", "spleen"), missed, target, unknown={"spleen"}, clinical=clinical),
            compare_masks(2, "b", ("liver", "spleen"), target, target, label_counts=counts, clinical=clinical),
        ]
        assert score_scans(scans)["dice_liver"] == 0.5 and score_scans(scans)["dice_spleen"] == 1
        described = describe_clinical(scans)
        assert described["known"] == {"liver": 2, "spleen": 1} and described["one_sided"] == {"liver": 0, "spleen": 0}
        assert "| scans where it is known | 2 of 2 | 1 of 2 |" in format_clinical(described)
        assert "known" not in describe_clinical(scans[1:])
        write_scan_scores({"eval": scans}, tmp_path / "scans.json")
        copies = read_scan_scores(tmp_path / "scans.json")["eval"]
        assert copies[0].unknown == ("spleen",) and score_scans(copies) == score_scans(scans)

    def test_macro_f1_leaves_out_an_unknown_organ(self) -> None:
        # Per label: in both masks, predicted, true.
        counts = np.array([[5, 5, 5], [2, 2, 2], [0, 4, 1]])
        empty = np.zeros((2, 1, 2, 2), dtype=bool)
        scan = compare_masks(1, "a", ("liver", "spleen"), empty, empty, label_counts=counts, unknown={"spleen"})
        assert score_scans([scan])["macro_f1_seed"] == 1

    def test_other_organs_cannot_be_scored_together(self) -> None:
        empty = np.zeros((1, 1, 2, 2), dtype=bool)
        scans = [compare_masks(1, name, (name,), empty, empty) for name in ("liver", "spleen")]
        with pytest.raises(ValueError, match="with the same organs"):
            score_scans(scans)


class TestIntervals:
    def test_the_scans_of_a_patient_stay_together(self) -> None:
        apart = [dice_scan(patient, 0.5 + 0.4 * (patient % 2)) for patient in range(12)]
        repeated = [dice_scan(scan.patient, scan.dice, f"day{day}") for scan in apart for day in range(10)]
        assert find_intervals(repeated)["dice"] == pytest.approx(find_intervals(apart)["dice"])

    @pytest.mark.parametrize("patients", [6, 17])
    def test_they_hold_the_truth_about_as_often_as_they_say(self, patients: int) -> None:
        rng, held = np.random.default_rng(0), 0
        for seed in range(300):
            scans = [dice_scan(patient, rng.beta(8, 2)) for patient in range(patients)]
            low, high = find_intervals(scans, num_resamples=500, seed=seed)["dice"]  # type: ignore[misc]
            held += low <= 0.8 <= high
        assert 0.88 <= held / 300 <= 0.99

    def test_against_the_normal_interval_where_there_are_many_patients(self) -> None:
        dice = np.random.default_rng(0).beta(8, 2, 400)
        scans = [dice_scan(patient, value) for patient, value in enumerate(dice.tolist())]
        reach = 1.96 * dice.std(ddof=1) / 20
        expected = (dice.mean() - reach, dice.mean() + reach)
        assert find_intervals(scans)["dice"] == pytest.approx(expected, abs=0.15 * reach)

    def test_paired_ones_are_narrower_where_both_find_the_same_patients_hard(self) -> None:
        rng = np.random.default_rng(0)
        hardness, noise = rng.uniform(0.2, 0.9, 15), rng.normal(0, 0.01, 15)
        worse = [dice_scan(patient, value) for patient, value in enumerate(hardness)]
        better = [dice_scan(patient, value) for patient, value in enumerate(hardness + 0.03 + noise)]
        low, high = find_intervals(better, baseline=worse)["dice"]  # type: ignore[misc]
        assert 0 < low < 0.03 < high < 0.05
        alone = find_intervals(better)["dice"]
        assert alone is not None and alone[1] - alone[0] > 10 * (high - low)
        reverse = find_intervals(worse, baseline=better)["dice"]
        assert reverse == pytest.approx((-high, -low))

    def test_other_patients_cannot_be_compared(self) -> None:
        with pytest.raises(ValueError, match="same patients"):
            find_intervals([dice_scan(1, 0.5)], baseline=[dice_scan(2, 0.5)])

    def test_one_patient_has_none(self) -> None:
        scans = [dice_scan(1, 0.5), dice_scan(1, 0.7, "day1"), clinical_scan(2, "other")]
        assert find_intervals(scans)["dice"] is None, "the other patient has nothing to score"
        assert find_intervals([*scans, dice_scan(3, 0.9)])["dice"] is not None
        assert find_intervals([]) == {}

    def test_every_score_has_one(self) -> None:
        scans = random_scans(9)
        intervals, scores = find_intervals(scans), score_scans(scans)
        assert intervals.keys() == scores.keys()
        for name, interval in intervals.items():
            assert interval is not None and interval[0] <= scores[name] <= interval[1], name


class TestClinical:
    def test_a_patient_counts_once_however_many_scans(self) -> None:
        scans = [
            clinical_scan(1, "case1_day0", stomach=(0.9, 2.0)),
            clinical_scan(1, "case1_day1", stomach=(0.7, 4.0)),
            clinical_scan(2, "case2_day0", stomach=(0.4, 9.0)),
        ]
        assert average_patients(scans).loc["stomach", "volume_dice"].tolist() == pytest.approx([0.8, 0.4])
        stomach = describe_clinical(scans)["scores"]["hausdorff_mm"]["stomach"]
        assert (stomach["mean"], stomach["sd"], stomach["patients"]) == (6, pytest.approx(math.sqrt(18)), 2)
        assert score_scans(scans)["hausdorff_mm_stomach"] == 6
        lines = format_clinical(describe_clinical(scans)).splitlines()
        assert lines[0] == "| mean ± SD over patients [95 % interval of the mean] | stomach |"
        assert "| volume_dice | 0.600 ± 0.283 [0.400, 0.800] |" in lines
        assert "| hausdorff_mm | 6.0 ± 4.2 [3.0, 9.0] |" in lines and "| patients | 2 |" in lines

    def test_what_nobody_asked_is_no_score_and_what_has_none_is_counted(self) -> None:
        scans = [
            clinical_scan(1, "case1_day0", large_bowel=(1.0, 5.0)),  # and no stomach in either mask
            clinical_scan(1, "case1_day1", stomach=(0.0, math.nan)),  # missed
            clinical_scan(1, "case1_day2", stomach=(1.0, 3.0)),
        ]
        assert average_patients(scans).loc[("stomach", 1)].tolist() == [0.5, 3.0]
        lines = format_clinical(describe_clinical(scans)).splitlines()
        assert lines[0].endswith("| large bowel | stomach |")
        assert "| hausdorff_mm | 5.0 | 3.0 |" in lines  # of one patient there is neither deviation nor interval
        assert "| scans with it in one mask only | 0 | 1 |" in lines

    def test_a_score_that_no_patient_has(self) -> None:
        described = describe_clinical([clinical_scan(1, "a", stomach=(0.0, math.nan)), dice_scan(2, 0.5)])
        assert described["scans"] == 1, "the other was not measured"
        assert described["scores"]["hausdorff_mm"]["stomach"]["mean"] is None
        assert "| hausdorff_mm | none |" in format_clinical(described)
