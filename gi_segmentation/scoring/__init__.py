"""In: predicted masks and masks drawn by hand. Out: the scores of scans, their intervals over patients, tables.

This package imports `data` and the modules that `data` may import, but not PyTorch. It must not know which
model predicted.
"""
