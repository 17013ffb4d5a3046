"""In: a scan with its masks. Out: its measures, a verdict with reasons, and the report that a clinician looks at.

It does not know which model predicted, and imports no PyTorch.

Imports the ground, `formats`, `data.intensity` and `postprocessing`.
"""
