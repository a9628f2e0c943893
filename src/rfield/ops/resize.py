"""Bilinear resizing with a differentiable scale factor, anchored at the corner (Wei et al., CVPR 2017, Sec. 3.2).

Target pixel `i` samples source position `i / scale_factor`. README.md beside this file derives the gradients.
"""

import math

import torch
from torch import Tensor

from rfield.ops.axis import Axis
from rfield.ops.kernels import has_kernels
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.strided import SampleByStrides, whole_strides
from rfield.ops.tables import SampleByTables
from rfield.ops.values import is_channels_last, positive_values, without_autocast

# Float noise in (size - 1) * factor must not flip the size at integers.
_SIZE_SLACK = 1e-4


def resized_size(size: int, factor: float) -> int:
    """Return the size of an axis resized by `factor` such that no source pixel is lost.

    Args:
        size: source pixels along the axis, at least 1.
        factor: scale factor, positive and finite.

    Returns:
        `ceil((size - 1) * factor) + 1`, with a slack of 1e-4 below integers.

    Raises:
        ValueError: if `size` or `factor` is out of its range.

    Example:
        >>> resized_size(41, 1.0), resized_size(41, 0.63), resized_size(1, 7.0)
        (41, 27, 1)
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be positive and finite, got {factor}")
    return math.ceil((size - 1) * factor - _SIZE_SLACK) + 1


def resize_bilinear(input: Tensor, scale_factor: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Resize a map by a factor that may be learned.

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

    Example:
        >>> ramp = torch.arange(3.0).reshape(1, 1, 1, 3)
        >>> resize_bilinear(ramp, torch.tensor([2.0]), (1, 6))
        tensor([[[[0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.0000]]]])
    """
    _check(input, scale_factor, output_size)
    dtype = torch.promote_types(input.dtype, torch.float32)
    with without_autocast(input):
        # On the meta device there is no value: none is needed for the size.
        factor = scale_factor.to(input.device if input.is_meta else scale_factor.device, dtype)
        return _sampled(input.to(dtype), factor, output_size).to(input.dtype)


def _sampled(input: Tensor, factor: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Choose the algorithm, by the training step of a head of 128 channels on a CPU (benchmarks/README.md)."""
    rows, columns = sampled_axes(factor.detach(), output_size)
    spacing = factor.reciprocal()  # Positions are linear in it.
    if has_kernels(input):
        # Learning starts at factor 1, and searches try others of these: 0.77 to 0.93 of the time by tables.
        if strides := whole_strides(factor.tolist(), (input.shape[2], input.shape[3]), output_size):
            return SampleByStrides(strides, rows, columns)(input, spacing)
        # A table's rows are pixels, which lie together in channels-last maps alone: 0.75 to 0.87 of that by matrices.
        if is_channels_last(input):
            return SampleByTables(rows, columns)(input, spacing)
    return sample_by_matrices(input, spacing, rows, columns, "border")


def sampled_axes(factor: Tensor, output_size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Return the rows and columns that `resize_bilinear` samples."""
    return _axis(factor[:1], output_size[0]), _axis(factor[-1:], output_size[1])


def _axis(factor: Tensor, target: int) -> Axis:
    pixel = torch.arange(target, dtype=factor.dtype, device=factor.device)
    return Axis(pixel / factor, pixel)


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
