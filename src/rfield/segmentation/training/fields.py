"""The receptive fields of a network now, path by path."""

from dataclasses import dataclass

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.models import MultiPathHead, ParsingNetwork


@dataclass(frozen=True)
class Field:
    """The receptive field of one path along one axis."""

    path: int
    axis: int
    factor: float
    effective_dilation: float
    receptive_field_px: float


def present_fields(network: ParsingNetwork) -> list[Field]:
    """Return the field of each path along the height, and along the width if that has a factor of its own."""
    head = network.head
    paths = head.heads() if isinstance(head, MultiPathHead) else [head]
    realised = [path.realised_dilation for path in paths]
    layers = [path.factor_layer for path in paths]
    total = receptive_field_px(network)
    fields = []
    for index, (layer, dilation) in enumerate(zip(layers, realised, strict=True)):
        base = dilation if layer is None else layer.base_dilation
        for axis in range(1 if layer is None else layer.log_factor.numel()):
            # The network's field is that of the path with the largest dilation along the axis; fc6 is 3x3.
            farthest = max(each[axis] for each in realised)
            field = total[axis] - 2 * network.stride * (farthest - dilation[axis])
            fields.append(Field(index, axis, base[axis] / dilation[axis], dilation[axis], field))
    return fields


def present_field(network: ParsingNetwork) -> tuple[float, float, float]:
    """Return factor, dilation and receptive field in px of the first path, along the height."""
    first = present_fields(network)[0]
    return first.factor, first.effective_dilation, first.receptive_field_px
