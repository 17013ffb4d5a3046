"""In: a model and the splits with their transforms. Out: the best checkpoint and its scores.

Imports the ground, `formats.algorithm`, `data`, `models`, `scoring` and `review`.
"""
