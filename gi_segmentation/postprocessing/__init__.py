"""In: the masks of a scan, and limits. Out: the masks without connected components that are small or doubtful.

`cross_validation.postprocessing_search` learns the limits. No PyTorch.

Imports the ground and `scoring.surface`.
"""
