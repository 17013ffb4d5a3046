"""In: a recipe and a dataset with a column `fold`. Out: a training per fold, pooled scores, one publication.

Only the command lines `gi_segmentation.cross_validate` and `gi_segmentation.table` import it.

Imports the ground, `formats`, `data`, `models`, `scoring`, `postprocessing`, `training`, `inference` and `publishing`.
"""
