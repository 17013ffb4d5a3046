"""Ratios against a limit or a peer, measured in one run: `python -m benchmarks.NAME` from the project's folder."""
