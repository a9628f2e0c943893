"""Warnings about receptive fields that do not suit the size of the images."""

import math
from collections.abc import Sequence
from typing import Any

from rfield.receptive_field.per_layer import LayerField
from rfield.text import format_size


def field_warnings(layers: Sequence[LayerField], size: tuple[int, int]) -> list[str]:
    """Return warnings about receptive fields that do not suit images of a given size.

    They name dilated layers that see more than the image, dilated layers most of whose taps read zeros, and an output
    that sees less than a tenth of the image's area.

    Args:
        layers: of `rfield.receptive_field.per_layer.layer_receptive_fields`; the last one is the model's output.
        size: (height, width) of the images in px.

    Example:
        >>> from torch import nn
        >>> from rfield.receptive_field.per_layer import layer_receptive_fields
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=9, dilation=9))
        >>> print(*field_warnings(layer_receptive_fields(layers), (100, 100)), sep="\\n")
        1: rate 9 at output stride 8 sees 1.5 x the image (147 of 100 px)
        1: rate 9 on a map of 13x13 px reads padding with 71 % of its taps
    """
    dilated = [layer for layer in layers if layer.kernel and max(layer.kernel) > 1 and max(layer.dilation or (1,)) > 1]
    groups: dict[tuple[Any, ...], list[LayerField]] = {}
    for layer in dilated:
        groups.setdefault((layer.parallel,) if layer.parallel else (layer.dilation, layer.stride), []).append(layer)
    found = []
    for group in groups.values():
        axis = max((0, 1), key=lambda axis: max(layer.local[axis] for layer in group) / size[axis])
        wide = [layer for layer in group if size[axis] < layer.local[axis] < math.inf]
        if wide:
            found.append(_width_warning(group, wide, axis, size[axis]))
    for layer in dilated:
        found += _padding_warning(layer, size)
    local = layers[-1].local
    seen = math.prod(min(extent / side, 1.0) for extent, side in zip(local, size, strict=True))
    if seen < 0.1 and math.isfinite(max(layers[-1].field)):
        of = f"{format_size(local)} of {format_size(size)} px"
        found.append(f"the output sees {100 * seen:.2g} % of the image ({of})")
    return found


def _width_warning(group: Sequence[LayerField], wide: Sequence[LayerField], axis: int, side: int) -> str:
    """Return the warning that the `wide` layers of a group of parallel ones see more than the image's side in px."""
    rates = sorted({max(layer.dilation or (1,)) for layer in group})
    names = group[0].parallel or " to ".join(dict.fromkeys((wide[0].name, wide[-1].name)))
    widest = max(wide, key=lambda layer: layer.local[axis])
    field = widest.local[axis]
    see = "rates {} at output stride {} see" if len(rates) > 1 else "rate {} at output stride {} sees"
    seeing = see.format("/".join(map(_number, rates)), _number(widest.stride[axis]))
    return f"{names}: {seeing} {field / side:.1f} x the image ({_number(field)} of {side} px)"


def _padding_warning(layer: LayerField, size: tuple[int, int]) -> list[str]:
    """Return the warning that most of a layer's taps read padding, or no warning."""
    kernel, spacing, dilation = layer.kernel or (1, 1), layer.tap_spacing or (1, 1), layer.dilation or (1, 1)
    if not layer.pads or not math.isfinite(max(spacing)):
        return []
    map_size = [math.ceil(side * rate / step) for side, rate, step in zip(size, dilation, spacing, strict=True)]
    inside, idle = 1.0, True
    for taps, rate, side in zip(kernel, dilation, map_size, strict=True):
        # A tap at a distance of a times the map's side reads inside the map at a share of 1 - a of all positions.
        reads = [max(0.0, 1 - abs(tap - (taps - 1) / 2) * rate / side) for tap in range(taps)]
        inside *= sum(reads) / taps
        idle = idle and sum(read > 0 for read in reads) <= 1
    which = f"{layer.name}: rate {_number(max(dilation))} on a map of {format_size(map_size)} px"
    if idle:
        return [f"{which} acts as a 1x1 convolution, its outer taps never reach the map"]
    return [f"{which} reads padding with {100 * (1 - inside):.0f} % of its taps"] if inside < 0.5 else []


def _number(value: float) -> str:
    return f"{value:.4g}"
