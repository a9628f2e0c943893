"""Bilinear sampling on a grid of rows and columns, differentiable in where it samples.

Three ways that compute the same: through ATen's grid sampler, whose kernels walk a map plane by plane; through
`F.embedding_bag`, whose kernels gather whole pixels (fast for channels-last maps of many channels); and by two small
matrices, for compiled graphs, second derivatives and other devices.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Stencil = tuple[Tensor, Tensor, Tensor]
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
# ATen's grid sampler: bilinear, beyond the border the border, -1 and 1 at the centres of the corner pixels.
_SAMPLER = (0, 1, True)
# From here on a channels-last map is sampled faster by its pixels than by its planes.
_MANY_CHANNELS = 128


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
        kinks: False where no position on a pixel will be differentiated, which saves looking for them.
        window: how many rows and columns in turn, a and b, become one pixel of a * b * C channels, in this order.

    Returns:
        Tensor[N, a * b * C, T / a, U / b], in the memory format of `input`; with a window channels-last on a CPU.

    >>> ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> sample_grid(ramp, torch.tensor([0.5]), torch.tensor([0.0, 0.25]), "edge")
    tensor([[[[1.0000, 1.2500]]]])
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return by_matrices(input, rows, columns, beyond, window)
    sampled: Tensor = _Gather.apply(input, rows, columns, beyond, kinks, window)
    return sampled


class _Gather(torch.autograd.Function):
    """By planes or by pixels; keeps nothing but what it was given, since gathering once more is cheap."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: Tensor, columns: Tensor, beyond: str, kinks: bool, window: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(input, rows, columns)
        ctx.beyond, ctx.kinks, ctx.window = beyond, kinks, window
        return _sample(input, rows, columns, beyond, window)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, rows, columns = ctx.saved_tensors
        needed, grad = ctx.needs_input_grad[:3], grad_outputs[0]
        if torch.is_grad_enabled():  # The gathering kernels have no second derivative.
            sampled = by_matrices(input, rows, columns, ctx.beyond, ctx.window)
            wanted = [part for part, need in zip(ctx.saved_tensors, needed, strict=True) if need]
            twice = iter(torch.autograd.grad(sampled, wanted, grad, create_graph=True))
            return (*(next(twice) if need else None for need in needed), None, None, None)
        if _by_planes(input, ctx.beyond, ctx.window):
            grad_input, *slopes = _gradients_by_planes(grad, input, rows, columns, needed)
        else:
            grad_input, *slopes = _gradients_by_pixels(grad, input, rows, columns, ctx.beyond, ctx.window, needed)
        for axis, slope in enumerate(slopes):
            if slope is not None and ctx.kinks:
                _mean_at_kinks(slope, axis, grad, input, (rows, columns), ctx.beyond, ctx.window)
        return grad_input, *slopes, None, None, None


def _by_planes(input: Tensor, beyond: str, window: tuple[int, int]) -> bool:
    few = input.shape[1] < _MANY_CHANNELS or not input.is_contiguous(memory_format=torch.channels_last)
    return few and beyond == "edge" and window == (1, 1)


def _sample(input: Tensor, rows: Tensor, columns: Tensor, beyond: str, window: tuple[int, int]) -> Tensor:
    if _by_planes(input, beyond, window):
        return _like(input, torch.grid_sampler_2d(input, _grid(input, rows, columns), *_SAMPLER))
    row, column = _stencil(rows, input.shape[2], beyond), _stencil(columns, input.shape[3], beyond)
    table, bags, weights = _bags(input, row, column, window)
    output = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    channels_last = window != (1, 1) or input.is_contiguous(memory_format=torch.channels_last)
    return _as_map(output, len(input), (len(rows) // window[0], len(columns) // window[1]), channels_last)


def _mean_at_kinks(
    slope: Tensor,
    axis: int,
    grad: Tensor,
    input: Tensor,
    positions: tuple[Tensor, Tensor],
    beyond: str,
    window: tuple[int, int],
) -> None:
    """Where positions lie on pixels, replaces the slopes along an axis, which the kernels take from either side."""
    at, step, last = positions[axis].tolist(), window[axis], input.shape[2 + axis] - 1
    kink = [place.is_integer() and (beyond != "edge" or 0 < place <= last) for place in at]
    found = [index for index in range(len(at) // step) if any(kink[index * step : (index + 1) * step])]
    if not found:
        return
    here = [index * step + tap for index in found for tap in range(step)]
    ahead, behind = (_pixels(input, axis, [math.floor(at[place]) + side for place in here], beyond) for side in (1, -1))
    change, pixels = ahead.sub_(behind), torch.arange(len(here)).to(slope)
    rows, columns = (pixels, positions[1]) if axis == 0 else (positions[0], pixels)
    chosen = torch.tensor(found)
    change = _sample(change, rows, columns, beyond, window).mul_(grad.index_select(2 + axis, chosen))
    n, _, height, width = change.shape
    split = change.view(n, *window, -1, height, width) if window != (1, 1) else change[:, None, None]
    kept = (1 + axis, 4 + axis)
    sums = split.sum([other for other in range(6) if other not in kept]) / 2
    means = slope.view(-1, step)
    means[chosen] = torch.where(torch.tensor(kink).view(-1, step)[chosen], sums.t(), means[chosen])


def _pixels(input: Tensor, axis: int, indices: list[int], beyond: str) -> Tensor:
    """Rows (axis 0) or columns of a map, in its memory format."""
    last = input.shape[2 + axis] - 1
    pixels = input.index_select(2 + axis, torch.tensor(indices).clamp_(0, last))
    if beyond == "zeros":
        inside = torch.tensor([0 <= index <= last for index in indices])
        pixels *= inside.view(-1, 1) if axis == 0 else inside
    return pixels


def _grid(input: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Tensor[N, T, U, 2]: the positions as the grid sampler has them, columns first, -1 to 1."""
    grid = input.new_empty(len(rows), len(columns), 2)
    for place, at, source in ((0, columns, input.shape[3]), (1, rows[:, None], input.shape[2])):
        grid[..., place] = at * (2 / max(source - 1, 1)) - 1
    return grid.expand(len(input), -1, -1, -1)


def _like(input: Tensor, output: Tensor) -> Tensor:
    """In the memory format of `input`."""
    if not input.is_contiguous(memory_format=torch.channels_last):
        return output
    return _as_map(_as_table(output), len(output), (output.shape[2], output.shape[3]), channels_last=True)


def _gradients_by_planes(
    grad: Tensor, input: Tensor, rows: Tensor, columns: Tensor, needed: tuple[bool, ...]
) -> _Grads:
    wanted = [needed[0], needed[1] or needed[2]]
    grad_input, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
        grad, input, _grid(input, rows, columns), *_SAMPLER, wanted
    )
    along = [
        grad_grid[..., place].sum((0, 2 - axis)) * (2 / max(input.shape[2 + axis] - 1, 1)) if needed[1 + axis] else None
        for axis, place in ((0, 1), (1, 0))
    ]
    return _like(input, grad_input) if needed[0] else None, along[0], along[1]


def _gradients_by_pixels(
    grad: Tensor,
    input: Tensor,
    rows: Tensor,
    columns: Tensor,
    beyond: str,
    window: tuple[int, int],
    needed: tuple[bool, ...],
) -> _Grads:
    row, column = _stencil(rows, input.shape[2], beyond), _stencil(columns, input.shape[3], beyond)
    table, bags, weights = _bags(input, row, column, window)
    count, reads = bags.shape
    grads = _as_table(grad).reshape(count, -1).contiguous()
    indices, weights = bags.flatten(), weights.flatten()
    bag = torch.arange(count).repeat_interleave(reads)
    grad_input = grad_rows = grad_columns = None
    if needed[0]:
        sizes = torch.full((count,), reads)
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        grad_table = torch.ops.aten._embedding_bag_dense_backward(
            grads, indices, bag, sizes, bag.new_empty(0), len(table), False, 0, weights
        )
        grad_input = _as_map(grad_table, len(input), (input.shape[2], input.shape[3]), channels_last)
    if needed[1] or needed[2]:
        grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grads, table, indices, torch.arange(0, count * reads, reads), bag, 0
        )
        a, b = window
        shape = (len(input), len(rows) // a, len(columns) // b, a, b, 2, 2)
        by_axis = grad_weights.view(shape).sum(0).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        grad_rows = ((by_axis * column[1][:, None]).sum((1, 3)) * row[2]).sum(1)
        grad_columns = ((by_axis * row[1][:, None, :, None]).sum((0, 2)) * column[2]).sum(1)
    return grad_input, grad_rows if needed[1] else None, grad_columns if needed[2] else None


def _bags(input: Tensor, rows: _Stencil, columns: _Stencil, window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A table of pixels, one a row, which of them each sample reads, and how much of each."""
    n, _, h, w = input.shape
    (row, row_weight, _), (column, column_weight, _), (a, b) = rows, columns, window
    shape = (len(row) // a, a, len(column) // b, b, 2, 2)
    pixels = (row[:, None, :, None] * w + column[:, None]).view(shape).transpose(1, 2).reshape(-1, 4)
    weights = (row_weight[:, None, :, None] * column_weight[:, None]).view(shape).transpose(1, 2).reshape(-1, 4)
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


def _stencil(position: Tensor, source: int, beyond: str) -> _Stencil:
    """Which two pixels each sample of an axis reads, how much of each, and how that changes with its position.

    Each is a Tensor[T, 2].
    """
    last = source - 1
    at = position.clamp(max=last) if beyond == "edge" else position
    first = at.floor()
    share = at - first
    index = torch.stack((first, first + 1), 1)
    weight = torch.stack((1 - share, share), 1)
    learned = ((position <= last) if beyond == "edge" else torch.ones_like(share)).to(weight)
    slope = torch.stack((-learned, learned), 1)
    if beyond == "zeros":
        inside = (index >= 0) & (index <= last)
        weight, slope = weight * inside, slope * inside
    return index.clamp(0, last).long(), weight, slope


def by_matrices(input: Tensor, rows: Tensor, columns: Tensor, beyond: str, window: tuple[int, int] = (1, 1)) -> Tensor:
    """`sample_grid` in plain operations, differentiable twice."""
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
