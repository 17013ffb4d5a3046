"""In: a checkpoint and slices. Out: masks on the slices' own grid, prediction files, comparisons of checkpoints.

Imports the ground, `data`, `models` and `scoring`; it must not import `training` or `publishing`.
"""
