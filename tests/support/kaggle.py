"""Folders in Kaggle's layout with some patients of another one."""

import shutil
from collections.abc import Collection
from pathlib import Path


def list_patients(kaggle_dir: Path) -> list[str]:
    """Return the names of the patients of a Kaggle folder, sorted."""
    return sorted(path.name for path in (kaggle_dir / "train").iterdir())


def copy_patients(kaggle_dir: Path, folder: Path, patients: Collection[str]) -> None:
    """Make a Kaggle folder of some patients of another one.

    Args:
        kaggle_dir: The folder with all patients.
        folder: The new folder.
        patients: Names like `case7`.
    """
    for patient in patients:
        shutil.copytree(kaggle_dir / "train" / patient, folder / "train" / patient)
    header, *lines = (kaggle_dir / "train.csv").read_text().splitlines()
    kept = [line for line in lines if line.split("_")[0] in patients]
    (folder / "train.csv").write_text("\n".join([header, *kept]) + "\n")
