"""Receptive fields of layers, compared with values computed by hand: branches, strides, global layers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.receptive_field.per_layer import LayerField, _regulated, layer_receptive_fields
from rfield.receptive_field.theoretical import theoretical_receptive_field
from rfield.segmentation.models import small_cnn

INF = (math.inf, math.inf)


def by_name(model: nn.Module, **options: Any) -> dict[str, LayerField]:
    return {layer.name: layer for layer in layer_receptive_fields(model, **options)}


class Branches(nn.Module):
    """A stem, two branches, one of them pooled by a function, a skip from the stem, and an upsampled sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.branches = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=d, dilation=d) for d in (2, 6)])
        self.last = nn.Conv2d(8, 2, (1, 3), padding=(0, 1))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        stem = self.stem(image).relu_()
        near, far = self.branches
        near = near(stem)
        near += stem
        far = F.interpolate(far(F.max_pool2d(stem, 3, 2, 1)), near.shape[2:], mode="nearest")
        return {"out": self.last(torch.cat([near, far], 1))}


def test_branches_functional_calls_and_strides() -> None:
    layers = by_name(Branches())
    assert list(layers) == ["stem", "branches.0", "branches.1", "last", "output"]
    assert [layer.field for layer in layers.values()] == [
        (3.0, 3.0),
        (11.0, 11.0),  # 3 + 2 * 2 * 2
        (55.0, 55.0),  # 3 + 2 * 2 by the pool, 2 * 6 * 4
        (55.0, 59.0),  # 2 px more to the left; to the right the nearest pixel is the one before, 4 px away or none
        (55.0, 59.0),
    ]
    assert [layer.stride[0] for layer in layers.values()] == [2, 2, 4, 2, 2]
    far = layers["branches.1"]
    assert (far.kernel, far.dilation, far.tap_spacing, far.parallel) == ((3, 3), (6, 6), (24, 24), "branches")
    assert (layers["last"].kernel, layers["last"].parallel, layers["output"].kernel) == ((1, 3), None, None)


@pytest.mark.parametrize("regulate", [False, True])
def test_agrees_with_the_theoretical_field_of_chains(regulate: bool) -> None:
    network = small_cnn(2, dilation=7, head_channels=4, regulate=regulate, mechanism="dilation")
    steps: list[nn.Module] = []
    for layer in layer_receptive_fields(network):
        if layer.name == "output":
            continue
        steps.append(network.get_submodule(layer.name))
        assert layer.field == theoretical_receptive_field(nn.Sequential(*steps))
    assert [type(step).__name__ for step in steps].count("AdaptiveConv2d") == regulate
    assert len(steps) > 5


def test_learned_dilations_are_the_effective_ones() -> None:
    adaptive = AdaptiveConv2d(3, 3, 3, padding=12, dilation=12, factor=1.5)
    layers = by_name(adaptive)
    assert (layers[""].dilation, layers["output"].field) == ((8, 8), (17.0, 17.0))
    inside = nn.Conv2d(3, 3, 3, padding=12, dilation=12)
    model = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), ReceptiveFieldRegulator(inside, factor=2.0))
    layer = by_name(model)["1.module"]
    assert layer.dilation == pytest.approx((6, 6))
    assert layer.tap_spacing == pytest.approx((12, 12), rel=0.02)
    # 128 px become 255; the middle one, 127, lies at 63.5, its outer taps at 57.5 and 69.5: 14 pixels of 2 px.
    assert layer.local == (28.0, 28.0)
    # Each axis by itself.
    regulator = ReceptiveFieldRegulator(inside, factor=(2.0, 1.5))
    layer = by_name(nn.Sequential(nn.Conv2d(3, 3, 1, stride=(4, 1)), regulator))["1.module"]
    assert layer.dilation == pytest.approx((6, 8))
    assert layer.tap_spacing == pytest.approx((24, 8), rel=0.02)
    assert layer.stride == pytest.approx((2, 2 / 3))


def test_regulators_inside_each_other_multiply() -> None:
    inner = ReceptiveFieldRegulator(nn.Conv2d(3, 3, 3, padding=12, dilation=12), factor=(2.0, 1.5))
    outer = ReceptiveFieldRegulator(nn.Sequential(inner), factor=(2.0, 4.0))
    assert _regulated(outer, "module.0.module") == pytest.approx((1 / 4, 1 / 6))
    assert _regulated(outer, "module.0") == pytest.approx((1 / 2, 1 / 4)), "around it"
    inner.snap()
    assert _regulated(outer, "module.0.module") == pytest.approx((1 / 2, 1 / 4))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.conv(image)
        tokens = features.flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        features = tokens.mT.unflatten(2, features.shape[2:])
        return features * self.gate(features.mean((2, 3), keepdim=True))


def test_layers_that_see_the_whole_image_are_listed() -> None:
    layers = by_name(Attends())
    assert list(layers) == ["conv", "attention", "gate", "", "output"]
    assert [layer.field for layer in layers.values()] == [(3, 3), INF, INF, INF, INF]
    assert [layer.local for layer in layers.values()] == [(3, 3), INF, INF, (3, 3), (3, 3)]
    assert layers["gate"].stride == INF
    pooled = by_name(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    assert [(layer.kind, layer.field) for layer in pooled.values()] == [
        ("Conv2d", (3, 3)),
        ("AdaptiveAvgPool2d", INF),
        ("", INF),
    ]


class Named(nn.Module):
    """A layer with the name output that is not the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.output = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.last = nn.Conv2d(4, 4, 5, padding=(0, 2))
        self.activated = nn.Conv2d(4, 4, 1)
        self.activated.act = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.activated(self.last(self.output(image)))
        return features.softmax(1)


def test_no_layer_is_left_out_and_the_output_comes_last() -> None:
    layers = layer_receptive_fields(Named())
    assert [(layer.name, layer.kind, layer.field[0], layer.pads) for layer in layers] == [
        ("output", "Conv2d", 3, False),
        ("last", "Conv2d", 7, True),
        ("activated", "Conv2d", 7, False),
        ("output", "", 7, False),
    ]


def test_a_layer_that_runs_twice_has_two_rows() -> None:
    conv = nn.Conv2d(3, 3, 3)
    layers = by_name(nn.Sequential(conv, nn.ReLU(), conv))
    assert [(layer.name, layer.field[0]) for layer in layers.values()] == [("0", 3), ("0#2", 5), ("output", 5)]


class OneSize(nn.Module):
    """Accepts images of one size only, or of even sizes only."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(3, 4, 5, stride=2, padding=2)

    def forward(self, image: Tensor) -> Tensor:
        if (image.shape[2] % 32 or image.shape[3] % 32) if self.side is None else image.shape[2:] != (self.side,) * 2:
            raise RuntimeError(f"not of my size: {image.shape[2]}x{image.shape[3]}")
        output: Tensor = self.conv(image)
        return output


def test_models_of_even_and_of_fixed_sizes() -> None:
    layer = by_name(OneSize())["conv"]
    assert (layer.field, layer.stride) == ((5, 5), (2, 2))
    layer = by_name(OneSize(side=20), size=(20, 20))["conv"]
    assert (layer.field, layer.stride) == ((5, 5), (2, 2))
    with pytest.raises(ValueError, match="65x257, 64x256 or 30x30 px: not of my size: 257x65"):
        layer_receptive_fields(OneSize(side=20), size=(30, 30))


def test_layers_that_do_not_depend_on_the_image_are_left_out() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, image: Tensor) -> Tensor:
            output: Tensor = self.conv(image) + self.other(torch.ones_like(image))
            return output

    assert list(by_name(Constant())) == ["conv", "output"]
