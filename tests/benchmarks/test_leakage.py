"""The leakage benchmark: its splits separate what their names say, and each score is of the right slices."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from benchmarks import leakage
from benchmarks.leakage import Trained, check_slices, divide, draw_groups, format_table, pool_slices, report, run
from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom
from gi_segmentation.arguments import DataArguments
from gi_segmentation.errors import InputError
from tests.support.models import FAMILIES

SHARE = 0.3
WORDS = ["--config_overrides", json.dumps(FAMILIES["segformer"]), "--image_size", "64", "--learning_rate", "1e-6"]


@pytest.fixture(scope="module")
def several_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 6 patients with 3 scans each, and 3 slices in each scan."""
    folder = tmp_path_factory.mktemp("several_days")
    write_phantom(folder / "kaggle", num_cases=6, days_per_case=3, slices_per_scan=3, num_proc=1)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
    return folder / "gi_tract"


@pytest.fixture(scope="module")
def slices(several_days: Path) -> Dataset:
    return pool_slices(DataArguments(dataset_name=str(several_days)))


def shared(slices: Dataset, column: str, *parts: list[int]) -> bool:
    """Return whether a scan or a patient is in more than one of the parts."""
    names = [set(slices.select(part)[column]) for part in parts]
    return sum(map(len, names)) > len(set.union(*names))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("way", "shares_scans", "shares_patients"),
    [("slice", True, True), ("scan", False, True), ("patient", False, False)],
)
def test_a_split_shares_scans_and_patients_as_its_name_says(
    slices: Dataset, way: str, shares_scans: bool, shares_patients: bool, seed: int
) -> None:
    train, validation, held_out = divide(slices, way, SHARE, seed)
    assert sorted(train + validation + held_out) == list(range(len(slices)))
    # 30 % of 6 patients, rounded, are 2 to put aside and 2 to validate on, which leaves 2 to train on. A patient has 9
    # slices.
    assert [len(train), len(validation), len(held_out)] == [18, 18, 18]
    assert shared(slices, "scan", train, validation) == shares_scans
    assert shared(slices, "case", train, validation) == shares_patients
    assert not shared(slices, "case", train + validation, held_out)


def test_a_seed_puts_the_same_patients_aside_for_all_splits(slices: Dataset) -> None:
    held_out = [[divide(slices, way, SHARE, seed).held_out for way in leakage.WAYS] for seed in range(4)]
    assert all(ways[0] == ways[1] == ways[2] for ways in held_out)
    assert len({tuple(ways[0]) for ways in held_out}) > 1


def test_whole_groups_are_drawn_with_about_as_many_slices_as_wanted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        groups = np.repeat(np.arange(12), rng.integers(1, 145, size=12))
        target = int(rng.integers(1, len(groups)))
        drawn = draw_groups(groups, target, rng)
        assert not set(groups[drawn]) & set(groups[~drawn])
        # A group is drawn only if the total comes nearer to the target by it, so the error is at most half a group.
        assert abs(np.count_nonzero(drawn) - target) <= np.bincount(groups).max() / 2


def train_here(dataset: Path, output_dir: Path, parts: tuple[list[int], ...], *words: str) -> Trained:
    flags = {**leakage.run_flags(str(dataset), seed=42, steps=2), "output_dir": output_dir}
    return run(flags, [*WORDS, *words], list(parts))


@pytest.mark.long
def test_the_same_slices_get_the_same_score_in_each_part(several_days: Path, slices: Dataset, tmp_path: Path) -> None:
    train, validation, held_out = divide(slices, "patient", SHARE, 0)
    words = ("--slice_context", "1")
    # With the same slices in all three parts, the three scores must be equal. With a slice context this also checks
    # that neighbours are looked up in the right part.
    same = train_here(several_days, tmp_path / "same", (train, train, train), *words)
    assert same.claimed == same.training == same.honest > 0
    differs = train_here(several_days, tmp_path / "differs", (train, validation, held_out), *words)
    assert len({differs.claimed, differs.training, differs.honest}) == 3


@pytest.mark.long
def test_a_report_trains_each_split_with_each_seed(
    several_days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(script: str, name: str, job: dict[str, Any]) -> Trained:
        assert script == "benchmarks.leakage"
        return run(**{**job, "flags": {**job["flags"], "output_dir": tmp_path / name}})

    monkeypatch.setattr(leakage, "run_apart", run_here)
    arguments = argparse.Namespace(seeds=[0, 1], steps=1, share=SHARE, flags=WORDS)
    trained_by = report(str(several_days), arguments)
    assert [len(trained_by[way]) for way in leakage.WAYS] == [2, 2, 2]
    assert "by scan, seed 1, 18 + 18 + 18 slices: claims 0." in capsys.readouterr().out


def test_the_table_takes_differences_within_a_seed() -> None:
    # By slice, the claims 0.8 and 0.6 have a mean of 0.7 and a standard deviation of 0.1 * sqrt(2) = 0.141. They are
    # 0.3 above the claims by patient with both seeds, so the deviation of this difference is 0.
    by_patient = [Trained(0.5, 0.9, 0.4, 1), Trained(0.3, 0.9, 0.4, 1)]
    by_slice = [Trained(0.8, 0.9, 0.5, 1), Trained(0.6, 0.9, 0.5, 1)]
    _, _, first, last = format_table({"slice": by_slice, "patient": by_patient}).splitlines()
    cells = "0.700 ± 0.141 | 0.500 ± 0.000 | +0.200 ± 0.141 | +0.300 ± 0.000 | 0.900 ± 0.000"
    assert first == f"| by slice | {cells} |"
    assert last == "| by patient | 0.400 ± 0.141 | 0.400 ± 0.000 | +0.000 ± 0.141 |  | 0.900 ± 0.000 |"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.5])
def test_a_share_that_leaves_no_patient_to_train_on_is_refused(slices: Dataset, share: float) -> None:
    with pytest.raises(InputError, match=r"--share .* got 6 in all; take a share between 0 and 0.5, or more patients"):
        check_slices(slices, share)


def test_a_dataset_with_one_scan_per_patient_ends_in_one_error(
    dataset_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["leakage", "--dataset_name", str(dataset_dir)])
    with pytest.raises(InputError, match="--dataset_name: expected patients with several scans, got one of each of"):
        leakage.main()
