"""Folds by patient: no patient's slices stand on both sides of a split."""

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from gi_segmentation.data.kaggle import KaggleDataError, Scan
from gi_segmentation.schema import ORGANS


def organ_presence(scan: Scan) -> list[int]:
    """Which organs each slice shows, as a number whose bits are the organs.

    Args:
        scan: A scan with annotations.

    Returns:
        One number of 0 to 7 per slice; bit k stands for `ORGANS[k]`.
    """
    annotations = scan.annotations or {}
    return [
        sum(1 << bit for bit, organ in enumerate(ORGANS) if organ in row and row[organ].rle.strip())
        for row in (annotations[slice_file.id] for slice_file in scan.slices)
    ]


def assign_folds(scans: list[Scan], num_folds: int, seed: int) -> dict[int, int]:
    """Deal the patients into folds that show each mix of organs about equally often.

    Args:
        scans: Scans with annotations.
        num_folds: Number of folds, at least 2 and at most the number of patients.
        seed: Seed of the shuffle.

    Returns:
        Fold number by case.

    Raises:
        KaggleDataError: If there are fewer patients than folds, fewer than 2 folds, or a fold gets no patient.

    Source: scikit-learn's `StratifiedGroupKFold`, patients as groups, `organ_presence` of each slice as strata.
    Releases of scikit-learn may deal differently (1.7 does); the split hash on every card tells.
    """
    cases = np.array([scan.case for scan in scans for _ in scan.slices])
    num_patients = len(set(cases.tolist()))
    if not 2 <= num_folds <= num_patients:
        raise KaggleDataError(
            [f"--num_folds: expected 2 up to the number of patients, {num_patients}; got {num_folds}. "
             f"A fold needs a patient of its own"]
        )  # fmt: skip
    presence = np.array([code for scan in scans for code in organ_presence(scan)])
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A mix of organs rarer than the folds are many cannot stand in each of them: no reason to alarm anyone.
        warnings.filterwarnings("ignore", message="The least populated class in y")
        parts = list(splitter.split(cases, presence, groups=cases))
    folds = {int(case): fold for fold, (_, validation) in enumerate(parts) for case in np.unique(cases[validation])}
    if len(set(folds.values())) < num_folds:
        raise KaggleDataError(
            [f"--num_folds {num_folds}: the deal left a fold without a patient; take another --seed or fewer folds"]
        )
    return folds
