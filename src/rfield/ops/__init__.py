"""Operators: functions of tensors with gradients; `reference.py` holds slow oracles for the tests."""

from rfield.ops.fractional_conv import fractional_conv2d
from rfield.ops.resize import resize_bilinear, resized_size

__all__ = ["fractional_conv2d", "resize_bilinear", "resized_size"]
