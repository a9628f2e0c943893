"""Sets of dilations: paths side by side, whose dilations are chosen together."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.search.factors import gather_rows

ABSENT = None
Rate = tuple[float, ...] | None
"""A path's dilation, (height, width) or one number for both; None for a path that is left out."""
# Up to so many combinations are all scored; of more, those that coordinate descent from several starts meets.
_EXHAUSTIVE = 1500
_STARTS = 4
# Combinations are scored on so many pixels of all held-out images together.
PIXELS = 2**15


@dataclass(frozen=True)
class PathLogits:
    """What each of several paths says about the pixels of a batch.

    Attributes:
        logits: one Tensor[P, K] a path, P pixels of K classes, whose sum are the network's logits.
        target: labels, integer Tensor[P].
        weight: how much each pixel counts, Tensor[P].
    """

    logits: Sequence[Tensor]
    target: Tensor
    weight: Tensor


ReadPaths = Callable[[nn.Module, Any], PathLogits]
"""Runs a model's paths apart on a batch, at the dilations that they are held at."""


def parallel_factors(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> list[list[int]]:
    """Find the factors that lie side by side: in different members of one `nn.ModuleList`, and in no other list inside.

    Args:
        model: any module.
        groups: its learned layers, those that share a factor together.

    Returns:
        Indices into `groups`, set by set; factors that stand alone are in none.

    Example:
        >>> from rfield.layers import AdaptiveConv2d
        >>> from rfield.search import learned_layers
        >>> branches = nn.ModuleList(AdaptiveConv2d(1, 1, 3) for _ in range(3))
        >>> parallel_factors(branches, learned_layers(branches))
        [[0, 1, 2]]
    """
    member: dict[int, tuple[int, int]] = {}  # Of each module: the innermost list around it, and its place in that.
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for place, child in enumerate(module):
                member |= {id(part): (id(module), place) for part in child.modules()}
    sets: dict[int, dict[int, list[int]]] = {}
    for index, group in enumerate(groups):
        places = {member.get(id(layer)) for layer in group}
        if len(places) == 1 and (place := places.pop()) is not None:
            sets.setdefault(place[0], {}).setdefault(place[1], []).append(index)
    found = []
    for places_of_list in sets.values():
        factors = [indices[0] for indices in places_of_list.values() if len(indices) == 1]
        if len(factors) > 1:
            found.append(factors)
    return found


def shares(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Cut a range into adjacent shares that are equally wide in the logarithm, in order.

    >>> [(round(a, 2), round(b, 2)) for a, b in shares(1.0, 16.0, 4)]
    [(1.0, 2.0), (2.0, 4.0), (4.0, 8.0), (8.0, 16.0)]
    """
    ends = [low * (high / low) ** (place / count) for place in range(count + 1)]
    ends[-1] = high
    return list(itertools.pairwise(ends))


class Combinations:
    """The held-out losses of combinations of dilations, one a path, scored by adding the paths' logits.

    Args:
        candidates: the dilations of each path.
        logits: for each path and each of its candidates Tensor[P, K]: the pixels of all held-out images.
        target: Tensor[P].
        weight: Tensor[P].
        image: which image each pixel belongs to, Tensor[P], from 0 on.

    Attributes:
        losses: {combination: the loss of each image}, a place in the candidates for each path or None where the path
            is left out; of all that have been scored.
    """

    def __init__(
        self,
        candidates: Sequence[Sequence[Rate]],
        logits: Sequence[Sequence[Tensor]],
        target: Tensor,
        weight: Tensor,
        image: Tensor,
    ) -> None:
        self.candidates = candidates
        self._logits, self._target, self._weight, self._image = logits, target, weight, image
        self._count = torch.bincount(image).clamp(min=1)
        self.losses: dict[tuple[int | None, ...], list[float]] = {}

    def loss(self, combination: tuple[int | None, ...]) -> float:
        """The mean over the images; infinite where one is not finite, or where every path is left out."""
        if all(place is None for place in combination):
            return math.inf
        if combination not in self.losses:
            self.losses[combination] = self._score(combination)
        values = self.losses[combination]
        mean = sum(values) / len(values)
        return mean if math.isfinite(mean) else math.inf

    def _score(self, combination: tuple[int | None, ...]) -> list[float]:
        parts = [own[place] for own, place in zip(self._logits, combination, strict=True) if place is not None]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        losses = F.cross_entropy(total.float(), self._target, reduction="none") * self._weight
        sums = losses.new_zeros(len(self._count)).index_add_(0, self._image, losses)
        row = (sums / self._count).double().cpu()
        gathered: list[float] = gather_rows(row[:, None])[:, 0].tolist()
        return gathered

    def search(self, allow_absent: bool, draw: random.Random) -> tuple[int | None, ...]:
        """Return the best combination: of all, or of those that coordinate descent from several starts meets."""
        options: list[list[int | None]] = [
            [*range(len(own)), *([None] if allow_absent else [])] for own in self.candidates
        ]
        if math.prod(len(own) for own in options) <= _EXHAUSTIVE:
            return min(itertools.product(*options), key=self.loss)
        starts = [tuple(len(own) // 2 for own in self.candidates)]
        starts += [tuple(draw.randrange(len(own)) for own in self.candidates) for _ in range(_STARTS - 1)]
        return min((self._descend(start, options) for start in starts), key=self.loss)

    def _descend(
        self, start: tuple[int | None, ...], options: Sequence[Sequence[int | None]]
    ) -> tuple[int | None, ...]:
        best = start
        while True:
            before = best
            for path, own in enumerate(options):
                best = min(((*best[:path], place, *best[path + 1 :]) for place in own), key=self.loss)
            if best == before:
                return best

    def best_of_each_size(self) -> dict[int, tuple[int | None, ...]]:
        """For each number of paths the best combination that has been scored."""
        found: dict[int, tuple[int | None, ...]] = {}
        for combination in self.losses:
            size = sum(place is not None for place in combination)
            if size not in found or self.loss(combination) < self.loss(found[size]):
                found[size] = combination
        return dict(sorted(found.items()))

    def forward_selection(self, options: Sequence[Sequence[int | None]]) -> None:
        """Score what a greedy selection meets: the best path alone, with it the best second one, and so on."""
        chosen: tuple[int | None, ...] = (None,) * len(options)
        for _ in options:
            chosen = min(
                (
                    (*chosen[:path], place, *chosen[path + 1 :])
                    for path, own in enumerate(options)
                    if chosen[path] is None
                    for place in own
                    if place is not None
                ),
                key=self.loss,
            )

    def rates(self, combination: Sequence[int | None]) -> tuple[Rate, ...]:
        """The dilations of a combination."""
        return tuple(
            None if place is None else own[place] for own, place in zip(self.candidates, combination, strict=True)
        )

    def error(self, one: tuple[int | None, ...], other: tuple[int | None, ...]) -> float:
        """The standard error of the difference of two combinations' losses, over the images; NaN for one image."""
        columns = torch.tensor([self.losses[one], self.losses[other]], dtype=torch.float64)
        return float((columns[0] - columns[1]).std()) / math.sqrt(columns.shape[1])
