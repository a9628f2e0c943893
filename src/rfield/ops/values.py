"""Questions about an operator's inputs: values, memory format, and whether a transform is active."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def read_values(name: str, numbers: Tensor) -> list[float]:
    """Return one number or two (height, width).

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        values: list[float] = numbers.tolist()
    except RuntimeError:
        raise ValueError(
            f"{name} must have values that can be read: a tensor on the meta device has none, nor has one that vmap "
            "maps over"
        ) from None
    return values


def positive_values(name: str, numbers: Tensor) -> list[float]:
    """Return one number or two (height, width), checked to be positive and finite.

    Raises:
        ValueError: if they cannot be read, or are not positive and finite.
    """
    values = read_values(name, numbers)
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"{name} must be positive and finite, got {values}")
    return values


def is_transformed() -> bool:
    """Return whether `torch.func` (vmap, grad, jacrev and so on) or forward-mode differentiation is active.

    If so, `requires_grad` of a tensor says nothing about the other levels of differentiation.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def without_autocast(input: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for the input's device."""
    return nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False)


def is_channels_last(map: Tensor) -> bool:
    """Return whether a map's channels lie beside one another in memory, and are more than one."""
    return map.is_contiguous(memory_format=torch.channels_last) and not map.is_contiguous()
