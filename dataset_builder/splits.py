"""Divide the patients into folds: a patient is never on both sides of a split.

Slices of one patient look alike. With a patient on both sides, a model could score well because it knows the patient
(docs/leakage.md).
"""

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from gi_segmentation.formats.kaggle.folder import KaggleScan
from gi_segmentation.formats.kaggle.names import KaggleDataError
from gi_segmentation.schema import ORGANS


def organ_presence(scan: KaggleScan) -> list[int]:
    """Code which organs each slice shows.

    Args:
        scan: A scan with annotations.

    Returns:
        For each slice a number from 0 to 7. Its bit k is 1 if the slice shows `ORGANS[k]`: 0 means no organ, and 5
        means the first and the third.
    """
    annotations = scan.annotations or {}
    return [
        sum(1 << bit for bit, organ in enumerate(ORGANS) if organ in row and row[organ].rle.strip())
        for row in (annotations[slice_file.id] for slice_file in scan.slices)
    ]


def assign_folds(scans: list[KaggleScan], num_folds: int, seed: int) -> dict[int, int]:
    """Divide the patients into folds in which each combination of organs is about equally frequent.

    Args:
        scans: Scans with annotations.
        num_folds: Number of folds, at least 2 and at most the number of patients.
        seed: Seed of the shuffle.

    Returns:
        The fold of each case, a number from 0 to `num_folds` - 1.

    Raises:
        KaggleDataError: If there are fewer patients than folds, fewer than 2 folds, or a fold without a patient.

    Source: scikit-learn's `StratifiedGroupKFold`. Its groups are the patients, and its classes are the codes of
    `organ_presence`.
    """
    # One entry per slice, not per patient: a fold is balanced by its slices, and patients have different numbers of
    # them.
    cases = np.array([scan.case for scan in scans for _ in scan.slices])
    num_patients = len(set(cases.tolist()))
    if not 2 <= num_folds <= num_patients:
        raise KaggleDataError(
            [f"--num_folds: expected 2 to {num_patients}, the number of patients; got {num_folds}. "
             f"Each fold needs at least one patient"]
        )  # fmt: skip
    presence = np.array([code for scan in scans for code in organ_presence(scan)])
    # The splitter takes patient after patient and puts each into the fold where the frequencies of the classes then
    # differ least between folds. A group stays whole. Another release of scikit-learn may divide differently (1.7
    # does), so every card names a hash of the split.
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # If a combination of organs is on fewer slices than there are folds, some folds cannot have it. scikit-learn
        # warns of this, but rare combinations are normal here.
        warnings.filterwarnings("ignore", message="The least populated class in y")
        parts = list(splitter.split(cases, presence, groups=cases))
    # Each part is a pair of row numbers. The rows on the validation side tell which patients are in this fold.
    folds = {int(case): fold for fold, (_, validation) in enumerate(parts) for case in np.unique(cases[validation])}
    # The splitter balances classes, and it does not promise that each fold gets a patient.
    if len(set(folds.values())) < num_folds:
        raise KaggleDataError([f"--num_folds {num_folds}: a fold got no patient; take another --seed or fewer folds"])
    return folds
