"""Divide the patients into folds: a patient is never on both sides of a split.

Slices of one patient look alike. With a patient on both sides, a model could score well because it knows the patient
(docs/leakage.md).
"""

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from gi_segmentation.formats.kaggle.folder import KaggleScan
from gi_segmentation.formats.kaggle.names import KaggleDataError

# With so many organs, a fold is balanced by their combinations. More organs have up to 2**30 combinations, and most of
# those that occur are on a few slices of one patient. They would count as much as the frequent ones.
MAX_COMBINED = 3


def organ_presence(scan: KaggleScan) -> list[int]:
    """Code which organs each slice shows.

    Args:
        scan: A scan with annotations.

    Returns:
        For each slice a number. Its bit k is 1 if the slice shows the organ k of the labels: 0 means no organ, and 5
        means the first and the third.
    """
    annotations = scan.annotations or {}
    return [
        sum(1 << bit for bit, organ in enumerate(scan.labels.names) if organ in row and row[organ].rle.strip())
        for row in (annotations[slice_file.id] for slice_file in scan.slices)
    ]


def list_classes(scan: KaggleScan) -> list[int]:
    """Return the classes of the slices of a scan, whose frequencies should be equal in all folds.

    Returns:
        With up to three organs, one class for each slice: its combination of organs, from `organ_presence`. With more
        organs, one class for each organ on each slice, from 0 on, and the number of organs for a slice without any.
    """
    codes, count = organ_presence(scan), len(scan.labels)
    if count <= MAX_COMBINED:
        return codes
    return [bit for code in codes for bit in [k for k in range(count) if code >> k & 1] or [count]]


def assign_folds(scans: list[KaggleScan], num_folds: int, seed: int) -> dict[int, int]:
    """Divide the patients into folds in which the classes of `list_classes` are about equally frequent.

    Args:
        scans: Scans with annotations, all with the same labels.
        num_folds: Number of folds, at least 2 and at most the number of patients.
        seed: Seed of the shuffle.

    Returns:
        The fold of each case, a number from 0 to `num_folds` - 1.

    Raises:
        KaggleDataError: If there are fewer patients than folds, fewer than 2 folds, or a fold without a patient.

    Source: scikit-learn's `StratifiedGroupKFold`. Its groups are the patients.
    """
    # Entries of slices, not of patients: a fold is balanced by its slices, and patients have different numbers of
    # them.
    entries = [(scan.case, one) for scan in scans for one in list_classes(scan)]
    cases, classes = np.array(entries, dtype=np.int64).reshape(-1, 2).T
    num_patients = len(set(cases.tolist()))
    if num_patients < 2:
        raise KaggleDataError(
            [f"expected scans of at least two patients, to train on one and to validate on the other, got "
             f"{num_patients}; add the scans of another patient"]
        )  # fmt: skip
    if not 2 <= num_folds <= num_patients:
        raise KaggleDataError(
            [f"--num_folds: expected 2 to {num_patients}, the number of patients; got {num_folds}. "
             f"Each fold needs at least one patient"]
        )  # fmt: skip
    # The splitter takes patient after patient and puts each into the fold where the frequencies of the classes then
    # differ least between folds. A group stays whole. Another release of scikit-learn may divide differently (1.7
    # does), so every card names a hash of the split.
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # If a combination of organs is on fewer slices than there are folds, some folds cannot have it. scikit-learn
        # warns of this, but rare combinations are normal here.
        warnings.filterwarnings("ignore", message="The least populated class in y")
        parts = list(splitter.split(cases, classes, groups=cases))
    # Each part is a pair of row numbers. The rows on the validation side tell which patients are in this fold.
    folds = {int(case): fold for fold, (_, validation) in enumerate(parts) for case in np.unique(cases[validation])}
    # The splitter balances classes, and it does not promise that each fold gets a patient.
    if len(set(folds.values())) < num_folds:
        raise KaggleDataError([f"--num_folds {num_folds}: a fold got no patient; take another --seed or fewer folds"])
    return folds
