"""How far one output pixel can see, in input pixels: reckoned along a chain of layers, or probed by gradients."""

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointError

from rfield.layers import AdaptiveConv2d, LearnedFactor, ReceptiveFieldRegulator
from rfield.receptive_field.let_pass import LetPass

Pair = tuple[float, float]

_WINDOWED = (AdaptiveConv2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
# See `is_pointwise`.
_POINTWISE = (
    nn.Identity,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.ChannelShuffle,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.Softmax2d,
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_OVER_CHANNELS = (nn.GLU, nn.LogSoftmax, nn.Softmax, nn.Softmin)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer maps each pixel of Tensor[N, C, h, w] by itself, in eval mode.

    That holds for a softmax over channels, and not over the width; not for a batch norm without running statistics.

    >>> is_pointwise(nn.Softmax(dim=1)), is_pointwise(nn.Softmax(dim=-1)), is_pointwise(nn.Conv2d(3, 3, 1))
    (True, False, False)
    """
    if isinstance(layer, _OVER_CHANNELS):
        return layer.dim in (1, -3)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
        return False
    return isinstance(layer, _POINTWISE)


def theoretical_receptive_field(model: nn.Module) -> tuple[float, float]:
    """The exact receptive field of a chain of layers: height and width, in input px.

    A kernel of k taps, dilated by d, adds (k - 1) * d * j px, where j is the product of the strides before it.
    Inside a `ReceptiveFieldRegulator` of factor f one step covers 1 / f of the map, so that it adds
    (k - 1) * d * j / f px (Wei et al., CVPR 2017). The one sampled pixel that bilinear resizing adds to either side
    is not counted, as in the paper.

    Args:
        model: convolutions, pools, activations, batch norm (in eval mode), dropout, regulators and `nn.Sequential`s
            of them. Any other module must tell its order of execution by a method `chain() -> list[nn.Module]`, as
            the modules of `rfield.segmentation.models` do, or the modules side by side whose outputs it joins by a
            method `branches() -> list[nn.Module]`, or its own field by the attributes `receptive_field`, (height,
            width) in px of its input, and `stride`. An `nn.Upsample` makes the steps after it smaller.

    Raises:
        ValueError: the model holds a module whose receptive field is not known; names it.

    Example:
        >>> from torch import nn
        >>> theoretical_receptive_field(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d((3, 2))))
        (7.0, 5.0)
        >>> from rfield.segmentation.models import largefov_vgg16
        >>> theoretical_receptive_field(largefov_vgg16(21, dilation=12, head_channels=16))
        (419.0, 419.0)
    """
    names = {module: name for name, module in model.named_modules()}
    return _after(model, (1.0, 1.0), _Seen(), names).extent


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one pixel of a map sees, and px between its neighbours, as (height, width)."""

    extent: Pair = (1.0, 1.0)
    jump: Pair = (1.0, 1.0)

    def after(self, steps: Sequence[float], stride: Sequence[float]) -> "_Seen":
        """After a layer that sees so many steps more of its input map."""
        height, width = (e + n * j for e, n, j in zip(self.extent, steps, self.jump, strict=True))
        return _Seen((height, width), (self.jump[0] * stride[0], self.jump[1] * stride[1]))


def _after(module: nn.Module, factor: Pair, seen: _Seen, names: Mapping[nn.Module, str]) -> _Seen:
    """What is seen after a module on a map that is inflated by a factor (height, width)."""
    if is_pointwise(module):
        return seen
    if (parts := _parts(module)) is not None:
        inside, listed = parts
        for part in listed:
            seen = _after(part, (factor[0] * inside[0], factor[1] * inside[1]), seen, names)
        return seen
    if (known := _known_field(module)) is not None:
        return seen.after([(known[0][axis] - 1) / factor[axis] for axis in (0, 1)], (known[1], known[1]))
    if (branches := _told(module, "branches")) is not None:
        ends = [_after(branch, factor, seen, names) for branch in branches]
        if len({end.jump for end in ends}) != 1:
            raise ValueError(f"the branches of {type(module).__name__} give maps of several strides, or there are none")
        height, width = (max(end.extent[axis] for end in ends) for axis in (0, 1))
        return _Seen((height, width), ends[0].jump)
    if not isinstance(module, _WINDOWED):
        position = repr(names[module]) if names.get(module) else "the top"
        raise ValueError(
            f"the receptive field of {type(module).__name__} (at {position}) is not known: "
            "give its layers in an nn.Sequential, or give it a method chain() that lists its modules in their "
            "order of execution, or branches() that lists those side by side; or measure it: probe_receptive_field"
        )
    dilation: Pair = _pair(getattr(module, "dilation", 1))
    if isinstance(module, AdaptiveConv2d):
        dilation = module.realised_dilation
    kernel = _pair(module.kernel_size)
    steps = [(kernel[axis] - 1) * dilation[axis] / factor[axis] for axis in (0, 1)]
    return seen.after(steps, _pair(module.stride or module.kernel_size))


def _parts(module: nn.Module) -> tuple[Pair, list[nn.Module]] | None:
    """The modules that a module runs one after the other, and the factor by which it inflates their map."""
    if isinstance(module, ReceptiveFieldRegulator):
        # A snapped regulator has handed its factor to the dilations inside.
        height, width = (
            1.0 if module.snapped else base / realised
            for base, realised in zip(module.base_dilation, module.realised_dilation, strict=True)
        )
        return (height, width), [module.module]
    if isinstance(module, fx.GraphModule) and "factor" in module.meta and type(module).__name__ == "Sequential":
        return module.meta["factor"], list(module.children())  # what `rfield.fuse` leaves of a regulated sequence
    # A class of its own may run its parts in any way.
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return (1.0, 1.0), list(module)
    chain = _told(module, "chain") if getattr(module, "receptive_field", None) is None else None
    return None if chain is None else ((1.0, 1.0), chain)


def _told(module: nn.Module, method: str) -> list[nn.Module] | None:
    """What a method of a module's class tells; a part of that name is no method."""
    told: list[nn.Module] | None = getattr(module, method)() if hasattr(type(module), method) else None
    return told


def receptive_field_px(model: nn.Module) -> tuple[float, float]:
    """The receptive field that run files record: height and width, in input px.

    Where the model's backbone has a `nominal_receptive_field_px`, that figure stands for the backbone's exact one:
    212 + 16 * dilation / factor for LargeFOV VGG16, as in Wei et al., CVPR 2017; what a network of timm with
    squeeze-excite sees besides that. Elsewhere it is `theoretical_receptive_field`.

    Raises:
        ValueError: the model holds a module whose receptive field is not known; names it.

    Example:
        >>> from rfield.segmentation.models import largefov_vgg16, small_cnn
        >>> receptive_field_px(largefov_vgg16(21, dilation=12, head_channels=16))
        (404.0, 404.0)
        >>> receptive_field_px(small_cnn(2, dilation=4))
        (47.0, 47.0)
    """
    backbone = getattr(model, "backbone", None)
    nominal = getattr(backbone, "nominal_receptive_field_px", None)
    if backbone is None or nominal is None or not callable(chain := getattr(model, "chain", None)):
        return theoretical_receptive_field(model)
    layers = [_Nominal(nominal, layer.stride) if layer is backbone else layer for layer in chain()]
    return theoretical_receptive_field(nn.Sequential(*layers))


class _Nominal(nn.Module):
    """Stands for a backbone of which a figure is known."""

    def __init__(self, field: float, stride: int) -> None:
        super().__init__()
        self.receptive_field = (field, field)
        self.stride = stride


def _known_field(layer: nn.Module) -> tuple[tuple[float, float], float] | None:
    """The receptive field and the stride of a module that tells them."""
    if isinstance(layer, nn.Upsample) and isinstance(layer.scale_factor, (int, float)):
        return (1.0, 1.0), 1 / layer.scale_factor
    field = getattr(layer, "receptive_field", None)
    return None if field is None else (field, float(layer.stride))  # type: ignore[arg-type]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclasses.dataclass(frozen=True)
class Window:
    """What the output pixel in the middle sees of an image along one axis."""

    size: float
    """Its receptive field in px; infinite if it sees the whole image, however large."""
    local: float
    """The same without what looks at the whole image at once: global pooling, attention, group norm."""
    centre: float
    """The middle of what it sees, by weight, in px from the image's first; NaN if it sees nothing nearby."""
    position: int
    """Which output pixel it is, from 0."""
    count: int
    """Output pixels along the axis."""


NO_GRADIENT = (
    "no gradient reaches the image: the receptive field of this model cannot be probed (it may run under "
    "torch.no_grad(), or in another library)"
)
CHECKPOINTS = (
    "the model runs parts of its forward again in the backward pass, which a probe cannot follow: turn its gradient "
    "checkpointing off"
)
# px; the longest holds the fields of the deepest networks.
_LENGTHS = (257, 513, 1025, 2049, 4097)


def probe_receptive_field(model: nn.Module, channels: int = 3) -> tuple[float, float]:
    """Measures the receptive field of any module by the gradient of an output pixel: height and width, in input px.

    For modules that `theoretical_receptive_field` cannot reckon. Infinite where the output sees the whole image:
    global pooling, squeeze-excite, attention or a norm over the whole map is found, or it sees more than 4097 px.

    Args:
        model: maps Tensor[N, channels, H, W] to Tensor[N, C, h, w] for images of 65 x 257 px and more.
        channels: of the image.

    Raises:
        ValueError: no gradient reaches the image, or a layer reads places that depend on the image or on chance.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, (5, 3), stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> probe_receptive_field(layers)
        (7.0, 5.0)
        >>> probe_receptive_field(nn.Sequential(layers, nn.AdaptiveAvgPool2d(1)))
        (inf, inf)
    """
    return probe_window(model, 0, channels).size, probe_window(model, 1, channels).size


def probe_window(
    model: nn.Module, axis: int, channels: int = 3, thickness: int = 65, lengths: Sequence[int] = _LENGTHS
) -> Window:
    """Measures where the central output pixel looks along one axis.

    It runs a copy in float64 as `rfield.receptive_field.let_pass.LetPass` does, so that no gradient is lost where there
    is a path. The images are strips, as long as the field needs.

    Args:
        model: maps Tensor[N, channels, H, W] to Tensor[N, C, h, w].
        axis: 0 for the height, 1 for the width.
        channels: of the image.
        thickness: the strips' short side in px.
        lengths: their long sides in px, tried one after the other until one holds the field.

    Raises:
        ValueError: no gradient reaches the image, or a layer reads places that depend on the image or on chance.

    Example:
        >>> probe_window(nn.Conv2d(1, 1, 2, stride=2), axis=1, channels=1, lengths=[9])
        Window(size=2.0, local=2.0, centre=4.5, position=2, count=4)
    """
    probe = probe_copy(model)
    for length in lengths:
        shape = (length, thickness) if axis == 0 else (thickness, length)
        image = torch.ones(1, channels, *shape, dtype=torch.float64, requires_grad=True)
        with LetPass(axis) as mode, torch.enable_grad():
            output = output_map(probe(image)).movedim(2 + axis, 3)
        position = output.shape[3] // 2
        if output.requires_grad:
            try:
                output[0, :, output.shape[2] // 2, position].sum().backward()  # type: ignore[no-untyped-call]
            except CheckpointError as error:
                raise ValueError(CHECKPOINTS) from error
        weight = torch.zeros(length) if image.grad is None else image.grad[0].abs().sum((0, 2 - axis))
        local = extent(weight)
        if local == 0 and not mode.looks_everywhere:
            raise ValueError(NO_GRADIENT)
        if math.isfinite(local):
            break
    local = local or math.inf
    centre = float((weight * torch.arange(length)).sum() / weight.sum())
    return Window(math.inf if mode.looks_everywhere else local, local, centre, position, output.shape[3])


def extent(weight: Tensor) -> float:
    """How many px of Tensor[L] are seen, from the first to the last; infinite if one is at an end, 0 if there is none.

    >>> extent(torch.tensor([0.0, 0.5, 0.0, 0.1, 0.0])), extent(torch.tensor([0.0, 0.1])), extent(torch.zeros(3))
    (3.0, inf, 0.0)

    Raises:
        ValueError: a weight is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("the gradient at the image is not finite: the receptive field of this model cannot be probed")
    seen = weight.nonzero().flatten()
    if not len(seen):
        return 0.0
    return float(seen[-1] - seen[0] + 1) if seen[0] > 0 and seen[-1] < len(weight) - 1 else math.inf


def output_map(output: Any) -> Tensor:
    """The map that a model means by what it returns.

    Args:
        output: Tensor[N, C, h, w]; a dict or an output class that has it as `out` or `logits`, or as its first; a
            tuple of which it is the first; a list of features of which it is the last. Tensor[N, C] counts as a map of
            one pixel.

    Raises:
        ValueError: there is no such map.

    >>> output_map({"aux": None, "out": torch.zeros(1, 4, 2, 3)}).shape, output_map(torch.zeros(1, 4)).shape
    (torch.Size([1, 4, 2, 3]), torch.Size([1, 4, 1, 1]))
    """
    found = output
    while not isinstance(found, Tensor):
        if isinstance(found, Mapping) and found:
            found = found.get("out", found.get("logits", next(iter(found.values()))))
        elif isinstance(found, (tuple, list)) and found:
            found = found[0 if isinstance(found, tuple) else -1]
        elif isinstance(getattr(found, "logits", None), Tensor):
            found = found.logits
        else:
            raise ValueError(f"the model returns no map but a {type(output).__name__}: wrap it so that it returns one")
    if found.dim() == 2:
        found = found[..., None, None]
    if found.dim() != 4:
        raise ValueError(f"the model returns no map (N, C, h, w) but a tensor of shape {tuple(found.shape)}")
    return found


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that keeps computed weights, as torch's old weight norm does.

    Args:
        model: any.
        memo: what stands for which object, by its id, as in `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def probe_copy(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with kernels that average; they take no memory."""
    factors = {id(module.log_factor) for module in model.modules() if isinstance(module, LearnedFactor)}
    memo: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        if nn.parameter.is_lazy(weight):
            raise ValueError(f"the parameter {name} has no shape yet: run the model once")
        if id(weight) not in factors:
            inputs = max(1, weight[:1].numel()) if weight.dim() > 1 else 1
            value = torch.tensor(1 / inputs, dtype=torch.float64)
            memo[id(weight)] = nn.Parameter(value.expand(weight.shape), requires_grad=False)
    probe = copied(model, memo).double().eval().requires_grad_(False)
    for module in probe.modules():
        if isinstance(module, AdaptiveConv2d):
            more = [
                stride * math.ceil(dilation * (taps - 1) / 2 / stride)
                for dilation, taps, stride in zip(
                    module.realised_dilation, module.kernel_size, module.stride, strict=True
                )
            ]
            module.register_forward_pre_hook(functools.partial(_widen, more))
            module.register_forward_hook(functools.partial(_narrow, more))
    return probe


def _widen(more: Sequence[int], module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Repeats the outermost pixels as `_pad` does, for a layer that pads by itself."""
    return F.pad(inputs[0], [more[1], more[1], more[0], more[0]], mode="replicate")


def _narrow(more: Sequence[int], module: AdaptiveConv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    height, width = more[0] // module.stride[0], more[1] // module.stride[1]
    return output[:, :, height : output.shape[2] - height, width : output.shape[3] - width]
