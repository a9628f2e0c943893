"""Bilinear resizing with a differentiable scale factor, anchored at the corner (Wei et al., CVPR 2017, Sec. 3.2).

Target pixel `i` samples source position `i / scale_factor`. The tent kernel is separable, so a resize is
`A X B^T` with two small matrices `A[i, m] = max(0, 1 - |min(i / f, h - 1) - m|)`. README.md beside this file
derives the gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rfield.ops.sampling import (
    Axis,
    by_matrices,
    differentiable_gradients,
    format_of,
    in_plain_operations,
    positive_values,
    sample_grid,
    without_autocast,
)

# Float noise in (size - 1) * factor must not flip the size at integers.
_SIZE_SLACK = 1e-4


def resized_size(size: int, factor: float) -> int:
    """Size of an axis inflated by `factor`, such that no source pixel is lost.

    Args:
        size: source pixels along the axis, at least 1.
        factor: scale factor, positive and finite.

    Returns:
        `ceil((size - 1) * factor) + 1`, with a slack of 1e-4 below integers.

    Raises:
        ValueError: if `size` or `factor` is out of its range.

    >>> resized_size(41, 1.0), resized_size(41, 0.63), resized_size(1, 7.0)
    (41, 27, 1)
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be positive and finite, got {factor}")
    return max(0, math.ceil((size - 1) * factor - _SIZE_SLACK)) + 1


def resize_bilinear(input: Tensor, scale_factor: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Resizes a map by a factor that may be learned.

    Target pixel `(i, j)` samples the source at `(i / f_h, j / f_w)`; positions past the last source pixel are
    clamped to it. The output size is free: the factor sets where the samples lie, not how many there are.
    Gradients to `input` and to `scale_factor` are exact; at kinks (a sample exactly on a source pixel, as everywhere
    at factor 1) the factor's gradient is the mean of the two one-sided derivatives.

    Computes in float32 (float64 for float64 input) whatever autocast says.

    Args:
        input: Tensor[N, C, h, w], floating point.
        scale_factor: Tensor[1] (both axes) or Tensor[2] (height, width), positive.
        output_size: (H, W) of the result in pixels.

    Returns:
        Tensor[N, C, H, W] of the dtype and memory format of `input`.

    Raises:
        ValueError: for a wrong rank, an empty map, a factor that is not positive and finite, has a wrong shape or no
            value that can be read (`torch.func.vmap` over the factor).
        TypeError: if `input` or `scale_factor` is not a floating-point tensor.

    >>> ramp = torch.arange(3.0).reshape(1, 1, 1, 3)
    >>> resize_bilinear(ramp, torch.tensor([2.0]), (1, 6))
    tensor([[[[0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.0000]]]])
    """
    _check(input, scale_factor, output_size)
    dtype = torch.promote_types(input.dtype, torch.float32)
    with without_autocast(input):
        # On the meta device there is no value: none is needed for the size.
        factor = scale_factor.to(input.device if input.is_meta else scale_factor.device, dtype)
        strides = _strides(input, scale_factor, output_size)
        if strides is not None:
            picked: Tensor = _Pick.apply(input.to(dtype), factor.expand(2), strides)
            return picked.to(input.dtype)
        return _sampled(input.to(dtype), factor, output_size).to(input.dtype)


def _sampled(input: Tensor, factor: Tensor, size: tuple[int, int], plain: bool = False) -> Tensor:
    fixed = factor.detach()
    rows = _axis(fixed[:1], size[0])
    columns = rows if len(factor) == 1 and size[0] == size[1] else _axis(fixed[-1:], size[1])
    # Positions are linear in the spacing of the pixels.
    return (by_matrices if plain else sample_grid)(input, factor.reciprocal(), rows, columns, "edge")


def _axis(factor: Tensor, target: int) -> Axis:
    pixel = torch.arange(target, dtype=factor.dtype, device=factor.device)
    return Axis(pixel / factor, pixel)


def _strides(input: Tensor, scale_factor: Tensor, output_size: tuple[int, int]) -> tuple[int, int] | None:
    """How many pixels lie from one sample to the next, if all samples are pixels and the last is the last of both."""
    if in_plain_operations(input):
        return None
    strides = [1 / value for value in scale_factor.tolist()]
    row, column = strides[0], strides[-1]
    ends = [(target - 1) * stride for target, stride in zip(output_size, (row, column), strict=True)]
    if not (row.is_integer() and column.is_integer()) or ends != [size - 1 for size in input.shape[2:]]:
        return None
    return int(row), int(column)


class _Pick(torch.autograd.Function):
    """The resize by 1, 1/2, 1/4 and so on, where every sample is a pixel and a kink of the factor."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, factor: Tensor, strides: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(input, factor)
        ctx.strides = strides
        return input[:, :, :: strides[0], :: strides[1]].clone(memory_format=format_of(input))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (input, factor), (row, column), grad = ctx.saved_tensors, ctx.strides, grad_outputs[0]
        of_input, of_factor = ctx.needs_input_grad[:2]
        if of_factor and torch.is_grad_enabled():  # For the second derivative.
            resized = _sampled(input, factor, (grad.shape[2], grad.shape[3]), plain=True)
            return (*differentiable_gradients(resized, (input, factor), (of_input, of_factor), grad), None)
        grad_input = None
        if of_input:
            grad_input = torch.zeros_like(input)
            grad_input[:, :, ::row, ::column] = grad
        if not of_factor:
            return grad_input, None, None
        by_row = _slope(grad, input[:, :, :, ::column], 2, row)
        return grad_input, torch.stack((by_row, _slope(grad, input[:, :, ::row], 3, column))), None


def _slope(grad: Tensor, input: Tensor, axis: int, stride: int) -> Tensor:
    """The factor's gradient along one axis, by the mean slope of a pixel's two sides: past the end, 0.

    With `stride` = 1 / f sample i lies at i / f and moves by -i / f² a unit of the factor.
    """
    grad, input = grad.transpose(axis, 3), input.transpose(axis, 3)
    samples, last = grad.shape[3], input.shape[3] - 1
    if last == 0:
        return grad.new_zeros(())
    end = (grad[..., -1] * (input[..., last] - input[..., last - 1])).sum() * (samples - 1)
    change = input[..., stride + 1 :: stride] - input[..., stride - 1 : last - 1 : stride]
    inner = change.mul_(grad[..., 1:-1]).sum((0, 1, 2))
    return -(end + inner @ torch.arange(1, samples - 1, dtype=inner.dtype, device=inner.device)) * (stride**2 / 2)


def _check(input: Tensor, scale_factor: Tensor, output_size: tuple[int, int]) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, got {input.dtype}")
    if input.dim() != 4:
        raise ValueError(f"input must have 4 dimensions (N, C, h, w), got shape {tuple(input.shape)}")
    if 0 in input.shape:
        raise ValueError(f"input must not be empty, got shape {tuple(input.shape)}")
    if not scale_factor.is_floating_point():
        raise TypeError(f"scale_factor must be a floating-point tensor, got {scale_factor.dtype}")
    if scale_factor.shape not in ((1,), (2,)):
        raise ValueError(
            f"scale_factor must have shape (1,) or (2,) (height, width), got shape {tuple(scale_factor.shape)}"
        )
    if len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(f"output_size must be two positive sizes (H, W), got {tuple(output_size)}")
    # Reading the values would break a compiled graph.
    if not (torch.compiler.is_compiling() or input.is_meta):
        positive_values("scale_factor", scale_factor)
