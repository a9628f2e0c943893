"""Linear sampling of one axis as a small matrix, differentiable in where it samples."""

import torch
from torch import Tensor


def sampling_matrix(position: Tensor, source: int, beyond: str) -> Tensor:
    """Tent weights `A[i, m] = max(0, 1 - |position[i] - m|)`, so that `A @ X` samples X linearly at `position`.

    Along the axis the sampled value is piecewise linear: in cell c its slope is X[c + 1] - X[c]. A position exactly on
    a pixel is a kink, whose derivative is taken as the mean of the two sides, as a central difference sees it. Plain
    autograd of a tent picks arbitrary sides there.

    Args:
        position: Tensor[T], in source pixels; may require a gradient.
        source: number of source pixels, at least 1.
        beyond: what lies past the ends: `edge` (the last pixel; positions must not be negative) or `zeros`.

    Returns:
        Tensor[T, source].

    >>> sampling_matrix(torch.tensor([0.0, 0.5, 3.0]), 2, "edge")
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    fixed = position.detach()
    pixel = torch.arange(source, dtype=fixed.dtype, device=fixed.device)
    right, left = fixed.floor(), fixed.ceil() - 1
    at = fixed
    if beyond == "edge":
        last = source - 1
        at = fixed.clamp(max=last)
        right = torch.where(fixed < last, right, source)  # cell `source` touches no pixel: slope 0
        left = torch.where(fixed <= last, left, source)
    weights = (1 - (at[:, None] - pixel).abs()).clamp(min=0)
    if not position.requires_grad:
        return weights
    slope = torch.zeros_like(weights)
    for cell in (left, right):
        offset = pixel - cell[:, None]
        slope = slope + 0.5 * ((offset == 1).to(slope.dtype) - (offset == 0).to(slope.dtype))
    # The second term is 0; its derivative in the position is the slope.
    return weights + slope * (position - fixed)[:, None]


def separable_product(rows: Tensor, input: Tensor, columns: Tensor) -> Tensor:
    """`rows @ X @ columns^T` for every channel X of Tensor[N, C, h, w], in the memory format of `input`.

    >>> separable_product(torch.ones(1, 2), torch.ones(1, 3, 2, 5), torch.ones(4, 5)).shape
    torch.Size([1, 3, 1, 4])
    """
    n, c, h, w = input.shape
    if c > 1 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        pixels = input.permute(0, 2, 3, 1)
        output = torch.matmul(rows, pixels.reshape(n, h, w * c))
        output = torch.matmul(columns, output.reshape(n * rows.shape[0], w, c))
        return output.reshape(n, rows.shape[0], columns.shape[0], c).permute(0, 3, 1, 2)
    output = torch.matmul(input, columns.t())
    output = torch.matmul(rows, output.reshape(n * c, h, columns.shape[0]))
    return output.reshape(n, c, rows.shape[0], columns.shape[0])
