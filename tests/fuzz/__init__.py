"""Hostile input: each case gives a clear error or a right result. `python -m tests.fuzz` runs many thousand cases.

- `oracles.py` has slow decoders that share no code with the package.
- `targets.py` has what is fuzzed, and how a result is checked.
- `__main__.py` runs all targets and prints a table. `tests/test_fuzz.py` runs a few cases of each.
"""
