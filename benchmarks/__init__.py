"""Ratios against a limit or a peer, measured in one run: `python -m benchmarks.NAME` from the project's folder."""

from gi_segmentation.memory import keep_freed_memory

# As training does, before other libraries start their threads. It serves whatever is compared in the process.
keep_freed_memory()
