"""Guiding a path to its own classes: identity forward, a weighted gradient backward (Wei et al., CVPR 2017)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class _ScaleGradient(torch.autograd.Function):
    # Written for `torch.func`, too.
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, scale: Tensor) -> Tensor:
        return input.clone()  # A view could not be changed in place.

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad_outputs[0] * scale.to(grad_outputs[0].dtype), None


def weight_gradient(input: Tensor, mask: Tensor, classes: Collection[int], weight: float) -> Tensor:
    """A copy of the input, whose gradient is multiplied by `weight` where the mask shows one of the classes.

    Map pixel p has the label at `round(p * (H - 1) / (h - 1))` of the mask, along each axis. All other pixels, void
    among them, keep their gradient (Wei et al., CVPR 2017, the weighted gradient layer).

    Args:
        input: a path's logits, Tensor[N, K, h, w].
        mask: labels, integer Tensor[N, H, W]; of the same image area as the map.
        classes: the path's class set.
        weight: finite and not negative.

    Raises:
        ValueError: for another rank, a batch size that differs, or a weight that is negative or not finite.

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
    own = torch.isin(labels, torch.tensor(sorted(classes), dtype=labels.dtype, device=labels.device))
    scale = torch.where(own, weight, 1.0)[:, None]
    result: Tensor = _ScaleGradient.apply(input, scale)
    return result


class WeightedGradient(nn.Module):
    """`weight_gradient` with a fixed class set and weight; the identity in eval mode and where no mask is given.

    It stands on a path's logits, after the interpolation and before the sum. Where the logits of several paths are
    summed and their class sets differ, there is no point at which all of them rest: see docs/paths.md.

    >>> layer = WeightedGradient([1, 2], weight=5.0)
    >>> layer(torch.ones(1, 3, 2, 2)).shape
    torch.Size([1, 3, 2, 2])
    """

    def __init__(self, classes: Collection[int], weight: float) -> None:
        super().__init__()
        self.classes = tuple(sorted(classes))
        self.weight = weight

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps Tensor[N, K, h, w] to a copy of it; `mask`: labels, integer Tensor[N, H, W]."""
        if not self.training or mask is None:
            return input.clone()
        return weight_gradient(input, mask, self.classes, self.weight)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, weight={self.weight}"
