"""In: masks and probabilities of a scan, and limits. Out: masks with faint pixels, without doubtful slices and parts.

`cleaning` applies the limits, and `cross_validation.postprocessing_search` learns them. No PyTorch.

Imports the ground and `scoring.surface`.
"""
