"""Dilations and the padding that follows them: rounding, integer ranges, and setting them on a convolution."""

import math
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[float, float]
"""(height, width)."""

# exp(log(f)) equals f up to rounding errors below this relative size.
ROUNDING_ERROR = 1e-6


def as_pair(value: Any) -> tuple[int, int]:
    """Return (height, width) of a kernel size, stride, padding or dilation, given as one integer or a tuple.

    Example:
        >>> as_pair(3), as_pair((3, 5))
        ((3, 3), (3, 5))
    """
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def round_dilation(dilation: float) -> int:
    """Return the nearest integer dilation, rounding halves up, and at least 1.

    Example:
        >>> [round_dilation(value) for value in (0.2, 2.4, 2.5, 3.5)]
        [1, 2, 3, 4]
    """
    return max(1, math.floor(dilation * (1 + ROUNDING_ERROR) + 0.5))


def integer_range(least: float, greatest: float) -> tuple[int, int] | None:
    """Return the least and the greatest integer dilation between two dilations, or None if there is none.

    Example:
        >>> integer_range(1.4, 5.0), integer_range(2.2, 2.8)
        ((2, 5), None)
    """
    low, high = math.ceil(least * (1 - ROUNDING_ERROR)), math.floor(greatest * (1 + ROUNDING_ERROR))
    return (low, high) if low <= high else None


def remove_rounding_error(dilation: float) -> float:
    """Return the integer from which a dilation differs only by the rounding error of exp(log(f)), or the dilation.

    Example:
        >>> remove_rounding_error(10.9999993), remove_rounding_error(10.9993)
        (11.0, 10.9993)
    """
    nearest = max(1, round(dilation))
    return float(nearest) if abs(dilation - nearest) <= ROUNDING_ERROR * nearest else dilation


def remove_rounding_error_tensor(dilation: Tensor) -> Tensor:
    """Return `remove_rounding_error` of every element; the gradient with respect to `dilation` is 1."""
    fixed = dilation.detach()
    nearest = fixed.round().clamp(min=1)
    return dilation + torch.where((fixed - nearest).abs() <= ROUNDING_ERROR * nearest, nearest - fixed, 0)


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Return a convolution's padding as (height, width), also where it is given as "same" or "valid"."""
    if isinstance(conv.padding, str):
        same = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (same[0], same[1]) if conv.padding == "same" else (0, 0)
    return conv.padding[0], conv.padding[1]


def padding_for_dilation(conv: Any, dilation: tuple[int, int]) -> tuple[int, int]:
    """Return the padding (height, width) that keeps a convolution's output size at another dilation.

    It is negative if the convolution has less padding than the change of dilation needs.
    """
    height, width = (
        conv.padding[axis] + (dilation[axis] - conv.dilation[axis]) * (conv.kernel_size[axis] - 1) // 2
        for axis in (0, 1)
    )
    return height, width


def set_dilation(conv: nn.Conv2d, dilation: tuple[int, int]) -> None:
    """Set a convolution's dilation (height, width) in place, with the padding that keeps its output size.

    Raises:
        ValueError: if the dilation is below 1, or the padding would be negative.

    Example:
        >>> conv = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
        >>> set_dilation(conv, (2, 3))
        >>> conv.padding
        (2, 3)
    """
    if min(dilation) < 1:
        raise ValueError(f"a dilation must be at least 1, got {dilation}")
    if conv.padding != "same":
        conv.padding = numeric_padding(conv)
        padding = padding_for_dilation(conv, dilation)
        if min(padding) < 0:
            raise ValueError(f"a padding of {conv.padding} is too small to follow the dilation to {dilation}")
        conv.padding = padding
    conv.dilation = dilation
    # nn.Conv2d pads by this attribute in the modes other than zeros; the last axis comes first.
    height, width = numeric_padding(conv)
    conv._reversed_padding_repeated_twice = [width, width, height, height]
