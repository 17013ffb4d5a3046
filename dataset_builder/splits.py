"""Divide the patients into folds: a patient is never on both sides of a split.

Slices of one patient look alike. With a patient on both sides, a model could score well because it knows the patient
(docs/leakage.md).
"""

import numpy as np

from gi_segmentation.data.kaggle import KaggleDataError, Scan
from gi_segmentation.schema import ORGANS


def organ_presence(scan: Scan) -> list[int]:
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


def assign_folds(scans: list[Scan], num_folds: int, seed: int) -> dict[int, int]:
    """Divide the patients into folds in which each combination of organs is about equally frequent.

    Args:
        scans: Scans with annotations.
        num_folds: Number of folds, at least 2 and at most the number of patients.
        seed: Seed of the shuffle.

    Returns:
        The fold of each case, a number from 0 to `num_folds` - 1.

    Raises:
        KaggleDataError: If there are fewer patients than folds, fewer than 2 folds, or a fold without a patient.

    Source: `StratifiedGroupKFold` of scikit-learn 1.9, with the patients as groups and the codes of `organ_presence`
    as classes. The folds are the same, and they do not depend on the installed release. Importing scikit-learn would
    take longer than building 1,000 slices.
    """
    cases = sorted({scan.case for scan in scans})
    if not 2 <= num_folds <= len(cases):
        raise KaggleDataError(
            [f"--num_folds: expected 2 to {len(cases)}, the number of patients; got {num_folds}. "
             f"Each fold needs at least one patient"]
        )  # fmt: skip
    # Slices of each patient (row) with each combination of organs (column). A fold is balanced by its slices, because
    # patients have different numbers of them.
    counts = np.zeros((len(cases), 2 ** len(ORGANS)))
    for scan in scans:
        counts[cases.index(scan.case)] += np.bincount(organ_presence(scan), minlength=counts.shape[1])
    counts = counts[:, counts.any(axis=0)]
    # Patients whose combinations are most unequally frequent come first, because later ones can make up for them. The
    # seed decides between equals.
    order = np.arange(len(cases))
    np.random.RandomState(seed).shuffle(order)
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    totals = np.zeros((num_folds, counts.shape[1]))
    folds = {}
    for patient in order:
        fold = find_fold(totals, counts[patient], counts.sum(axis=0))
        totals[fold] += counts[patient]
        folds[cases[patient]] = fold
    # Slices are balanced, and this does not promise that each fold gets a patient.
    if len(set(folds.values())) < num_folds:
        raise KaggleDataError([f"--num_folds {num_folds}: a fold got no patient; take another --seed or fewer folds"])
    return folds


def find_fold(totals: np.ndarray, added: np.ndarray, overall: np.ndarray) -> int:
    """Find the fold for a patient, so that the frequencies of the classes then differ least between the folds.

    Args:
        totals: Slices of each class in each fold so far, shape `(folds, classes)`.
        added: The patient's slices of each class, shape `(classes,)`.
        overall: All slices of each class, shape `(classes,)`.

    Returns:
        The number of the fold. Of equally good folds, the first of those with the fewest slices.
    """
    best, least, fewest = 0, np.inf, np.inf
    for fold in range(len(totals)):
        tried = totals.copy()
        tried[fold] += added
        spread = np.mean(np.std(tried / overall, axis=0))
        slices = totals[fold].sum()
        if spread < least or (np.isclose(spread, least) and slices < fewest):
            best, least, fewest = fold, spread, slices
    return best
