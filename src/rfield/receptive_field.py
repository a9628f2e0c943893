"""How far one output pixel can see, in input pixels."""

from collections.abc import Iterator

from torch import nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator

_WINDOWED = (AdaptiveConv2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_POINTWISE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.BatchNorm2d,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
)


def theoretical_receptive_field(model: nn.Module) -> tuple[float, float]:
    """The exact receptive field of a chain of layers: height and width, in input px.

    A kernel of k taps, dilated by d, adds (k - 1) * d * j px, where j is the product of the strides before it.
    Inside a `ReceptiveFieldRegulator` of factor f one step covers 1 / f of the map, so that it adds
    (k - 1) * d * j / f px (Wei et al., CVPR 2017). The one sampled pixel that bilinear resizing adds to either side
    is not counted, as in the paper.

    Args:
        model: convolutions, pools, activations, batch norm (in eval mode), dropout, regulators and `nn.Sequential`s
            of them. Any other module must tell its order of execution by a method `chain() -> list[nn.Module]`, as
            the modules of `rfield.models` do.

    Raises:
        ValueError: the model holds a module whose receptive field is not known; names it.

    Example:
        >>> from torch import nn
        >>> theoretical_receptive_field(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d((3, 2))))
        (7.0, 5.0)
        >>> from rfield.models import largefov_vgg16
        >>> theoretical_receptive_field(largefov_vgg16(21, dilation=12, head_channels=16))
        (419.0, 419.0)
    """
    names = {module: name for name, module in model.named_modules()}
    extent, jump = [1.0, 1.0], [1.0, 1.0]
    for layer, factor in _steps(model, (1.0, 1.0)):
        if isinstance(layer, _POINTWISE):
            continue
        if not isinstance(layer, _WINDOWED):
            position = repr(names[layer]) if names.get(layer) else "the top"
            raise ValueError(
                f"The receptive field of {type(layer).__name__} (at {position}) is not known. "
                "Give its layers in an nn.Sequential, or give it a method chain() that lists its modules in their "
                "order of execution."
            )
        dilation: tuple[float, float] = _pair(getattr(layer, "dilation", 1))
        if isinstance(layer, AdaptiveConv2d):
            dilation = layer.realised_dilation
        for axis in (0, 1):
            taps = _pair(layer.kernel_size)[axis] - 1
            extent[axis] += taps * dilation[axis] * jump[axis] / factor[axis]
            jump[axis] *= _pair(layer.stride)[axis]
    return extent[0], extent[1]


def receptive_field_px(model: nn.Module) -> tuple[float, float]:
    """The receptive field that run files record: height and width, in input px.

    Where the model's backbone has a `nominal_receptive_field_px`, that figure stands for the backbone's exact one:
    212 + 16 * dilation / factor for LargeFOV VGG16, as in Wei et al., CVPR 2017. Elsewhere it is
    `theoretical_receptive_field`.

    Raises:
        ValueError: the model holds a module whose receptive field is not known; names it.

    Example:
        >>> from rfield.models import largefov_vgg16, small_cnn
        >>> receptive_field_px(largefov_vgg16(21, dilation=12, head_channels=16))
        (404.0, 404.0)
        >>> receptive_field_px(small_cnn(2, dilation=4))
        (47.0, 47.0)
    """
    height, width = theoretical_receptive_field(model)
    backbone = getattr(model, "backbone", None)
    nominal = getattr(backbone, "nominal_receptive_field_px", None)
    if not isinstance(backbone, nn.Module) or nominal is None:
        return height, width
    exact = theoretical_receptive_field(backbone)
    return height - exact[0] + nominal, width - exact[1] + nominal


def _steps(module: nn.Module, factor: tuple[float, float]) -> Iterator[tuple[nn.Module, tuple[float, float]]]:
    """The layers in their order of execution, each with the factor (height, width) by which its map is inflated."""
    if isinstance(module, ReceptiveFieldRegulator):
        # A snapped regulator has handed its factor to the dilations inside.
        height, width = (
            1.0 if module.snapped else base / realised
            for base, realised in zip(module.base_dilation, module.realised_dilation, strict=True)
        )
        yield from _steps(module.module, (factor[0] * height, factor[1] * width))
    elif isinstance(module, nn.Sequential):
        for child in module:
            yield from _steps(child, factor)
    elif callable(chain := getattr(module, "chain", None)):
        for child in chain():
            yield from _steps(child, factor)
    else:
        yield module, factor


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
