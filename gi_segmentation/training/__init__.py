"""In: a model and the splits with their transforms. Out: the best checkpoint and its scores.

Imports the ground, `data`, `models`, `scoring` and `inference`; it must not import `publishing`.
"""
