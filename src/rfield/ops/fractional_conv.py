"""Convolution whose dilation is a positive real number, by bilinear taps anchored at the kernel's centre."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.ops.axis import Axis
from rfield.ops.kernels import has_kernels
from rfield.ops.taps import ConvolveByRows, convolve_by_matrices
from rfield.ops.values import is_transformed, positive_values

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
    """Convolve with a dilation that may be learned.

    Output size and kernel centres are those of the convolution with `base_dilation` and `padding`; tap t of k lies
    `dilation * (t - (k - 1) / 2)` px from the centre and reads the input bilinearly, zeros past its border. At an
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

    Example:
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
    input, weight = (each.to(_autocast_dtype(each)) for each in (input, weight))
    bias = None if bias is None else bias.to(_autocast_dtype(bias))
    dilation = dilation.to(torch.promote_types(input.dtype, torch.float32))
    rows, columns = (
        _taps(
            dilation.detach()[place],
            input.shape[axis + 2],
            weight.shape[axis + 2],
            stride[axis],
            padding[axis],
            base_dilation[axis],
        )
        for axis, place in ((0, 0), (1, -1))
    )
    with torch.autocast(input.device.type, enabled=False):
        if has_kernels(input):
            return ConvolveByRows(rows, columns, groups)(input, weight, bias, dilation)
        return convolve_by_matrices(input, weight, bias, dilation, rows, columns, groups)


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
    dtypes = [_autocast_dtype(each) for each in (input, weight, *(() if bias is None else (bias,)))]
    if not dtypes[0].is_floating_point or len(set(dtypes)) > 1:
        raise TypeError(f"input, weight and bias must be floating-point tensors of one dtype, got {dtypes}")


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to which autocast casts a convolution's operand."""
    device = tensor.device.type
    kept = tensor.is_meta or tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor.dtype if kept or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


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
    # The padding changes with the dilation, so that the kernel's centres stay where they are.
    kernel = weight.shape[2:]
    height, width = (
        padding[axis] + (dilation[axis] - base_dilation[axis]) * (kernel[axis] - 1) // 2 for axis in (0, 1)
    )
    crop = min(height, 0), min(width, 0)
    if any(crop):
        input = F.pad(input, (crop[1], crop[1], crop[0], crop[0]))
    return F.conv2d(input, weight, bias, stride, (max(height, 0), max(width, 0)), dilation, groups)


def _taps(dilation: Tensor, source: int, kernel: int, stride: int, padding: int, base_dilation: int) -> Axis:
    """Where each tap of each output pixel reads along one axis: positions Tensor[output, kernel]."""
    reach = base_dilation * (kernel - 1)
    target = (source + 2 * padding - reach - 1) // stride + 1
    if target < 1:
        raise ValueError(f"a map of {source} px, padded by {padding}, is smaller than the kernel's reach of {reach} px")
    centre = torch.arange(target, dtype=dilation.dtype, device=dilation.device) * stride - padding + reach / 2
    offset = torch.arange(kernel, dtype=dilation.dtype, device=dilation.device) - (kernel - 1) / 2
    return Axis(centre[:, None] + offset * dilation, offset.expand(target, -1))
