"""In: a folder, a Hub id or the name of a family. Out: a model with our labels, its processor, masks of logits.

Imports the ground.
"""
