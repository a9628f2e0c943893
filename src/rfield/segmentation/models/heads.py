"""Heads: the layers after the backbone, from features to logits; their receptive field can be learned."""

from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, fx, nn

from rfield.layers import AdaptiveConv2d, LearnedFactor, ReceptiveFieldRegulator

Mechanism = Literal["regulator", "dilation"]


class SinglePathHead(nn.Module):
    """DeepLab-LargeFOV's fc6, fc7 and fc8, with one learned receptive field around them (Wei et al., CVPR 2017).

    fc6 is a dilated 3x3 convolution, fc7 and fc8 are 1x1; ReLU and dropout stand between them. fc6 and fc7 start
    from torch's own initialisation, whose smaller weights learn better here than Kaiming's normal ones
    (docs/results.md), fc8 from a normal of standard deviation 0.01 as in DeepLab (Chen et al., ICLR 2015), all biases
    from 0.

    Args:
        in_channels: channels C of the features.
        num_classes: classes K.
        dilation: of fc6, in feature px; its padding too, so that the map keeps its size.
        head_channels: width of fc6 and fc7.
        dropout: probability that an activation after fc6 and fc7 is dropped.
        regulate: learns the receptive field.
        mechanism: what realises it: `regulator` wraps fc6..fc8 in a `ReceptiveFieldRegulator`, `dilation` makes fc6 an
            `AdaptiveConv2d`; the factor starts at 1.
        rectangular: learn one factor along the height and one along the width.
        norm: batch norm before fc6, as each of several paths has it.

    Attributes:
        layers: fc6..fc8, or the regulator around them (then `layers.module` holds them).

    Raises:
        ValueError: a size that is not a whole number of at least 1, or a dropout outside [0, 1].

    Example:
        >>> import torch
        >>> head = SinglePathHead(32, num_classes=5, dilation=6, head_channels=16)
        >>> features = torch.randn(2, 32, 9, 5)
        >>> head(features).shape, head(features, output_size=(65, 33)).shape
        (torch.Size([2, 5, 9, 5]), torch.Size([2, 5, 65, 33]))
        >>> head.effective_dilation
        (6.0, 6.0)
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dilation: int,
        head_channels: int = 1024,
        dropout: float = 0.5,
        regulate: bool = True,
        mechanism: Mechanism = "regulator",
        rectangular: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "dilation": dilation,
            "head_channels": head_channels,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dilation = dilation
        fc6 = nn.Conv2d(in_channels, head_channels, 3, padding=dilation, dilation=dilation)
        layers = nn.Sequential(
            OrderedDict[str, nn.Module](
                fc6=fc6,
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(dropout),
                fc7=nn.Conv2d(head_channels, head_channels, 1),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(dropout),
                fc8=nn.Conv2d(head_channels, num_classes, 1),
            )
        )
        for name, parameter in layers.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("fc8"):
                nn.init.normal_(parameter, std=0.01)
        factor = (1.0, 1.0) if rectangular else 1.0
        self.norm: nn.Module = nn.BatchNorm2d(in_channels) if norm else nn.Identity()
        self.layers: nn.Sequential | ReceptiveFieldRegulator = layers
        if regulate and mechanism == "regulator":
            self.layers = ReceptiveFieldRegulator(layers, factor)
        elif regulate:
            layers.fc6 = AdaptiveConv2d.from_conv(fc6, factor)

    @property
    def factor_layer(self) -> LearnedFactor | None:
        """The layer whose receptive field is learned, if one is."""
        return next((layer for layer in self.modules() if isinstance(layer, LearnedFactor)), None)

    @property
    def effective_dilation(self) -> tuple[float, float]:
        """The dilation d / f along height and width, in feature px; fc6's own where nothing is learned."""
        layer = self.factor_layer
        return self._fixed_dilation() if layer is None else layer.effective_dilation

    @property
    def realised_dilation(self) -> tuple[float, float]:
        """The dilation that a forward runs at now, which a search may hold elsewhere."""
        layer = self.factor_layer
        return self._fixed_dilation() if layer is None else layer.realised_dilation

    def _fixed_dilation(self) -> tuple[float, float]:
        fc6 = self.layers.get_submodule("fc6")
        # Of the fixed resizes that `rfield.fuse` leaves; what it makes of a cropped fc6 is no nn.Conv2d.
        height, width = (
            self.layers.meta.get("factor", (1.0, 1.0)) if isinstance(self.layers, fx.GraphModule) else (1, 1)
        )
        dilation: tuple[int, int] = fc6.dilation  # type: ignore[assignment]
        return dilation[0] / height, dilation[1] / width

    def chain(self) -> list[nn.Module]:
        """The modules in their order of execution."""
        return [self.norm, self.layers]

    def forward(self, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Maps features to logits.

        Args:
            features: Tensor[N, C, h, w].
            output_size: height and width (H, W) of the logits; `None` keeps the feature grid (h, w). The corners
                of both grids coincide: logit p lies at feature p * (h - 1) / (H - 1).

        Returns:
            Tensor[N, K, H, W].
        """
        logits: Tensor
        features = self.norm(features)
        if isinstance(self.layers, ReceptiveFieldRegulator):
            logits = self.layers(features, output_size=output_size)
            return logits
        if isinstance(self.layers, fx.GraphModule):  # the plain layers and resizes that `rfield.fuse` leaves
            logits = self.layers(features, output_size or (0, 0))
            return logits
        logits = self.layers(features)
        if output_size is None:
            return logits
        return F.interpolate(logits, size=output_size, mode="bilinear", align_corners=True)
