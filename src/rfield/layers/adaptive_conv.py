"""A convolution whose dilation is learned: the drop-in for a dilated `nn.Conv2d`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rfield.layers.factor import LearnedFactor, numeric_padding, remove_rounding_error_tensor
from rfield.ops import fractional_conv2d


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
        """The adaptive twin of a convolution; weight and bias are the very same parameters, and so is what makes them.

        A parametrization of the convolution, such as a weight norm, becomes one of the twin.

        Raises:
            ValueError: for what a twin would not repeat: another class's forward, an even kernel, a padding other than
                zeros, a weight without a shape, hooks, parameters or buffers beside weight and bias.

        >>> conv = nn.Conv2d(8, 16, 3, padding=6, dilation=6)
        >>> AdaptiveConv2d.from_conv(conv).weight is conv.weight
        True
        """
        adaptive = cls.__new__(cls)
        adaptive._init_from(conv, factor, min_factor, max_factor)
        carry_parametrizations(conv, adaptive)
        return adaptive

    def _init_from(
        self, conv: nn.Conv2d, factor: float | Sequence[float], min_factor: float | None, max_factor: float | None
    ) -> None:
        fault = why_not_adaptive(conv)
        if fault:
            raise ValueError(f"the convolution cannot be adapted: {fault}")
        dilation = (conv.dilation[0], conv.dilation[1])
        super().__init__((float(dilation[0]), float(dilation[1])), factor, min_factor, max_factor)
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        self.stride = (conv.stride[0], conv.stride[1])
        self.padding = numeric_padding(conv)
        self.dilation = dilation
        self.groups = conv.groups
        # Those that a parametrization makes are carried over with it: to read them runs it.
        self.weight: Tensor
        self.bias: Tensor | None
        for name in ("weight", "bias"):
            if name in conv._parameters:
                self.register_parameter(name, conv._parameters[name])
        self._move_factor(next(conv.parameters()).device)
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Maps Tensor[N, C, h, w] to Tensor[N, K, H, W], the size that the convolution at dilation d gives."""
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        self._record_map_size((input.shape[2], input.shape[3]))
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

    def _present_dilation(self) -> Tensor:
        if self.dilation_override is not None:
            return self.log_factor.new_tensor(self.dilation_override)
        dilation = remove_rounding_error_tensor(self.log_factor.new_tensor(self.base_dilation) / self.log_factor.exp())
        if self.log_factor.requires_grad and torch.is_grad_enabled():
            if not self.snapped:
                return dilation
            dilation = dilation.detach()
        # Without a question to the device.
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


def why_not_adaptive(conv: nn.Module) -> str | None:
    """Why a module has no adaptive twin that computes the same; None if it has one."""
    kind = parametrize.type_before_parametrizations(conv)
    if not isinstance(conv, nn.Conv2d):
        return f"it is a {kind.__name__}, and not an nn.Conv2d"
    own = [method for method in ("forward", "_conv_forward") if getattr(kind, method) is not getattr(nn.Conv2d, method)]
    if own or {"forward", "_conv_forward"} & set(vars(conv)):
        return f"its class {kind.__name__} has a forward of its own, which an AdaptiveConv2d would not repeat"
    if conv.kernel_size[0] % 2 == 0 or conv.kernel_size[1] % 2 == 0:
        return f"its kernel {conv.kernel_size[0]}x{conv.kernel_size[1]} is even along an axis and has no centre"
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
    """Whether something else runs when a module runs forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def carry_state_hooks(source: nn.Module, target: nn.Module) -> None:
    """Has what runs when `source` is saved or loaded run for `target`: a weight norm so reads its older keys."""
    for name in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        getattr(target, name).update(getattr(source, name))
    hooks: dict[int, Any] = source._load_state_dict_pre_hooks
    for hook in hooks.values():
        target._register_load_state_dict_pre_hook(hook.hook, hook.with_module)  # type: ignore[no-untyped-call]


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """While it runs, a module is in eval mode; its flags and buffers are afterwards what they were.

    To read a parametrised weight runs the parametrization, which may take a step: a spectral norm in training does.
    """
    flags = {part: part.training for part in module.modules()}
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in flags
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags.items():
            part.training = training
        with torch.no_grad():
            for part, name, buffer, value in buffers:
                part._buffers[name] = buffer.copy_(value)


def carry_parametrizations(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the parametrizations of `source`, such as a weight norm, with the very same parameters.

    What runs when `source` is saved or loaded goes with them.
    """
    carry_state_hooks(source, target)
    if not parametrize.is_parametrized(source):
        return
    target.eval()
    with unchanged(source):
        parametrize.transfer_parametrizations_and_params(source, target)
    carried = set(source.modules())
    for part in target.modules():
        if part not in carried:
            part.training = source.training
