"""Arithmetic on a receptive-field curve: the dilations to evaluate, and the dilation of the least loss."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rfield.layers.dilation import round_dilation

NO_HELD_OUT = "a sampled search reads its curve on held-out batches, but there is none"


def dilation_grid(low: float, high: float, count: int, whole: bool) -> list[float]:
    """Return at most `count` dilations from `low` to `high`, evenly spaced in their logarithm; integers if `whole`.

    Example:
        >>> dilation_grid(1.0, 32.0, 6, whole=True)
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    """
    steps = [low * (high / low) ** (place / max(1, count - 1)) for place in range(count)]
    return sorted({float(round_dilation(value)) for value in steps} if whole else set(steps))


def curve_minimum(curve: dict[float, float]) -> float:
    """Return the dilation at which a loss curve, {dilation: loss}, is least.

    It is the vertex of the parabola, over the logarithm of the dilation, through the least loss and both its
    neighbours. Losses that are not finite are ignored.

    Raises:
        ValueError: if no loss is finite.

    Example:
        >>> round(curve_minimum({2.0: 0.69, 4.0: 0.0, 8.0: 0.69}), 2)
        4.0
    """
    dilations = sorted(curve)
    finite = [index for index, dilation in enumerate(dilations) if math.isfinite(curve[dilation])]
    if not finite:
        raise ValueError(
            f"no loss of the curve is finite: {curve}; the training has diverged, or the loss is not defined on the "
            "held-out batches, for example because one has no labels"
        )
    least = min(finite, key=lambda index: curve[dilations[index]])
    if not {least - 1, least + 1} <= set(finite):
        return dilations[least]
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(d), curve[d]) for d in dilations[least - 1 : least + 2]), strict=True)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:
        return dilations[least]
    vertex = (x0 + x1) / 2 - left / (2 * curvature)
    return math.exp(min(max(vertex, x0), x2))


def mean_curve(losses: Mapping[float, list[float]]) -> dict[float, float]:
    """Return {dilation: mean loss} from the losses of all batches."""
    return {dilation: sum(each) / len(each) for dilation, each in losses.items()}


def check_held_out(held_out: Iterable[Any]) -> None:
    """Raise ValueError for batches that are empty, where this can be known, or can be iterated over only once."""
    if iter(held_out) is held_out:
        raise ValueError(
            f"held_out is a {type(held_out).__name__}, which can be gone through once, but every evaluation of the "
            "curve goes through it: give a list of batches or a DataLoader"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # another process may have some
    try:
        is_empty = len(held_out) == 0  # type: ignore[arg-type]
    except TypeError:  # for example a DataLoader of an iterable data set
        is_empty = not any(True for _ in held_out)
    if is_empty:
        raise ValueError(NO_HELD_OUT)
