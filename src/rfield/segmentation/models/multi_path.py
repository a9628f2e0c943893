"""Heads of several paths side by side, whose logits are summed."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rfield.layers import WeightedGradient
from rfield.segmentation.models.heads import Mechanism, SinglePathHead


class MultiPathHead(nn.Module):
    """Paths of the same structure and the same initial dilation, each with a receptive field of its own.

    Every path is a batch norm and then fc6, fc7 and fc8 with a learned factor around them; their logits are summed
    (Wei et al., CVPR 2017). DeepLab's atrous spatial pyramid is the same with fixed dilations that differ: `aspp_head`.

    Args:
        in_channels, num_classes, head_channels, dropout, regulate, mechanism, rectangular: see `SinglePathHead`.
        dilation: of every path's fc6, in feature px; or one a path.
        paths: how many.
        class_groups: the classes that each path serves, one collection a path; None for paths without guidance.
        gradient_weight: the published guidance: the gradient of a path's logits is multiplied by this at pixels of
            the path's own classes (`WeightedGradient`). 1 leaves it as it is. See docs/paths.md before you use it.
        fusion: how the paths' logits become one: `sum`.
        norm: batch norm at the start of each path.

    Attributes:
        paths: the `SinglePathHead`s.
        path_logits: with the published guidance, in training: root mean squares of the last forward's logits, those of
            each path and that of their sum; drifting paths show in them.

    Raises:
        ValueError: not 2 to 255 paths, class groups that do not fit them, or what `SinglePathHead` raises.

    Example:
        >>> head = MultiPathHead(32, 5, dilation=4, paths=2, head_channels=16, class_groups=[[1, 2], [3, 4]])
        >>> head(torch.randn(2, 32, 9, 7), output_size=(65, 49)).shape
        torch.Size([2, 5, 65, 49])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dilation: int | Sequence[int],
        paths: int = 2,
        head_channels: int = 1024,
        dropout: float = 0.5,
        regulate: bool = True,
        mechanism: Mechanism = "regulator",
        rectangular: bool = False,
        class_groups: Sequence[Collection[int]] | None = None,
        gradient_weight: float = 1.0,
        fusion: Literal["sum"] = "sum",
        norm: bool = True,
    ) -> None:
        super().__init__()
        if not 2 <= paths < 256:
            raise ValueError(f"several paths are 2 to 255, got {paths}; one is a SinglePathHead")
        dilations = [dilation] * paths if isinstance(dilation, int) else list(dilation)
        if len(dilations) != paths:
            raise ValueError(f"{paths} paths need one dilation or as many, got {dilations}")
        if fusion != "sum":
            raise ValueError(f"fusion must be 'sum', got {fusion!r}")
        if class_groups is not None and len(class_groups) != paths:
            raise ValueError(f"{paths} paths need as many class groups, got {len(class_groups)}")
        for group in class_groups or ():
            if not group or not all(0 <= index < num_classes for index in group):
                raise ValueError(f"a class group holds classes from 0 to {num_classes - 1}, got {sorted(group)}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.class_groups = None if class_groups is None else [tuple(sorted(group)) for group in class_groups]
        self.paths = nn.ModuleList(
            SinglePathHead(
                in_channels, num_classes, start, head_channels, dropout, regulate, mechanism, rectangular, norm
            )
            for start in dilations
        )
        guided = gradient_weight != 1.0 and self.class_groups is not None
        self.guidance = nn.ModuleList(
            WeightedGradient(group, gradient_weight) for group in (self.class_groups or ()) if guided
        )
        self.path_logits: Tensor | None = None

    @property
    def effective_dilation(self) -> tuple[float, float]:
        """The largest dilation d / f of any path along height and width, in feature px."""
        dilations = [path.effective_dilation for path in self.heads()]
        return max(height for height, _ in dilations), max(width for _, width in dilations)

    def heads(self) -> list[SinglePathHead]:
        """The paths, typed."""
        return [path for path in self.paths if isinstance(path, SinglePathHead)]

    def branches(self) -> list[nn.Module]:
        """The modules that run side by side, of which the output is the sum."""
        return list(self.paths)

    def forward(
        self, features: Tensor, output_size: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Maps features to logits.

        Args:
            features: Tensor[N, C, h, w].
            output_size: height and width (H, W) of the logits, see `SinglePathHead.forward`.
            mask: labels, integer Tensor[N, H', W'], of the whole map's area; for the published guidance in training.

        Returns:
            Tensor[N, K, H, W].
        """
        logits = [path(features, output_size) for path in self.paths]
        if self.guidance and self.training:
            with torch.no_grad():
                self.path_logits = torch.stack([part.float().square().mean().sqrt() for part in (*logits, sum(logits))])
            logits = [guide(part, mask) for guide, part in zip(self.guidance, logits, strict=True)]
        total: Tensor = sum(logits[1:], logits[0])
        return total


def aspp_head(
    in_channels: int,
    num_classes: int,
    rates: Sequence[int] = (6, 12, 18, 24),
    head_channels: int = 1024,
    dropout: float = 0.5,
) -> MultiPathHead:
    """Atrous spatial pyramid pooling as in DeepLabv2 (ASPP-L; Chen et al., TPAMI 2018): fixed rates, summed.

    >>> aspp_head(32, 5, head_channels=16)(torch.randn(1, 32, 9, 7)).shape
    torch.Size([1, 5, 9, 7])
    """
    return MultiPathHead(
        in_channels, num_classes, rates, len(rates), head_channels, dropout, regulate=False, norm=False
    )


@dataclasses.dataclass(frozen=True)
class Paths:
    """What head a network gets beside the plain one: several paths, fixed rates, a rectangular field."""

    count: int = 1
    """Paths side by side."""
    rates: tuple[int, ...] = ()
    """Fixed dilations of parallel paths, as in DeepLab's ASPP; none for learned ones."""
    rectangular: bool = False
    """One factor along the height and one along the width."""
    class_groups: tuple[tuple[int, ...], ...] | None = None
    """The classes that each path serves."""
    gradient_weight: float = 1.0
    """Of the published guidance, see `MultiPathHead`."""

    def head(
        self,
        in_channels: int,
        num_classes: int,
        dilation: int,
        head_channels: int,
        dropout: float,
        regulate: bool,
        mechanism: Mechanism,
    ) -> SinglePathHead | MultiPathHead:
        """The head itself; arguments as in `SinglePathHead`."""
        if self.rates:
            return aspp_head(in_channels, num_classes, self.rates, head_channels, dropout)
        sizes = (head_channels, dropout, regulate, mechanism, self.rectangular)
        if self.count == 1:
            return SinglePathHead(in_channels, num_classes, dilation, *sizes)
        return MultiPathHead(
            in_channels, num_classes, dilation, self.count, *sizes, self.class_groups, self.gradient_weight
        )


ONE_PATH = Paths()
