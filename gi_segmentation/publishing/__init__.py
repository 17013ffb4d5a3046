"""In: a finished run, or a built dataset. Out: its facts, pictures and card, and its repository on a Hub.

This package may import every other one except `cross_validation`. Only that package, the command lines and
`dataset_builder` import it.
"""
