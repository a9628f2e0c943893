"""Operators: one a file, the function with its autograd; loop oracles in `reference.py`."""

from rfield.ops.fractional_conv import fractional_conv2d
from rfield.ops.resize import resize_bilinear, resized_size

__all__ = ["fractional_conv2d", "resize_bilinear", "resized_size"]
