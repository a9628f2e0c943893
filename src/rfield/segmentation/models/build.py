"""The networks by name: which backbone each has, its defaults, and who loads its weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from rfield.layers import AdaptiveConv2d
from rfield.segmentation.models.backbones import (
    Backbone,
    largefov_vgg16_backbone,
    load_vgg16_weights,
    small_cnn_backbone,
)
from rfield.segmentation.models.decoder import output_layers
from rfield.segmentation.models.efficientnet import efficientnet_lite0_backbone, load_efficientnet_lite0_weights
from rfield.segmentation.models.heads import HeadSpec
from rfield.segmentation.models.multi_path import MultiPathHead, build_head
from rfield.segmentation.models.network import NetworkSpec, ParsingNetwork

Weights = str | Path
"""`imagenet`, downloaded if need be, or the path of a local .pth or .safetensors file."""


@dataclass(frozen=True)
class Model:
    """What `build_model` needs to know of a network."""

    backbone: Callable[[int], Backbone]
    """Makes the backbone of an output stride, with random weights."""
    output_strides: tuple[int, ...]
    """Input px between neighbouring features; the first is the default."""
    head: HeadSpec
    """The head's defaults."""
    load_weights: Callable[[ParsingNetwork, Weights], None] | None = None
    """Fills a network with published weights; None if nobody has published any."""


def build_model(
    model: str,
    num_classes: int,
    *,
    weights: Weights | None = None,
    output_stride: int | None = None,
    min_size: int | tuple[int, int] | None = None,
    decoder: bool = False,
    **head: Any,
) -> ParsingNetwork:
    """Build a network by its name.

    Args:
        model: a name of `MODELS`, or timm:NAME for any network of timm.
        num_classes: classes K.
        weights: None (random), `imagenet`, or the path of a local .pth or .safetensors file with the keys of the
            weights' publisher.
        output_stride: input px between neighbouring features; None for the model's default.
        min_size: least side in px, or (height, width), that images are padded to.
        decoder: sharper borders by a finer map of the backbone, see `Decoder`.
        head: fields of `HeadSpec` that differ from the model's defaults, such as `dilation=6`.

    Raises:
        FileNotFoundError: there is no such weights file, or the download failed.
        ValueError: there is no such model or output stride, the weights do not fit, a value is outside its range, or
            timm is missing.
        TypeError: `head` has a name that is no field of `HeadSpec`.

    Example:
        >>> import torch
        >>> build_model("small_cnn", 2, dilation=6)(torch.randn(1, 3, 20, 30)).shape
        torch.Size([1, 2, 20, 30])
    """
    found = find_model(model)
    stride = found.output_strides[0] if output_stride is None else output_stride
    spec = NetworkSpec(model, num_classes, replace(found.head, **head), stride, min_size, decoder)
    return build_from_spec(spec, weights)


def build_from_spec(spec: NetworkSpec, weights: Weights | None = None) -> ParsingNetwork:
    """Build the network that a spec describes; see `build_model` for `weights` and what is raised."""
    model = find_model(spec.model)
    if spec.output_stride not in model.output_strides:
        strides = " or ".join(map(str, sorted(model.output_strides)))
        advice = "; leave it out" if len(model.output_strides) == 1 else ""
        raise ValueError(f"{spec.model} has an output_stride of {strides}, got {spec.output_stride!r}{advice}")
    if weights is not None and model.load_weights is None:
        raise ValueError(f"{spec.model} has no pretrained weights, got weights={str(weights)!r}; leave them out")
    backbone = model.backbone(spec.output_stride)
    channels, decoder = output_layers(backbone, spec.num_classes, spec.decoder)
    head = build_head(backbone.out_channels, channels, spec.head)
    network = ParsingNetwork(backbone, head, spec.min_size, decoder, spec)
    if weights is not None and model.load_weights is not None:
        model.load_weights(network, weights)
    return network


def find_model(name: str) -> Model:
    """Return a model of `MODELS`, or for timm:NAME any network of timm.

    Raises:
        ValueError: there is no such model, or timm is missing.

    >>> find_model("small_cnn").head.dilation
    4
    """
    if name in MODELS:
        return MODELS[name]
    if not name.startswith("timm:"):
        raise ValueError(f"model {name!r} is not known; the known ones are {', '.join(MODELS)} and timm:NAME")
    try:
        from rfield.segmentation.models import timm_backbone as timm  # Local: the other models work without timm.
    except ImportError as error:
        raise ValueError(f"model {name} needs the package timm: pip install timm") from error

    def load(network: ParsingNetwork, weights: Weights) -> None:
        timm.load_timm_weights(cast(timm.TimmBackbone, network.backbone), weights)

    backbone = functools.partial(timm.timm_backbone, name.removeprefix("timm:"))
    return Model(backbone, (16, 8, 32), HeadSpec(dilation=6, head_channels=256, dropout=0.1), load)


def largefov_vgg16(num_classes: int, **options: Any) -> ParsingNetwork:
    """Build DeepLab-LargeFOV (Chen et al., ICLR 2015) with a learned receptive field (Wei et al., CVPR 2017).

    Its exact receptive field is 227 + 16 * dilation / factor px, the nominal one of the paper 212 + 16 * dilation
    / factor. A weights file with torchvision's fc layers fills fc6 and fc7 too.

    Args:
        num_classes: classes K.
        options: see `build_model`; by default fc6 has dilation 12 and 1024 channels, and dropout is 0.5.

    Example:
        >>> import torch
        >>> network = largefov_vgg16(21, dilation=2, head_channels=16)
        >>> network(torch.randn(1, 3, 40, 65)).shape
        torch.Size([1, 21, 40, 65])
    """
    return build_model("largefov_vgg16", num_classes, **options)


def small_cnn(num_classes: int, **options: Any) -> ParsingNetwork:
    """Build a network of six convolutions that trains from scratch in minutes on a CPU.

    Its receptive field is 15 + 8 * dilation / factor px, nearly all of it the head's.

    Args:
        num_classes: classes K.
        options: see `build_model`; by default fc6 has dilation 4 and 32 channels, and there is no dropout.
    """
    return build_model("small_cnn", num_classes, **options)


def efficientnet_lite0(num_classes: int, **options: Any) -> ParsingNetwork:
    """Build EfficientNet-Lite0 (Tan and Le, ICML 2019) up to its block 4, with a learned receptive field.

    Its receptive field is 339 + 2 * output_stride * dilation / factor px.

    Args:
        num_classes: classes K.
        options: see `build_model`; by default fc6 has dilation 3 and 256 channels, dropout is 0.1, and the output
            stride is 8; 16 is the other one.

    Example:
        >>> import torch
        >>> network = efficientnet_lite0(11, output_stride=16)
        >>> network(torch.randn(2, 3, 40, 65)).shape
        torch.Size([2, 11, 40, 65])
    """
    return build_model("efficientnet_lite0", num_classes, **options)


def _load_vgg16(network: ParsingNetwork, weights: Weights) -> None:
    for path in network.head.heads() if isinstance(network.head, MultiPathHead) else [network.head]:
        layers = {name.rpartition(".")[2]: layer for name, layer in path.named_modules()}
        fc6, fc7 = cast(nn.Conv2d | AdaptiveConv2d, layers["fc6"]), cast(nn.Conv2d, layers["fc7"])
        load_vgg16_weights(network.backbone, fc6, fc7, weights)


MODELS: dict[str, Model] = {
    "efficientnet_lite0": Model(
        efficientnet_lite0_backbone,
        (8, 16),
        HeadSpec(dilation=3, head_channels=256, dropout=0.1),
        lambda network, weights: load_efficientnet_lite0_weights(network.backbone, weights),
    ),
    "largefov_vgg16": Model(lambda stride: largefov_vgg16_backbone(), (8,), HeadSpec(), _load_vgg16),
    "small_cnn": Model(lambda stride: small_cnn_backbone(), (4,), HeadSpec(dilation=4, head_channels=32, dropout=0.0)),
}
"""The models by name: `--model NAME`."""
