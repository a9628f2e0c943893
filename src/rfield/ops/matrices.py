"""Bilinear sampling by two matrix products, on every device and differentiable any number of times."""

import torch
from torch import Tensor

from rfield.ops.axis import Axis, PaddingMode
from rfield.ops.values import is_channels_last, is_transformed


def sample_by_matrices(input: Tensor, spacing: Tensor, rows: Axis, columns: Axis, padding_mode: PaddingMode) -> Tensor:
    """Sample every channel bilinearly at each pair of a row and a column.

    Gradients to `input` and `spacing` are exact. A position exactly on a pixel is a kink; its derivative is the mean
    of the two sides, as a central difference measures it.

    Args:
        input: Tensor[N, C, h, w], float32 or float64.
        spacing: Tensor[1] (both axes) or Tensor[2] (height, width), in which the positions are linear.
        rows: T samples.
        columns: U samples.
        padding_mode: what lies past the ends.

    Returns:
        Tensor[N, C, T, U], in the memory format of `input`.

    Example:
        >>> ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> rows, columns = (Axis(at, torch.zeros_like(at)) for at in (torch.tensor([0.5]), torch.tensor([0.0, 0.25])))
        >>> sample_by_matrices(ramp, torch.ones(1), rows, columns, "border")
        tensor([[[[1.0000, 1.2500]]]])
    """
    change = spacing - spacing.detach()  # 0, with a derivative.
    row, column = (
        sampling_matrix(axis.position + axis.rate * change[place], source, padding_mode)
        for place, axis, source in ((0, rows, input.shape[2]), (-1, columns, input.shape[3]))
    )
    return separable_product(row, input, column)


def sampling_matrix(position: Tensor, source: int, padding_mode: PaddingMode) -> Tensor:
    """Return tent weights `A[i, m] = max(0, 1 - |position[i] - m|)`, so that `A @ X` samples X linearly at `position`.

    Along the axis the sampled value is piecewise linear: in cell c its slope is X[c + 1] - X[c]. A position exactly on
    a pixel is a kink; its derivative is the mean of the two sides, as a central difference measures it. Autograd of a
    tent would take either side.

    Args:
        position: Tensor[T], in source px; may require a gradient.
        source: number of source pixels, at least 1.
        padding_mode: what lies past the ends: "border" (the last pixel; positions must not be negative) or "zeros".

    Returns:
        Tensor[T, source].

    Example:
        >>> sampling_matrix(torch.tensor([0.0, 0.5, 3.0]), 2, "border")
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    fixed = position.detach()
    pixel = torch.arange(source, dtype=fixed.dtype, device=fixed.device)
    right, left = fixed.floor(), fixed.ceil() - 1
    inside = fixed
    if padding_mode == "border":
        last = source - 1
        inside = fixed.clamp(max=last)
        right = torch.where(fixed < last, right, source)  # Cell `source` has no pixels, so its slope is 0.
        left = torch.where(fixed <= last, left, source)
    weights = (1 - (inside[:, None] - pixel).abs()).clamp(min=0)
    if not (position.requires_grad or is_transformed()):
        return weights
    slope = torch.zeros_like(weights)
    for cell in (left, right):
        offset = pixel - cell[:, None]
        slope = slope + 0.5 * ((offset == 1).to(slope.dtype) - (offset == 0).to(slope.dtype))
    # The second term is 0; its derivative in the position is the slope.
    return weights + slope * (position - fixed)[:, None]


def separable_product(rows: Tensor, input: Tensor, columns: Tensor) -> Tensor:
    """Return `rows @ X @ columns^T` for every channel X of Tensor[N, C, h, w], in the memory format of `input`.

    Example:
        >>> separable_product(torch.ones(1, 2), torch.ones(1, 3, 2, 5), torch.ones(4, 5)).shape
        torch.Size([1, 3, 1, 4])
    """
    n, c, h, w = input.shape
    if not is_transformed() and is_channels_last(input):  # vmap hides the memory format.
        pixels = input.permute(0, 2, 3, 1)
        output = torch.matmul(rows, pixels.reshape(n, h, w * c))
        output = torch.matmul(columns, output.reshape(n * rows.shape[0], w, c))
        return output.reshape(n, rows.shape[0], columns.shape[0], c).permute(0, 3, 1, 2)
    output = torch.matmul(input, columns.t())
    output = torch.matmul(rows, output.reshape(n * c, h, columns.shape[0]))
    return output.reshape(n, c, rows.shape[0], columns.shape[0])
