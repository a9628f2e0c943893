"""Losses of the same images at several dilations: paired differences and their standard errors."""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

Losses = Mapping[float, Sequence[float]]
"""One evaluation of a curve: {dilation: its losses, one per held-out image}, for the same images at every dilation."""


class Evaluation:
    """The losses of one evaluation of a curve, on the same images at every dilation.

    Attributes:
        losses: {dilation: Tensor[images]}, in ascending order of the dilation.
        count: number of images.
        finite: the dilations at which all losses are finite.
        ends: the least and the greatest dilation.

    Raises:
        ValueError: for dilations that are not positive and finite, or a number of images that differs or is 0.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses = {float(d): torch.tensor([*each], dtype=torch.float64) for d, each in sorted(losses.items())}
        if not all(0 < dilation < math.inf for dilation in self.losses):
            raise ValueError(f"dilations must be above 0 and finite, got {[*self.losses]}")
        counts = {len(each) for each in self.losses.values()}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(f"an evaluation has the same images at every dilation, one or more, got {sorted(counts)}")
        self.count = counts.pop()
        self.finite = [dilation for dilation, each in self.losses.items() if bool(each.isfinite().all())]
        self.ends = min(self.losses), max(self.losses)

    def at(self, dilation: float) -> Tensor:
        """Return each image's loss at a dilation, Tensor[images].

        Between the dilations evaluated it is linear in the dilation's logarithm, and beyond the ends it is constant.
        """
        if dilation in self.losses:
            return self.losses[dilation]
        below = max((d for d in self.finite if d <= dilation), default=self.finite[0])
        above = min((d for d in self.finite if d >= dilation), default=self.finite[-1])
        if below == above:
            return self.losses[below]
        share = math.log(dilation / below) / math.log(above / below)
        return self.losses[below].lerp(self.losses[above], share)


def common_grid(evaluations: Sequence[Evaluation]) -> list[float]:
    """Return all dilations of the evaluations, except those at which any of them has a loss that is not finite."""
    if not all(each.finite for each in evaluations):
        return []
    bad = {dilation for each in evaluations for dilation in each.losses if dilation not in each.finite}
    return sorted({dilation for each in evaluations for dilation in each.finite} - bad)


def last_covering(evaluations: Sequence[Evaluation], *dilations: float) -> Evaluation:
    """Return the last evaluation whose range contains the dilations, or the widest one if there is none."""
    for each in reversed(evaluations):
        if each.finite and each.ends[0] <= min(dilations) and max(dilations) <= each.ends[1]:
            return each
    return max((each for each in evaluations if each.finite), key=lambda each: each.ends[1] / each.ends[0])


def mean_loss(columns: Sequence[Tensor]) -> float:
    """Return the mean over the searches of the mean over each search's images."""
    return sum(float(column.mean()) for column in columns) / len(columns)


def difference(
    evaluations: Sequence[Evaluation], one: float, other: float, images: Sequence[Sequence[Hashable]] | None = None
) -> tuple[float, float]:
    """Return how much higher the loss at dilation `one` is than that at `other`, and the standard error of this.

    Args:
        evaluations: one per search.
        one, other: the dilations to compare.
        images: as in `judge`.

    Returns:
        (mean, error): the error is the larger of that over the images and that over the searches; infinite for a single
        image.
    """
    columns = [each.at(one) - each.at(other) for each in evaluations]
    mean = mean_loss(columns)
    # An image that several searches share counts once, with the sum of its deviations.
    deviations: dict[Hashable, float] = {}
    for search, column in enumerate(columns):
        names = images[search] if images else [(search, index) for index in range(len(column))]
        shares = ((column - column.mean()) / len(column) / len(columns)).tolist()
        for name, share in zip(names, shares, strict=True):
            deviations[name] = deviations.get(name, 0.0) + share
    count = len(deviations)
    if count < 2:
        return mean, math.inf
    error = math.sqrt(count / (count - 1) * sum(deviation**2 for deviation in deviations.values()))
    if len(columns) > 1:
        means = torch.stack([column.mean() for column in columns])
        error = max(error, float(means.std()) / math.sqrt(len(means)))
    return mean, error


def standard_errors(
    readings: Sequence[Losses], images: Sequence[Sequence[Hashable]] | None = None
) -> dict[float, float]:
    """Return for each dilation the standard error of its difference to the least loss of the mean curve.

    Args:
        readings: for each search {dilation: its losses, one per image}.
        images: as in `judge`.

    Returns:
        {dilation: error}: 0 at the least loss; NaN where a loss is not finite, and everywhere for a single image.

    Raises:
        ValueError: as `judge` does.

    Example:
        >>> standard_errors([{1.0: [1.0, 3.0], 2.0: [0.0, 1.0]}])
        {1.0: 0.5, 2.0: 0.0}
    """
    evaluations = [Evaluation(losses) for losses in readings]
    dilations = sorted({dilation for each in evaluations for dilation in each.losses})
    grid = common_grid(evaluations)
    if not grid:
        return dict.fromkeys(dilations, math.nan)
    best = min(grid, key=lambda dilation: mean_loss([each.at(dilation) for each in evaluations]))
    errors = {dilation: difference(evaluations, dilation, best, images)[1] for dilation in dilations}
    return {dilation: error if math.isfinite(error) else math.nan for dilation, error in errors.items()}


def class_share_loss(counts: Tensor, class_weights: Tensor | None = None) -> float:
    """Return the least cross-entropy of a prediction that ignores the image: always the classes' weighted shares.

    Args:
        counts: number of labelled pixels of each class in each image, Tensor[N, K]; images without labels are left out.
        class_weights: weight of each class, Tensor[K]. Default: all 1.

    Returns:
        The mean over the images of the weighted sum over an image's pixels, divided by their number.

    Raises:
        ValueError: if no pixel has a label.

    Example:
        >>> round(class_share_loss(torch.tensor([[1, 0], [0, 1]])), 4)  # log 2
        0.6931
    """
    counts = counts.double().cpu()
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        raise ValueError("no pixel has a label, so that the classes have no shares: give counts of labelled pixels")
    shares = (counts / counts.sum(1, keepdim=True)).mean(0)
    if class_weights is not None:
        shares = shares * class_weights.double().cpu()
    return float(torch.xlogy(shares, shares.sum() / shares).sum())  # not -xlogy(x, x), which is -0 for one class
