"""In: a folder in Kaggle's layout, `train.csv` and slice images. Out: scans, annotations, pixels, and all problems.

A problem of the data does not stop the reading. It becomes one line of text that names the file, the row and what to
do, so that a user sees all problems at once.
"""
