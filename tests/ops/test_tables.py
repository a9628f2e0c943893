"""Sampling by tables and by matrices, in either memory format, at sizes of real maps."""

import pytest
import torch

from rfield.ops import resize_bilinear
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.resize import sampled_axes


@pytest.mark.parametrize("factors", [(0.9,), (1.1, 0.8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_several_images(factors: tuple[float, ...], memory_format: torch.memory_format) -> None:
    """Compare values and gradients; each gradient is the same whether it is needed alone or with the other."""
    input = torch.randn(5, 24, 73, 75, generator=torch.Generator().manual_seed(0))
    input = input.contiguous(memory_format=memory_format).requires_grad_()
    size, scale = (61, 60), torch.tensor(factors, requires_grad=True)
    grad = torch.randn(*input.shape[:2], *size, generator=torch.Generator().manual_seed(1))
    by_matrices = sample_by_matrices(input, scale.reciprocal(), *sampled_axes(scale.detach(), size), "border")
    found = []
    for output in (resize_bilinear(input, scale, size), by_matrices):
        gradients = torch.autograd.grad(output, (input, scale), grad, retain_graph=True)
        found.append([output, *gradients])
        for leaf, gradient in zip((input, scale), gradients, strict=True):
            assert torch.equal(torch.autograd.grad(output, leaf, grad, retain_graph=True)[0], gradient)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
