"""Training steps of heads and whole networks, with each algorithm of the operators left out or forced in turn."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.timing import Case, Group, training_step
from rfield import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.segmentation.models import HeadSpec, SinglePathHead, efficientnet_lite0, largefov_vgg16

# What each way replaces in `rfield.ops`.
WAYS: dict[str, dict[str, Callable[..., object]]] = {
    "as chosen": {},
    "without strides": {"resize.whole_strides": lambda *_: None},
    "by matrices": {"resize.has_kernels": lambda _: False, "fractional_conv.has_kernels": lambda _: False},
}
_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
Make = Callable[[str], nn.Module]


def steps(quick: bool = False) -> Iterator[Group]:
    """Train heads and networks: bare, in a regulator, at a drawn integer dilation, and between integers."""
    yield from _heads(quick)
    yield from _networks(quick)


def _heads(quick: bool) -> Iterator[Group]:
    shapes = [(1, 32, 9)] if quick else [(4, 128, 41), (2, 1024, 41)]
    for (batch, width, side), (format, memory_format) in product(shapes, _FORMATS.items()):
        features = torch.randn(batch, 512, side, side).contiguous(memory_format=memory_format).requires_grad_()
        make = partial(_head, width, memory_format)
        yield from _groups(f"step: head 512 -> {width}, {side} x {side}, {format}", make, features, 6)


def _head(width: int, memory_format: torch.memory_format, mechanism: str) -> nn.Module:
    head = SinglePathHead(512, 21, HeadSpec(6, width, 0.0, bool(mechanism), mechanism or "regulator"))
    return head.to(memory_format=memory_format)


def _networks(quick: bool) -> Iterator[Group]:
    networks = {
        "VGG16, 512 -> 128": (largefov_vgg16, 6, 8, (2, 161)),
        "EfficientNet-Lite0, 112 -> 128": (efficientnet_lite0, 3, 16, (4, 257)),
    }
    for (name, (network, dilation, stride, (batch, side))), (format, memory_format) in product(
        networks.items(), _FORMATS.items()
    ):
        batch, side = (1, 65) if quick else (batch, side)
        images = torch.randn(batch, 3, side, side).contiguous(memory_format=memory_format)
        make = partial(_network, network, dilation, stride, memory_format)
        yield from _groups(f"step: {name}, {batch} x {side} x {side} px, {format}", make, images, dilation)


def _network(
    network: Callable[..., nn.Module], dilation: int, stride: int, memory_format: torch.memory_format, mechanism: str
) -> nn.Module:
    made = network(
        21,
        dilation=dilation,
        head_channels=128,
        regulate=bool(mechanism),
        mechanism=mechanism or "dilation",
        dropout=0.0,
        output_stride=stride,
    )
    return made.to(memory_format=memory_format)


def _groups(name: str, make: Make, input: Tensor, dilation: int) -> Iterator[Group]:
    bare = _step(make(""), input)
    for factor in (1.0, 0.63, 0.5, 1.3):
        regulated = make("regulator")
        _layer(regulated).set_factor(factor)
        ways = [way for way in WAYS if way != "without strides" or factor in (1.0, 0.5)]
        cases = {way: forced(way, _step(regulated, input)) for way in ways}
        yield Group(f"{name}, regulator, f = {factor:g}", {"bare": bare, **cases})
    drawn, between = make("dilation"), make("dilation")
    _layer(drawn).dilation_override = (float(dilation), float(dilation))
    _layer(between).set_factor(1.05)
    cases = {way: forced(way, _step(between, input)) for way in ("as chosen", "by matrices")}
    cases = {"bare": bare, "drawn integer": _step(drawn, input), **cases}
    yield Group(f"{name}, adaptive convolution, f = 1.05", cases)


def _layer(module: nn.Module) -> ReceptiveFieldRegulator | AdaptiveConv2d:
    return next(each for each in module.modules() if isinstance(each, ReceptiveFieldRegulator | AdaptiveConv2d))


def _step(module: nn.Module, input: Tensor) -> Case:
    leaves = [each for each in (input, *module.parameters()) if each.requires_grad]
    forward = getattr(module, "logits", module)
    return training_step(lambda: forward(input), leaves)


def forced(way: str, case: Case) -> Case:
    """Return a case that runs with the operators changed as `WAYS` says."""

    def run() -> None:
        with ExitStack() as stack:
            for name, value in WAYS[way].items():
                stack.enter_context(patch(f"rfield.ops.{name}", value))
            case()

    return run
