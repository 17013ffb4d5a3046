"""In: a recipe and a dataset with a column `fold`. Out: a training per fold, their pooled scores, one publication.

Imports every other wing. Only the command lines `cross_validate` and `table` of the package import it.
"""
