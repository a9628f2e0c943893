"""Identity forward, weighted gradient backward, to train a path on its own classes (Wei et al., CVPR 2017)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class _ScaleGradient(torch.autograd.Function):
    # `setup_context` and this flag make it work under `torch.func`.
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, scale: Tensor) -> Tensor:
        return input.clone()  # autograd forbids changing a view in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad_outputs[0] * scale.to(grad_outputs[0].dtype), None


def weight_gradient(input: Tensor, mask: Tensor, classes: Collection[int], weight: float) -> Tensor:
    """Return a copy of the input whose gradient is multiplied by `weight` where the mask has one of the classes.

    Map pixel p has the label at `round(p * (H - 1) / (h - 1))` of the mask, along each axis. All other pixels keep
    their gradient, also those without a label (Wei et al., CVPR 2017, weighted gradient layer).

    Args:
        input: a path's logits, Tensor[N, K, h, w].
        mask: labels, integer Tensor[N, H, W], of the same image area as the map.
        classes: the path's classes.
        weight: finite and not negative.

    Returns:
        Tensor[N, K, h, w].

    Raises:
        ValueError: for a wrong rank, batch sizes that differ, or a weight that is negative or not finite.

    Example:
        >>> input = torch.zeros(1, 1, 1, 3, requires_grad=True)
        >>> weight_gradient(input, torch.tensor([[[0, 2, 255]]]), classes=[2], weight=5.0).sum().backward()
        >>> input.grad.flatten().tolist()
        [1.0, 5.0, 1.0]
    """
    if input.dim() != 4 or mask.dim() != 3 or len(input) != len(mask) or 0 in (*input.shape, *mask.shape):
        raise ValueError(
            f"expected logits (N, K, h, w) and a mask (N, H, W) of the same images, got {tuple(input.shape)} and "
            f"{tuple(mask.shape)}"
        )
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight must be finite and not negative, got {weight}")
    rows, columns = (
        (torch.arange(to, dtype=torch.float64, device=mask.device) * (of - 1) / max(1, to - 1)).round().long()
        for of, to in zip(mask.shape[1:], input.shape[2:], strict=True)
    )
    labels = mask[:, rows[:, None], columns]
    of_classes = torch.isin(labels, torch.tensor([*classes], device=labels.device))
    scale = torch.where(of_classes, weight, 1.0)[:, None]
    result: Tensor = _ScaleGradient.apply(input, scale)
    return result


class WeightedGradient(nn.Module):
    """`weight_gradient` with fixed classes and weight; the identity in eval mode and without a mask.

    Put it on a path's logits, after the interpolation and before the sum. If the logits of several paths are summed and
    their classes differ, the training has no stationary point: see docs/paths.md.

    Args:
        classes: the path's classes.
        weight: factor of the gradient at pixels of these classes; finite and not negative.

    Example:
        >>> layer = WeightedGradient([1, 2], weight=5.0)
        >>> layer(torch.ones(1, 3, 2, 2)).shape
        torch.Size([1, 3, 2, 2])
    """

    def __init__(self, classes: Collection[int], weight: float) -> None:
        super().__init__()
        self.classes = tuple(sorted(classes))
        self.weight = weight

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return a copy of the input, Tensor[N, K, h, w]; `mask`: labels, integer Tensor[N, H, W]."""
        if not self.training or mask is None:
            return input.clone()
        return weight_gradient(input, mask, self.classes, self.weight)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, weight={self.weight}"
