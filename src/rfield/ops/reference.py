"""Slow loops under the operators' own names, for tests only. They share no code with the operators."""

import math

import torch
from torch import Tensor


def _sample(line: list[float], position: float) -> float:
    """The value of a 1-d signal at a real position, linear between its pixels and constant past the last one."""
    if position >= len(line) - 1:
        return line[-1]
    left = math.floor(position)
    return line[left] + (position - left) * (line[left + 1] - line[left])


def _slope(line: list[float], position: float) -> float:
    """The mean of the two one-sided derivatives of `_sample` in the position."""
    sides = []
    for cell in (math.floor(position), math.ceil(position) - 1):
        inside = 0 <= cell < len(line) - 1
        sides.append(line[cell + 1] - line[cell] if inside else 0.0)
    return sum(sides) / 2


def resize_bilinear(input: Tensor, scale_factor: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Return Tensor[N, C, H, W] of Tensor[N, C, h, w], pixel by pixel."""
    factor_h, factor_w = scale_factor.tolist()[0], scale_factor.tolist()[-1]
    output = input.new_zeros(*input.shape[:2], *output_size)
    for n, c, i, j in torch.cartesian_prod(*(torch.arange(size) for size in output.shape)).tolist():
        rows = [_sample(row, j / factor_w) for row in input[n, c].tolist()]
        output[n, c, i, j] = _sample(rows, i / factor_h)
    return output


def resize_bilinear_backward(input: Tensor, scale_factor: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input, Tensor[N, C, h, w], and of the factor, in the factor's shape."""
    factor_h, factor_w = scale_factor.tolist()[0], scale_factor.tolist()[-1]
    h, w = input.shape[2:]
    grad_input = torch.zeros_like(input)
    grad_factor = torch.zeros_like(scale_factor)
    for n, c, i, j in torch.cartesian_prod(*(torch.arange(size) for size in grad_output.shape)).tolist():
        grad = float(grad_output[n, c, i, j])
        y, x = i / factor_h, j / factor_w
        plane = input[n, c].tolist()
        along_y = _slope([_sample(row, x) for row in plane], y)
        along_x = _slope([_sample(list(column), y) for column in zip(*plane, strict=True)], x)
        grad_factor[0] += grad * along_y * -i / factor_h**2
        grad_factor[-1] += grad * along_x * -j / factor_w**2
        for m in range(h):
            for k in range(w):
                weight_y = _sample([float(row == m) for row in range(h)], y)
                weight_x = _sample([float(column == k) for column in range(w)], x)
                grad_input[n, c, m, k] += grad * weight_y * weight_x
    return grad_input, grad_factor


def fractional_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    base_dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return Tensor[N, K, H, W] of Tensor[N, C, h, w], tap by tap; the dilation has no gradient."""
    n, _, h, w = input.shape
    out_channels, in_group, k_h, k_w = weight.shape
    d = dilation.tolist()
    out_h = (h + 2 * padding[0] - base_dilation[0] * (k_h - 1) - 1) // stride[0] + 1
    out_w = (w + 2 * padding[1] - base_dilation[1] * (k_w - 1) - 1) // stride[1] + 1
    rows = []
    for i in range(out_h):
        for j in range(out_w):
            total = input.new_zeros(n, out_channels) if bias is None else bias.expand(n, out_channels)
            for a in range(k_h):
                for b in range(k_w):
                    y = i * stride[0] - padding[0] + base_dilation[0] * (k_h - 1) / 2 + d[0] * (a - (k_h - 1) / 2)
                    x = j * stride[1] - padding[1] + base_dilation[1] * (k_w - 1) / 2 + d[-1] * (b - (k_w - 1) / 2)
                    value = _bilinear_with_zeros(input, y, x)
                    for group in range(groups):
                        ins = slice(group * in_group, (group + 1) * in_group)
                        size = out_channels // groups
                        outs = slice(group * size, (group + 1) * size)
                        part = value[:, ins] @ weight[outs, :, a, b].t()
                        total = total + torch.cat(
                            [part if g == group else torch.zeros_like(part) for g in range(groups)], dim=1
                        )
            rows.append(total)
    return torch.stack(rows, dim=2).reshape(n, out_channels, out_h, out_w)


def _bilinear_with_zeros(input: Tensor, y: float, x: float) -> Tensor:
    """Tensor[N, C] read at a real position of Tensor[N, C, h, w]; pixels past the border are 0."""
    total = torch.zeros_like(input[:, :, 0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < input.shape[2] and 0 <= column < input.shape[3]:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * input[:, :, row, column]
    return total
