"""Bilinear sampling on a grid of rows and columns, differentiable in one number that moves them.

On a CPU the rows of a map, and then its pixels, are rows of a table, and `embedding_bag` mixes them: its kernels weigh
and sum a few rows of a table at the memory's rate. The gradient of the map is such a mixture too, of the samples that
read a pixel, and so is the derivative in the learned number. Compiled graphs, second derivatives, `torch.func` and
other devices go by two small matrices.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


class Axis(NamedTuple):
    """Where an axis is sampled.

    Attributes:
        at: Tensor[T], in source pixels.
        rate: Tensor[T], how far each sample moves per unit of the learned number.
    """

    at: Tensor
    rate: Tensor


class _Mixture:
    """Weighted sums of rows of a table: the rows and weights of all sums, and where in these each sum starts.

    Args:
        row, weight: Tensor[R], int32 and as the table.
        start: Tensor[sums], int32.
        source: rows of a table.
    """

    def __init__(self, row: Tensor, weight: Tensor, start: Tensor, source: int) -> None:
        self.source = source
        self._of = {1: (row, weight, start)}

    def of(self, tables: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same sums for each of several tables that lie behind one another: kept, as long as they are few."""
        if tables in self._of:
            return self._of[tables]
        row, weight, start = self._of[1]
        table, read = (torch.arange(0, tables * each, each, dtype=row.dtype) for each in (self.source, len(row)))
        rows, starts = (place[None] + first[:, None] for place, first in ((row, table), (start, read)))
        made = rows.view(-1), torch.cat([weight] * tables), starts.view(-1)
        if rows.numel() <= 2**16:
            self._of[tables] = made
        return made


def sample_grid(input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
    """Samples every channel bilinearly at each pair of a row and a column.

    Gradients to `input` and `learned` are exact. A position exactly on a pixel is a kink, whose derivative is taken as
    the mean of the two sides, as a central difference sees it.

    Args:
        input: Tensor[N, C, h, w], float32 or float64.
        learned: Tensor[1] (both axes) or Tensor[2] (height, width), what the positions are linear in.
        rows: T samples.
        columns: U samples.
        beyond: what lies past the ends: `edge` (the last pixel; positions must not be negative) or `zeros`.

    Returns:
        Tensor[N, C, T, U], in the memory format of `input`.

    >>> ramp = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> rows, columns = (Axis(at, torch.zeros_like(at)) for at in (torch.tensor([0.5]), torch.tensor([0.0, 0.25])))
    >>> sample_grid(ramp, torch.ones(1), rows, columns, "edge")
    tensor([[[[1.0000, 1.2500]]]])
    """
    if in_plain_operations(input):
        return by_matrices(input, learned, rows, columns, beyond)
    sampled: Tensor = _Sample.apply(input, learned, rows, columns, beyond)
    return sampled


def in_plain_operations(input: Tensor) -> bool:
    """Whether an operator goes by plain operations: the kernels are a CPU's, and only reverse mode knows them."""
    return input.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Whether `torch.func` (vmap, grad, jacrev and so on) or forward-mode differentiation is at work.

    What needs a gradient cannot be told from a tensor then: it may be another level's.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def without_autocast(input: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False)


def read_values(name: str, numbers: Tensor) -> list[float]:
    """One number or two (height, width).

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        values: list[float] = numbers.tolist()
    except RuntimeError:
        raise ValueError(
            f"{name} must have values that can be read: a tensor on the meta device has none, nor has one that vmap "
            "maps over"
        ) from None
    return values


def positive_values(name: str, numbers: Tensor) -> list[float]:
    """One number or two (height, width).

    Raises:
        ValueError: if they cannot be read, or are not positive and finite.
    """
    values = read_values(name, numbers)
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"{name} must be positive and finite, got {values}")
    return values


class _Sample(torch.autograd.Function):
    """Keeps nothing of a map's size but what it was given, since sampling once more is cheap."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
        ctx.save_for_backward(input, learned)
        ctx.rows, ctx.columns, ctx.beyond = rows, columns, beyond
        ctx.grid = ctx.sampler_grid = None
        if _suits_sampler(input, rows, columns, beyond):
            ctx.sampler_grid = _sampler_grid(input, rows, columns)
            sampled = torch.grid_sampler_2d(input, ctx.sampler_grid, *_SAMPLER)
            return sampled.contiguous(memory_format=format_of(input))
        ctx.grid = Grid(rows, columns, (input.shape[2], input.shape[3]), beyond)
        return _as_map(ctx.grid.sample(as_table(input, is_channels_last(input))), input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, learned = ctx.saved_tensors
        rows, columns, beyond, grad = ctx.rows, ctx.columns, ctx.beyond, grad_outputs[0]
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # The kernels have no second derivative.
            sampled = by_matrices(input, learned, rows, columns, beyond)
            return (*differentiable_gradients(sampled, (input, learned), needed, grad), None, None, None)
        grad_input = grad_learned = None
        if ctx.sampler_grid is not None:
            # Its gradient of the map is slow, that of the grid is not.
            needed_of_it = needed[0] and grad.numel() <= _MOST_BACK, needed[1]
            if any(needed_of_it):
                grad_input, grad_learned = _sampler_gradients(
                    grad, input, ctx.sampler_grid, rows, columns, needed_of_it
                )
            needed = needed[0] and grad_input is None, False
        if any(needed):
            grid = ctx.grid or Grid(rows, columns, (input.shape[2], input.shape[3]), beyond)
            grads, table = (as_table(each, is_channels_last(input)) for each in (grad, input))
            grad_table, of_learned = grid.gradients(grads, table, *needed)
            grad_input = None if grad_table is None else _as_map(grad_table, input)
            grad_learned = of_learned if grad_learned is None else grad_learned
        if grad_learned is not None and len(learned) == 1:
            grad_learned = grad_learned.sum(0, keepdim=True)
        return grad_input, grad_learned, None, None, None


# ATen's grid sampler: bilinear, beyond the border the border, -1 and 1 at the centres of the corner pixels.
_SAMPLER = (0, 1, True)
# Up to so many samples it is faster than tables: of channels-last maps, of contiguous ones, and at the gradient of the
# latter. Found on one machine, by benchmarks.
_MOST_CHANNELS_LAST, _MOST_CONTIGUOUS, _MOST_BACK = 2**15, 2**19, 2**17


def _suits_sampler(input: Tensor, rows: Axis, columns: Axis, beyond: str) -> bool:
    """Whether ATen's grid sampler is exact and fast here: it takes the slope of a sample on a pixel from one side."""
    samples = input.shape[0] * input.shape[1] * len(rows.at) * len(columns.at)
    if beyond != "edge" or samples > (_MOST_CHANNELS_LAST if is_channels_last(input) else _MOST_CONTIGUOUS):
        return False
    height, width = input.shape[2:]
    alike = columns is rows and height == width
    return not (_has_kinks(rows, height) or (not alike and _has_kinks(columns, width)))


def _has_kinks(axis: Axis, source: int) -> bool:
    moved = zip(axis.at.tolist(), axis.rate.tolist(), strict=True)
    return any(place.is_integer() and place < source and rate for place, rate in moved)


def _sampler_grid(input: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Tensor[N, T, U, 2]: the positions as the grid sampler has them, columns first, -1 to 1."""
    row, column = rows.at * _per_pixel(input.shape[2]) - 1, columns.at * _per_pixel(input.shape[3]) - 1
    size = len(row), len(column)
    return torch.stack((column.expand(size), row[:, None].expand(size)), 2).expand(len(input), -1, -1, -1)


def _sampler_gradients(
    grad: Tensor, input: Tensor, grid: Tensor, rows: Axis, columns: Axis, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    backward = torch.ops.aten.grid_sampler_2d_backward
    grad_input, grad_grid = backward(grad, input, grid, *_SAMPLER, list(needed))
    grad_learned = None
    if needed[1]:
        along = grad_grid.sum(0) if len(input) > 1 else grad_grid[0]
        by_row = torch.dot(rows.rate, along[..., 1].sum(1)) * _per_pixel(input.shape[2])
        by_column = torch.dot(columns.rate, along[..., 0].sum(0)) * _per_pixel(input.shape[3])
        grad_learned = torch.stack((by_row, by_column))
    return grad_input.contiguous(memory_format=format_of(input)) if needed[0] else None, grad_learned


def _per_pixel(source: int) -> float:
    return 2 / max(source - 1, 1)


class Grid:
    """`sample_grid` for tables of pixels, Tensor[N, h, w, C], and its gradients, as kernels of a CPU do it.

    Args:
        rows, columns, beyond: as in `sample_grid`.
        size: (h, w) of the maps.
    """

    def __init__(self, rows: Axis, columns: Axis, size: tuple[int, int], beyond: str) -> None:
        self._axes, self._size, self._beyond = (rows, columns), size, beyond
        self._row, self._column = self._both(_samples)

    @cached_property
    def _back(self) -> tuple[_Mixture, _Mixture]:
        row = _transposed(self._row)
        return row, row if self._column is self._row else _transposed(self._column)

    @cached_property
    def _slope(self) -> tuple[_Mixture, _Mixture]:
        return self._both(_slopes)

    def _both(self, read: Callable[[Axis, int, str], _Mixture]) -> tuple[_Mixture, _Mixture]:
        """What is read along the rows and along the columns, worked out once where they are alike."""
        (rows, columns), (h, w) = self._axes, self._size
        row = read(rows, h, self._beyond)
        return row, row if columns is rows and h == w else read(columns, w, self._beyond)

    def sample(self, table: Tensor) -> Tensor:
        """Tensor[N, T, U, C]."""
        output = table.new_empty(len(table), *(len(axis.at) for axis in self._axes), table.shape[3])
        for maps, place in zip(*_in_cache(table, output), strict=True):
            between = _by_columns(_mix(maps, self._row))
            sampled = _by_rows(_mix(between, self._column), maps)
            if len(maps) == len(table):
                return sampled
            place.copy_(sampled)
        return output

    def gradients(
        self, grads: Tensor, table: Tensor, of_table: bool, of_learned: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the maps, Tensor[N, h, w, C], and of the learned number along each axis, Tensor[2].

        Args:
            grads: Tensor[N, T, U, C], of what `sample` returns.
            table: Tensor[N, h, w, C], the maps.
            of_table, of_learned: which of the two are wanted.
        """
        grad_table, grad_learned = torch.empty_like(table), table.new_zeros(2)
        row_back, column_back = self._back
        for maps, grad, place in zip(*_in_cache(table, grads, grad_table), strict=True):
            turned = _by_columns(grad)
            between = _by_rows(_mix(turned, column_back), maps)
            if of_table:
                back = _mix(between, row_back)
                if len(maps) == len(table):
                    grad_table = back
                else:
                    place.copy_(back)
            if of_learned:
                row_slope, column_slope = self._slope
                changes = _mix(maps, row_slope), _mix(_by_columns(_mix(maps, self._row)), column_slope)
                pairs = zip(changes, (between, turned), strict=True)
                grad_learned += torch.stack([torch.dot(change.flatten(), each.flatten()) for change, each in pairs])
        return grad_table if of_table else None, grad_learned if of_learned else None


def _in_cache(table: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Tables and what belongs to them, as many maps at a time as a core's cache holds.

    What is made in between then stays there, and needs no memory that the system would first have to clear.
    """
    some = max(1, 2**18 // table[0].numel())
    tables = (table, *others)
    return [torch.split(each, some) for each in tables] if some < len(table) else [(each,) for each in tables]


def _samples(axis: Axis, source: int, beyond: str) -> _Mixture:
    """The two pixels that each sample reads, and how much of each."""
    at = axis.at.clamp(max=source - 1) if beyond == "edge" else axis.at
    first = at.floor()
    second = first + 1
    return _pairs(first, second, second - at, at - first, source, beyond)


def _slopes(axis: Axis, source: int, beyond: str) -> _Mixture:
    """The two pixels whose difference tells how each sample changes with the learned number, and how fast.

    In a cell these are its ends; on a pixel, where the mean of both sides is half the difference of its neighbours,
    they are these.
    """
    behind, ahead = axis.at.ceil() - 1, axis.at.floor() + 1
    speed = axis.rate / (ahead - behind)
    if beyond == "edge":
        speed.masked_fill_(axis.at > source - 1, 0)
    return _pairs(behind, ahead, -speed, speed, source, beyond)


def _pairs(first: Tensor, second: Tensor, weight: Tensor, other: Tensor, source: int, beyond: str) -> _Mixture:
    index, weights = torch.stack((first, second), 1), torch.stack((weight, other), 1)
    if beyond == "zeros":
        weights *= (index >= 0) & (index < source)
    start = torch.arange(0, index.numel(), 2, dtype=torch.int32)
    return _Mixture(index.clamp_(0, source - 1).int().view(-1), weights.view(-1), start, source)


def _transposed(pairs: _Mixture) -> _Mixture:
    """For each source pixel the samples that read it, and how much of it."""
    row, weight, _ = pairs.of(1)
    index, order = row.sort(stable=True)
    start = torch.searchsorted(index, torch.arange(pairs.source, dtype=torch.int32), out_int32=True)
    return _Mixture((order >> 1).int(), weight[order], start, len(row) >> 1)


def _mix(tables: Tensor, mixture: _Mixture) -> Tensor:
    """Tensor[N, sums, ...] of Tensor[N, rows, ...]: the same sums for each of N tables."""
    row, weight, start = mixture.of(len(tables))
    rows = tables.reshape(len(tables) * mixture.source, -1)
    mixed = torch.embedding_bag(rows, row, start, False, 0, False, weight)[0]
    return mixed.view(len(tables), -1, *tables.shape[2:])


def _by_columns(table: Tensor) -> Tensor:
    """Tensor[N * T, w, C] of Tensor[N, T, w, C]; of planes, where C is 1, Tensor[1, w, N * T], whose rows are long."""
    n, t, w, c = table.shape
    return _turned(table.view(n * t, w))[None] if c == 1 else table.view(n * t, w, c)


def _by_rows(columns: Tensor, table: Tensor) -> Tensor:
    """Back from `_by_columns`, for a table that the columns are of."""
    n, _, _, c = table.shape
    turned = _turned(columns[0]) if c == 1 else columns
    return turned.view(n, -1, columns.shape[1], c)


def as_table(map: Tensor, channels_last: bool) -> Tensor:
    """Tensor[N, h, w, C] of a channels-last map, Tensor[N * C, h, w, 1] of another: a view, where it is contiguous."""
    if channels_last:
        return map.permute(0, 2, 3, 1).contiguous()
    return map.contiguous().view(-1, *map.shape[2:], 1)


def _as_map(table: Tensor, like: Tensor) -> Tensor:
    """The map, in the memory format of another, of a table that `as_table` makes of that format: a view."""
    channels = like.shape[1]
    map = table.permute(0, 3, 1, 2) if is_channels_last(like) else table.view(-1, channels, *table.shape[1:3])
    return map.detach()  # Else autograd takes it for a view, which may not leave a function and be changed in place.


def is_channels_last(map: Tensor) -> bool:
    return map.is_contiguous(memory_format=torch.channels_last)


def format_of(map: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(map) else torch.contiguous_format


def _turned(matrix: Tensor) -> Tensor:
    """Tensor[p, q] as Tensor[q, p].

    A shuffle of channels is a transposition too, and its kernel for channels-last maps takes a quarter to a fifth of
    the time that a transposed copy does.
    """
    p, q = matrix.shape
    channels = matrix.contiguous().as_strided((1, p * q, 1, 1), (p * q, 1, p * q, p * q))
    return F.channel_shuffle(channels, p).view(q, p)


def differentiable_gradients(
    output: Tensor, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """What a backward pass returns if it is to be differentiated once more: by autograd, of what autograd can follow.

    Args:
        output: what was made of the inputs, in plain operations.
        needed: for each of the inputs, whether its gradient is wanted.
        grad: of the output.
    """
    wanted = [each for each, need in zip(inputs, needed, strict=True) if need and each is not None]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def by_matrices(input: Tensor, learned: Tensor, rows: Axis, columns: Axis, beyond: str) -> Tensor:
    """`sample_grid` in plain operations, differentiable twice."""
    moved = learned - learned.detach()  # 0, but for its derivative.
    row, column = (
        sampling_matrix(axis.at + axis.rate * moved[place], source, beyond)
        for place, axis, source in ((0, rows, input.shape[2]), (-1, columns, input.shape[3]))
    )
    return separable_product(row, input, column)


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
    if not (position.requires_grad or is_transformed()):
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
    # vmap hides the memory format.
    if c > 1 and not is_transformed() and is_channels_last(input) and not input.is_contiguous():
        pixels = input.permute(0, 2, 3, 1)
        output = torch.matmul(rows, pixels.reshape(n, h, w * c))
        output = torch.matmul(columns, output.reshape(n * rows.shape[0], w, c))
        return output.reshape(n, rows.shape[0], columns.shape[0], c).permute(0, 3, 1, 2)
    output = torch.matmul(input, columns.t())
    output = torch.matmul(rows, output.reshape(n * c, h, columns.shape[0]))
    return output.reshape(n, c, rows.shape[0], columns.shape[0])
