"""Operators: one a file, the function with its autograd; loop oracles in `reference.py`."""

from rfield.ops.resize import resize_bilinear, resized_size

__all__ = ["resize_bilinear", "resized_size"]
