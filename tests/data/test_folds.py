"""One dataset, any fold: `--fold K` divides the slices by the column `fold`."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from gi_segmentation.arguments import DataArguments
from gi_segmentation.command_line import parse_arguments
from gi_segmentation.data.slices import load_slices
from gi_segmentation.errors import InputError
from gi_segmentation.publishing.facts import fingerprint_dataset
from gi_segmentation.schema import hash_splits

NUM_FOLDS = 3


@pytest.fixture(scope="module")
def built(kaggle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same four patients, built once for each fold."""
    root = tmp_path_factory.mktemp("folds")
    folders = {fold: root / str(fold) for fold in range(NUM_FOLDS)}
    for fold, folder in folders.items():
        build(kaggle_dir, folder, GiTractConfig(num_folds=NUM_FOLDS, fold=fold), num_proc=1)
    return folders


def rows(dataset: Dataset) -> list[dict]:
    return dataset.select_columns(["id", "fold", "segmentation", "height", "width", "pixel_spacing"]).to_list()


def scans(slices: DatasetDict) -> dict[str, list[str]]:
    return {split: slices[split].unique("scan") for split in slices}


@pytest.mark.parametrize("fold", range(NUM_FOLDS))
def test_a_fold_has_the_rows_of_a_dataset_that_was_built_with_it(built: dict[int, Path], fold: int) -> None:
    expected = load_slices(DataArguments(dataset_name=str(built[fold])))
    # The first dataset holds fold 0 back. The flag takes another fold out of the same files.
    found = load_slices(DataArguments(dataset_name=str(built[0]), fold=str(fold)))
    for split in ("train", "validation"):
        assert rows(found[split]) == rows(expected[split])
    assert set(found["validation"]["fold"]) == {fold}
    assert hash_splits(scans(found)) == hash_splits(scans(expected))
    assert fingerprint_dataset(found) == fingerprint_dataset(expected)


def test_without_the_flag_fold_0_is_held_back(built: dict[int, Path]) -> None:
    assert set(load_slices(DataArguments(dataset_name=str(built[0])))["validation"]["fold"]) == {0}


def test_each_patient_is_held_back_by_exactly_one_fold(built: dict[int, Path]) -> None:
    held_back = [
        case
        for fold in range(NUM_FOLDS)
        for case in load_slices(DataArguments(dataset_name=str(built[0]), fold=str(fold)))["validation"].unique("case")
    ]
    everyone = load_slices(DataArguments(dataset_name=str(built[0]), fold="all"))
    assert sorted(held_back) == sorted(everyone["train"].unique("case"))
    assert len(everyone["validation"]) == 0


def test_a_fold_that_does_not_exist_is_named_with_those_that_do(built: dict[int, Path]) -> None:
    with pytest.raises(InputError, match=r"--fold 7: .* has no such fold; expected one of 0, 1, 2, or all"):
        load_slices(DataArguments(dataset_name=str(built[0]), fold="7"))


@pytest.mark.parametrize("value", ["-1", "first", "1.0"])
def test_a_value_that_is_no_fold_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="--fold must be the number of a fold or all"):
        parse_arguments([f"--fold={value}"])


def test_a_dataset_without_the_column_is_to_be_built_again(built: dict[int, Path], tmp_path: Path) -> None:
    for split, dataset in load_dataset(str(built[0])).items():
        dataset.remove_columns("fold").to_parquet(tmp_path / "old" / f"{split}.parquet")
    with pytest.raises(
        InputError, match=r"lacks the columns fold, .*build it again: `python -m dataset_builder build"
    ):
        load_slices(DataArguments(dataset_name=str(tmp_path / "old")))


def test_early_stopping_needs_patients_that_are_held_back() -> None:
    with pytest.raises(InputError, match="--early_stopping_patience needs scores, but with --fold all there are none"):
        parse_arguments(["--fold", "all", "--early_stopping_patience", "2"])
