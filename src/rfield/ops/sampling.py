"""Bilinear sampling on a grid of rows and columns, differentiable in where it samples.

Two ways that compute the same: by the few source pixels that each sample reads, through `F.embedding_bag`, whose
kernels gather whole pixels (channels-last maps need no copy); and by two small matrices, for compiled graphs, second
derivatives and other devices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_grid(
    input: Tensor, rows: Tensor, columns: Tensor, beyond: str, kinks: bool = True, window: tuple[int, int] = (1, 1)
) -> Tensor:
    """Samples every channel bilinearly at each pair of a row and a column.

    Gradients to `input`, `rows` and `columns` are exact. A position exactly on a pixel is a kink, whose derivative is
    taken as the mean of the two sides, as a central difference sees it.

    Args:
        input: Tensor[N, C, h, w], float32 or float64.
        rows: Tensor[T], in source pixels, of the dtype of `input`.
        columns: Tensor[U].
        beyond: what lies past the ends: `edge` (the last pixel; positions must not be negative) or `zeros`.
        kinks: False where no position on a pixel will be differentiated, which saves a third of the pixels.
        window: how many rows and columns in turn, a and b, become one pixel of a * b * C channels, in this order.

    Returns:
        Tensor[N, a * b * C, T / a, U / b], in the memory format of `input`; with a window channels-last on a CPU.

    >>> ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> sample_grid(ramp, torch.tensor([0.5]), torch.tensor([0.0, 0.25]), "edge")
    tensor([[[[1.0000, 1.2500]]]])
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return _by_matrices(input, rows, columns, beyond, window)
    sampled: Tensor = _ByPixels.apply(input, rows, columns, beyond, kinks, window)
    return sampled


class _ByPixels(torch.autograd.Function):
    """Gathers; keeps nothing but what it was given, since gathering once more is cheap."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: Tensor, columns: Tensor, beyond: str, kinks: bool, window: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(input, rows, columns)
        ctx.beyond, ctx.kinks, ctx.window = beyond, kinks, window
        row, row_weight, _ = _stencil(rows, input.shape[2], beyond)
        column, column_weight, _ = _stencil(columns, input.shape[3], beyond)
        table, bags, weights = _bags(input, row, row_weight, column, column_weight, window)
        output = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
        channels_last = window != (1, 1) or input.is_contiguous(memory_format=torch.channels_last)
        return _as_map(output, len(input), (len(rows) // window[0], len(columns) // window[1]), channels_last)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, rows, columns = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # The gathering kernels have no second derivative.
            sampled = _by_matrices(input, rows, columns, ctx.beyond, ctx.window)
            wanted = [part for part, need in zip(ctx.saved_tensors, needed, strict=True) if need]
            twice = iter(torch.autograd.grad(sampled, wanted, grad_outputs[0], create_graph=True))
            return (*(next(twice) if need else None for need in needed), None, None, None)
        row, row_weight, row_slope = _stencil(rows, input.shape[2], ctx.beyond, needed[1], ctx.kinks)
        column, column_weight, column_slope = _stencil(columns, input.shape[3], ctx.beyond, needed[2], ctx.kinks)
        table, bags, weights = _bags(input, row, row_weight, column, column_weight, ctx.window)
        table, weights = table.detach().requires_grad_(needed[0]), weights.requires_grad_(needed[1] or needed[2])
        with torch.enable_grad():
            output = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
        parts = [part for part in (table, weights) if part.requires_grad]
        grads = list(torch.autograd.grad(output, parts, _as_table(grad_outputs[0]).view(output.shape)))
        grad_input = grad_rows = grad_columns = None
        if needed[0]:
            channels_last = input.is_contiguous(memory_format=torch.channels_last)
            grad_input = _as_map(grads[0], len(input), (input.shape[2], input.shape[3]), channels_last)
        if weights.requires_grad:
            a, b = ctx.window
            shape = (len(input), len(rows) // a, len(columns) // b, a, b, row.shape[1], column.shape[1])
            grad_weights = grads[-1].view(shape).sum(0).transpose(1, 2).flatten(0, 1).flatten(1, 2)
            grad_rows = ((grad_weights * column_weight[:, None]).sum((1, 3)) * row_slope).sum(1)
            grad_columns = ((grad_weights * row_weight[:, None, :, None]).sum((0, 2)) * column_slope).sum(1)
        return grad_input, grad_rows if needed[1] else None, grad_columns if needed[2] else None, None, None, None


def _bags(
    input: Tensor, row: Tensor, row_weight: Tensor, column: Tensor, column_weight: Tensor, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A table of pixels, one a row, which of them each sample reads, and how much of each."""
    n, _, h, w = input.shape
    (a, b), reads = window, row.shape[1] * column.shape[1]
    shape = (len(row) // a, a, len(column) // b, b, row.shape[1], column.shape[1])
    pixels = (row[:, None, :, None] * w + column[:, None]).view(shape).transpose(1, 2).reshape(-1, reads)
    weights = (row_weight[:, None, :, None] * column_weight[:, None]).view(shape).transpose(1, 2).reshape(-1, reads)
    if n > 1:
        pixels = torch.cat([pixels + image * h * w for image in range(n)])
    return _as_table(input), pixels, weights.repeat(n, 1)


def _as_table(map: Tensor) -> Tensor:
    """Tensor[N * h * w, C]: a view of a channels-last map, a copy of another."""
    n, c, h, w = map.shape
    if map.is_contiguous(memory_format=torch.channels_last):
        return map.permute(0, 2, 3, 1).reshape(n * h * w, c)
    # Image by image: torch transposes matrices in blocks, and maps pixel by pixel, which takes up to 8 times as long.
    table = map.new_empty(n, h * w, c)
    for pixels, image in zip(table, map, strict=True):
        pixels.copy_(image.reshape(c, h * w).t())
    return table.view(n * h * w, c)


def _as_map(table: Tensor, n: int, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Tensor[N, C, *size]."""
    pixels = table.view(n, size[0] * size[1], -1)
    if channels_last:
        return pixels.view(n, *size, -1).permute(0, 3, 1, 2)
    map = table.new_empty(n, pixels.shape[2], *size)
    for image, rows in zip(map, pixels, strict=True):
        image.view(len(image), -1).copy_(rows.t())
    return map


def _stencil(
    position: Tensor, source: int, beyond: str, slopes: bool = False, kinks: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels each sample of an axis reads, how much of each, and how that changes with its position.

    Each is a Tensor[T, 2]; with slopes a Tensor[T, 3] if there are kinks, where the third pixel counts.
    """
    last = source - 1
    at = position.clamp(max=last) if beyond == "edge" else position
    first = at.floor()
    share = at - first
    index = torch.stack((first, first + 1), 1)
    weight = torch.stack((1 - share, share), 1)
    slope = weight
    if slopes:
        learned = ((position <= last) if beyond == "edge" else torch.ones_like(share)).to(weight)
        slope = torch.stack((-learned, learned), 1)
        kink = (share == 0) & (learned > 0) & ((position > 0) if beyond == "edge" else True)
        if kinks and kink.any():
            # The mean of both cells' slopes: from the pixel before to the one behind.
            index = torch.cat((index, first[:, None] - 1), 1)
            weight = F.pad(weight, (0, 1))
            slope = torch.where(kink[:, None], slope.new_tensor([0.0, 0.5, -0.5]), F.pad(slope, (0, 1)))
    if beyond == "zeros":
        inside = (index >= 0) & (index <= last)
        weight, slope = weight * inside, slope * inside
    return index.clamp(0, last).long(), weight, slope


def _by_matrices(input: Tensor, rows: Tensor, columns: Tensor, beyond: str, window: tuple[int, int]) -> Tensor:
    row, column = (sampling_matrix(at, input.shape[axis], beyond) for axis, at in ((2, rows), (3, columns)))
    sampled = separable_product(row, input, column)
    if window == (1, 1):
        return sampled
    n, c = input.shape[:2]
    split = sampled.reshape(n, c, len(rows) // window[0], window[0], len(columns) // window[1], window[1])
    return split.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


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
