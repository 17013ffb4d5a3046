"""In: a folder, a Hub id or a family's name. Out: a model with our labels, and its image processor.

Imports the ground and nothing else of this package.
"""
