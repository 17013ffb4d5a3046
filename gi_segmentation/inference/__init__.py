"""In: a checkpoint and slices. Out: masks on the slices' own grid, prediction files, comparisons of checkpoints.

This package imports `data`, `models`, `scoring`, and the modules that these may import. It does not import `training`
or `publishing`.
"""
