"""The resize by 1, 1/2, 1/4 and so on, where every sample is a pixel: a copy of every n-th pixel."""

import torch
from torch import Tensor

from rfield.ops.axis import Axis
from rfield.ops.kernels import Kernel
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.tables import format_of, of_spacing


def whole_strides(factor: list[float], size: tuple[int, int], output_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return how many pixels lie from one sample to the next, along each axis.

    None if a sample lies between pixels, or if the first and last pixels are not the first and last samples.

    Example:
        >>> whole_strides([0.5], (9, 5), (5, 3)), whole_strides([0.6], (9, 5), (6, 3))
        ((2, 2), None)
    """
    strides = 1 / factor[0], 1 / factor[-1]
    last = [(target - 1) * stride for target, stride in zip(output_size, strides, strict=True)]
    if not all(stride.is_integer() for stride in strides) or last != [source - 1 for source in size]:
        return None
    return int(strides[0]), int(strides[1])


class SampleByStrides(Kernel):
    """`sample_by_matrices` with border padding, at strides that `whole_strides` returns.

    Every sample is a kink, whose derivative is the mean of the slopes of both sides.
    """

    def __init__(self, strides: tuple[int, int], rows: Axis, columns: Axis) -> None:
        self._strides, self._axes = strides, (rows, columns)

    def forward(self, input: Tensor, spacing: Tensor) -> Tensor:
        row, column = self._strides
        return input[:, :, ::row, ::column].clone(memory_format=format_of(input))

    def backward(
        self, grad_output: Tensor, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        (input, spacing), (row, column) = tensors, self._strides
        grad_input = None
        if needed[0]:
            grad_input = torch.zeros_like(input)
            grad_input[:, :, ::row, ::column] = grad_output
        if not needed[1]:
            return grad_input, None
        by_row = _grad_spacing(grad_output, input[:, :, :, ::column], 2, row)
        by_column = _grad_spacing(grad_output, input[:, :, ::row], 3, column)
        return grad_input, of_spacing(torch.stack((by_row, by_column)), spacing)

    def plain(self, input: Tensor, spacing: Tensor) -> Tensor:
        return sample_by_matrices(input, spacing, *self._axes, "border")


def _grad_spacing(grad: Tensor, input: Tensor, axis: int, stride: int) -> Tensor:
    """The gradient of one axis's spacing. Sample i lies at i times the spacing, so it moves i times as far."""
    grad, input = grad.transpose(axis, 3), input.transpose(axis, 3)
    samples, last = grad.shape[3], input.shape[3] - 1
    if last == 0:
        return grad.new_zeros(())
    # Beyond the last pixel the slope is 0, and sample 0 does not move.
    end = (grad[..., -1] * (input[..., last] - input[..., last - 1])).sum() * (samples - 1)
    change = input[..., stride + 1 :: stride] - input[..., stride - 1 : last - 1 : stride]
    inner = change.mul_(grad[..., 1:-1]).sum((0, 1, 2))
    return (end + inner @ torch.arange(1, samples - 1, dtype=inner.dtype, device=inner.device)) / 2
