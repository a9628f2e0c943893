"""A convolution with a learned dilation, which replaces a dilated `nn.Conv2d`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rfield.layers.dilation import numeric_padding, remove_rounding_error_tensor
from rfield.layers.factor import LearnedFactor
from rfield.ops import fractional_conv2d
from rfield.text import format_size


class AdaptiveConv2d(LearnedFactor):
    """A convolution at the dilation `d / factor`, which may be any positive number, and different along each axis.

    At an integer dilation that needs no gradient it runs the plain convolution. Between integers its taps sample the
    input bilinearly. The padding follows the dilation, so that output size and kernel centres are those of the
    convolution at dilation d. Weight and bias have the state-dict keys of `nn.Conv2d`, and a state dict without a
    factor can be loaded, too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.Conv2d`, for odd
            kernels and zero padding.
        factor: start value: a number, or (height, width) for rectangular receptive fields.
        min_factor: lower bound. Default: the factor at which `effective_dilation` equals the map's size.
        max_factor: upper bound. Default: the factor at which `effective_dilation` is 1.

    Raises:
        ValueError: for an even kernel, or factors or bounds that are not positive and finite; in `forward` for an input
            that is not a map (N, C, h, w) or is empty.

    Example:
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
        """Return an adaptive convolution that computes the same as `conv` and shares its weight and bias.

        It also takes over the parametrizations of `conv`, such as a weight norm.

        Args:
            conv: the convolution to replace.
            factor, min_factor, max_factor: see the class.

        Raises:
            ValueError: if `conv` has something that an AdaptiveConv2d would lose: a forward of its own, an even kernel,
                a padding other than zeros, a weight without a shape, hooks, parameters or buffers beside weight and
                bias.

        Example:
            >>> conv = nn.Conv2d(8, 16, 3, padding=6, dilation=6)
            >>> AdaptiveConv2d.from_conv(conv).weight is conv.weight
            True
        """
        adaptive = cls.__new__(cls)
        adaptive._init_from(conv, factor, min_factor, max_factor)
        share_parametrizations(conv, adaptive)
        return adaptive

    def _init_from(
        self, conv: nn.Conv2d, factor: float | Sequence[float], min_factor: float | None, max_factor: float | None
    ) -> None:
        reason = reason_not_adaptable(conv)
        if reason:
            raise ValueError(f"the convolution cannot be adapted: {reason}")
        dilation = (conv.dilation[0], conv.dilation[1])
        super().__init__((float(dilation[0]), float(dilation[1])), factor, min_factor, max_factor)
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        self.stride = (conv.stride[0], conv.stride[1])
        self.padding = numeric_padding(conv)
        self.dilation = dilation
        self.groups = conv.groups
        # Only those that are parameters: reading a parametrized one would run its parametrization.
        self.weight: Tensor
        self.bias: Tensor | None
        for name in ("weight", "bias"):
            if name in conv._parameters:
                self.register_parameter(name, conv._parameters[name])
        self._move_factor(next(conv.parameters()).device)
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map Tensor[N, C, h, w] to Tensor[N, K, H, W], of the size that the convolution at dilation d returns."""
        self._record_map_size(input)
        return fractional_conv2d(
            input,
            self.weight,
            self.bias,
            self._current_dilation(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _current_dilation(self) -> Tensor:
        """Return the dilation to run at, Tensor[2], with a gradient while the factor is learned."""
        if self.dilation_override is not None:
            return self.log_factor.new_tensor(self.dilation_override)
        dilation = remove_rounding_error_tensor(self.log_factor.new_tensor(self.base_dilation) / self.log_factor.exp())
        if self.log_factor.requires_grad and torch.is_grad_enabled():
            if not self.snapped:
                return dilation
            dilation = dilation.detach()
        # `where` needs no synchronization with the GPU, which `if self.snapped` would.
        return torch.where(self.snapped_dilation > 0, self.snapped_dilation.to(dilation.dtype), dilation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}log_factor" not in state_dict:
            start = torch.tensor(self._start).log().expand_as(self.log_factor)
            no_value = self.log_factor.is_meta or self._uninitialized
            state_dict[f"{prefix}log_factor"] = start if no_value else self.log_factor.detach()
            if not self._uninitialized and self.snapped:
                state_dict[f"{prefix}snapped"] = self.snapped_dilation
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {super().extra_repr()}"
        )


def reason_not_adaptable(conv: nn.Module) -> str | None:
    """Return why a module cannot become an `AdaptiveConv2d` that computes the same, or None if it can."""
    kind = parametrize.type_before_parametrizations(conv)
    if not isinstance(conv, nn.Conv2d):
        return f"it is a {kind.__name__}, and not an nn.Conv2d"
    own = [method for method in ("forward", "_conv_forward") if getattr(kind, method) is not getattr(nn.Conv2d, method)]
    if own or {"forward", "_conv_forward"} & set(vars(conv)):
        return f"its class {kind.__name__} has a forward of its own, which an AdaptiveConv2d would not repeat"
    if conv.kernel_size[0] % 2 == 0 or conv.kernel_size[1] % 2 == 0:
        return f"its kernel {format_size(conv.kernel_size)} is even along an axis and has no centre"
    if conv.padding_mode != "zeros":
        return f"it pads with padding_mode={conv.padding_mode!r}, and not with zeros"
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin) and conv.has_uninitialized_params():
        return "its weight has no shape yet: run the model once"
    if has_hooks(conv):
        return "it has hooks (an old weight or spectral norm, or pruning), which would be lost"
    beside = {*conv._parameters, *conv._buffers, *conv._modules} - {"weight", "bias", "parametrizations"}
    if beside:
        return f"it holds {', '.join(sorted(beside))} beside weight and bias, which would be lost"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run in a module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def copy_state_hooks(source: nn.Module, target: nn.Module) -> None:
    """Copy the state-dict hooks of `source` to `target`; by one of them a weight norm reads its older keys."""
    for name in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        getattr(target, name).update(getattr(source, name))
    hooks: dict[int, Any] = source._load_state_dict_pre_hooks
    for hook in hooks.values():
        target._register_load_state_dict_pre_hook(hook.hook, hook.with_module)  # type: ignore[no-untyped-call]


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode; restore its modes and buffers when the block ends.

    Reading a parametrized weight runs the parametrization, which may change buffers, as a spectral norm in training
    does.
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in modes
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        with torch.no_grad():
            for part, name, buffer, value in buffers:
                part._buffers[name] = buffer.copy_(value)


def share_parametrizations(source: nn.Module, target: nn.Module) -> None:
    """Share the parametrizations of `source`, such as a weight norm, and its state-dict hooks with `target`."""
    copy_state_hooks(source, target)
    if not parametrize.is_parametrized(source):
        return
    target.eval()
    with preserve_state(source):
        parametrize.transfer_parametrizations_and_params(source, target)
    shared = set(source.modules())
    for part in target.modules():
        if part not in shared:
            part.training = source.training
