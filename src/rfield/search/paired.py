"""Losses that were read on the same images at several dilations: their differences and the errors of those."""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

Losses = Mapping[float, Sequence[float]]
"""One reading: {dilation: its losses, one a held-out image}; the images are the same at every dilation."""


class Reading:
    """The losses of one reading, and which of its dilations have finite ones."""

    def __init__(self, losses: Losses) -> None:
        self.losses = {float(d): torch.tensor([*each], dtype=torch.float64) for d, each in sorted(losses.items())}
        if not all(0 < dilation < math.inf for dilation in self.losses):
            raise ValueError(f"dilations must be above 0 and finite, got {[*self.losses]}")
        counts = {len(each) for each in self.losses.values()}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(f"a reading has the same images at every dilation, one or more, got {sorted(counts)}")
        self.count = counts.pop()
        self.finite = [dilation for dilation, each in self.losses.items() if bool(each.isfinite().all())]
        self.ends = min(self.losses), max(self.losses)

    def at(self, dilation: float) -> Tensor:
        """Each image's loss: linear in the logarithm of the dilation between those read, constant beyond the ends."""
        if dilation in self.losses:
            return self.losses[dilation]
        below = max((d for d in self.finite if d <= dilation), default=self.finite[0])
        above = min((d for d in self.finite if d >= dilation), default=self.finite[-1])
        if below == above:
            return self.losses[below]
        share = math.log(dilation / below) / math.log(above / below)
        return self.losses[below].lerp(self.losses[above], share)


def common_grid(readings: Sequence[Reading]) -> list[float]:
    """The dilations of any of the readings at which none has a loss that is not finite."""
    if not all(reading.finite for reading in readings):
        return []
    bad = {dilation for reading in readings for dilation in reading.losses if dilation not in reading.finite}
    return sorted({dilation for reading in readings for dilation in reading.finite} - bad)


def covering(readings: Sequence[Reading], *dilations: float) -> Reading:
    """The last reading whose range holds the dilations; the widest if none does."""
    for reading in reversed(readings):
        if reading.finite and reading.ends[0] <= min(dilations) and max(dilations) <= reading.ends[1]:
            return reading
    return max((r for r in readings if r.finite), key=lambda reading: reading.ends[1] / reading.ends[0])


def mean_loss(columns: Sequence[Tensor]) -> float:
    return sum(float(column.mean()) for column in columns) / len(columns)


def difference(
    readings: Sequence[Reading], one: float, other: float, images: Sequence[Sequence[Hashable]] | None = None
) -> tuple[float, float]:
    """By how much the loss at one dilation exceeds that at another, and the standard error of that."""
    columns = [reading.at(one) - reading.at(other) for reading in readings]
    mean = mean_loss(columns)
    moves: dict[Hashable, float] = {}
    for search, column in enumerate(columns):
        names = images[search] if images else [(search, place) for place in range(len(column))]
        for name, move in zip(names, ((column - column.mean()) / len(column) / len(columns)).tolist(), strict=True):
            moves[name] = moves.get(name, 0.0) + move
    if len(moves) < 2:
        return mean, math.inf
    error = math.sqrt(len(moves) / (len(moves) - 1) * sum(move**2 for move in moves.values()))
    if len(columns) > 1:
        means = torch.stack([column.mean() for column in columns])
        error = max(error, float(means.std()) / math.sqrt(len(means)))
    return mean, error


def standard_errors(
    readings: Sequence[Losses], images: Sequence[Sequence[Hashable]] | None = None
) -> dict[float, float]:
    """For each dilation the standard error of its difference to the least of the mean curve: 0 there.

    Args:
        readings: one of each search.
        images: as in `judge`.

    Returns:
        NaN where a loss is not finite, or for one image alone.

    >>> standard_errors([{1.0: [1.0, 3.0], 2.0: [0.0, 1.0]}])
    {1.0: 0.5, 2.0: 0.0}
    """
    read = [Reading(losses) for losses in readings]
    every = sorted({dilation for reading in read for dilation in reading.losses})
    grid = common_grid(read)
    if not grid:
        return dict.fromkeys(every, math.nan)
    best = min(grid, key=lambda dilation: mean_loss([reading.at(dilation) for reading in read]))
    errors = {dilation: difference(read, dilation, best, images)[1] for dilation in every}
    return {dilation: error if math.isfinite(error) else math.nan for dilation, error in errors.items()}


def class_share_loss(counts: Tensor, class_weights: Tensor | None = None) -> float:
    """The least cross-entropy of a prediction that does not look at the image: the classes' weighted shares.

    Args:
        counts: labelled pixels of each class in each image, Tensor[N, K]; images without any are left out.
        class_weights: how much each class counts, Tensor[K]. Default: all 1.

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
        raise ValueError("no pixel has a label, so that the classes have no shares")
    shares = (counts / counts.sum(1, keepdim=True)).mean(0)
    if class_weights is not None:
        shares = shares * class_weights.double().cpu()
    return float(-torch.xlogy(shares, shares / shares.sum()).sum())
