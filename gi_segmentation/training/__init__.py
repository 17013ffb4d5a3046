"""In: a model and the splits with their transforms. Out: the best checkpoint and its scores.

This package imports the ground, `data`, `models`, `scoring` and `inference`. It must not import `publishing`.
"""
