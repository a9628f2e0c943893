"""A convolution whose dilation is learned: the drop-in for a dilated `nn.Conv2d`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers.factor import LearnedFactor, padding_of
from rfield.ops import fractional_conv2d

# exp(log(f)) is not f to the last bit: a dilation this near to an integer, relatively, is one.
_INTEGER_SLACK = 1e-5


class AdaptiveConv2d(LearnedFactor):
    """A convolution at the dilation `d / factor`, a positive real number, per axis if wanted.

    Where the effective dilation is an integer and needs no gradient, this is the plain convolution; between integers
    its taps read the input bilinearly. Output size and kernel centres stay those of the convolution at dilation d,
    so the padding follows the dilation. State-dict keys of weight and bias are those of `nn.Conv2d`, and a state dict
    without a factor loads, too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.Conv2d`; odd
            kernels, padding with zeros.
        factor: where the factor starts: a number, or (height, width) for rectangular receptive fields.
        min_factor: lower bound. Default: what keeps `effective_dilation` at or below the map's size.
        max_factor: upper bound. Default: what keeps `effective_dilation` at or above 1.

    Raises:
        ValueError: for an even kernel, or factors or bounds that are not positive and finite.

    >>> conv = AdaptiveConv2d(8, 16, 3, padding=12, dilation=12, factor=1.5)
    >>> conv.effective_dilation, conv(torch.rand(2, 8, 41, 41)).shape
    ((8.0, 8.0), torch.Size([2, 16, 41, 41]))
    """

    rounds = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        factor: float | Sequence[float] = 1.0,
        min_factor: float | None = None,
        max_factor: float | None = None,
    ) -> None:
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._init_from(plain, factor, min_factor, max_factor)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        factor: float | Sequence[float] = 1.0,
        min_factor: float | None = None,
        max_factor: float | None = None,
    ) -> "AdaptiveConv2d":
        """The adaptive twin of a convolution; weight and bias are the very same parameters.

        >>> conv = nn.Conv2d(8, 16, 3, padding=6, dilation=6)
        >>> AdaptiveConv2d.from_conv(conv).weight is conv.weight
        True
        """
        adaptive = cls.__new__(cls)
        adaptive._init_from(conv, factor, min_factor, max_factor)
        return adaptive

    def _init_from(
        self, conv: nn.Conv2d, factor: float | Sequence[float], min_factor: float | None, max_factor: float | None
    ) -> None:
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        dilation = (conv.dilation[0], conv.dilation[1])
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise ValueError(f"an adaptive kernel must be odd along both axes to have a centre, got {kernel}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"an adaptive convolution pads with zeros, got padding_mode={conv.padding_mode!r}")
        super().__init__((float(dilation[0]), float(dilation[1])), factor, min_factor, max_factor)
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = kernel
        self.stride = (conv.stride[0], conv.stride[1])
        self.padding = padding_of(conv)
        self.dilation = dilation
        self.groups = conv.groups
        self.weight = conv.weight
        self.bias = conv.bias
        self.log_factor.data = self.log_factor.data.to(conv.weight.device)
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Maps Tensor[N, C, h, w] to Tensor[N, K, H, W], the size that the convolution at dilation d gives."""
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        self._see((input.shape[2], input.shape[3]))
        return fractional_conv2d(
            input,
            self.weight,
            self.bias,
            self._present_dilation(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def snap(self) -> None:
        """Ends the learning: the dilation becomes `max(1, round(dilation / factor))`, a plain convolution's."""
        self.freeze_factor()
        nearest = [max(1, round(dilation)) for dilation in self.effective_dilation]
        self.set_factor(
            [base / n for base, n in zip(self.base_dilation, nearest, strict=True)][: self.log_factor.numel()]
        )

    def _present_dilation(self) -> Tensor:
        if self.held is not None:
            return self.log_factor.new_tensor(self.held)
        dilation = self.log_factor.new_tensor(self.base_dilation) / self.log_factor.exp()
        if self.log_factor.requires_grad and torch.is_grad_enabled():
            return dilation
        nearest = dilation.round().clamp(min=1)
        return torch.where((dilation - nearest).abs() <= _INTEGER_SLACK * nearest, nearest, dilation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}log_factor", self.log_factor.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {super().extra_repr()}"
        )
