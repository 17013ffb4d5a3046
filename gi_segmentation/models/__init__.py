"""In: a folder, a Hub id or the name of a family. Out: a model with our labels, and its image processor.

This package imports the ground and nothing else of `gi_segmentation`.
"""
