"""In: a Kaggle folder, or the dataset `gi_tract`. Out: checked slices, and the tensors that a model needs.

Imports the ground (`schema`, `rules`, `rle`, `errors`, `arguments`, `internals`) and nothing else of this package.
"""
