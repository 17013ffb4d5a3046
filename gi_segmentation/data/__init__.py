"""In: a dataset. Out: slices, checked, cached and augmented, as the tensors that a model needs.

Imports the ground and `formats.kaggle`.
"""
