"""The list of pointwise layers, compared with the receptive field of every layer of torch."""

from typing import Any

import pytest
import torch
from torch import nn

from rfield.layers import ReceptiveFieldRegulator
from rfield.receptive_field.positive_gradients import PositiveGradients
from rfield.receptive_field.theoretical import _POINTWISE as POINTWISE
from rfield.receptive_field.theoretical import is_pointwise, theoretical_receptive_field
from rfield.surgery.fuse import fuse

POINTWISE_IN_A_WAY: dict[str, Any] = {
    "GLU": {"dim": 1},
    "LogSoftmax": {"dim": 1},
    "Softmax": {"dim": 1},
    "Softmin": {"dim": -3},
    "Threshold": {"threshold": 0.1, "value": 20},
    "ChannelShuffle": {"groups": 2},
    "LocalResponseNorm": {"size": 2},
    "CrossMapLRN2d": {"size": 2},
    "BatchNorm1d": {"num_features": 4},
    "BatchNorm2d": {"num_features": 4},
    "BatchNorm3d": {"num_features": 4},
    "SyncBatchNorm": {"num_features": 4},
    "LazyBatchNorm1d": {},
    "LazyBatchNorm2d": {},
    "LazyBatchNorm3d": {},
}
# Layers that do not accept a 2d map, or of which a 2d variant exists.
TAKES_NO_MAP = {"BatchNorm1d", "BatchNorm3d", "SyncBatchNorm", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"}


# An empty container, a large network, and deprecated names.
LEFT_OUT = {"Sequential", "Transformer", "Container", "NLLLoss2d"}
KINDS = sorted(name for name in {*nn.modules.__all__} - LEFT_OUT if isinstance(getattr(nn, name), type))


@pytest.mark.parametrize("name", KINDS)
def test_of_torch_s_layers_those_that_see_one_pixel_are_pointwise(name: str) -> None:
    """Each layer that needs no arguments, or those above, is run: it is pointwise if it sees one pixel."""
    kind = getattr(nn, name)
    try:
        layer = kind(**POINTWISE_IN_A_WAY.get(name, {}))
    except TypeError:  # convolutions, pools and linear layers need arguments
        assert not issubclass(kind, tuple(POINTWISE))
        return
    if name in TAKES_NO_MAP:
        assert is_pointwise(layer)
        return
    try:
        image = torch.rand(1, 4, 5, 6, requires_grad=True)
        with PositiveGradients(0), torch.enable_grad():
            output = layer.eval()(image)
        (grad,) = torch.autograd.grad(output[0, :, 2, 3].sum(), image)
    except Exception:  # a loss, a container, or a layer with another kind of input
        assert not is_pointwise(layer)
        return
    rows, columns = grad[0].sum(0).nonzero().unbind(1)
    sees_one = output.shape[2:] == image.shape[2:] and rows.tolist() == [2] and columns.tolist() == [3]
    assert is_pointwise(layer) == sees_one
    if sees_one:
        regulator = ReceptiveFieldRegulator(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), layer), factor=0.5)
        assert fuse(regulator, mode="dilation")[0].dilation == (2, 2)
        assert theoretical_receptive_field(layer) == (1, 1)


def test_layers_that_see_other_pixels_are_not_pointwise() -> None:
    for layer in (nn.Softmax(dim=-1), nn.GLU(), nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm(6)):
        with pytest.raises(ValueError, match="is not known"):
            theoretical_receptive_field(layer)
