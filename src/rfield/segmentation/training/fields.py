"""The receptive fields of a network now, path by path."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.models import MultiPathHead, ParsingNetwork
from rfield.segmentation.models.heads import Branch

# For each network its receptive field if all dilations were 0. Every step asks for the fields, and to go through all
# layers for it would take as long as a fiftieth of a small head's step.
_without_dilation: weakref.WeakKeyDictionary[ParsingNetwork, tuple[float, float]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Field:
    """The receptive field of one path along one axis."""

    path: int
    axis: int
    factor: float
    effective_dilation: float
    """0 for a 1x1 convolution, and for image pooling."""
    receptive_field_px: float
    """Infinite for image pooling."""
    branch: Branch | None
    """What the path is if it has no dilation."""


def present_fields(network: ParsingNetwork) -> list[Field]:
    """Return the field of each path along the height, and along the width if that has a factor of its own."""
    head = network.head
    paths = head.heads() if isinstance(head, MultiPathHead) else [head]
    realised = [path.realised_dilation for path in paths]
    layers = [path.factor_layer for path in paths]
    if network not in _without_dilation:
        total = receptive_field_px(network)
        # The network's field is that of the path with the largest dilation along the axis; fc6 is 3x3.
        height, width = (total[axis] - 2 * network.stride * max(each[axis] for each in realised) for axis in (0, 1))
        _without_dilation[network] = height, width
    fields = []
    for index, (layer, dilation) in enumerate(zip(layers, realised, strict=True)):
        base = (1.0, 1.0) if layer is None else layer.base_dilation
        for axis in range(1 if layer is None else layer.log_factor.numel()):
            field = _without_dilation[network][axis] + 2 * network.stride * dilation[axis]
            field = math.inf if paths[index].branch == "pool" else field
            factor = 1.0 if layer is None else base[axis] / dilation[axis]
            fields.append(Field(index, axis, factor, dilation[axis], field, paths[index].branch))
    return fields


def present_field(network: ParsingNetwork) -> tuple[float, float, float]:
    """Return factor, dilation and receptive field in px of the first path with a dilation, along the height."""
    first = first_dilated(present_fields(network))
    return first.factor, first.effective_dilation, first.receptive_field_px


def first_dilated(fields: Sequence[Field]) -> Field:
    """Return the field of the first path that is no 1x1 convolution or image pooling."""
    return next(field for field in fields if field.effective_dilation)
