"""In: files of scans as they lie on a disk. Out: volumes and slices on their grids; and masks as files for others.

Kaggle's folder, NIfTI, DICOM series, archives of them; NIfTI label maps, DICOM SEG, RTSTRUCT. No PyTorch.

Imports the ground.
"""
