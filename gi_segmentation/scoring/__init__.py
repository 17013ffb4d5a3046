"""In: predicted masks and annotations. Out: the scores of scans, their intervals over patients, tables.

It does not know which model predicted, and imports no PyTorch.

Imports the ground, `formats` and `data.dataset_scans`.
"""
