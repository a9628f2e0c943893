"""Measure the effective receptive field: how much each pixel of an image contributes to the central output."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rfield.receptive_field.probe import copy_model, output_map
from rfield.text import format_size

Measure = Literal["luo", "replknet"]

_NO_GRADIENT = "no finite gradient reaches the images: there is no effective receptive field to measure"


def effective_receptive_field(model: nn.Module, images: Iterable[Tensor], measure: Measure = "luo") -> Tensor:
    """Return how much each pixel contributes to the central output, with the model's own weights and nonlinearities.

    The contribution is the gradient of the central output pixel, summed over channels, with respect to the image,
    averaged over images (Luo et al., *Understanding the Effective Receptive Field*, NeurIPS 2016). A copy of the model
    runs in eval mode.

    Args:
        model: maps Tensor[1, C, H, W] to an output that `rfield.receptive_field.probe.output_map` accepts.
        images: Tensor[N, C, H, W], or an iterable of Tensor[C, H, W] of one size. Luo et al. use random images:
            `torch.randn(20, 3, 257, 257)`.
        measure: `luo` adds the absolute values of the gradients. `replknet` adds only positive gradients of positive
            outputs, as the published script of Ding et al., *Scaling Up Your Kernels to 31x31*, CVPR 2022, does.

    Returns:
        Tensor[H, W], not negative, in units of the output.

    Raises:
        ValueError: if there are no images, their sizes differ, no gradient reaches them, or the output's channels
            always have the same sum, as after a softmax, so that their gradients cancel.

    Example:
        >>> mean = nn.AvgPool2d(3, stride=1)
        >>> effective_receptive_field(mean, torch.randn(1, 1, 5, 5))[1].mul(9)
        tensor([0., 1., 1., 1., 0.])
    """
    probe = copy_model(model).eval().requires_grad_(False)
    weight = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.tensor([]))
    total: Tensor | None = None
    count = 0
    for image in images:
        centre, leaf = _central(probe, image.to(weight))
        if not centre.requires_grad:
            raise ValueError(_NO_GRADIENT)
        # If the gradients cancel, only rounding errors remain: a tiny share in float32, and far less in float64.
        doubtful = measure == "luo" and count == 0 and _share_of_sum(centre, leaf) < 0.05
        if doubtful and _share_of_sum(*_central(copy_model(probe).double(), image.double().to(weight.device))) < 1e-6:
            raise ValueError(
                "the output's channels always have the same sum, as after a softmax, so that its gradient is rounding "
                "alone: measure what goes into the last layer"
            )
        value = (centre.relu() if measure == "replknet" else centre).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        scores = (grad.relu() if measure == "replknet" else grad.abs())[0].sum(0)
        if total is not None and total.shape != scores.shape:
            raise ValueError(
                f"images must have one size, got {format_size(total.shape)} and {format_size(scores.shape)} px"
            )
        total = scores if total is None else total + scores
        count += 1
    if total is None or not 0 < total.max() < torch.inf:
        raise ValueError(_NO_GRADIENT)
    return total / count


def _central(probe: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels of the central output pixel, Tensor[C], and the model's input, Tensor[1, C, H, W]."""
    leaf = image[None].requires_grad_()
    with torch.enable_grad():
        # A copy, because a model may change its input in place.
        output = output_map(probe(leaf.clone()))
        return output[0, :, output.shape[2] // 2, output.shape[3] // 2], leaf


def _share_of_sum(centre: Tensor, leaf: Tensor) -> float:
    """Return the largest gradient of the sum over channels, relative to that of a weighted sum; NaN if both are 0."""
    weights = torch.ones_like(centre)
    weights[::2] = 1.5
    plain, weighted = (
        torch.autograd.grad(centre, leaf, grad, retain_graph=True)[0].abs().max()
        for grad in (torch.ones_like(centre), weights)
    )
    return float(plain / weighted)


def random_images(size: tuple[int, int], count: int, channels: int = 3, seed: int = 0) -> Iterable[Tensor]:
    """Yield `count` images Tensor[channels, H, W] of standard normal noise; the seed determines them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(channels, *size, generator=generator)


@dataclasses.dataclass(frozen=True)
class Square:
    """The smallest square around the image's centre that contains a share of all contributions.

    Attributes:
        share: the share, above 0 and up to 1.
        side: in px, odd.
        area_ratio: share of the image's area that the square covers.
    """

    share: float
    side: int
    area_ratio: float


def contribution_squares(
    scores: Tensor,
    shares: Sequence[float] = (0.2, 0.3, 0.5, 0.99),
    compress: bool = False,
    centre: tuple[int, int] | None = None,
) -> list[Square]:
    """Return the squares around the centre that contain 20, 30, 50 and 99 % of the contributions.

    These are the thresholds t and the high-contribution area ratios r of Ding et al., CVPR 2022. A square is (2 i + 1)
    px wide around the centre's pixel, for the least i whose square contains the share. Where a square is larger
    than the image, only the part inside counts.

    Args:
        scores: Tensor[H, W] of `effective_receptive_field`.
        shares: each above 0 and up to 1.
        compress: use log10(1 + scores), as their published script does. The result then depends on the scale of the
            logits.
        centre: row and column of the squares' centre. Default: (H // 2, W // 2).

    Raises:
        ValueError: for scores that are negative, not finite or all 0, or a share out of range.

    Example:
        >>> scores = torch.zeros(9, 9)
        >>> scores[4, 4], scores[3:6, 3] = 6.0, 1.0
        >>> [(square.side, round(square.area_ratio, 3)) for square in contribution_squares(scores, (0.5, 0.99))]
        [(1, 0.012), (3, 0.111)]
    """
    if scores.dim() != 2 or not torch.isfinite(scores).all() or scores.min() < 0 or not scores.any():
        raise ValueError(
            f"scores must be Tensor[H, W] of numbers not below 0 and not all 0, got {format_size(scores.shape)}"
        )
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be above 0 and up to 1, got {tuple(shares)}")
    scores = scores.detach().double().cpu()
    height, width = scores.shape
    middle = (height // 2, width // 2) if centre is None else centre
    rows, columns = (torch.arange(side) - at for side, at in zip((height, width), middle, strict=True))
    rings = torch.maximum(rows.abs()[:, None], columns.abs())
    contributions = (scores + 1).log10() if compress else scores
    within = torch.bincount(rings.flatten(), contributions.flatten()).cumsum(0)
    squares = []
    for share in shares:
        # Rounding may make a sum slightly smaller than the share.
        half = int((within < share * within[-1] * (1 - 1e-12)).sum())
        covered = int((rows.abs() <= half).sum()) * int((columns.abs() <= half).sum())
        squares.append(Square(share, 2 * half + 1, covered / (height * width)))
    return squares
