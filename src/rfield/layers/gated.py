"""A convolution whose receptive field depends on the input: one kernel at several rates, mixed by predicted gates."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers.adaptive_conv import reason_not_adaptable, share_parametrizations
from rfield.layers.dilation import numeric_padding
from rfield.text import format_size

Gates = Literal["image", "pixel"]
DEFAULT_RATES = (1, 2, 4, 8)
ONE_HOT = 0.99
"""Mean gate from which one rate alone stands for the layer."""

# Of the running average of the gates, as in a batch norm.
_MOMENTUM = 0.1


class GatedConv2d(nn.Module):
    """A convolution at several rates (dilations) with one kernel, mixed by gates that a small network predicts.

    The outputs, each in a batch norm of its own, are summed with softmax gates. `gates="image"` predicts one set of
    gates for the whole image, from globally pooled features (as in Selective Kernel networks; Li et al., CVPR 2019);
    `gates="pixel"` predicts one for each pixel (the Autofocus layer; Qin et al., MICCAI 2018). At the start all gates
    are equal. The layer costs as much as its rates are many, uses plain operations only, and exports to ONNX with any
    size.

    Weight and bias have the state-dict keys of `nn.Conv2d`. Further keys are `gate.*`, `mean_gates`, and with batch
    norms `norms.*`.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: as in `nn.Conv2d`, for odd kernels. Zeros pad the
            input so that the kernel's centres lie at every `stride` px, whatever the rate.
        rates: two or more different dilations, such as a set that a search has found.
        gates: `image` or `pixel`.
        norm: give each rate a batch norm of its own, as in both papers. Without it, the layer starts as the mean of the
            convolutions.

    Attributes:
        gate: the small network: Tensor[N, C, h, w] to gates Tensor[N, R, 1, 1] or Tensor[N, R, H, W]. A forward hook on
            it reads the gates of a run.
        mean_gates: Tensor[R], the mean gate of each rate over the last training batches, a running average.

    Raises:
        ValueError: for an even kernel, and for rates that are fewer than two, not whole numbers or equal.

    Example:
        >>> conv = GatedConv2d(8, 16, 3, rates=(1, 2, 4), gates="pixel")
        >>> conv(torch.rand(2, 8, 41, 33)).shape
        torch.Size([2, 16, 41, 33])
        >>> conv.mean_gates
        tensor([0.3333, 0.3333, 0.3333])
    """

    mean_gates: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        rates: Sequence[int] = DEFAULT_RATES,
        gates: Gates = "image",
        norm: bool = True,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = height // 2, width // 2
        plain = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, groups=groups, bias=bias)
        self._init_from(plain, rates, gates, norm)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, rates: Sequence[int] = DEFAULT_RATES, gates: Gates = "image", norm: bool = True
    ) -> "GatedConv2d":
        """Return a gated convolution that shares the weight, the bias and the parametrizations of `conv`.

        Its rates replace the dilation of `conv`.

        Args:
            conv: the convolution to replace.
            rates, gates, norm: see the class.

        Raises:
            ValueError: as the class, and if `conv` cannot be replaced, see `reason_not_gateable`.

        Example:
            >>> conv = nn.Conv2d(8, 16, 3, padding=6, dilation=6)
            >>> GatedConv2d.from_conv(conv, rates=(2, 6)).weight is conv.weight
            True
        """
        gated = cls.__new__(cls)
        gated._init_from(conv, rates, gates, norm)
        share_parametrizations(conv, gated)
        return gated

    def _init_from(self, conv: nn.Conv2d, rates: Sequence[int], gates: Gates, norm: bool) -> None:
        reason = reason_not_gateable(conv)
        if reason:
            raise ValueError(f"the convolution cannot be gated: {reason}")
        if gates not in get_args(Gates):
            raise ValueError(f"gates must be {' or '.join(get_args(Gates))}, got {gates!r}")
        rates = tuple(rates)
        whole = all(isinstance(rate, int) and rate >= 1 for rate in rates)
        if not whole or len(set(rates)) != len(rates) or len(rates) < 2:
            raise ValueError(f"rates must be two or more different whole numbers of at least 1, got {list(rates)}")
        super().__init__()
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        self.stride = (conv.stride[0], conv.stride[1])
        self.groups = conv.groups
        self.rates = rates
        self.gates: Gates = gates
        self.weight: Tensor
        self.bias: Tensor | None
        for name in ("weight", "bias"):
            if name in conv._parameters:
                self.register_parameter(name, conv._parameters[name])
        self.gate = _gate(conv.in_channels, len(rates), self.stride, gates)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity() for _ in rates)
        self.register_buffer("mean_gates", torch.full((len(rates),), 1 / len(rates)))
        parameter = next(conv.parameters())
        self.to(parameter.device, parameter.dtype)
        self.train(conv.training)

    @property
    def dilation(self) -> tuple[int, int]:
        """The largest rate as (height, width): the one that bounds the receptive field."""
        return max(self.rates), max(self.rates)

    @property
    def padding(self) -> tuple[int, int]:
        """The padding (height, width) at the largest rate."""
        return self.padding_at(max(self.rates))

    def padding_at(self, rate: int) -> tuple[int, int]:
        """Return the padding (height, width) at a rate."""
        return rate * (self.kernel_size[0] // 2), rate * (self.kernel_size[1] // 2)

    @property
    def one_hot(self) -> int | None:
        """The place of the rate whose mean gate over the last training batches is at least 0.99, or None.

        Gates lie between 0 and 1. So a mean of 0.99 bounds what all other rates contribute: their gates are 0.01 on
        average.
        """
        place = int(self.mean_gates.argmax())
        return place if float(self.mean_gates[place]) >= ONE_HOT else None

    def forward(self, input: Tensor) -> Tensor:
        """Map Tensor[N, C, h, w] to Tensor[N, K, H, W], with H = ceil(h / stride)."""
        gates = self.gate(input)
        if self.training:
            self._record(gates)
        output: Tensor | None = None
        for place, (rate, norm) in enumerate(zip(self.rates, self.norms, strict=True)):
            at_rate = norm(F.conv2d(input, self.weight, None, self.stride, self.padding_at(rate), rate, self.groups))
            part = at_rate * gates[:, place : place + 1].to(at_rate.dtype)
            output = part if output is None else output + part
        assert output is not None
        # Once, since the gates of a pixel sum to 1.
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    @torch.no_grad()
    def _record(self, gates: Tensor) -> None:
        mean = gates.float().mean((0, 2, 3)).to(self.mean_gates.dtype)
        self.mean_gates.lerp_(mean, _MOMENTUM)

    @torch.no_grad()
    def folded(self, place: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of a plain convolution: one rate, with its batch norm, if any, in eval mode.

        They compute what the layer computes where that rate's gate is 1.
        """
        norm = self.norms[place]
        if not isinstance(norm, nn.BatchNorm2d):
            return self.weight, self.bias
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        return self.weight * scale[:, None, None, None], shift if self.bias is None else shift + self.bias

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"rates={self.rates}, gates={self.gates!r}"
        )


def reason_not_gateable(conv: nn.Module) -> str | None:
    """Return why a module cannot become a `GatedConv2d`, or None if it can.

    Beside what an `AdaptiveConv2d` needs, its padding must be dilation * (kernel - 1) / 2, so that kernels of all rates
    have the same centres.
    """
    reason = reason_not_adaptable(conv)
    if reason or not isinstance(conv, nn.Conv2d):
        return reason
    needed = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    padding = numeric_padding(conv)
    if padding != needed:
        return f"its padding is {format_size(padding)}, and not dilation * (kernel - 1) / 2 = {format_size(needed)}"
    return None


def _gate(channels: int, count: int, stride: tuple[int, int], gates: Gates) -> nn.Sequential:
    """Return the network that predicts gates; its last layer starts at zero, so that all gates start equal."""
    hidden = max(channels // 16, 32)  # as in Selective Kernel networks
    first = (
        (nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1))
        if gates == "image"
        else (nn.Conv2d(channels, hidden, 3, stride, padding=1),)
    )
    last = nn.Conv2d(hidden, count, 1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(*first, nn.ReLU(inplace=True), last, nn.Softmax(1))
