"""Operators: one a file, the function with its autograd; loop oracles in `reference.py`."""
