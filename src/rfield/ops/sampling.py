"""Bilinear sampling on a grid of rows and columns, differentiable in one number that moves them.

On a CPU pixels are rows of a table and `F.embedding_bag` gathers them: its kernels weigh and sum a few rows of a table
at the memory's rate. The gradient of the map is such a gathering too, of the samples that read a pixel, and so is the
derivative in the learned number. Compiled graphs, second derivatives and other devices go by two small matrices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_Reads = tuple[Tensor, Tensor]


class Axis(NamedTuple):
    """Where an axis is sampled: `taps` samples for each of T output pixels.

    Attributes:
        at: Tensor[taps, T], in source pixels, ascending along T.
        rate: Tensor[taps, T], how far each sample moves per unit of the learned number.
    """

    at: Tensor
    rate: Tensor


def sample_grid(input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
    """Samples every channel bilinearly at each pair of a row and a column.

    Gradients to `input` and `learned` are exact. A position exactly on a pixel is a kink, whose derivative is taken as
    the mean of the two sides, as a central difference sees it.

    Args:
        input: Tensor[N, C, h, w], float32 or float64.
        learned: Tensor[1] (both axes) or Tensor[2] (height, width), what the positions are linear in.
        rows: a taps for each of T output rows.
        columns: b taps for each of U output columns.
        beyond: what lies past the ends: `edge` (the last pixel; positions must not be negative) or `zeros`.

    Returns:
        Tensor[N, a * b * C, T, U], the channels of one tap together, in the memory format of `input`; with more than
        one tap channels-last on a CPU.

    >>> ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> rows, columns = (Axis(at, torch.zeros_like(at)) for at in (torch.tensor([[0.5]]), torch.tensor([[0.0, 0.25]])))
    >>> sample_grid(ramp, torch.ones(1), rows, columns, "edge")
    tensor([[[[1.0000, 1.2500]]]])
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return by_matrices(input, learned, rows, columns, beyond)
    sampled: Tensor = _Gather.apply(input, learned, rows, columns, beyond)
    return sampled


class _Gather(torch.autograd.Function):
    """Keeps nothing but what it was given, since gathering once more is cheap."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
        ctx.save_for_backward(input, learned)
        ctx.rows, ctx.columns, ctx.beyond = rows, columns, beyond
        reads = _outer(*_both(_values, input, rows, columns, beyond), input.shape[3])
        (a, t), (b, u) = rows.at.shape, columns.at.shape
        sampled = _sums(_as_table(input), len(input), *reads)
        return _as_map(sampled, len(input), (t, u), a * b > 1 or _is_channels_last(input))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, learned = ctx.saved_tensors
        rows, columns, beyond, grad = ctx.rows, ctx.columns, ctx.beyond, grad_outputs[0]
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # The gathering kernels have no second derivative.
            sampled = by_matrices(input, learned, rows, columns, beyond)
            wanted = [part for part, need in zip((input, learned), needed, strict=True) if need]
            twice = iter(torch.autograd.grad(sampled, wanted, grad, create_graph=True))
            return (*(next(twice) if need else None for need in needed), None, None, None)
        grads = _as_table(grad)
        grad_input = grad_learned = None
        if needed[0]:
            grad_input = _adjoint(grads, input, rows, columns, beyond)
        if needed[1]:
            grad_learned = _along(grads, input, rows, columns, beyond, len(learned))
        return grad_input, grad_learned, None, None, None


def _adjoint(grads: Tensor, input: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
    """The gradient of the map: every pixel gathers from the samples that read it."""
    (row, row_weight), (column, column_weight) = _both(_readers, input, rows, columns, beyond)
    (a, _), (b, u) = rows.at.shape, columns.at.shape
    if a * b > 1:  # Among the samples, of which a * b * u are of one row of pixels and a * b of one pixel.
        row = row * (a * b * u) + torch.arange(0, a * b, b, dtype=row.dtype)[:, None]
        column = column * (a * b) + torch.arange(b, dtype=row.dtype)[:, None]
    else:
        row = row * u
    pixels = row.flatten(1)[:, None, :, None] + column.flatten(1)[:, None, :]
    weights = row_weight.flatten(1)[:, None, :, None] * column_weight.flatten(1)[:, None, :]
    n, c, h, w = input.shape
    return _as_map(_sums(grads.view(-1, c), n, pixels, weights), n, (h, w), _is_channels_last(input))


def _along(grads: Tensor, input: Tensor, rows: Axis, columns: Axis, beyond: str, numbers: int) -> Tensor:
    """The gradient of the learned number, or of one an axis: how the samples change with it, times their gradients."""
    table, images = _as_table(input), len(input)
    row, column = _both(_values, input, rows, columns, beyond)
    row_slope, column_slope = _both(_slopes, input, rows, columns, beyond)
    by_row, by_column = (row_slope, column), (row, column_slope)
    if numbers == 1 and torch.equal(row[0], row_slope[0]) and torch.equal(column[0], column_slope[0]):
        # Without kinks both changes are of the pixels that the sample reads.
        pixels, weights = _outer(*by_row, input.shape[3])
        changes = [_sums(table, images, pixels, weights.add_(_outer(*by_column, input.shape[3])[1]))]
    else:
        changes = [_sums(table, images, *_outer(*reads, input.shape[3])) for reads in (by_row, by_column)]
    sums = torch.stack([torch.dot(change.view(-1), grads.view(-1)) for change in changes])
    return sums.sum(0, keepdim=True) if numbers == 1 else sums


def _both(reads: Any, input: Tensor, rows: Axis, columns: Axis, beyond: str) -> tuple[_Reads, _Reads]:
    """What is read along the rows and along the columns, worked out once where they are the same."""
    row = reads(rows, input.shape[2], beyond)
    same = columns is rows and input.shape[2] == input.shape[3]
    return row, row if same else reads(columns, input.shape[3], beyond)


def _values(axis: Axis, source: int, beyond: str) -> _Reads:
    """Which two pixels each sample reads, and how much of each: Tensor[taps, T, 2] and the same."""
    last = source - 1
    at = axis.at.clamp(max=last) if beyond == "edge" else axis.at
    first = at.floor()
    share = at - first
    return _read(first, first + 1, 1 - share, share, last, beyond)


def _slopes(axis: Axis, source: int, beyond: str) -> _Reads:
    """The two pixels whose difference tells how each sample changes with the learned number, and how fast.

    In a cell these are its ends. On a pixel, the mean of both sides, half the difference of its neighbours.
    """
    last = source - 1
    ahead, behind = axis.at.floor() + 1, axis.at.ceil() - 1
    speed = axis.rate / (ahead - behind)
    if beyond == "edge":
        speed = speed * (axis.at <= last)
    return _read(behind, ahead, -speed, speed, last, beyond)


def _read(first: Tensor, second: Tensor, weight: Tensor, other: Tensor, last: int, beyond: str) -> _Reads:
    index, weights = torch.stack((first, second), 2), torch.stack((weight, other), 2)
    if beyond == "zeros":
        weights *= (index >= 0) & (index <= last)
    return index.clamp_(0, last).int(), weights


def _readers(axis: Axis, source: int, beyond: str) -> _Reads:
    """Which output pixels read each source pixel by each tap, and how much: Tensor[source, taps, K] and the same."""
    at = axis.at.clamp(max=source - 1) if beyond == "edge" else axis.at
    pixel = torch.arange(source, dtype=at.dtype)[:, None]
    sides = (pixel + pixel.new_tensor([-1, 1])).t().repeat(len(at), 1, 1)
    start = torch.searchsorted(at, sides[:, 0].contiguous(), right=True)
    end = torch.searchsorted(at, sides[:, 1].contiguous())
    most = max(1, int((end - start).max()))
    index = (start[..., None] + torch.arange(most)).flatten(1)
    near = F.pad(at, (0, most), value=torch.inf).gather(1, index).view(len(at), source, most)
    weight = near.sub_(pixel).abs_().neg_().add_(1).clamp_(min=0)
    index = index.clamp_(max=at.shape[1] - 1).int().view(len(at), source, most)
    return index.transpose(0, 1), weight.transpose(0, 1)


def _outer(row: _Reads, column: _Reads, width: int) -> _Reads:
    """Which pixels of a map of some width samples read, and how much of each: Tensor[T, U, a, b, 2, 2] and the same.

    Of what they read along the rows, Tensor[a, T, 2], and along the columns, Tensor[b, U, 2].
    """
    (r, row_weight), (c, column_weight) = ((reads.transpose(0, 1) for reads in axis) for axis in (row, column))
    pixels = (r * width)[:, None, :, None, :, None] + c[:, None, :, None]
    return pixels, row_weight[:, None, :, None, :, None] * column_weight[:, None, :, None]


def _sums(table: Tensor, images: int, pixels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows of a table, one of each bag of the last two axes of `pixels`, for each image's part."""
    reads = pixels.shape[-2] * pixels.shape[-1]
    pixels, weights = pixels.flatten(), weights.flatten()
    if images > 1:
        step = len(table) // images
        pixels = (pixels + torch.arange(0, len(table), step, dtype=torch.int32)[:, None]).flatten()
        weights = weights.repeat(images)
    bags = torch.arange(0, len(pixels), reads, dtype=torch.int32)
    return torch.embedding_bag(table, pixels, bags, False, 0, False, weights)[0]


def _is_channels_last(map: Tensor) -> bool:
    return map.is_contiguous(memory_format=torch.channels_last)


def _as_table(map: Tensor) -> Tensor:
    """Tensor[N * h * w, C]: a view of a channels-last map, a copy of another."""
    n, c, h, w = map.shape
    if _is_channels_last(map):
        return map.permute(0, 2, 3, 1).reshape(n * h * w, c)
    return _transposed(map.reshape(n, c, h * w)).view(n * h * w, c)


def _as_map(table: Tensor, n: int, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Tensor[N, C, *size]."""
    if channels_last:
        return table.view(n, *size, -1).permute(0, 3, 1, 2)
    return _transposed(table.view(n, size[0] * size[1], -1)).view(n, -1, *size)


def _transposed(matrices: Tensor) -> Tensor:
    """Tensor[n, p, q] as Tensor[n, q, p].

    A shuffle of channels is a transposition too, and its kernel for channels-last maps takes a quarter to a fifth of
    the time that a transposed copy does.
    """
    n, p, q = matrices.shape
    channels = matrices.contiguous().as_strided((n, p * q, 1, 1), (p * q, 1, p * q, p * q))
    return F.channel_shuffle(channels, p).view(n, q, p)


def by_matrices(input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
    """`sample_grid` in plain operations, differentiable twice."""
    (a, t), (b, u) = rows.at.shape, columns.at.shape
    moved = learned - learned.detach()  # 0, but for its derivative.
    row, column = (
        sampling_matrix((axis.at + axis.rate * moved[place]).flatten(), source, beyond)
        for place, axis, source in ((0, rows, input.shape[2]), (-1, columns, input.shape[3]))
    )
    sampled = separable_product(row, input, column)
    if a * b == 1:
        return sampled
    return sampled.view(*input.shape[:2], a, t, b, u).permute(0, 2, 4, 1, 3, 5).flatten(1, 3)


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
