"""Both operators at any shape, dtype, memory layout and factor give the finite numbers of contiguous maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfield.ops import fractional_conv2d, resize_bilinear
from rfield.ops.matrices import separable_product

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "a window": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1), value=float("nan"))[..., 3:-1, 1:-2],
    "one image for all": lambda x: x[:1].expand(x.shape),
}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
# From a field of one pixel to one of the whole map and far beyond it.
factors = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1e-6, 1e-3, 0.5, 1.0, 2.0, 1e3, 1e6])), min_size=1, max_size=2
)
layouts = st.sampled_from(list(LAYOUTS))
dtypes = st.sampled_from(DTYPES)


def random_map(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    return LAYOUTS[layout](torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def differentiated(op: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs."""
    leaves = [input.detach().requires_grad_() for input in inputs]
    output = op(*leaves)
    return [output.detach(), *torch.autograd.grad(output.float().square().mean(), leaves)]


def check(op: Callable[..., Tensor], input: Tensor, *others: Tensor) -> None:
    """Check that a layout changes only the order of sums, and that all numbers are finite."""
    found = differentiated(op, input, *others)
    expected = differentiated(op, input.contiguous(), *others)
    tolerance: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2} if input.dtype.itemsize == 2 else {}
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@settings(max_examples=60, deadline=None)
@given(shapes, layouts, dtypes, factors, st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_resize(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, factor: list[float], target: tuple[int, int]
) -> None:
    input = random_map(shape, layout, dtype)
    scale = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert resize_bilinear(input, scale, target).dtype == dtype
    assert resize_bilinear(input, scale, target).shape == (*shape[:2], *target)
    check(lambda x, f: resize_bilinear(x, f, target), input, scale)


@settings(max_examples=60, deadline=None)
@given(shapes, layouts, dtypes, st.lists(st.floats(1e-6, 12), min_size=1, max_size=2), st.sampled_from([1, 3]))
def test_fractional_conv(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, dilation: list[float], kernel: int
) -> None:
    input = random_map(shape, layout, dtype)
    weight = random_map((2, shape[1], kernel, kernel), "contiguous", dtype)
    real = torch.tensor(dilation, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    pad = (kernel // 2, kernel // 2)
    output = fractional_conv2d(input, weight, None, real, padding=pad)
    assert output.dtype == dtype
    assert output.shape == (shape[0], 2, *shape[2:])
    check(lambda x, w, d: fractional_conv2d(x, w, None, d, padding=pad), input, weight, real)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_nothing_to_resize_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        resize_bilinear(torch.zeros(shape), torch.ones(1), (3, 3))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_have_the_layout_of_the_map(memory_format: torch.memory_format) -> None:
    input = torch.randn(2, 3, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
    weight, spacing = torch.randn(4, 3, 3, 3), torch.tensor([1.5], requires_grad=True)
    for output in (
        resize_bilinear(input, spacing, (7, 9)),
        fractional_conv2d(input, weight, None, spacing, padding=(1, 1)),
        fractional_conv2d(input, weight, None, spacing.detach(), padding=(1, 1)),
    ):
        grad_output = torch.randn(output.shape).contiguous(memory_format=memory_format)
        (grad,) = torch.autograd.grad(output, input, grad_output)
        assert output.is_contiguous(memory_format=memory_format)
        assert grad.is_contiguous(memory_format=memory_format)
    by_matrices = separable_product(torch.randn(7, 5), input, torch.randn(9, 6))
    assert by_matrices.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (-2.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_one_bad_number_of_two_is_an_error(bad: tuple[float, float]) -> None:
    input, weight = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="must be positive and finite"):
        resize_bilinear(input, torch.tensor(bad), (3, 3))
    with pytest.raises(ValueError, match="must be positive and finite"):
        fractional_conv2d(input, weight, None, torch.tensor(bad))
