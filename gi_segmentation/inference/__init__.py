"""In: checkpoints and scans. Out: masks on the grids of the scans, an output folder with files, comparisons.

Imports the ground, `formats`, `data`, `models`, `scoring`, `postprocessing` and `review`.
"""
