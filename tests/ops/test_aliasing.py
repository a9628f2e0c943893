"""Outputs and gradients of operators and layers share no memory with their inputs, so all may be changed in place.

In-place activations change an output, optimizers and clipping change a gradient, and a map of one pixel or one channel
is contiguous in every order, where copies are easily left out.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import (
    AdaptiveConv2d,
    Inflation2d,
    Interpolation2d,
    ReceptiveFieldRegulator,
    WeightedGradient,
    weight_gradient,
)
from rfield.ops import fractional_conv2d, resize_bilinear

Run = Callable[[Tensor], Tensor]
Case = tuple[Run, list[Tensor]]  # A function of an input, and the other tensors that it reads.


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def leaf(tensor: Tensor, dtype: torch.dtype, learned: bool = True) -> Tensor:
    return tensor.to(dtype).requires_grad_(learned)


def convolution(dilation: tuple[float, ...], channels: tuple[int, int], dtype: torch.dtype, learned: bool) -> Case:
    weight, bias = leaf(random(channels[1], channels[0], 3, 3), dtype), leaf(random(channels[1]), dtype)
    real = leaf(torch.tensor(dilation), dtype if dtype == torch.float64 else torch.float32, learned)
    return lambda x: fractional_conv2d(x, weight, bias, real, padding=(2, 2), base_dilation=(2, 2)), [
        weight,
        bias,
        real,
    ]


def resize(factor: tuple[float, ...], size: tuple[int, int] | None, dtype: torch.dtype, learned: bool) -> Case:
    scale = leaf(torch.tensor(factor), dtype if dtype == torch.float64 else torch.float32, learned)
    return lambda x: resize_bilinear(x, scale, size or (x.shape[2], x.shape[3])), [scale]


def layer(module: nn.Module, dtype: torch.dtype, training: bool) -> Case:
    module = module.to(dtype).train(training)
    return module, [*module.parameters(), *module.buffers()]


def snapped(regulator: ReceptiveFieldRegulator) -> ReceptiveFieldRegulator:
    regulator.snap()
    return regulator


def labels(input: Tensor) -> Tensor:
    return torch.ones(len(input), input.shape[2], input.shape[3], dtype=torch.long)


def around_conv(channels: tuple[int, int], factor: float) -> ReceptiveFieldRegulator:
    torch.manual_seed(0)
    return ReceptiveFieldRegulator(nn.Conv2d(*channels, 3, padding=2, dilation=2), factor)


def adaptive(channels: tuple[int, int], factor: float | tuple[float, float]) -> AdaptiveConv2d:
    torch.manual_seed(0)
    return AdaptiveConv2d(*channels, 3, padding=2, dilation=2, factor=factor)


CASES: dict[str, Callable[[tuple[int, int], torch.dtype, bool], Case]] = {
    "fractional": lambda c, dtype, train: convolution((1.3,), c, dtype, train),
    "fractional per axis": lambda c, dtype, train: convolution((0.6, 2.0), c, dtype, train),
    "whole": lambda c, dtype, train: convolution((2.0,), c, dtype, train),
    "far beyond the map": lambda c, dtype, train: convolution((40.5,), c, dtype, train),
    "resize by 1": lambda c, dtype, train: resize((1.0,), None, dtype, train),
    "resize by 1 to another size": lambda c, dtype, train: resize((1.0,), (3, 3), dtype, train),
    "resize by 1/2": lambda c, dtype, train: resize((0.5,), (3, 3), dtype, train),
    "resize by 1.3 and 2": lambda c, dtype, train: resize((1.3, 2.0), None, dtype, train),
    "AdaptiveConv2d": lambda c, dtype, train: layer(adaptive(c, 1.3), dtype, train),
    "AdaptiveConv2d per axis": lambda c, dtype, train: layer(adaptive(c, (1.3, 2.0)), dtype, train),
    "AdaptiveConv2d at its own dilation": lambda c, dtype, train: layer(adaptive(c, 1.0), dtype, train),
    "regulator": lambda c, dtype, train: layer(around_conv(c, 1.3), dtype, train),
    "regulator at 1": lambda c, dtype, train: layer(around_conv(c, 1.0), dtype, train),
    "regulator of nothing at 1": lambda c, dtype, train: layer(ReceptiveFieldRegulator(nn.Identity()), dtype, train),
    "snapped regulator": lambda c, dtype, train: layer(snapped(around_conv(c, 1.7)), dtype, train),
    "inflation by 1": lambda c, dtype, train: (lambda x: Inflation2d()(x, torch.ones(1)), []),
    "interpolation by 1": lambda c, dtype, train: (
        lambda x: Interpolation2d()(x, torch.ones(1), (x.shape[2], x.shape[3]), (x.shape[2], x.shape[3])),
        [],
    ),
    "weight_gradient": lambda c, dtype, train: (lambda x: weight_gradient(x, labels(x), [1], 3.0), []),
    "WeightedGradient": lambda c, dtype, train: (
        lambda x: WeightedGradient([1], 3.0).train(train)(x, labels(x)),
        [],
    ),
    "WeightedGradient without a mask": lambda c, dtype, train: (WeightedGradient([1], 3.0).train(train), []),
}


MAPS = (
    ((1, 4, 1, 1), 1, torch.channels_last),
    ((1, 4, 1, 1), 3, torch.contiguous_format),
    ((1, 1, 1, 1), 1, torch.contiguous_format),
    ((1, 1, 5, 5), 1, torch.channels_last),
    ((1, 3, 5, 5), 1, torch.contiguous_format),
    ((2, 3, 5, 5), 2, torch.contiguous_format),
    ((2, 3, 5, 5), 2, torch.channels_last),
    ((1, 3, 1, 5), 2, torch.contiguous_format),
)


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float32, True), (torch.float32, False), (torch.float64, False), (torch.bfloat16, True)],
    ids=["float32 in training", "float32", "float64", "bfloat16 in training"],
)
@pytest.mark.parametrize("name", CASES)
def test_all_may_be_changed_in_place(name: str, dtype: torch.dtype, training: bool) -> None:
    for shape, outputs, memory_format in MAPS:
        input = random(*shape).to(dtype).contiguous(memory_format=memory_format)
        channels = (shape[1], outputs)
        run, others = CASES[name](channels, dtype, training)
        given = [input.requires_grad_(), *others]
        before = [each.detach().clone() for each in given]
        learned = [each for each in given if each.requires_grad]
        grad = torch.ones_like(run(input))
        found = []
        for change in (lambda output: (output + 1).relu(), lambda output: output.add_(1).relu_()):
            output = run(input)
            values = output.detach().clone()
            changed = change(output)
            found.append([values, changed, *torch.autograd.grad(changed, learned, grad, allow_unused=True)])
        for one, other in zip(*found, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        with torch.no_grad():
            values = run(input).clone()
            run(input).add_(1)
            assert torch.equal(run(input), values)
        output = run(input)
        gradients = [each for each in torch.autograd.grad(output, learned, grad, allow_unused=True) if each is not None]
        for each in (output.detach(), *gradients):
            each.mul_(3).add_(1)
        # The identity's clone is torch's own, which hands on the very gradient that it is given.
        assert name.startswith("WeightedGradient") or grad.eq(1).all(), "the gradient of the output has changed"
        for place, (one, other) in enumerate(zip(given, before, strict=True)):
            assert torch.equal(one, other), f"{place} of the input and what is read beside it has changed"
