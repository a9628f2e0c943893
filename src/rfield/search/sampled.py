"""Learning without a start: draw, read the curve, keep the best."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rfield.layers.factor import whole_dilation, whole_range
from rfield.search.base import LossFunction, Search
from rfield.search.certainty import Verdict, judge
from rfield.search.factors import (
    all_round,
    dilation_range,
    gather_rows,
    hold_dilation,
    names_of,
    present_dilation,
    reshard,
    set_dilation,
)
from rfield.search.paired import standard_errors

# Of the running average of the weights: about the last 33 steps.
_DECAY = 0.97
# Share of a search's steps: how far the window reaches to either side of the minimum from there on.
NARROWINGS = {0.25: 2.5, 0.4: 1.75, 0.6: 1.35}


class SampledSearch(Search):
    """Start-free: train at dilations drawn at random, read the loss curve on held-out images, narrow, keep the best.

    Every step runs at a dilation drawn log-uniformly from a window, at first the whole range, so that the weights
    learn to work at all of them. The loss on held-out training images, read across the window with a running average
    of these shared weights, is then a receptive-field curve. Each reading centres a narrower window on its minimum:
    the weights train on where it matters, at hardly any price once the window is small, and a minimum that was read
    too early (small dilations are learned faster) is still mended by the readings that follow. The minimum of the
    last is kept and snapped. Give the held-out images back to training when `done`.

    With several factors all are drawn independently; a reading takes one factor and axis at a time, the others at
    their best, and goes round until none moves.

    Args:
        model, loss_fn, steps, seed: see `Search`.
        held_out: batches of training images that the search does not train on; gone through at every reading. The
            reading's standard error is over the batches: one image a batch tells most.
        narrowings: when to read before the end, as shares of the steps, and how far the window then reaches to
            either side of the minimum, as a ratio. Not too early: weights that have learned little favour dilations
            at which the kernel's outer taps leave the map.
        candidates: dilations that the whole range is read at; a window has its share of them.

    Attributes:
        readings: for each (factor, axis), all (step, {dilation: held-out loss}) read so far.
        losses: the same with a list in place of each loss: those of the held-out batches, of all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        steps: int,
        held_out: Iterable[Any],
        seed: int = 0,
        narrowings: Mapping[float, float] = NARROWINGS,
        candidates: int = 10,
    ) -> None:
        if any(not 0 < share <= 1 or reach < 1 for share, reach in narrowings.items()) or candidates < 1:
            raise ValueError(
                "narrowings must be shares of the steps above 0 and up to 1, with a reach of at least 1, and "
                f"candidates at least 1; got {dict(narrowings)} and {candidates}"
            )
        _check_held_out(held_out)
        super().__init__(model, loss_fn, steps, seed)
        self.held_out = held_out
        self.narrowings = {max(1, round(share * steps)): reach for share, reach in narrowings.items()}
        self.candidates = candidates
        self.readings: dict[tuple[int, int], list[tuple[int, dict[float, float]]]] = {
            (index, axis): [] for index, group in enumerate(self.groups) for axis in range(group[0].log_factor.numel())
        }
        self.losses: dict[tuple[int, int], list[tuple[int, dict[float, list[float]]]]] = {
            key: [] for key in self.readings
        }
        self._ranges: list[tuple[float, float]] = []
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}
        self._average: dict[str, Tensor] = {}
        self._take_factors()

    def loss(self, batch: Any) -> Tensor:
        if self.done:
            return self._losses(batch)[0]
        if not self._windows:
            for group in self.groups:  # Held, a regulator keeps to its memory budget.
                hold_dilation(group, group[0].effective_dilation[: group[0].log_factor.numel()])
            with torch.no_grad():
                self._losses(batch)  # Shows the layers how large their maps are.
            reshard(self.model)
            self._release()
            self._check_layers()
            self._ranges = [dilation_range(group) for group in self.groups]
            self._windows = {key: self._ranges[key[0]] for key in self.readings}
        for index, group in enumerate(self.groups):
            draw = self._random("dilation", index)
            hold_dilation(group, [self._draw(index, axis, draw) for axis in range(group[0].log_factor.numel())], draw)
        return self._losses(batch)[0]

    def _draw(self, index: int, axis: int, draw: random.Random) -> float:
        """A dilation of the window, log-uniform and stratified.

        As many strata as candidates, each once a round: weights follow what they have seen last, and a run of large
        dilations before a reading would make large ones look good.
        """
        low, high = self._windows[index, axis]
        strata = self._count(index, low, high)
        rounds, place = divmod(self.step_index, strata)
        order = random.Random(repr((self.seed, "round", index, axis, rounds, strata))).sample(range(strata), strata)
        return low * math.pow(high / low, (order[place] + draw.random()) / strata)

    def _count(self, index: int, low: float, high: float) -> int:
        """A window's share of the candidates."""
        least, greatest = self._ranges[index]
        share = math.log(high / low) / math.log(greatest / least) if greatest > least else 0.0
        return 1 + math.ceil((self.candidates - 1) * share)

    def _learn(self) -> None:
        self._record()
        self._update_ema()
        last = self.step_index >= self.steps
        if last or self.step_index in self.narrowings:
            self._read()
        if last:
            self._average = {}  # Read for the last time; later checkpoints need not carry it.
            self._finish()

    def curve(self, index: int = 0, axis: int = 0) -> dict[float, float]:
        """The held-out loss over the dilations of one factor and axis, from each candidate's last reading."""
        merged: dict[float, float] = {}
        for _, reading in self.readings[index, axis]:
            merged |= reading
        return dict(sorted(merged.items()))

    def errors(self, index: int = 0, axis: int = 0) -> dict[float, float]:
        """The standard errors of `curve`: of each loss's difference to the least of its reading, over the batches."""
        merged: dict[float, float] = {}
        for _, losses in self.losses[index, axis]:
            merged |= standard_errors([losses])
        return dict(sorted(merged.items()))

    def verdict(
        self, index: int = 0, axis: int = 0, chance: float | None = None, random_backbone: bool = False
    ) -> Verdict:
        """How sure the answer for one factor and axis is, compared with where the search was started.

        Args:
            index, axis: which factor, and height (0) or width (1).
            chance: the held-out loss of predicting the classes' shares everywhere, see `class_share_loss`. Default: it
                is not checked whether the network does better.
            random_backbone: whether the backbone is frozen at random weights.

        Raises:
            ValueError: if nothing has been read yet.
        """
        return judge(
            [[losses for _, losses in self.losses[index, axis]]],
            self.starts[index][axis],
            chosen=self.groups[index][0].effective_dilation[axis],
            chance=chance,
            steps=self.step_index,
            random_backbone=random_backbone,
            unit="held-out batch",
        )

    def _read(self) -> None:
        """Reads every factor and axis, moves it to its minimum, and narrows its window around that."""
        losses: dict[tuple[int, int], dict[float, list[float]]] = {}
        curves: dict[tuple[int, int], dict[float, float]] = {}
        with self._averaged_weights():
            moved = True
            for _ in range(3 if len(self.readings) > 1 else 1):
                if not moved:
                    break
                moved = False
                for index, axis in self.readings:
                    before = self.groups[index][0].effective_dilation[axis]
                    losses[index, axis] = self._curve(index, axis)
                    curves[index, axis] = {d: sum(each) / len(each) for d, each in losses[index, axis].items()}
                    best = self._minimum(index, axis, curves[index, axis])
                    self._move(index, axis, best)
                    moved |= abs(math.log(best / before)) > 0.1
        for key, curve in curves.items():
            self.readings[key].append((self.step_index, curve))
            self.losses[key].append((self.step_index, losses[key]))
            low, high = self._ranges[key[0]]
            best, reach = curve_minimum(curve), self.narrowings.get(self.step_index, 1.0)
            self._windows[key] = max(low, best / reach), min(high, best * reach)

    def _minimum(self, index: int, axis: int, curve: dict[float, float]) -> float:
        try:
            return curve_minimum(curve)
        except ValueError as error:
            side = ("height", "width")[axis]
            name = self._name(self.groups[index])
            raise ValueError(f"step {self.step_index}, the learned layer {name}, {side}: {error}") from error

    def _named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """The names are those of the model without its wrappers, which may have come after the search."""
        names = names_of(self.model)
        return [(names[id(weight)], weight) for weight in self.model.parameters()]

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Moves the running average of the weights, which is what is read: the last steps' weights are noisy.

        In float32 or better: most of a step of 3 % would be lost in bfloat16.
        """
        averages, values = [], []
        for name, weight in self._named_weights():
            if weight.requires_grad:
                value = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
                averages.append(self._average.setdefault(name, value.clone()))
                values.append(value)
        if values:
            get_ema_multi_avg_fn(_DECAY)(averages, values, 0)  # type: ignore[no-untyped-call]

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The model with the running average of its weights, in eval mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        averaged = [(weight, self._average[name]) for name, weight in self._named_weights() if name in self._average]
        own = [weight.detach().clone() for weight, _ in averaged]
        self.model.eval()
        try:
            with torch.no_grad():
                for weight, average in averaged:
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (weight, _), value in zip(averaged, own, strict=True):
                    weight.copy_(value)
            for module, training in modes:
                module.training = training
            self._release()

    def _move(self, index: int, axis: int, dilation: float) -> None:
        axes = self.groups[index][0].log_factor.numel()
        values = list(self.groups[index][0].effective_dilation[:axes])
        values[axis] = dilation
        set_dilation(self.groups[index], values)

    @torch.no_grad()
    def _curve(self, index: int, axis: int) -> dict[float, list[float]]:
        """The held-out losses, one a batch, across the window of a factor and axis, all else at its present best."""
        for group in self.groups:
            hold_dilation(group, present_dilation(group))
        group = self.groups[index]
        low, high = self._windows[index, axis]
        count = max(7 if self.step_index >= self.steps else 4, self._count(index, low, high))
        grid = dilation_grid(low, high, count, all_round(group))
        # Rounded, its ends may have left the range, and the next window would end before it begins.
        if all_round(group) and (whole := whole_range(*self._ranges[index])):
            grid = sorted({float(min(max(dilation, whole[0]), whole[1])) for dilation in grid})
        return self._read_at(index, axis, grid)

    def _read_at(self, index: int, axis: int, dilations: list[float]) -> dict[float, list[float]]:
        group = self.groups[index]
        rows = [torch.empty(0, len(dilations), dtype=torch.float64)]
        for batch in self.held_out:
            row = []
            for dilation in dilations:
                values = present_dilation(group)
                values[axis] = dilation
                hold_dilation(group, values)
                row.append(self._losses(batch)[1][index].double().cpu())
            rows.append(torch.stack(row)[None])
        reshard(self.model)
        losses = gather_rows(torch.cat(rows))
        if not len(losses):
            raise ValueError("a sampled search reads its curve on held-out batches, but there is none")
        return dict(zip(dilations, losses.T.tolist(), strict=True))

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "narrowings": self.narrowings,
            "readings": self.readings,
            "losses": self.losses,
            "ranges": self._ranges,
            "windows": self._windows,
            "average": self._average,
        }

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.narrowings = state["narrowings"]
        self.readings = state["readings"]
        self.losses = state["losses"]
        self._ranges = state["ranges"]
        self._windows = state["windows"]
        weights = dict(self._named_weights())
        if unknown := [name for name in state["average"] if name not in weights]:
            raise ValueError(f"the state averages weights that the model does not have: {', '.join(unknown[:3])}")
        self._average = {name: average.to(weights[name].device) for name, average in state["average"].items()}


def _check_held_out(held_out: Iterable[Any]) -> None:
    """Refuses what cannot be gone through at every reading, as far as that can be told before the first."""
    if iter(held_out) is held_out:
        raise ValueError(
            f"held_out is a {type(held_out).__name__}, which can be gone through once, but every reading goes through "
            "it: give a list of batches or a DataLoader"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # Another process may have some.
    try:
        count = len(held_out)  # type: ignore[arg-type]
    except TypeError:  # As that of a loader of an iterable data set.
        count = sum(1 for _ in zip((1,), held_out, strict=False))
    if count == 0:
        raise ValueError("a sampled search reads its curve on held-out batches, but there is none")


def dilation_grid(low: float, high: float, count: int, whole: bool) -> list[float]:
    """At most `count` dilations from `low` to `high`, evenly spaced in their logarithm; integers if `whole`.

    >>> dilation_grid(1.0, 32.0, 6, whole=True)
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    """
    steps = [low * (high / low) ** (place / max(1, count - 1)) for place in range(count)]
    return sorted({float(whole_dilation(value)) for value in steps} if whole else set(steps))


def curve_minimum(curve: dict[float, float]) -> float:
    """Where a loss curve is least: the vertex of the parabola, in the logarithm, through the three lowest in a row.

    Raises:
        ValueError: if no loss is finite; those that are not are passed over.

    >>> round(curve_minimum({2.0: 0.69, 4.0: 0.0, 8.0: 0.69}), 2)
    4.0
    """
    dilations = sorted(curve)
    finite = [place for place, dilation in enumerate(dilations) if math.isfinite(curve[dilation])]
    if not finite:
        raise ValueError(
            f"no loss of the curve is finite: {curve}; the training has diverged, or the loss is not defined on the "
            "held-out batches, as where one has no labels"
        )
    place = min(finite, key=lambda index: curve[dilations[index]])
    if not {place - 1, place + 1} <= set(finite):
        return dilations[place]
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(d), curve[d]) for d in dilations[place - 1 : place + 2]), strict=True)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:
        return dilations[place]
    vertex = (x0 + x1) / 2 - left / (2 * curvature)
    return math.exp(min(max(vertex, x0), x2))
