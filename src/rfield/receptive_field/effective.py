"""How much each pixel of an image counts for the central output: the effective receptive field."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rfield.receptive_field.theoretical import copied, output_map

Measure = Literal["luo", "replknet"]

_NOTHING = "no finite gradient reaches the images: there is no effective receptive field to measure"


def effective_receptive_field(model: nn.Module, images: Iterable[Tensor], measure: Measure = "luo") -> Tensor:
    """How much each pixel counts for the output in the middle, with the model's own weights and nonlinearities.

    The gradient of the central output pixel, summed over channels, with respect to the image, averaged over images
    (Luo et al., *Understanding the Effective Receptive Field*, NeurIPS 2016). The model runs as a copy in eval mode.

    Args:
        model: maps Tensor[1, C, H, W] to what `rfield.receptive_field.theoretical.output_map` understands.
        images: Tensor[N, C, H, W], or any number of Tensor[C, H, W] of one size. Luo et al. take random ones:
            `torch.randn(20, 3, 257, 257)`.
        measure: `luo` adds up the gradients' absolute values. `replknet` adds up positive gradients of positive outputs
            alone, as the published script of Ding et al., *Scaling Up Your Kernels to 31x31*, CVPR 2022, does.

    Returns:
        Tensor[H, W], not below 0, in units of the output.

    Raises:
        ValueError: no images, images of two sizes, no gradient that reaches them, or channels that always have the same
            sum, as after a softmax: their gradients cancel each other but for rounding.

    Example:
        >>> mean = nn.AvgPool2d(3, stride=1)
        >>> effective_receptive_field(mean, torch.randn(1, 1, 5, 5))[1].mul(9)
        tensor([0., 1., 1., 1., 0.])
    """
    probe = copied(model).eval().requires_grad_(False)
    weight = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.tensor([]))
    total: Tensor | None = None
    count = 0
    for image in images:
        centre, leaf = _central(probe, image.to(weight))
        if not centre.requires_grad:
            raise ValueError(_NOTHING)
        # Rounding is a small share; where one image leaves doubt, twice the precision decides.
        doubtful = measure == "luo" and count == 0 and _share_of_sum(centre, leaf) < 0.05
        if doubtful and _share_of_sum(*_central(copied(probe).double(), image.double().to(weight.device))) < 1e-6:
            raise ValueError(
                "the output's channels always have the same sum, as after a softmax, so that its gradient is rounding "
                "alone: measure what goes into the last layer"
            )
        value = (centre.relu() if measure == "replknet" else centre).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        scores = (grad.relu() if measure == "replknet" else grad.abs())[0].sum(0)
        if total is not None and total.shape != scores.shape:
            raise ValueError(f"images must have one size, got {_size(total)} and {_size(scores)} px")
        total = scores if total is None else total + scores
        count += 1
    if total is None or not 0 < total.max() < torch.inf:
        raise ValueError(_NOTHING)
    return total / count


def _central(probe: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of the central output pixel, Tensor[C], and the image of one, Tensor[1, C, H, W], before them."""
    leaf = image[None].requires_grad_()
    with torch.enable_grad():
        # Not the leaf itself: a model may change its input in place.
        output = output_map(probe(leaf.clone()))
        return output[0, :, output.shape[2] // 2, output.shape[3] // 2], leaf


def _share_of_sum(centre: Tensor, leaf: Tensor) -> float:
    """The gradient of the sum over channels, as a share of that of a sum whose weights differ."""
    weights = torch.ones_like(centre)
    weights[::2] = 1.5
    alike, other = (
        torch.autograd.grad(centre, leaf, grad, retain_graph=True)[0].abs().max()
        for grad in (torch.ones_like(centre), weights)
    )
    return float(alike / other)  # NaN if both are 0


def random_images(size: tuple[int, int], count: int, channels: int = 3, seed: int = 0) -> Iterable[Tensor]:
    """So many images Tensor[channels, H, W] of standard normal noise, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(channels, *size, generator=generator)


@dataclasses.dataclass(frozen=True)
class Square:
    """The smallest square around the image's centre that holds a share of all contributions."""

    share: float
    side: int
    """In px, odd."""
    area_ratio: float
    """The share of the image's area that it covers."""


def contribution_squares(
    scores: Tensor, shares: Sequence[float] = (0.2, 0.3, 0.5, 0.99), compress: bool = False
) -> list[Square]:
    """How large a square around the centre holds 20, 30, 50 and 99 % of the contributions.

    These are the thresholds t and the high-contribution area ratios r of Ding et al., CVPR 2022. A square is
    (2 i + 1) px wide around pixel (H // 2, W // 2), for the least i whose square holds the share; where it is larger
    than the image, what lies inside counts.

    Args:
        scores: Tensor[H, W] of `effective_receptive_field`.
        shares: above 0, up to 1.
        compress: take log10(1 + scores) first, as their published script does. The result depends then on the units
            of the output: it changes when the logits are scaled.

    Raises:
        ValueError: scores that are negative, not finite or all 0, or a share out of range.

    Example:
        >>> scores = torch.zeros(9, 9)
        >>> scores[4, 4], scores[3:6, 3] = 6.0, 1.0
        >>> [(square.side, round(square.area_ratio, 3)) for square in contribution_squares(scores, (0.5, 0.99))]
        [(1, 0.012), (3, 0.111)]
    """
    if scores.dim() != 2 or not torch.isfinite(scores).all() or scores.min() < 0 or not scores.any():
        raise ValueError(f"scores must be Tensor[H, W] of numbers not below 0 and not all 0, got {_size(scores)}")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be above 0 and up to 1, got {tuple(shares)}")
    scores = scores.detach().double().cpu()
    height, width = scores.shape
    rows, columns = (torch.arange(side) - side // 2 for side in (height, width))
    rings = torch.maximum(rows.abs()[:, None], columns.abs())
    held = torch.bincount(rings.flatten(), (scores + 1).log10().flatten() if compress else scores.flatten()).cumsum(0)
    squares = []
    for share in shares:
        # Rounding may leave a sum a little below the share.
        half = int((held < share * held[-1] * (1 - 1e-12)).sum())
        covered = int((rows.abs() <= half).sum()) * int((columns.abs() <= half).sum())
        squares.append(Square(share, 2 * half + 1, covered / (height * width)))
    return squares


def _size(scores: Tensor) -> str:
    return "x".join(map(str, scores.shape))
