"""The scores of a submission file: by hand, from the definition, with every preset, and errors that name the row."""

import csv
import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion, shift
from scipy.spatial import cKDTree

from gi_segmentation.errors import InputError
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.rle import decode, encode
from gi_segmentation.rules import PRESETS
from gi_segmentation.score import main
from gi_segmentation.scoring.clinical import compare_organ
from tests.support.scoring import score_submission

ORGANS = GI_TRACT.names
HEIGHT, WIDTH = 4, 5
Masks = dict[str, np.ndarray]  # by slice id: bool, shape (organs, height, width)


def write_table(path: Path, masks: Masks, column: str, sizes: bool = False) -> Path:
    """Write masks as `train.csv` (with the sizes as columns, if so asked) or as a submission."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "class", column, *(["width", "height"] if sizes else [])])
        for slice_id, organs in masks.items():
            for organ, mask in zip(ORGANS, organs, strict=True):
                extra = [mask.shape[1], mask.shape[0]] if sizes else []
                writer.writerow([slice_id, organ, encode(mask), *extra])
    return path


def random_masks(seed: int = 0) -> Masks:
    """Two scans of 4 and 2 slices, numbered with a gap; the first slice is empty."""
    rng = np.random.default_rng(seed)
    ids = [f"case2_day1_slice_{n:04d}" for n in (1, 2, 3, 10)] + [f"case10_day0_slice_{n:04d}" for n in (5, 6)]
    masks = {slice_id: rng.random((3, HEIGHT, WIDTH)) < 0.3 for slice_id in ids}
    masks[ids[0]][:] = False
    return masks


def distance_by_definition(preds: np.ndarray, target: np.ndarray) -> float:
    """mle-bench's distance of two volumes that both have voxels, from the definition."""
    points = [np.argwhere(volume) / np.array(volume.shape) for volume in (preds, target)]
    ways = [cKDTree(b).query(a)[0].max() for a, b in (points, points[::-1])]
    return max(ways) / math.sqrt(3)


def score_by_definition(truth: Masks, preds: Masks) -> dict[str, float]:
    """Dice and Hausdorff of small masks, pair by pair and scan by scan."""
    dice = []
    scans: dict[str, list[str]] = defaultdict(list)
    for slice_id in sorted(truth):
        scans[slice_id.split("_slice_")[0]].append(slice_id)
        for organ in range(3):
            t, p = truth[slice_id][organ], preds[slice_id][organ]
            if t.any() or p.any():
                dice.append(2 * (t & p).sum() / (t.sum() + p.sum()))
    distances = []
    for ids in scans.values():
        t, p = (np.stack([masks[i].any(axis=0) for i in ids]) for masks in (truth, preds))
        distances.append(distance_by_definition(p, t))
    scores = {"dice": float(np.mean(dice)), "hausdorff_score": 1 - float(np.mean(distances))}
    return {**scores, "competition_score": 0.4 * scores["dice"] + 0.6 * scores["hausdorff_score"]}


class TestPresets:
    def test_presets_by_hand(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        # One slice of 3x4 pixels: large bowel 1 of 2 pixels, no small bowel, the stomach only predicted.
        masks, others = np.zeros((3, 3, 4), dtype=bool), np.zeros((3, 3, 4), dtype=bool)
        masks[0, 0, 0] = others[0, 0, 0] = others[0, 0, 1] = others[2, 2, 3] = True
        truth = write_table(tmp_path / "train.csv", {"case1_day0_slice_0001": masks}, "segmentation", sizes=True)
        submission = write_table(tmp_path / "submission.csv", {"case1_day0_slice_0001": others}, "predicted")
        command = ["--truth", str(truth), "--submission", str(submission), "--num_proc", "1"]
        ours = main(command)
        assert ours["dice"] == pytest.approx((2 / 3 + 0) / 2)  # the small bowel is skipped
        assert ours["hausdorff_score"] == pytest.approx(1 - math.hypot(2 / 3, 3 / 4) / math.sqrt(3))  # of the union
        assert "preset mle_bench: both_empty skipped, target_empty_slices worst, " in capsys.readouterr().out
        theirs = main([*command, "--preset", "first_place"])
        assert theirs["dice"] == ours["dice"], "what the rest of the project calls Dice follows no preset"
        assert theirs["competition_dice"] == pytest.approx((2 / 3 + 1 + 0) / 3)
        assert theirs["competition_score"] == pytest.approx(
            0.4 * theirs["competition_dice"] + 0.6 * theirs["hausdorff_score"]
        )
        assert theirs["hausdorff_score"] == pytest.approx(1 - (1 / math.sqrt(1 + 9 + 16) + 0 + 1) / 3)
        shown = capsys.readouterr().out
        assert "preset first_place: both_empty perfect, target_empty_slices worst, " in shown
        # All presets stand side by side, whichever is chosen. For the host, the stomach is nowhere in the truth. The
        # large bowel has a Dice of 2/3, and its outline ends one of four pixels too far.
        host = (2 / 3, 1 - 1 / 4 / math.sqrt(3))
        row = (*host, 0.4 * host[0] + 0.6 * host[1])
        assert f"| host | {' | '.join(f'{value:.4f}' for value in row)} |" in shown
        assert f"| **first_place** | {theirs['competition_dice']:.4f} | " in shown
        assert f"| mle_bench | {ours['competition_dice']:.4f} | {ours['hausdorff_score']:.4f} | " in shown

    def test_each_choice_can_be_made_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        truth = write_table(tmp_path / "train.csv", random_masks(), "segmentation", sizes=True)
        submission = write_table(tmp_path / "submission.csv", random_masks(1), "predicted")
        command = ["--truth", str(truth), "--submission", str(submission), "--num_proc", "1"]
        rules = replace(PRESETS["mle_bench"], hausdorff_over="organ", both_empty="perfect")
        scores = main([*command, "--hausdorff_over", "organ", "--both_empty", "perfect"])
        assert scores == score_submission(truth, submission, num_proc=1, rules=rules) != main(command)
        assert "preset mle_bench except for both_empty, hausdorff_over: both_empty perfect" in capsys.readouterr().out


class TestScores:
    def test_a_perfect_submission(self, tmp_path: Path) -> None:
        truth = write_table(tmp_path / "train.csv", random_masks(), "segmentation", sizes=True)
        submission = write_table(tmp_path / "submission.csv", random_masks(), "predicted")
        scores = score_submission(truth, submission, num_proc=1)
        assert {"dice", "dice_stomach", "hausdorff_score", "competition_score"} < set(scores)
        assert set(scores.values()) == {1.0}

    @pytest.mark.parametrize("seed", range(5))
    def test_a_random_submission_scores_by_definition_in_any_order(self, seed: int, tmp_path: Path) -> None:
        masks, others = random_masks(seed), random_masks(seed + 100)
        truth = write_table(tmp_path / "train.csv", masks, "segmentation", sizes=True)
        submission = write_table(tmp_path / "submission.csv", others, "predicted")
        scores = score_submission(truth, submission, num_proc=1)
        for name, value in score_by_definition(masks, others).items():
            assert scores[name] == pytest.approx(value, abs=1e-12) and 0 < value < 1
        for path in (truth, submission):
            header, *rows = path.read_text().splitlines()
            random.Random(seed).shuffle(rows)
            path.write_text("\n".join([header, *rows]) + "\n")
        assert score_submission(truth, submission, num_proc=2) == scores

    def test_by_hand(self, tmp_path: Path) -> None:
        # Two slices of 1x4 pixels. Large bowel 2/3 on the first; stomach missed on the second; the rest is empty.
        masks = {f"case1_day0_slice_000{n}": np.zeros((3, 1, 4), dtype=bool) for n in (1, 2)}
        others = {slice_id: organs.copy() for slice_id, organs in masks.items()}
        masks["case1_day0_slice_0001"][0, 0, 0] = True
        others["case1_day0_slice_0001"][0, 0, :2] = True
        masks["case1_day0_slice_0002"][2, 0, 0] = True
        truth = write_table(tmp_path / "train.csv", masks, "segmentation", sizes=True)
        submission = write_table(tmp_path / "submission.csv", others, "predicted")
        scores = score_submission(truth, submission, num_proc=1)
        assert (scores["dice_large_bowel"], scores["dice_stomach"]) == (pytest.approx(2 / 3), 0)
        assert math.isnan(scores["dice_small_bowel"])
        assert scores["dice"] == pytest.approx(1 / 3)
        # The missed pixel is half a volume from the nearest; the false one a quarter.
        assert scores["hausdorff_score"] == pytest.approx(1 - 0.5 / math.sqrt(3))
        assert scores["competition_score"] == pytest.approx(0.4 / 3 + 0.6 * (1 - 0.5 / math.sqrt(3)))

    def test_the_command_finds_the_sizes_beside_the_truth(
        self, kaggle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = (kaggle_dir / "train.csv").read_text().replace("segmentation", "predicted", 1)
        submission = tmp_path / "submission.csv"
        submission.write_text(text)
        scores = main(["--truth", str(kaggle_dir / "train.csv"), "--submission", str(submission), "--num_proc", "1"])
        assert scores["competition_score"] == 1
        assert "  1.0000  competition_score" in capsys.readouterr().out
        elsewhere = tmp_path / "truth.csv"
        elsewhere.write_text((kaggle_dir / "train.csv").read_text())
        assert score_submission(elsewhere, submission, kaggle_dir, num_proc=1) == scores


class TestClinical:
    """The command with `--clinical`; the scores themselves are tested in test_clinical.py."""

    @pytest.fixture
    def masks(self) -> Masks:
        """Scans without gaps: two of one patient, one of another."""
        rng = np.random.default_rng(0)
        ids = [f"{scan}_slice_{n:04d}" for scan in ("case2_day1", "case2_day4", "case10_day0") for n in (3, 4, 5)]
        return {slice_id: rng.random((3, HEIGHT, WIDTH)) < 0.3 for slice_id in ids}

    @pytest.fixture
    def truth(self, masks: Masks, tmp_path: Path) -> Path:
        path = write_table(tmp_path / "train.csv", masks, "segmentation", sizes=True)
        table = pd.read_csv(path, dtype=str, na_filter=False)
        table["spacing_x"] = np.where(table["id"].str.startswith("case10_"), "1.50", "2.00")
        table["spacing_y"] = "1.00"
        table.to_csv(path, index=False)
        return path

    @pytest.fixture
    def submission(self, masks: Masks, tmp_path: Path) -> Path:
        others = {slice_id: np.roll(organs, 1, axis=2) for slice_id, organs in masks.items()}
        return write_table(tmp_path / "submission.csv", others, "predicted")

    def command(self, truth: Path, submission: Path, *more: str) -> list[str]:
        return ["--truth", str(truth), "--submission", str(submission), "--num_proc", "1", "--clinical", *more]

    def test_a_row_per_scan_and_organ_in_millimetres(
        self, masks: Masks, truth: Path, submission: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scores = main(self.command(truth, submission, "--output", str(tmp_path / "scans.csv")))
        assert scores.items() > score_submission(truth, submission, num_proc=1).items()
        rows = pd.read_csv(tmp_path / "scans.csv").set_index(["scan", "organ"])
        assert list(rows.index) == [
            (scan, organ) for scan in ("case2_day1", "case2_day4", "case10_day0") for organ in ORGANS
        ]
        assert rows["case"].tolist() == [2] * 6 + [10] * 3
        for (scan, organ), found in rows.iterrows():
            target = np.stack([masks[f"{scan}_slice_{n:04d}"][ORGANS.index(organ)] for n in (3, 4, 5)])
            spacing = (3.0, 1.0, 1.5 if scan == "case10_day0" else 2.0)
            expected = compare_organ(np.roll(target, 1, axis=2), target, spacing)
            assert found[list(expected)].to_dict() == pytest.approx(expected, nan_ok=True)
        out = capsys.readouterr().out
        assert "| mean ± SD over patients [95 % interval of the mean] | large bowel | small bowel | stomach |" in out
        assert "| patients | 2 | 2 | 2 |" in out
        by_patient = rows.groupby(["organ", "case"])["hausdorff_mm"].mean()["stomach"]
        assert f"| {by_patient.mean():.1f} ± {by_patient.std():.1f} [" in out
        assert scores["hausdorff_mm_stomach"] == pytest.approx(by_patient.mean())

    def test_spacing_comes_from_the_file_names(self, kaggle_dir: Path, tmp_path: Path) -> None:
        submission = tmp_path / "submission.csv"
        submission.write_text((kaggle_dir / "train.csv").read_text().replace("segmentation", "predicted", 1))
        main(self.command(kaggle_dir / "train.csv", submission, "--output", str(tmp_path / "scans.csv")))
        rows = pd.read_csv(tmp_path / "scans.csv")
        assert len(rows) == 4 * len(ORGANS) and rows["hausdorff_mm"].eq(0).all()
        assert rows["volume_target_ml"].sum() > 0

    def message(self, truth: Path, submission: Path, *more: str) -> str:
        with pytest.raises(InputError) as caught:
            main(self.command(truth, submission, *more))
        return str(caught.value)

    def test_pixels_of_no_size(self, truth: Path, submission: Path) -> None:
        truth.write_text(truth.read_text().replace("1.50", "0.00"))
        assert (
            "expected pixels of more than 0 mm, but 3 slices have others, the first case10_day0_slice_0003"
            in self.message(truth, submission)
        )
        truth.write_text(truth.read_text().replace("0.00", "wide"))
        assert "expected millimetres in spacing_x and spacing_y" in self.message(truth, submission)

    def test_a_table_without_spacing(self, masks: Masks, submission: Path, tmp_path: Path) -> None:
        bare = write_table(tmp_path / "bare.csv", masks, "segmentation", sizes=True)
        assert "9 slices have none" in self.message(bare, submission)

    def test_slices_of_two_spacings(self, truth: Path, submission: Path) -> None:
        lines = truth.read_text().splitlines()
        for scan in ("case2_day1", "case2_day4"):
            start = next(i for i, line in enumerate(lines) if line.startswith(f"{scan}_slice_0004"))
            lines[start : start + 3] = [line.replace("2.00", "2.50") for line in lines[start : start + 3]]
        truth.write_text("\n".join(lines))
        message = self.message(truth, submission)
        assert "case2_day1: expected slices of one size and spacing" in message and "(2 such scans)" in message
        score_submission(truth, submission, num_proc=1)  # the competition does not ask for millimetres
        truth.write_text(truth.read_text().replace("2.50", "2.00", 1))
        assert "1 slices have several sizes, the first case2_day1_slice_0004" in self.message(truth, submission)

    def test_a_gap(self, truth: Path, submission: Path) -> None:
        for path in (truth, submission):
            text = path.read_text()
            path.write_text("\n".join(line for line in text.splitlines() if "case2_day4_slice_0004" not in line))
        assert "case2_day4: expected every slice from the first to the last" in self.message(truth, submission)

    def test_an_output_that_cannot_be(self, truth: Path, submission: Path, tmp_path: Path) -> None:
        nowhere = str(tmp_path / "nowhere" / "scans.csv")
        assert "a folder that exists" in self.message(truth, submission, "--output", nowhere)


def row(masks: Masks, slice_id: str, organ: str) -> str:
    return f"{slice_id},{organ},{encode(masks[slice_id][ORGANS.index(organ)])}"


class TestErrors:
    """Each test damages one line of a perfect submission."""

    @pytest.fixture
    def masks(self) -> Masks:
        return random_masks()

    @pytest.fixture
    def truth(self, masks: Masks, tmp_path: Path) -> Path:
        return write_table(tmp_path / "train.csv", masks, "segmentation", sizes=True)

    @pytest.fixture
    def submission(self, masks: Masks, tmp_path: Path) -> Path:
        return write_table(tmp_path / "submission.csv", masks, "predicted")

    def replace(self, path: Path, old: str, new: str) -> None:
        text = path.read_text().replace("\r\n", "\n")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def message(self, truth: Path, submission: Path) -> str:
        with pytest.raises(InputError) as caught:
            score_submission(truth, submission, num_proc=1)
        return str(caught.value)

    def test_a_row_too_few(self, masks: Masks, truth: Path, submission: Path) -> None:
        self.replace(submission, row(masks, "case2_day1_slice_0002", "stomach") + "\n", "")
        assert "submission.csv: case2_day1_slice_0002 has no row for stomach" in self.message(truth, submission)

    def test_a_row_twice(self, masks: Masks, truth: Path, submission: Path) -> None:
        line = row(masks, "case2_day1_slice_0001", "small_bowel") + "\n"
        self.replace(submission, line, line + line)
        message = self.message(truth, submission)
        assert "submission.csv, row 4: case2_day1_slice_0001 small_bowel is in row 3 already" in message

    def test_slices_too_few_and_too_many(self, masks: Masks, truth: Path, tmp_path: Path) -> None:
        fewer = {slice_id: masks[slice_id] for slice_id in masks if "slice_0003" not in slice_id}
        del fewer["case10_day0_slice_0006"]
        message = self.message(truth, write_table(tmp_path / "fewer.csv", fewer, "predicted"))
        assert "lacks 2 slices, the first case10_day0_slice_0006" in message
        more = {**masks, "case3_day0_slice_0001": masks["case2_day1_slice_0002"]}
        message = self.message(truth, write_table(tmp_path / "more.csv", more, "predicted"))
        assert "adds 1 slices, the first case3_day0_slice_0001" in message
        fewer["case3_day0_slice_0001"] = masks["case2_day1_slice_0002"]
        message = self.message(truth, write_table(tmp_path / "other.csv", fewer, "predicted"))
        assert "lacks 2 slices, the first case10_day0_slice_0006 and adds 1 slices" in message

    def test_problems_are_counted_and_the_first_is_named(self, truth: Path, submission: Path) -> None:
        submission.write_text(submission.read_text().replace("stomach", "liver"))
        message = self.message(truth, submission)
        assert "row 4: expected a class of large_bowel, small_bowel, stomach; got 'liver'" in message
        assert "(6 problems)" in message

    def test_an_id_that_is_none(self, masks: Masks, truth: Path, submission: Path) -> None:
        line = row(masks, "case2_day1_slice_0002", "stomach")
        self.replace(submission, line, line.replace("case2_day1_slice_0002", "case2"))
        assert "expected an id like case123_day20_slice_0001, got 'case2'" in self.message(truth, submission)

    @pytest.mark.parametrize("wrong_file", ["train.csv", "submission.csv"])
    @pytest.mark.parametrize(
        ("rle", "complaint"),
        [("20 2", "past the image's 20 pixels"), ("1 2 3", "odd count"), ("0 1", "at least 1"), ("a b", "'a'")],
    )
    def test_an_encoding_that_is_no_mask(
        self, wrong_file: str, rle: str, complaint: str, masks: Masks, truth: Path, submission: Path, tmp_path: Path
    ) -> None:
        line = row(masks, "case10_day0_slice_0005", "stomach")
        self.replace(tmp_path / wrong_file, line, f"case10_day0_slice_0005,stomach,{rle}")
        message = self.message(truth, submission)
        assert f"{wrong_file}: case10_day0_slice_0005 stomach: " in message and complaint in message
        assert "problems)" not in message

    def test_encodings_that_are_no_masks_are_counted(
        self, masks: Masks, truth: Path, submission: Path, tmp_path: Path
    ) -> None:
        for slice_id, organ in (("case2_day1_slice_0003", "stomach"), ("case10_day0_slice_0005", "large_bowel")):
            self.replace(submission, row(masks, slice_id, organ), f"{slice_id},{organ},20 2")
        self.replace(truth, row(masks, "case10_day0_slice_0006", "stomach"), "case10_day0_slice_0006,stomach,21 1")
        message = self.message(truth, submission)
        assert "submission.csv: case2_day1_slice_0003 stomach: " in message and message.endswith("(3 problems)")

    def test_sizes_that_nobody_knows(self, masks: Masks, submission: Path, tmp_path: Path) -> None:
        truth = write_table(tmp_path / "train.csv", masks, "segmentation")
        message = self.message(truth, submission)
        assert "6 slices have none, the first case10_day0_slice_0005" in message and "--kaggle_dir" in message

    def test_a_size_that_is_no_number(self, masks: Masks, truth: Path, submission: Path) -> None:
        truth.write_text(truth.read_text().replace(f"{WIDTH},{HEIGHT}", "wide,high"))
        assert "train.csv: expected pixels in the columns width and height" in self.message(truth, submission)

    def test_a_scan_of_two_sizes(self, masks: Masks, submission: Path, tmp_path: Path) -> None:
        masks["case10_day0_slice_0006"] = np.zeros((3, HEIGHT, WIDTH + 1), dtype=bool)
        truth = write_table(tmp_path / "train.csv", masks, "segmentation", sizes=True)
        assert "case10_day0: expected slices of one size and spacing" in self.message(truth, submission)

    def test_files_without_rows_columns_or_existence(self, truth: Path, submission: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare.csv"
        bare.write_text("id,class,predicted\n")
        assert "bare.csv: no rows below the header" in self.message(truth, bare)
        assert "train.csv: expected the columns id, class, predicted" in self.message(truth, truth)
        assert "nowhere.csv: no such file" in self.message(truth, tmp_path / "nowhere.csv")
        assert "nowhere.csv: no such file" in self.message(tmp_path / "nowhere.csv", submission)


class TestRealOutlines:
    """On the competition's own annotation rows."""

    @pytest.fixture
    def rows(self, test_data: Path) -> list[dict[str, str]]:
        with (test_data / "uwmgi_rle" / "train.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def test_the_truth_scores_one_against_itself(
        self, rows: list[dict[str, str]], test_data: Path, tmp_path: Path
    ) -> None:
        submission = tmp_path / "submission.csv"
        with submission.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "class", "predicted"])
            writer.writerows([r["id"], r["class"], r["segmentation"]] for r in rows)
        scores = score_submission(test_data / "uwmgi_rle" / "train.csv", submission, num_proc=2)
        assert set(scores.values()) == {1.0}

    def test_a_shifted_and_eroded_submission_scores_by_definition(
        self, rows: list[dict[str, str]], tmp_path: Path
    ) -> None:
        scans = sorted({r["id"].split("_slice_")[0] for r in rows})[:2]
        truth: Masks = {}
        for r in rows:
            if r["id"].split("_slice_")[0] in scans:
                size = int(r["height"]), int(r["width"])
                organs = truth.setdefault(r["id"], np.zeros((3, *size), dtype=bool))
                organs[ORGANS.index(r["class"])] = decode(r["segmentation"], *size)
        changed = {
            i: shift(organs, (0, 3, -5), order=0)
            if i.startswith(scans[0])
            else np.stack([binary_erosion(organ, iterations=2) for organ in organs])
            for i, organs in truth.items()
        }
        scores = score_submission(
            write_table(tmp_path / "train.csv", truth, "segmentation", sizes=True),
            write_table(tmp_path / "submission.csv", changed, "predicted"),
            num_proc=1,
        )
        dice, distances = [], []
        for i, organs in truth.items():
            for t, p in zip(organs, changed[i], strict=True):
                if t.any() or p.any():
                    dice.append(2 * (t & p).sum() / (t.sum() + p.sum()))
        for scan in scans:
            ids = sorted(i for i in truth if i.startswith(scan + "_"))
            volumes = [np.stack([masks[i].any(axis=0) for i in ids]) for masks in (changed, truth)]
            distances.append(distance_by_definition(*volumes))
        assert scores["dice"] == pytest.approx(np.mean(dice), abs=1e-12) and 0.5 < scores["dice"] < 0.95
        assert scores["hausdorff_score"] == pytest.approx(1 - np.mean(distances), abs=1e-12)
        assert 0.8 < scores["hausdorff_score"] < 0.99
