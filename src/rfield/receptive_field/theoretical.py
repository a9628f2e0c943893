"""The exact receptive field of a chain of layers, computed from kernels, dilations, strides and factors."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx, nn

from rfield.layers import AdaptiveConv2d, GatedConv2d, ReceptiveFieldRegulator
from rfield.layers.dilation import Pair, as_pair

_WINDOWED = (AdaptiveConv2d, GatedConv2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
# Layers of which `is_pointwise` is true.
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
    """Return whether a layer computes each pixel of Tensor[N, C, h, w] from the same pixel only, in eval mode.

    A softmax over channels does, one over the width does not, nor does a batch norm without running statistics.

    Example:
        >>> is_pointwise(nn.Softmax(dim=1)), is_pointwise(nn.Softmax(dim=-1)), is_pointwise(nn.Conv2d(3, 3, 1))
        (True, False, False)
    """
    if isinstance(layer, _OVER_CHANNELS):
        return layer.dim in (1, -3)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
        return False
    return isinstance(layer, _POINTWISE)


def theoretical_receptive_field(model: nn.Module) -> tuple[float, float]:
    """Return the exact receptive field of a chain of layers: (height, width), in input px.

    A kernel of k taps with dilation d adds (k - 1) * d * j px, where j is the product of all earlier strides. Inside a
    `ReceptiveFieldRegulator` of factor f it adds (k - 1) * d * j / f px (Wei et al., CVPR 2017). As in the paper, the
    one px that bilinear resizing adds on each side is not counted. A `GatedConv2d` counts at its largest rate, without
    the pooling that gates of an image read.

    Args:
        model: convolutions, pools, activations, batch norm (in eval mode), dropout, `nn.Upsample`, regulators and
            `nn.Sequential`s of these. Any other module needs one of: a method `chain() -> list[nn.Module]` that lists
            its parts in their order of execution, as the modules of `rfield.segmentation.models` have; a method
            `branches() -> list[nn.Module]` that lists its parallel parts; or the attributes `receptive_field`, (height,
            width) in px of its input, and `stride`.

    Raises:
        ValueError: if the receptive field of a module in the model is not known; the message names it.

    Example:
        >>> from torch import nn
        >>> theoretical_receptive_field(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d((3, 2))))
        (7.0, 5.0)
        >>> from rfield.segmentation.models import largefov_vgg16
        >>> theoretical_receptive_field(largefov_vgg16(21, dilation=12, head_channels=16))
        (419.0, 419.0)
    """
    names = {module: name for name, module in model.named_modules()}
    return _after(model, (1.0, 1.0), _MapField(), names).extent


@dataclasses.dataclass(frozen=True)
class _MapField:
    """The receptive field of a map's pixel and the distance between neighbours, as (height, width) in input px."""

    extent: Pair = (1.0, 1.0)
    jump: Pair = (1.0, 1.0)

    def after(self, steps: Sequence[float], stride: Sequence[float]) -> "_MapField":
        """Return the field after a layer whose kernel spans `steps` steps between px of its input map."""
        height, width = (e + n * j for e, n, j in zip(self.extent, steps, self.jump, strict=True))
        return _MapField((height, width), (self.jump[0] * stride[0], self.jump[1] * stride[1]))


def _after(module: nn.Module, factor: Pair, before: _MapField, names: Mapping[nn.Module, str]) -> _MapField:
    """Return the field after a module whose input map is inflated by a factor (height, width)."""
    if is_pointwise(module):
        return before
    if (parts := _parts(module)) is not None:
        inner, chain = parts
        for part in chain:
            before = _after(part, (factor[0] * inner[0], factor[1] * inner[1]), before, names)
        return before
    if (known := _known_field(module)) is not None:
        return before.after([(known[0][axis] - 1) / factor[axis] for axis in (0, 1)], (known[1], known[1]))
    if (branches := _listed(module, "branches")) is not None:
        ends = [_after(branch, factor, before, names) for branch in branches]
        if len({end.jump for end in ends}) != 1:
            raise ValueError(f"the branches of {type(module).__name__} give maps of several strides, or there are none")
        height, width = (max(end.extent[axis] for end in ends) for axis in (0, 1))
        return _MapField((height, width), ends[0].jump)
    if isinstance(module, fx.GraphModule) and "kernel_size" in module.meta:  # a GatedConv2d after `rfield.fuse`
        kernel, dilation, stride = (module.meta[name] for name in ("kernel_size", "dilation", "stride"))
        return before.after([(kernel[axis] - 1) * dilation[axis] / factor[axis] for axis in (0, 1)], stride)
    if not isinstance(module, _WINDOWED):
        position = repr(names[module]) if names.get(module) else "the top"
        raise ValueError(
            f"the receptive field of {type(module).__name__} (at {position}) is not known: "
            "give its layers in an nn.Sequential, or give it a method chain() that lists its modules in their "
            "order of execution, or branches() that lists those side by side; or measure it: probe_receptive_field"
        )
    dilation = as_pair(getattr(module, "dilation", 1))
    if isinstance(module, AdaptiveConv2d):
        dilation = module.realised_dilation
    kernel = as_pair(module.kernel_size)
    steps = [(kernel[axis] - 1) * dilation[axis] / factor[axis] for axis in (0, 1)]
    return before.after(steps, as_pair(module.stride or module.kernel_size))


def _parts(module: nn.Module) -> tuple[Pair, list[nn.Module]] | None:
    """Return the factor by which a module inflates its input map, and the modules that it then runs in a chain.

    None if the module is no such chain.
    """
    if isinstance(module, ReceptiveFieldRegulator):
        # A snapped regulator does not inflate; the dilations inside have changed instead.
        height, width = (
            1.0 if module.snapped else base / realised
            for base, realised in zip(module.base_dilation, module.realised_dilation, strict=True)
        )
        return (height, width), [module.module]
    if isinstance(module, fx.GraphModule) and "factor" in module.meta and type(module).__name__ == "Sequential":
        return module.meta["factor"], list(module.children())  # a regulated nn.Sequential after `rfield.fuse`
    # A subclass with its own forward may run its parts in any order.
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return (1.0, 1.0), list(module)
    chain = _listed(module, "chain") if getattr(module, "receptive_field", None) is None else None
    return None if chain is None else ((1.0, 1.0), chain)


def _listed(module: nn.Module, method: str) -> list[nn.Module] | None:
    """Return the modules that a method of a module's class lists, or None; a submodule of that name is no method."""
    modules: list[nn.Module] | None = getattr(module, method)() if hasattr(type(module), method) else None
    return modules


def receptive_field_px(model: nn.Module) -> tuple[float, float]:
    """Return the receptive field that a training run records: (height, width), in input px.

    If the model's backbone has an attribute `nominal_receptive_field_px`, that number is used in place of the
    backbone's exact field. Then LargeFOV VGG16 has 212 + 16 * dilation / factor px, as in Wei et al., CVPR 2017, and
    squeeze-excite in a timm network does not make the field infinite. Otherwise it is `theoretical_receptive_field`.

    Raises:
        ValueError: if the receptive field of a module in the model is not known; the message names it.

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
    """Stand for a backbone with a nominal receptive field."""

    def __init__(self, field: float, stride: int) -> None:
        super().__init__()
        self.receptive_field = (field, field)
        self.stride = stride


def _known_field(layer: nn.Module) -> tuple[tuple[float, float], float] | None:
    """Return the receptive field and the stride of a module that has them as attributes, or None."""
    if isinstance(layer, nn.Upsample) and isinstance(layer.scale_factor, (int, float)):
        return (1.0, 1.0), 1 / layer.scale_factor
    field = getattr(layer, "receptive_field", None)
    return None if field is None else (field, float(layer.stride))  # type: ignore[arg-type]
