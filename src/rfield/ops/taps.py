"""Convolution of bilinear taps, an image and a row of the kernel at a time.

The taps that a row of the kernel reads are sampled once, and each output pixel's taps are taken as its channels: then
the row's part of the convolution is a product of matrices. The sampled taps take as much memory as the image and the
kernel's width together. They are not kept but sampled again in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.ops.axis import Axis
from rfield.ops.kernels import Kernel
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.tables import Tables, format_of, of_spacing, pixels_of, put_pixels


def convolve_by_matrices(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Tensor, rows: Axis, columns: Axis, groups: int
) -> Tensor:
    """Return what `ConvolveByRows` returns, by operations that autograd differentiates.

    All taps are sampled at once, and the kernel strides over them.
    """
    rows, columns = (Axis(*(each.flatten() for each in axis)) for axis in (rows, columns))
    taps = sample_by_matrices(input.to(dilation.dtype), dilation, rows, columns, "zeros").to(input.dtype)
    return F.conv2d(taps, weight, bias, stride=(weight.shape[2], weight.shape[3]), groups=groups)


class ConvolveByRows(Kernel):
    """The convolution of an input, a weight, a bias or None, and a dilation.

    Args:
        rows: positions Tensor[T, k_h] of every tap of every output pixel.
        columns: positions Tensor[U, k_w].
        groups: as in `F.conv2d`.
    """

    def __init__(self, rows: Axis, columns: Axis, groups: int) -> None:
        self._axes, self._groups = (rows, columns), groups

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Tensor) -> Tensor:
        rows, columns = (axis.position for axis in self._axes)
        shape = len(input), len(weight), len(rows), len(columns)
        output = torch.empty(shape, dtype=input.dtype, memory_format=format_of(input))
        total = dilation.new_zeros(*shape[2:], shape[1])  # Sums have the dilation's precision, float32 at least.
        kernel_rows = self._kernel_rows(input, weight)
        for image, place in zip(input, output, strict=True):
            pixels = pixels_of(image.to(total.dtype))
            total.zero_() if bias is None else total.copy_(bias.expand_as(total))
            for row in kernel_rows:
                row.add_output(total, pixels)
            put_pixels(place, total)
        return output

    def backward(
        self, grad_output: Tensor, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        input, weight, _, dilation = tensors
        kernel_rows = self._kernel_rows(input, weight)
        grad_input = torch.empty_like(input, memory_format=format_of(input))
        grad_kernel = dilation.new_zeros(_as_matrices(weight, self._groups).shape)
        grad_dilation = dilation.new_zeros(2)
        for image, grad, place in zip(input, grad_output, grad_input, strict=True):
            pixels, grad_pixels = pixels_of(image.to(dilation.dtype)), pixels_of(grad)
            grad_image = torch.zeros_like(pixels)
            for row in kernel_rows:
                if needed[1]:
                    row.add_grad_weight(grad_kernel, grad_pixels, pixels)
                if needed[0] or needed[3]:
                    of_pixels, of_dilation = row.gradients(grad_pixels, pixels, needed[0], needed[3])
                    grad_image += 0 if of_pixels is None else of_pixels
                    grad_dilation += 0 if of_dilation is None else of_dilation
            put_pixels(place, grad_image)
        grad_weight = _from_matrices(grad_kernel, weight).to(weight.dtype)
        grads = grad_input, grad_weight, grad_output.sum((0, 2, 3)), of_spacing(grad_dilation, dilation)
        return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))

    def plain(self, input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Tensor) -> Tensor:
        return convolve_by_matrices(input, weight, bias, dilation, *self._axes, self._groups)

    def _kernel_rows(self, input: Tensor, weight: Tensor) -> list["_KernelRow"]:
        rows, columns = self._axes
        height, width = input.shape[2:]
        columns = Axis(*(each.flatten() for each in columns))
        # A tap one pixel beyond the border reads nothing, but its derivative does: the border is a kink.
        inside = (rows.position >= -1) & (rows.position <= height)
        made = []
        for number, kernel in enumerate(_as_matrices(weight, self._groups)):
            count, first = int(inside[:, number].sum()), int(inside[:, number].int().argmax())
            if count:
                span = slice(first, first + count)
                row = Axis(*(each[span, number].contiguous() for each in rows))
                made.append(_KernelRow(number, span, Tables(row, columns, (height, width), "zeros"), kernel))
        return made


class _KernelRow:
    """One row of a kernel: the part of the convolution that its taps add.

    Args:
        number: of the row.
        span: the output rows at which its taps read the map at all.
        tables: the taps of these output rows.
        kernel: Tensor[groups, k_w * C / groups, K / groups], the row's weights.
    """

    def __init__(self, number: int, span: slice, tables: Tables, kernel: Tensor) -> None:
        self._number, self._span, self._tables, self._kernel = number, span, tables, kernel

    def add_output(self, total: Tensor, pixels: Tensor) -> None:
        """Add to the output, Tensor[T, U, K], what the taps of Tensor[h, w, C] give."""
        _add_product(self._by_group(total), self._taps(pixels), self._kernel)

    def add_grad_weight(self, grad_kernel: Tensor, grad: Tensor, pixels: Tensor) -> None:
        """Add to the gradient of all rows' weights, given that of the output, Tensor[T, U, K]."""
        _add_product(grad_kernel[self._number], self._taps(pixels).transpose(1, 2), self._by_group(grad))

    def gradients(
        self, grad: Tensor, pixels: Tensor, of_pixels: bool, of_dilation: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the pixels and of each axis's dilation, as `Tables.gradients` does."""
        grad_taps = torch.bmm(self._by_group(grad), self._kernel.transpose(1, 2))
        groups, channels = len(grad_taps), pixels.shape[2] // len(grad_taps)
        grad_taps = grad_taps.view(groups, grad_taps.shape[1], -1, channels).permute(1, 2, 0, 3).to(pixels.dtype)
        grad_taps = grad_taps.reshape(*self._tables.sizes, -1)
        return self._tables.gradients(grad_taps, pixels, of_pixels, of_dilation)

    def _taps(self, pixels: Tensor) -> Tensor:
        """Tensor[groups, T * U, k_w * C / groups]: a view of the samples, if there is one group."""
        groups, inputs, _ = self._kernel.shape
        channels = pixels.shape[2] // groups
        taps = self._tables.sample(pixels).to(self._kernel.dtype).view(-1, inputs // channels, groups, channels)
        return taps.permute(2, 0, 1, 3).reshape(groups, -1, inputs)

    def _by_group(self, pixels: Tensor) -> Tensor:
        """Tensor[groups, T * U, K / groups] of the row's part of Tensor[T, U, K]: a view."""
        groups, _, outputs = self._kernel.shape
        return pixels[self._span].view(-1, groups, outputs).transpose(0, 1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add in the precision of the sum."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _as_matrices(weight: Tensor, groups: int) -> Tensor:
    """Tensor[k_h, groups, k_w * C / groups, K / groups]: what the taps of each row are multiplied by."""
    k, c, h, w = weight.shape
    return weight.view(groups, k // groups, c, h, w).permute(3, 0, 4, 2, 1).reshape(h, groups, w * c, k // groups)


def _from_matrices(kernel: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_as_matrices`, for a tensor of the weight's shape."""
    k, c, h, w = weight.shape
    groups = kernel.shape[1]
    return kernel.view(h, groups, w, c, k // groups).permute(1, 4, 3, 0, 2).reshape(weight.shape)
