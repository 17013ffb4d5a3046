"""In: a finished run, or a built dataset. Out: its facts, pictures and card, and its repository on a Hub.

Imports the ground, `data`, `models`, `scoring`, `postprocessing`, `review`, `training` and `inference`.
"""
