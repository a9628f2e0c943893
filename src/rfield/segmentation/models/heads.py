"""Heads: the layers after the backbone, from features to logits; their receptive field can be learned."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, fx, nn

from rfield.layers import AdaptiveConv2d, GatedConv2d, LearnedFactor, ReceptiveFieldRegulator
from rfield.layers.gated import DEFAULT_RATES, Gates

Mechanism = Literal["regulator", "dilation"]
Branch = Literal["1x1", "pool"]
"""A path without dilation: a 1x1 convolution, or image pooling (DeepLabv3; Chen et al., 2017)."""


@dataclass(frozen=True)
class HeadSpec:
    """A head in plain values, as checkpoints save it; `build_head` builds it.

    The defaults are those of DeepLab-LargeFOV (Chen et al., ICLR 2015).

    Raises:
        ValueError: a size is not a whole number of at least 1, or a value is outside its range.

    >>> HeadSpec(dilation=6, head_channels=256).paths
    1
    """

    dilation: int = 12
    """Of fc6, in feature px."""
    head_channels: int = 1024
    """Width of fc6 and fc7."""
    dropout: float = 0.5
    """Probability that an activation after fc6 and fc7 is dropped."""
    regulate: bool = True
    """Learn the receptive field; False gives plain DeepLab-LargeFOV."""
    mechanism: Mechanism = "regulator"
    """What realises a learned field: `regulator` wraps fc6 to fc8 in a `ReceptiveFieldRegulator`, `dilation` makes fc6
    an `AdaptiveConv2d`."""
    paths: int = 1
    """Number of parallel paths, each with a receptive field of its own; their logits are summed."""
    rates: tuple[int | Branch, ...] = ()
    """Fixed dilations of parallel paths, as in DeepLab's ASPP, or other branches; they replace `dilation`, `regulate`
    and `paths`. With `gates`, the rates that these mix. Default: 1, 2, 4, 8."""
    gates: Gates | None = None
    """Make fc6 a `GatedConv2d`, with gates for each image or each pixel."""
    extra_paths: tuple[Branch, ...] = ()
    """Further parallel paths beside the learned ones."""
    norm: bool | None = None
    """Batch norm at the start of each path. Default: for several learned paths, and with gates."""
    rectangular: bool = False
    """Learn one factor along the height and one along the width."""
    class_groups: tuple[tuple[int, ...], ...] | None = None
    """The classes that each path serves; None for paths without guidance."""
    gradient_weight: float = 1.0
    """The published guidance, see `MultiPathHead`; 1 turns it off."""

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "rates", tuple(self.rates) or (DEFAULT_RATES if self.gates else ()))
        object.__setattr__(self, "extra_paths", tuple(self.extra_paths))
        if self.class_groups is not None:
            object.__setattr__(self, "class_groups", tuple(tuple(sorted(group)) for group in self.class_groups))
        sizes = [(name, getattr(self, name)) for name in ("dilation", "head_channels", "paths")]
        rates = [rate for rate in self.rates if rate not in get_args(Branch)]
        for name, size in (*sizes, *(("rates", rate) for rate in rates)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if max(self.paths, len(self.rates)) > 255:
            raise ValueError(f"a head has 1 to 255 paths, got {max(self.paths, len(self.rates))}")
        if not {*self.extra_paths} <= {*get_args(Branch)}:
            raise ValueError(f"extra_paths hold {' or '.join(get_args(Branch))}, got {list(self.extra_paths)}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {self.dropout!r}")
        if self.mechanism not in get_args(Mechanism):
            raise ValueError(f"mechanism must be {' or '.join(get_args(Mechanism))}, got {self.mechanism!r}")
        if self.gates is not None and self.gates not in get_args(Gates):
            raise ValueError(f"gates must be {' or '.join(get_args(Gates))}, got {self.gates!r}")
        if self.gates and (self.paths > 1 or self.extra_paths):
            raise ValueError(f"gates need one path, got {self.paths + len(self.extra_paths)}")
        if self.class_groups is not None and len(self.class_groups) != self.paths:
            raise ValueError(f"{self.paths} paths need as many class groups, got {len(self.class_groups)}")

    @property
    def has_norm(self) -> bool:
        """Whether each path starts with a batch norm."""
        learned_paths = self.paths > 1 and not self.rates
        return (learned_paths or self.gates is not None) if self.norm is None else self.norm


class SinglePathHead(nn.Module):
    """DeepLab-LargeFOV's fc6, fc7 and fc8, with one learned receptive field around them (Wei et al., CVPR 2017).

    fc6 is a dilated 3x3 convolution, fc7 and fc8 are 1x1; ReLU and dropout stand between them. fc6 and fc7 start
    from torch's own initialisation, whose smaller weights learn better here than Kaiming's normal ones
    (docs/results.md), fc8 from a normal of standard deviation 0.01 as in DeepLab (Chen et al., ICLR 2015), all biases
    from 0, a learned factor from 1.

    Args:
        in_channels: channels C of the features.
        num_classes: classes K.
        spec: the sizes and what is learned; `paths` and the guidance, and without `gates` the rates, are those of
            `MultiPathHead`.
        branch: makes fc6 a 1x1 convolution, after image pooling for `pool`; nothing is learned then. Default: fc6 is
            dilated.

    Attributes:
        layers: fc6 to fc8, or the regulator around them (then `layers.module` holds them).

    Raises:
        ValueError: a number of channels or classes is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> head = SinglePathHead(32, num_classes=5, spec=HeadSpec(dilation=6, head_channels=16))
        >>> features = torch.randn(2, 32, 9, 5)
        >>> head(features).shape, head(features, output_size=(65, 33)).shape
        (torch.Size([2, 5, 9, 5]), torch.Size([2, 5, 65, 33]))
        >>> head.effective_dilation
        (6.0, 6.0)
    """

    def __init__(self, in_channels: int, num_classes: int, spec: HeadSpec, branch: Branch | None = None) -> None:
        super().__init__()
        for name, size in (("in_channels", in_channels), ("num_classes", num_classes)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.branch = branch
        self.dilation = 0 if branch else spec.dilation
        width = spec.head_channels
        fc6 = (
            nn.Conv2d(in_channels, width, 1)
            if branch
            else nn.Conv2d(in_channels, width, 3, padding=spec.dilation, dilation=spec.dilation)
        )
        layers = nn.Sequential(
            OrderedDict[str, nn.Module](
                fc6=fc6,
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(spec.dropout),
                fc7=nn.Conv2d(width, width, 1),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(spec.dropout),
                fc8=nn.Conv2d(width, num_classes, 1),
            )
        )
        for name, parameter in layers.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("fc8"):
                nn.init.normal_(parameter, std=0.01)
        factor = (1.0, 1.0) if spec.rectangular else 1.0
        self.norm: nn.Module = nn.BatchNorm2d(in_channels) if spec.has_norm else nn.Identity()
        self.layers: nn.Sequential | ReceptiveFieldRegulator = layers
        if branch:
            pass
        elif spec.gates:
            rates = [rate for rate in spec.rates if isinstance(rate, int)]
            # Batch norms after fc6 cost 5 points on nuclei, with gates and without (studies/gates).
            layers.fc6 = GatedConv2d.from_conv(fc6, rates, spec.gates, norm=False)
        elif spec.regulate and spec.mechanism == "regulator":
            self.layers = ReceptiveFieldRegulator(layers, factor)
        elif spec.regulate:
            layers.fc6 = AdaptiveConv2d.from_conv(fc6, factor)

    @property
    def factor_layer(self) -> LearnedFactor | None:
        """The layer whose receptive field is learned, or None."""
        return next((layer for layer in self.modules() if isinstance(layer, LearnedFactor)), None)

    @property
    def effective_dilation(self) -> tuple[float, float]:
        """The dilation d / f along height and width, in feature px; fc6's own if nothing is learned.

        The largest rate with gates.
        """
        layer = self.factor_layer
        return self._fixed_dilation() if layer is None else layer.effective_dilation

    @property
    def realised_dilation(self) -> tuple[float, float]:
        """The dilation of a forward pass now; a search may override the effective one."""
        layer = self.factor_layer
        return self._fixed_dilation() if layer is None else layer.realised_dilation

    def _fixed_dilation(self) -> tuple[float, float]:
        if self.branch:
            return 0.0, 0.0
        fc6 = self.layers.get_submodule("fc6")
        # The fixed resizes that `rfield.fuse` leaves; a cropped fc6 is no nn.Conv2d after it.
        height, width = (
            self.layers.meta.get("factor", (1.0, 1.0)) if isinstance(self.layers, fx.GraphModule) else (1, 1)
        )
        dilation: tuple[int, int] = fc6.meta["dilation"] if isinstance(fc6, fx.GraphModule) else fc6.dilation  # type: ignore[assignment]
        return dilation[0] / height, dilation[1] / width

    def chain(self) -> list[nn.Module]:
        """Return the modules in the order of execution."""
        return [self.norm, self.layers]

    def forward(self, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Map features to logits.

        Args:
            features: Tensor[N, C, h, w].
            output_size: height and width (H, W) of the logits; `None` keeps the feature grid (h, w). The corners
                of both grids coincide: logit p lies at feature p * (h - 1) / (H - 1).

        Returns:
            Tensor[N, K, H, W].
        """
        logits: Tensor
        features = self.norm(features)
        if self.branch == "pool":
            logits = self.layers(features.mean((2, 3), keepdim=True))
            return logits.expand(-1, -1, *(output_size or features.shape[2:]))
        if isinstance(self.layers, ReceptiveFieldRegulator):
            logits = self.layers(features, output_size=output_size)
            return logits
        if isinstance(self.layers, fx.GraphModule):  # The plain layers and resizes that `rfield.fuse` leaves.
            logits = self.layers(features, output_size or (0, 0))
            return logits
        logits = self.layers(features)
        if output_size is None:
            return logits
        return F.interpolate(logits, size=output_size, mode="bilinear", align_corners=True)
