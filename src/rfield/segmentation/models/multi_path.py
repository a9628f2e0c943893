"""Heads of several paths side by side, whose logits are summed."""

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor, nn

from rfield.layers import WeightedGradient
from rfield.segmentation.models.heads import Branch, HeadSpec, SinglePathHead


class MultiPathHead(nn.Module):
    """Parallel paths of the same structure, each with a receptive field of its own; their logits are summed.

    Every path is a batch norm and then fc6, fc7 and fc8 with a learned factor around them (Wei et al., CVPR 2017).
    With `spec.rates` it is atrous spatial pyramid pooling as in DeepLabv2 (ASPP-L; Chen et al., TPAMI 2018): fixed
    dilations that differ, and no batch norm. Further paths may be a 1x1 convolution or image pooling.

    The published guidance multiplies the gradient of a path's logits by `spec.gradient_weight` at pixels of the path's
    own classes (`WeightedGradient`); read docs/paths.md before you use it.

    Args:
        in_channels: channels C of the features.
        num_classes: classes K.
        spec: see `HeadSpec`.

    Attributes:
        paths: the `SinglePathHead`s.
        silent: indices of paths that add nothing and are not run, see `leave_out`.
        path_logits: with the published guidance, in training: root mean squares of the last forward's logits, those of
            each path and that of their sum; they show paths that drift apart.

    Raises:
        ValueError: there is only one path, or a class group is empty or holds other classes.

    Example:
        >>> spec = HeadSpec(dilation=4, head_channels=16, paths=2, class_groups=((1, 2), (3, 4)))
        >>> head = MultiPathHead(32, 5, spec)
        >>> head(torch.randn(2, 32, 9, 7), output_size=(65, 49)).shape
        torch.Size([2, 5, 65, 49])
    """

    def __init__(self, in_channels: int, num_classes: int, spec: HeadSpec) -> None:
        super().__init__()
        if (len(spec.rates) or spec.paths) + len(spec.extra_paths) == 1:
            raise ValueError("several paths are 2 to 255, got 1; one is a SinglePathHead")
        for group in spec.class_groups or ():
            if not group or not all(0 <= index < num_classes for index in group):
                raise ValueError(f"a class group holds classes from 0 to {num_classes - 1}, got {list(group)}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.class_groups = spec.class_groups
        branches: list[int | Branch] = [*(spec.rates or (spec.dilation,) * spec.paths), *spec.extra_paths]
        fixed = dataclasses.replace(spec, regulate=spec.regulate and not spec.rates)
        self.paths = nn.ModuleList(
            SinglePathHead(in_channels, num_classes, fixed, each)
            if isinstance(each, str)
            else SinglePathHead(in_channels, num_classes, dataclasses.replace(fixed, dilation=each))
            for each in branches
        )
        self.silent: frozenset[int] = frozenset()
        guided = spec.gradient_weight != 1.0 and not spec.rates
        self.guidance = nn.ModuleList(
            WeightedGradient(group, spec.gradient_weight) for group in (spec.class_groups or ()) if guided
        )
        self.path_logits: Tensor | None = None

    @property
    def effective_dilation(self) -> tuple[float, float]:
        """The largest dilation d / f of all paths along height and width, in feature px."""
        dilations = [path.effective_dilation for path in self.heads()]
        return max(height for height, _ in dilations), max(width for _, width in dilations)

    def heads(self) -> list[SinglePathHead]:
        """Return the paths, with their type."""
        return [path for path in self.paths if isinstance(path, SinglePathHead)]

    def branches(self) -> list[nn.Module]:
        """Return the modules that run side by side, but for image pooling, which has no receptive field of its own."""
        return [path for path in self.heads() if path.branch != "pool"]

    def _kernels(self) -> list[tuple[nn.Parameter, ...]]:
        """Return the weights and biases of all dilated paths that run, those of the same place together."""
        named = [
            [each for name, each in path.layers.named_parameters() if not name.endswith("log_factor")]
            for index, path in enumerate(self.heads())
            if index not in self.silent and not path.branch
        ]
        return list(zip(*named, strict=True))

    @torch.no_grad()
    def share_kernels(self) -> None:
        """Give all dilated paths the kernels of the first; `share_gradients` keeps them equal."""
        for first, *others in self._kernels():
            for other in others:
                other.copy_(first)

    def share_gradients(self) -> None:
        """Give the kernels of all dilated paths the sum of their gradients: they stay equal, as one kernel would.

        The optimizer's state must be equal too, as it is if it was shared from the first step on.
        """
        for own in self._kernels():
            gradients = [each.grad for each in own if each.grad is not None]
            if gradients:
                total = torch.stack(gradients).sum(0)
                for each in own:
                    each.grad = total.clone()

    @torch.no_grad()
    def leave_out(self, paths: Collection[int]) -> None:
        """Make paths add nothing: their last layer becomes zero, which a checkpoint saves too.

        Raises:
            ValueError: no path would be left, or there is no such path.
        """
        silent = self.silent | set(paths)
        if not silent < set(range(len(self.paths))):
            raise ValueError(f"at least one of the paths 0 to {len(self.paths) - 1} must stay, got {sorted(silent)}")
        for index in silent:
            for parameter in _last_layer(self.paths[index]).parameters():
                parameter.zero_()
        self.silent = silent

    def find_silent(self) -> None:
        """Set `silent` from the weights, as after a state dict was loaded."""
        layers = [_last_layer(path) for path in self.paths]
        self.silent = frozenset(
            index for index, layer in enumerate(layers) if not any(bool(each.any()) for each in layer.parameters())
        )

    def forward(
        self, features: Tensor, output_size: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map features to logits.

        Args:
            features: Tensor[N, C, h, w].
            output_size: height and width (H, W) of the logits, see `SinglePathHead.forward`.
            mask: labels, integer Tensor[N, H', W'], over the same area; for the published guidance in training.

        Returns:
            Tensor[N, K, H, W].
        """
        logits = [path(features, output_size) for index, path in enumerate(self.paths) if index not in self.silent]
        if self.guidance and self.training:
            with torch.no_grad():
                self.path_logits = torch.stack([part.float().square().mean().sqrt() for part in (*logits, sum(logits))])
            logits = [guide(part, mask) for guide, part in zip(self.guidance, logits, strict=True)]
        total: Tensor = sum(logits[1:], logits[0])
        return total


def _last_layer(path: nn.Module) -> nn.Module:
    layer: nn.Module = next(layer for name, layer in path.named_modules() if name.endswith("fc8"))
    return layer


def build_head(in_channels: int, num_classes: int, spec: HeadSpec) -> SinglePathHead | MultiPathHead:
    """Build the head that a spec describes.

    >>> build_head(32, 5, HeadSpec(head_channels=16, rates=(6, 12)))(torch.randn(1, 32, 9, 7)).shape
    torch.Size([1, 5, 9, 7])
    """
    several = (spec.rates and not spec.gates) or spec.extra_paths or spec.paths > 1
    kind = MultiPathHead if several else SinglePathHead
    return kind(in_channels, num_classes, spec)
