"""Bilinear sampling on a CPU, by weighted sums of the rows of a table.

A sample along an axis is a weighted sum of two pixels. `embedding_bag` computes such sums of rows of a table at the
memory's speed. First the rows of an image are the table, then its pixels, with all their channels. Both gradients are
weighted sums too, so nothing is scattered.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rfield.ops.axis import Axis, PaddingMode
from rfield.ops.kernels import Kernel
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.values import is_channels_last


class SampleByTables(Kernel):
    """`sample_by_matrices` with border padding, of a channels-last map: an image at a time, to save memory."""

    def __init__(self, rows: Axis, columns: Axis) -> None:
        self._axes = rows, columns
        self._tables: Tables | None = None

    def forward(self, input: Tensor, spacing: Tensor) -> Tensor:
        tables = self._tables_of(input)
        shape = *input.shape[:2], *tables.sizes
        output = torch.empty(shape, dtype=input.dtype, memory_format=torch.channels_last)
        for image, place in zip(input, output, strict=True):
            put_pixels(place, tables.sample(pixels_of(image)))
        return output

    def backward(
        self, grad_output: Tensor, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        input, spacing = tensors
        tables = self._tables_of(input)
        grad_input = torch.empty_like(input) if needed[0] else None
        grad_spacing = spacing.new_zeros(2)
        for number, (image, grad) in enumerate(zip(input, grad_output, strict=True)):
            grad_pixels, change = tables.gradients(pixels_of(grad), pixels_of(image), *needed)
            if grad_input is not None and grad_pixels is not None:
                put_pixels(grad_input[number], grad_pixels)
            if change is not None:
                grad_spacing += change
        return grad_input, of_spacing(grad_spacing, spacing) if needed[1] else None

    def plain(self, input: Tensor, spacing: Tensor) -> Tensor:
        return sample_by_matrices(input, spacing, *self._axes, "border")

    def _tables_of(self, input: Tensor) -> "Tables":
        if self._tables is None:
            self._tables = Tables(*self._axes, (input.shape[2], input.shape[3]), "border")
        return self._tables


class _Sums(NamedTuple):
    """Weighted sums of rows of a table.

    Attributes:
        row: int32 Tensor[R], the rows of all sums, one sum after another.
        weight: Tensor[R], of each of these rows.
        start: int32 Tensor[S], where each sum starts in `row`.
    """

    row: Tensor
    weight: Tensor
    start: Tensor


class Tables:
    """`sample_by_matrices` of one image's pixels, Tensor[h, w, C], and its gradients.

    Args:
        rows: T samples.
        columns: U samples.
        size: (h, w) of the images.
        padding_mode: what lies past the ends.
    """

    def __init__(self, rows: Axis, columns: Axis, size: tuple[int, int], padding_mode: PaddingMode) -> None:
        self._axes, self._size, self._padding_mode = (rows, columns), size, padding_mode
        self.sizes = len(rows.position), len(columns.position)
        self._row = _samples(rows, size[0], padding_mode)
        column = _samples(columns, size[1], padding_mode)
        self._column = _for_each(column, self.sizes[0], size[1])
        self._column_of_one_row = column

    @cached_property
    def _transposed(self) -> tuple[_Sums, _Sums]:
        h, w = self._size
        column = _transposed(self._column_of_one_row, w)
        return _transposed(self._row, h), _for_each(column, *self.sizes)

    @cached_property
    def _slopes(self) -> tuple[_Sums, _Sums]:
        (rows, columns), (h, w) = self._axes, self._size
        column = _slopes(columns, w, self._padding_mode)
        return _slopes(rows, h, self._padding_mode), _for_each(column, self.sizes[0], w)

    def sample(self, pixels: Tensor) -> Tensor:
        """Return Tensor[T, U, C]."""
        return _sum(self._sampled_rows(pixels), self._column).view(*self.sizes, -1)

    def gradients(
        self, grad: Tensor, pixels: Tensor, of_pixels: bool, of_spacing: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the pixels, Tensor[h, w, C], and of the spacing of each axis, Tensor[2].

        Args:
            grad: Tensor[T, U, C], of what `sample` returns.
            pixels: Tensor[h, w, C], the image.
            of_pixels: whether the first gradient is wanted.
            of_spacing: whether the second one is.
        """
        (h, w), (t, u) = self._size, self.sizes
        row, column = self._transposed
        grad_samples = grad.view(t * u, -1)
        grad_rows = _sum(grad_samples, column).view(t, -1)
        grad_pixels = _sum(grad_rows, row).view(h, w, -1) if of_pixels else None
        if not of_spacing:
            return grad_pixels, None
        row, column = self._slopes
        change = _sum(pixels.view(h, -1), row), _sum(self._sampled_rows(pixels), column)
        grads = grad_rows, grad_samples
        dots = [torch.dot(one.flatten(), other.flatten()) for one, other in zip(change, grads, strict=True)]
        return grad_pixels, torch.stack(dots)

    def _sampled_rows(self, pixels: Tensor) -> Tensor:
        """Tensor[T * w, C]."""
        h, w = self._size
        return _sum(pixels.view(h, -1), self._row).view(self.sizes[0] * w, -1)


def _samples(axis: Axis, source: int, padding_mode: PaddingMode) -> _Sums:
    """The two pixels that each sample reads, and their shares."""
    position = axis.position.clamp(max=source - 1) if padding_mode == "border" else axis.position
    first = position.floor()
    second = first + 1
    return _pairs(first, second, second - position, position - first, source, padding_mode)


def _slopes(axis: Axis, source: int, padding_mode: PaddingMode) -> _Sums:
    """The two pixels whose difference gives each sample's derivative in the spacing.

    Between pixels they are the ends of the cell. On a pixel they are its neighbours: half their difference is the mean
    of the slopes of both sides.
    """
    left, right = axis.position.ceil() - 1, axis.position.floor() + 1
    slope = axis.rate / (right - left)
    if padding_mode == "border":
        slope.masked_fill_(axis.position > source - 1, 0)
    return _pairs(left, right, -slope, slope, source, padding_mode)


def _pairs(
    left: Tensor, right: Tensor, left_weight: Tensor, right_weight: Tensor, source: int, padding_mode: PaddingMode
) -> _Sums:
    row, weight = torch.stack((left, right), 1), torch.stack((left_weight, right_weight), 1)
    if padding_mode == "zeros":
        weight *= (row >= 0) & (row < source)
    start = torch.arange(0, row.numel(), 2, dtype=torch.int32)
    return _Sums(row.clamp_(0, source - 1).int().flatten(), weight.flatten(), start)


def _transposed(pairs: _Sums, source: int) -> _Sums:
    """For each source pixel the samples that read it, and its share in them."""
    pixel, order = pairs.row.sort(stable=True)
    start = torch.searchsorted(pixel, torch.arange(source, dtype=torch.int32), out_int32=True)
    return _Sums((order >> 1).int(), pairs.weight[order], start)


def _for_each(sums: _Sums, tables: int, source: int) -> _Sums:
    """The same sums of each of several tables of `source` rows, stored one after another."""
    table = torch.arange(tables, dtype=torch.int32)[:, None]
    row, start = sums.row + table * source, sums.start + table * len(sums.row)
    return _Sums(row.flatten(), sums.weight.repeat(tables), start.flatten())


def _sum(table: Tensor, sums: _Sums) -> Tensor:
    """Tensor[S, C] of Tensor[rows, C]."""
    mode = 0  # Sum.
    return torch.embedding_bag(table, sums.row, sums.start, False, mode, False, sums.weight)[0]


def pixels_of(image: Tensor) -> Tensor:
    """Return Tensor[h, w, C] of Tensor[C, h, w]: a view if the image is channels-last."""
    return image.permute(1, 2, 0).contiguous()


def put_pixels(image: Tensor, pixels: Tensor) -> None:
    """Write Tensor[h, w, C] into Tensor[C, h, w]."""
    image.copy_(pixels.permute(2, 0, 1))


def of_spacing(grad: Tensor, spacing: Tensor) -> Tensor:
    """Return the gradient of a spacing, Tensor[1] or Tensor[2], from that of each axis, Tensor[2]."""
    return grad if len(spacing) == 2 else grad.sum(0, keepdim=True)


def format_of(map: Tensor) -> torch.memory_format:
    """Return the memory format of an operator's output for a map."""
    return torch.channels_last if is_channels_last(map) else torch.contiguous_format
