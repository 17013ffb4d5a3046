"""In: masks predicted and drawn by hand. Out: the scores of scans, their intervals over patients, tables.

Imports the ground and `data`, and no PyTorch: it must not know which model predicted.
"""
