"""Convolution whose dilation is a positive real number, by bilinear taps anchored at the kernel's centre."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.ops.sampling import (
    Axis,
    Grid,
    as_table,
    by_matrices,
    differentiable_gradients,
    in_plain_operations,
    is_channels_last,
    is_transformed,
    positive_values,
)

Pair = tuple[int, int]


def fractional_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    base_dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolves with a dilation that may be learned.

    Output size and kernel centres are those of the convolution with `base_dilation` and `padding`; tap t of k lies
    `dilation * (t - (k - 1) / 2)` px from the centre and reads the input bilinearly, zeros beyond its border. At an
    integer dilation that needs no gradient this *is* `F.conv2d`, bit for bit. Gradients to the input, weight, bias
    and dilation are exact; at kinks (integer dilations) the dilation's is the mean of the two sides.

    Args:
        input: Tensor[N, C, h, w], floating point.
        weight: Tensor[K, C / groups, k_h, k_w], k_h and k_w odd.
        bias: Tensor[K] or None.
        dilation: Tensor[1] (both axes) or Tensor[2] (height, width), positive, in input px.
        stride: of the output, in px.
        padding: zeros around the input at `base_dilation`.
        base_dilation: the dilation of the convolution that this one stands for.
        groups: as in `F.conv2d`.

    Returns:
        Tensor[N, K, H, W].

    Raises:
        ValueError: for shapes that do not fit one another, an even kernel, a map smaller than the kernel's reach, or a
            dilation that is not positive and finite, has a wrong shape or no value that can be read (`torch.func.vmap`
            over the dilation).
        TypeError: if input, weight and bias are not floating-point tensors of one dtype; autocast lowers what it lowers
            for `F.conv2d`, which is all but float64.

    >>> ramp = torch.arange(9.0).reshape(1, 1, 1, 9)
    >>> kernel = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    >>> fractional_conv2d(ramp, kernel, None, torch.tensor([1.5]), padding=(0, 1))[0, 0, 0, 2:7]
    tensor([3., 3., 3., 3., 3.])
    """
    _check(input, weight, bias, dilation, groups)
    if input.is_meta:  # No values, but the size, which does not depend on the dilation.
        return F.conv2d(input, weight, bias, stride, padding, base_dilation, groups)
    values = positive_values("dilation", dilation)
    learned = (dilation.requires_grad and torch.is_grad_enabled()) or is_transformed()
    if not learned and all(value == round(value) for value in values):
        integer = (round(values[0]), round(values[-1]))
        return _integer_conv2d(input, weight, bias, integer, stride, padding, base_dilation, groups)
    input, weight = _lowered(input), _lowered(weight)
    bias = None if bias is None else _lowered(bias)
    real = dilation.to(torch.promote_types(input.dtype, torch.float32))
    rows, columns = (
        _taps(
            real.detach()[place],
            input.shape[axis + 2],
            weight.shape[axis + 2],
            stride[axis],
            padding[axis],
            base_dilation[axis],
        )
        for axis, place in ((0, 0), (1, -1))
    )
    with torch.autocast(input.device.type, enabled=False):
        if in_plain_operations(input):
            return _by_taps(input, weight, bias, real, rows, columns, groups)
        convolved: Tensor = _ByRows.apply(input, weight, bias, real, rows, columns, groups)
        return convolved


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Tensor, groups: int) -> None:
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
    if weight.dim() != 4 or weight.shape[1] * groups != input.shape[1] or len(weight) % groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} in {groups} groups does not fit an input of shape "
            f"{tuple(input.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        kernel = f"{weight.shape[2]}x{weight.shape[3]}"
        raise ValueError(f"the kernel must be odd along both axes to have a centre pixel, got {kernel}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), one number a channel, got shape {tuple(bias.shape)}")
    if dilation.shape not in ((1,), (2,)):
        raise ValueError(f"dilation must have shape (1,) or (2,) (height, width), got shape {tuple(dilation.shape)}")
    dtypes = [_lower_dtype(each) for each in (input, weight, *(() if bias is None else (bias,)))]
    if not dtypes[0].is_floating_point or len(set(dtypes)) > 1:
        raise TypeError(f"input, weight and bias must be floating-point tensors of one dtype, got {dtypes}")


def _lower_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of a convolution's operand."""
    device = tensor.device.type
    kept = tensor.is_meta or tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor.dtype if kept or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def _lowered(tensor: Tensor) -> Tensor:
    return tensor.to(_lower_dtype(tensor))


def _by_taps(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Tensor, rows: Axis, columns: Axis, groups: int
) -> Tensor:
    """All taps at once, in plain operations: the kernel strides over a map of all that it reads."""
    flat_rows, flat_columns = (Axis(*(each.flatten() for each in axis)) for axis in (rows, columns))
    taps = by_matrices(input.to(dilation.dtype), dilation, flat_rows, flat_columns, "zeros").to(input.dtype)
    return F.conv2d(taps, weight, bias, stride=(weight.shape[2], weight.shape[3]), groups=groups)


class _ByRows(torch.autograd.Function):
    """An image and a row of the kernel at a time: a product of matrices, an output pixel's taps being its channels.

    The taps of a row take as much memory as the image and the kernel's width together; they are not kept but sampled
    again. Output rows at which a row of taps lies beyond the map are left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dilation: Tensor,
        rows: Axis,
        columns: Axis,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, dilation)
        ctx.rows, ctx.columns, ctx.groups = rows, columns, groups
        shape = (len(input), len(rows.at), len(columns.at), len(weight))
        output = dilation.new_zeros(shape)
        if bias is not None:
            output += bias
        kernel = _as_matrices(weight, groups)
        grids = list(_rows_of_taps(rows, columns, (input.shape[2], input.shape[3])))
        for table, total in zip(as_table(input, True), output, strict=True):
            for tap, span, grid in grids:
                taps = grid.sample(table.to(dilation.dtype)[None]).to(input.dtype)
                _add_product(_by_group(total[span], groups), _grouped(taps, groups, weight.shape[3]), kernel[tap])
        return _in_format_of(input, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, dilation = ctx.saved_tensors
        rows, columns, groups, grad = ctx.rows, ctx.columns, ctx.groups, grad_outputs[0]
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # The kernels have no second derivative.
            convolved = _by_taps(input, weight, bias, dilation, rows, columns, groups)
            inputs = input, weight, bias, dilation
            return (*differentiable_gradients(convolved, inputs, needed, grad), None, None, None)
        grads, tables = as_table(grad, True), as_table(input, True)
        kernel = _as_matrices(weight, groups)
        grad_kernel = torch.zeros_like(kernel, dtype=dilation.dtype)
        grad_tables = torch.zeros_like(tables, dtype=dilation.dtype) if needed[0] else None
        grad_dilation = dilation.new_zeros(2)
        grids = list(_rows_of_taps(rows, columns, (input.shape[2], input.shape[3])))
        for image, each in enumerate(grads):
            table = tables[image].to(dilation.dtype)[None]
            for tap, span, grid in grids:
                grad_rows = _by_group(each[span], groups)
                if needed[1]:
                    taps = _grouped(grid.sample(table).to(input.dtype), groups, weight.shape[3])
                    _add_product(grad_kernel[tap], taps.transpose(1, 2), grad_rows)
                if needed[0] or needed[3]:
                    grad_taps = torch.bmm(grad_rows, kernel[tap].transpose(1, 2)).to(dilation.dtype)
                    grad_taps = _ungrouped(grad_taps, weight.shape[3]).view(1, -1, columns.at.numel(), input.shape[1])
                    of_table, of_dilation = grid.gradients(grad_taps, table, needed[0], needed[3])
                    if grad_tables is not None and of_table is not None:
                        grad_tables[image] += of_table[0]
                    if of_dilation is not None:
                        grad_dilation += of_dilation
        grad_input = None if grad_tables is None else _in_format_of(input, grad_tables)
        grad_weight = _from_matrices(grad_kernel, weight).to(weight.dtype)
        grad_bias = grad.sum((0, 2, 3)) if needed[2] else None
        grad_dilation = grad_dilation if len(dilation) == 2 else grad_dilation.sum(0, keepdim=True)
        found = (grad_input, grad_weight, grad_bias, grad_dilation)
        return (*(each if need else None for each, need in zip(found, needed, strict=True)), None, None, None)


def _rows_of_taps(rows: Axis, columns: Axis, size: Pair) -> Iterator[tuple[int, slice, Grid]]:
    """Each row of taps, the output rows at which it reads the map at all, and where it reads it there."""
    flat = Axis(*(each.flatten() for each in columns))
    # One pixel out nothing is read, but moving in is: where the derivative has its kink.
    inside = (rows.at >= -1) & (rows.at <= size[0])
    for tap, count in enumerate(inside.sum(0).tolist()):
        if count:
            first = int(inside[:, tap].int().argmax())
            span = slice(first, first + count)
            yield tap, span, Grid(Axis(*(each[span, tap].contiguous() for each in rows)), flat, size, "zeros")


def _as_matrices(weight: Tensor, groups: int) -> Tensor:
    """Tensor[k_h, groups, k_w * C / groups, K / groups]: what the taps of a row are multiplied with."""
    k, c, h, w = weight.shape
    return weight.view(groups, k // groups, c, h, w).permute(3, 0, 4, 2, 1).reshape(h, groups, w * c, k // groups)


def _from_matrices(kernel: Tensor, weight: Tensor) -> Tensor:
    k, c, h, w = weight.shape
    groups = kernel.shape[1]
    return kernel.view(h, groups, w, c, k // groups).permute(1, 4, 3, 0, 2).reshape(weight.shape)


def _by_group(pixels: Tensor, groups: int) -> Tensor:
    """Tensor[groups, T * U, K / groups] of Tensor[T, U, K]: a view."""
    return pixels.reshape(-1, groups, pixels.shape[-1] // groups).transpose(0, 1)


def _grouped(taps: Tensor, groups: int, width: int) -> Tensor:
    """Tensor[groups, T * U, k_w * C / groups] of Tensor[1, T, U * k_w, C]: a view, if there is one group."""
    c = taps.shape[3] // groups
    return taps.view(-1, width, groups, c).permute(2, 0, 1, 3).reshape(groups, -1, width * c)


def _ungrouped(taps: Tensor, width: int) -> Tensor:
    """Tensor[T * U, k_w, C] of what `_grouped` returns."""
    groups, pixels, channels = taps.shape
    return taps.view(groups, pixels, width, channels // width).permute(1, 2, 0, 3).reshape(pixels, width, -1)


def _in_format_of(input: Tensor, table: Tensor) -> Tensor:
    """Tensor[N, h, w, C] as a map of the type and memory format of another."""
    map = table.to(input.dtype).permute(0, 3, 1, 2)
    # A view may not leave a function and be changed in place; `contiguous` copies nothing where there is one channel.
    return (map if is_channels_last(input) else map.contiguous()).detach()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """In the precision of the sum."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _integer_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Pair,
    stride: Pair,
    padding: Pair,
    base_dilation: Pair,
    groups: int,
) -> Tensor:
    # The kernel's centre stays where it was, so the padding follows the dilation.
    kernel = weight.shape[2:]
    follow = [padding[axis] + (dilation[axis] - base_dilation[axis]) * (kernel[axis] - 1) // 2 for axis in (0, 1)]
    if min(follow) < 0:
        crop_h, crop_w = min(follow[0], 0), min(follow[1], 0)
        input = F.pad(input, (crop_w, crop_w, crop_h, crop_h))
    return F.conv2d(input, weight, bias, stride, (max(follow[0], 0), max(follow[1], 0)), dilation, groups)


def _taps(dilation: Tensor, source: int, kernel: int, stride: int, padding: int, base_dilation: int) -> Axis:
    """Where every tap of every output pixel of one axis reads, in source pixels: Tensor[output, kernel]."""
    reach = base_dilation * (kernel - 1)
    target = (source + 2 * padding - reach - 1) // stride + 1
    if target < 1:
        raise ValueError(f"a map of {source} px, padded by {padding}, is smaller than the kernel's reach of {reach} px")
    centre = torch.arange(target, dtype=dilation.dtype, device=dilation.device) * stride - padding + reach / 2
    offset = torch.arange(kernel, dtype=dilation.dtype, device=dilation.device) - (kernel - 1) / 2
    return Axis(centre[:, None] + offset * dilation, offset.expand(target, -1))
