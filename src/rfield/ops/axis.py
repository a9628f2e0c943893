"""Where an axis is sampled."""

from typing import Literal, NamedTuple

from torch import Tensor

# What lies past the ends of an axis: its last pixel, or zeros.
PaddingMode = Literal["border", "zeros"]


class Axis(NamedTuple):
    """Sample positions along one axis, linear in a spacing that may be learned.

    Attributes:
        position: Tensor[T], in source px; not negative where the padding mode is "border".
        rate: Tensor[T], derivative of each position in the spacing.
    """

    position: Tensor
    rate: Tensor
