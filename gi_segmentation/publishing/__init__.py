"""In: a run that is over, or a built dataset. Out: its facts, pictures and card, and its repository on a Hub.

May import every other wing; only the command lines import it, and `dataset_builder`.
"""
