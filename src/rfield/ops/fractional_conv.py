"""Convolution whose dilation is a positive real number, by bilinear taps anchored at the kernel's centre."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.ops.sampling import Axis, sample_grid

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
        ValueError: for an even kernel, or a dilation that is not positive and finite or has a wrong shape.

    >>> ramp = torch.arange(9.0).reshape(1, 1, 1, 9)
    >>> kernel = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    >>> fractional_conv2d(ramp, kernel, None, torch.tensor([1.5]), padding=(0, 1))[0, 0, 0, 2:7]
    tensor([3., 3., 3., 3., 3.])
    """
    kernel = (weight.shape[2], weight.shape[3])
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"the kernel must be odd along both axes to have a centre pixel, got {kernel[0]}x{kernel[1]}")
    if dilation.shape not in ((1,), (2,)):
        raise ValueError(f"dilation must have shape (1,) or (2,) (height, width), got shape {tuple(dilation.shape)}")
    values = dilation.tolist()
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"dilation must be positive and finite, got {values}")
    learned = dilation.requires_grad and torch.is_grad_enabled()
    if not learned and all(value == round(value) for value in values):
        integer = (round(values[0]), round(values[-1]))
        return _integer_conv2d(input, weight, bias, integer, stride, padding, base_dilation, groups)
    dtype = torch.promote_types(input.dtype, torch.float32)
    with torch.autocast(input.device.type, enabled=False):
        rows, columns = (
            _taps(
                dilation.detach().to(dtype)[place],
                input.shape[axis + 2],
                kernel[axis],
                stride[axis],
                padding[axis],
                base_dilation[axis],
            )
            for axis, place in ((0, 0), (1, -1))
        )
        taps = sample_grid(input.to(dtype), dilation.to(dtype), rows, columns, "zeros").to(input.dtype)
    output = _weigh(taps, weight, bias, groups)
    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _weigh(taps: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The convolution, as one of 1x1: every pixel of Tensor[N, k_h * k_w * C, H, W] has its taps as channels.

    A strided convolution would do, but torch's backward pass of one takes several times as long on a CPU.
    """
    if groups > 1:
        n, channels, *size = taps.shape
        inputs = weight.shape[1]
        taps = taps.view(n, channels // (groups * inputs), groups, inputs, *size).transpose(1, 2).flatten(1, 3)
    pointwise = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
    # A dilation means nothing to one tap, but without it torch leaves oneDNN aside where there is one thread.
    return F.conv2d(taps, pointwise, bias, dilation=2, groups=groups)


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
    """Where every tap of every output pixel of one axis reads, in source pixels."""
    reach = base_dilation * (kernel - 1)
    target = (source + 2 * padding - reach - 1) // stride + 1
    if target < 1:
        raise ValueError(f"a map of {source} px, padded by {padding}, is smaller than the kernel's reach of {reach} px")
    centre = torch.arange(target, dtype=dilation.dtype, device=dilation.device) * stride - padding + reach / 2
    offset = torch.arange(kernel, dtype=dilation.dtype, device=dilation.device)[:, None] - (kernel - 1) / 2
    return Axis(centre + offset * dilation, offset.expand(-1, target))
