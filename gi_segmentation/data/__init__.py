"""In: a Kaggle folder, or the dataset `gi_tract`. Out: checked slices, and the tensors that a model needs.

This package imports only the modules `schema`, `rules`, `rle`, `errors`, `arguments` and `internals`.
"""
