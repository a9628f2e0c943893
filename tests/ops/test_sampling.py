"""Sampling by tables and by ATen's sampler, at sizes where they go by parts, against plain operations."""

import pytest
import torch
from torch import Tensor

from rfield.ops import resize_bilinear
from rfield.ops.resize import _sampled


def compare(input: Tensor, factors: tuple[float, ...], size: tuple[int, int]) -> None:
    """Values, and both gradients each by itself and together."""
    input = input.requires_grad_()
    scale = torch.tensor(factors, requires_grad=True)
    grad = torch.randn(*input.shape[:2], *size, generator=torch.Generator().manual_seed(1))
    found = []
    for output in (resize_bilinear(input, scale, size), _sampled(input, scale, size, plain=True)):
        gradients = torch.autograd.grad(output, (input, scale), grad, retain_graph=True)
        found.append([output, *gradients])
        for leaf, gradient in zip((input, scale), gradients, strict=True):
            assert torch.equal(torch.autograd.grad(output, leaf, grad, retain_graph=True)[0], gradient)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("factors", [(0.9,), (1.1, 0.8)])
@pytest.mark.parametrize("shape", [(3, 8, 200, 201), (5, 24, 73, 75)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_of_several_parts_of_a_cache(
    shape: tuple[int, ...], factors: tuple[float, ...], memory_format: torch.memory_format
) -> None:
    """A map alone is more than a part, or two are."""
    input = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    compare(input, factors, (190, 170) if shape[0] == 3 else (61, 60))
