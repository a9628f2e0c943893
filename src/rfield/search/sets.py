"""Sets of dilations: the dilations of parallel paths are chosen together."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.search.curve import NO_HELD_OUT
from rfield.search.factors import gather_rows, override_dilation, reshard

Rate = tuple[float, ...]
"""A path's dilation: one number, or (height, width)."""
Choice = tuple[int | None, ...]
"""For each path an index into its candidates, or None if the path is left out."""
# If there are more combinations than this, only those that coordinate descent from several starts visits are scored.
_EXHAUSTIVE = 1500
_STARTS = 4
# Guided paths choose in turn at most so often.
_MOST_TURNS = 10
# Maximum number of pixels of a batch, evenly spaced, on which combinations are scored.
_PIXELS = 512


@dataclass(frozen=True)
class PathLogits:
    """The logits of each of several paths at the pixels of a batch.

    Attributes:
        logits: one Tensor[P, K] per path, for P pixels and K classes; their sum is the network's logits.
        target: labels, integer Tensor[P].
        weight: weight of each pixel in the loss, Tensor[P].
        path_weights: for guided paths, the weight of each pixel in the loss by which each path's dilation is chosen,
            one Tensor[P] per path with a factor.
    """

    logits: Sequence[Tensor]
    target: Tensor
    weight: Tensor
    path_weights: Sequence[Tensor] = ()


ReadPaths = Callable[[nn.Module, Any], PathLogits]
"""`read_paths(model, batch)` runs a model and returns the logits of each of its paths."""


def parallel_factors(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> list[list[int]]:
    """Find the factors of parallel branches: those in different members of one `nn.ModuleList`, and in no inner list.

    Args:
        model: any module.
        groups: its learned layers; layers that share a factor form one group.

    Returns:
        For each set the indices of its factors in `groups`; a factor without parallel ones is in no set.

    Example:
        >>> from rfield.layers import AdaptiveConv2d
        >>> from rfield.search import learned_layers
        >>> branches = nn.ModuleList(AdaptiveConv2d(1, 1, 3) for _ in range(3))
        >>> parallel_factors(branches, learned_layers(branches))
        [[0, 1, 2]]
    """
    member: dict[int, tuple[int, int]] = {}  # {module: (innermost list around it, position)}
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for number, child in enumerate(module):
                member |= {id(part): (id(module), number) for part in child.modules()}
    sets: dict[int, dict[int, list[int]]] = {}
    for index, group in enumerate(groups):
        places = {member.get(id(layer)) for layer in group}
        place = places.pop() if len(places) == 1 else None
        if place is not None:
            sets.setdefault(place[0], {}).setdefault(place[1], []).append(index)
    found = []
    for places_of_list in sets.values():
        factors = [indices[0] for indices in places_of_list.values() if len(indices) == 1]
        if len(factors) > 1:
            found.append(factors)
    return found


def shares(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Divide a range into adjacent shares of equal width in the logarithm, in ascending order.

    Example:
        >>> [(round(a, 2), round(b, 2)) for a, b in shares(1.0, 16.0, 4)]
        [(1.0, 2.0), (2.0, 4.0), (4.0, 8.0), (8.0, 16.0)]
    """
    ends = [low * (high / low) ** (place / count) for place in range(count + 1)]
    ends[-1] = high
    return list(itertools.pairwise(ends))


class Combinations:
    """The held-out losses of combinations of dilations, one per path, computed by adding the paths' logits.

    Args:
        candidates: the dilations of each path.
        logits: for each path and each of its candidates the logits of the pixels of all held-out images, Tensor[P, K].
        target: Tensor[P].
        weight: Tensor[P].
        image: index of the image that each pixel belongs to, Tensor[P], from 0.
        path_weights: see `PathLogits`.

    Attributes:
        losses: {combination: the loss of each image}, for all combinations scored so far.
        path_losses: for guided paths, {combination: for each path the loss of each image with the path's weights}.
    """

    def __init__(
        self,
        candidates: Sequence[Sequence[Rate]],
        logits: Sequence[Sequence[Tensor]],
        target: Tensor,
        weight: Tensor,
        image: Tensor,
        path_weights: Sequence[Tensor] = (),
    ) -> None:
        self.candidates = candidates
        # With the classes first, the sums over them are several times as fast.
        self._logits = [[each.float().t().contiguous() for each in own] for own in logits]
        self._at_target = [[each.float().gather(1, target[:, None])[:, 0] for each in own] for own in logits]
        self._target, self._weight, self._image = target, weight, image
        self._count = torch.bincount(image).clamp(min=1)
        self._path_weights = path_weights
        self.losses: dict[Choice, list[float]] = {}
        self.path_losses: dict[Choice, list[list[float]]] = {}

    def loss(self, combination: Choice) -> float:
        """Return the mean loss over the images; infinite if one is not finite, or all paths are left out."""
        if all(place is None for place in combination):
            return math.inf
        return _finite_mean(self.losses_of(combination))

    def losses_of(self, combination: Choice, path: int | None = None) -> list[float]:
        """Return the loss of each image, of all processes; for a guided path with the path's own weights."""
        if combination not in self.losses:
            self.losses[combination], *self.path_losses[combination] = self._score(combination)
        own = self.path_losses[combination] if path is not None else []
        return self.losses[combination] if path is None or not own else own[path]

    def _score(self, combination: Choice) -> list[list[float]]:
        """Return the loss of each image, then those with each guided path's weights."""
        losses = self._pixel_losses(combination)
        rows = []
        for weight in (self._weight, *self._path_weights):
            sums = losses.new_zeros(len(self._count)).index_add_(0, self._image, losses * weight)
            rows.append((sums / self._count).double().cpu())
        gathered: list[list[float]] = gather_rows(torch.stack(rows, 1)).T.tolist()
        return gathered

    def _pixel_losses(self, combination: Choice) -> Tensor:
        """Return the cross-entropy of each pixel, Tensor[P]; if all paths are left out, that of equal probabilities."""
        total = torch.zeros_like(self._logits[0][0])
        at_target = torch.zeros_like(self._at_target[0][0])
        for path, place in enumerate(combination):
            if place is not None:
                total += self._logits[path][place]
                at_target += self._at_target[path][place]
        losses: Tensor = total.logsumexp(0) - at_target
        return losses

    def search(self, least: int, most: int, draw: random.Random) -> Choice:
        """Return the best combination of so many paths: of all, or of those that descent from several starts visits.

        At least one path with a dilation stays.
        """
        options: list[list[int | None]] = [[None, *range(len(own))] for own in self.candidates]

        def allowed(combination: Choice) -> bool:
            return least <= _size(combination) <= most and self._has_dilation(combination)

        if math.prod(len(own) - (least == len(options)) for own in options) <= _EXHAUSTIVE:
            return min(filter(allowed, itertools.product(*options)), key=self.loss)
        starts = [self._select_forward(options, most)]
        for _ in range(_STARTS):
            chosen = draw.sample(range(len(options)), most)
            starts.append(
                tuple(draw.randrange(len(own)) if path in chosen else None for path, own in enumerate(self.candidates))
            )
        return min((self._descend(start, options, allowed) for start in starts if allowed(start)), key=self.loss)

    def search_guided(self, best: Choice) -> Choice:
        """Return a combination in which no guided path alone would choose another dilation by its own loss.

        Each path in turn chooses its best dilation, from a combination of all paths on. If that comes to no rest, the
        last combination is returned.
        """
        for _ in range(_MOST_TURNS if self._path_weights else 0):
            before = best
            for path, own in enumerate(self.candidates):
                turns = [(*best[:path], place, *best[path + 1 :]) for place in range(len(own))]
                best = min(turns, key=lambda each: _finite_mean(self.losses_of(each, path)))
            if best == before:
                break
        return best

    def _descend(
        self, best: Choice, options: Sequence[Sequence[int | None]], allowed: Callable[[Choice], bool]
    ) -> Choice:
        """Change one path at a time, or exchange one path for another, until nothing is better."""
        while True:
            before = best
            for path, own in enumerate(options):
                changed = [(*best[:path], place, *best[path + 1 :]) for place in own]
                absent = [other for other, place in enumerate(best) if place is None and other != path]
                exchanged = [
                    tuple(place if at == other else None if at == path else kept for at, kept in enumerate(best))
                    for other in absent
                    for place in options[other]
                ]
                best = min(filter(allowed, (best, *changed, *exchanged)), key=self.loss)
            if best == before:
                return best

    def _select_forward(self, options: Sequence[Sequence[int | None]], most: int) -> Choice:
        """Return the result of a greedy selection: the best single path, then the best one to add to it, and so on."""
        chosen: Choice = (None,) * len(options)
        for _ in range(most):
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
        return chosen

    def _has_dilation(self, combination: Choice) -> bool:
        return any(rate is not None and any(rate) for rate in self.rates(combination))

    def best_of_each_size(self) -> dict[int, Choice]:
        """Return for each number of paths the best combination that has been scored."""
        found: dict[int, Choice] = {}
        for combination in filter(self._has_dilation, self.losses):
            size = _size(combination)
            if size not in found or self.loss(combination) < self.loss(found[size]):
                found[size] = combination
        return dict(sorted(found.items()))

    def fewest(self) -> Choice:
        """Return the combination of the fewest paths that is within one standard error of the best that was scored."""
        sizes = self.best_of_each_size().values()
        best = min(sizes, key=self.loss)
        enough = (each for each in sizes if self.loss(each) - self.loss(best) <= self.error(each, best))
        return next(enough, best)

    def class_costs(self, combination: Choice) -> list[list[float | None]]:
        """Return by how much the loss of each class's pixels increases if a path is left out.

        Returns:
            For each class a list with one number per path: None for paths that are already left out, and for classes
            without pixels.
        """
        classes = len(self._logits[0][0])
        whole = self._class_losses(combination, classes)
        costs: list[list[float | None]] = [[None] * len(combination) for _ in range(classes)]
        for path, place in enumerate(combination):
            if place is not None:
                without = self._class_losses((*combination[:path], None, *combination[path + 1 :]), classes)
                for index, cost in enumerate((without - whole).tolist()):
                    costs[index][path] = cost if math.isfinite(cost) else None
        return costs

    def _class_losses(self, combination: Choice, classes: int) -> Tensor:
        """Return the mean loss of each class's pixels, Tensor[K] in float64; NaN for a class without pixels."""
        sums, counts = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
        sums.index_add_(0, self._target, self._pixel_losses(combination).double())
        counts.index_add_(0, self._target, torch.ones(len(self._target), dtype=torch.float64))
        return sums / counts

    def rates(self, combination: Choice) -> tuple[Rate | None, ...]:
        """Return the dilations of a combination."""
        return tuple(
            None if place is None else own[place] for own, place in zip(self.candidates, combination, strict=True)
        )

    def error(self, one: Choice, other: Choice) -> float:
        """Return the standard error of the difference between two combinations' losses; NaN for one image."""
        columns = torch.tensor([self.losses[one], self.losses[other]], dtype=torch.float64)
        return float((columns[0] - columns[1]).std()) / math.sqrt(columns.shape[1])

    def curve(self, combination: Choice, path: int, axis: int) -> dict[float, list[float]]:
        """Return {dilation: loss of each image} of one path and axis, with all others as in a combination."""
        own = self.candidates[path]
        place = combination[path]
        fixed = own[place or 0]
        return {
            rate[axis]: self.losses_of((*combination[:path], at, *combination[path + 1 :]), path)
            for at, rate in enumerate(own)
            if rate[:axis] + rate[axis + 1 :] == fixed[:axis] + fixed[axis + 1 :]
        }

    def describe(self, step: int, chosen: Choice, count: int = 10) -> dict[str, Any]:
        """Return the chosen combination, the best ones, and the best of each number of paths, in plain types.

        Args:
            step: of the search.
            chosen: the combination that was chosen.
            count: number of best combinations.

        Returns:
            The step, `chosen` (an entry), `best` and `sizes` (lists of entries), and `class_costs`. An entry has the
            `rates` (one list per path, None for a path that is left out), the mean `loss`, and the `error` of its
            difference to the best one's loss (NaN for one image).
        """
        ranked = sorted(self.losses, key=self.loss)
        best, sizes = ranked[:count], [*self.best_of_each_size().values()]
        entry = {
            combination: {
                "rates": [None if rate is None else list(rate) for rate in self.rates(combination)],
                "loss": self.loss(combination),
                "error": self.error(combination, ranked[0]),
            }
            for combination in (chosen, *best, *sizes)
        }
        return {
            "step": step,
            "chosen": entry[chosen],
            "best": [entry[each] for each in best],
            "sizes": [entry[each] for each in sizes],
            "class_costs": self.class_costs(chosen),
        }


def _finite_mean(values: Sequence[float]) -> float:
    """Return the mean; infinite if it is not finite."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf


def _size(combination: Choice) -> int:
    return sum(place is not None for place in combination)


@torch.no_grad()
def read_combinations(
    model: nn.Module,
    groups: Sequence[Sequence[LearnedFactor]],
    read_paths: ReadPaths,
    held_out: Iterable[Any],
    candidates: Sequence[Sequence[Rate]],
) -> Combinations:
    """Evaluate every path once for each of its candidates, so that all combinations can be scored by addition.

    Paths without a factor come after the others and have one candidate each, whose dilation is 0.

    Args:
        model: a model whose logits are the sum of the paths' logits.
        groups: the learned layers of each path.
        read_paths: see `ReadPaths`.
        held_out: batches.
        candidates: the dilations of each path.

    Raises:
        ValueError: if `read_paths` returns the logits of a different number of paths, or there is no batch.
    """
    logits: list[list[list[Tensor]]] = []
    targets, weights, images = [], [], []
    path_weights: list[list[Tensor]] = []
    for image, batch in enumerate(held_out):
        for place in range(max(map(len, candidates))):
            for group, own in zip(groups, candidates, strict=False):
                override_dilation(group, own[min(place, len(own) - 1)])
            read = read_paths(model, batch)
            if len(read.logits) < len(groups):
                raise ValueError(
                    f"read_paths returned the logits of {len(read.logits)} paths, but there are {len(groups)} factors"
                )
            if not logits:
                candidates = [*candidates, *[[(0.0,)]] * (len(read.logits) - len(groups))]
                logits = [[[] for _ in own] for own in candidates]
            # The same pixels for every candidate.
            chosen = torch.linspace(0, len(read.target) - 1, min(_PIXELS, len(read.target))).long()
            for own_logits, path_logits in zip(logits, read.logits, strict=True):
                if place < len(own_logits):
                    own_logits[place].append(path_logits[chosen].cpu())
        targets.append(read.target[chosen].cpu())
        weights.append(read.weight[chosen].cpu())
        path_weights.append([each[chosen].cpu() for each in read.path_weights])
        images.append(torch.full_like(targets[-1], image))
    reshard(model)
    if not targets:
        raise ValueError(NO_HELD_OUT)
    joined = [[torch.cat(each) for each in own] for own in logits]
    own_weights = [torch.cat(each) for each in zip(*path_weights, strict=True)]
    return Combinations(candidates, joined, torch.cat(targets), torch.cat(weights), torch.cat(images), own_weights)
