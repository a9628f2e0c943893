"""Learning without a start: draw, read the curve, keep the best."""

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rfield.search.base import LossFunction, Search
from rfield.search.certainty import Verdict, judge, standard_errors
from rfield.search.factors import (
    all_round,
    dilation_range,
    gather_rows,
    hold_dilation,
    present_dilation,
    reshard,
    set_dilation,
)

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
        starts: for each factor the effective dilations that the search was started at, one or (height, width).
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
        self.starts = [list(group[0].effective_dilation[: group[0].log_factor.numel()]) for group in self.groups]
        self._ranges: list[tuple[float, float]] = []
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}
        self._average: dict[str, Tensor] = {}
        for group in self.groups:
            group[0].freeze_factor()

    def loss(self, batch: Any) -> Tensor:
        if self.done:
            return self._losses(batch)[0]
        if not self._windows:
            with torch.no_grad():
                self._losses(batch)  # Shows the layers how large their maps are.
            reshard(self.model)
            self._ranges = [dilation_range(group[0]) for group in self.groups]
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

    def step(self) -> None:
        if self.done:
            return
        self._record()
        self._follow()
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
            merged |= standard_errors(losses)
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
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self._exchange()
        try:
            losses: dict[tuple[int, int], dict[float, list[float]]] = {}
            curves: dict[tuple[int, int], dict[float, float]] = {}
            moved = True
            for _ in range(3 if len(self.readings) > 1 else 1):
                if not moved:
                    break
                moved = False
                for index, axis in self.readings:
                    before = self.groups[index][0].effective_dilation[axis]
                    losses[index, axis] = self._curve(index, axis)
                    curves[index, axis] = {d: sum(each) / len(each) for d, each in losses[index, axis].items()}
                    best = curve_minimum(curves[index, axis])
                    self._move(index, axis, best)
                    moved |= abs(math.log(best / before)) > 0.1
            for key, curve in curves.items():
                self.readings[key].append((self.step_index, curve))
                self.losses[key].append((self.step_index, losses[key]))
                low, high = self._ranges[key[0]]
                best, reach = curve_minimum(curve), self.narrowings.get(self.step_index, 1.0)
                self._windows[key] = max(low, best / reach), min(high, best * reach)
        finally:
            self._exchange()
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the running average of the weights, which is what is read: the last steps' weights are noisy."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                average = self._average.setdefault(name, weight.detach().clone())
                average.lerp_(weight.detach(), 1 - _DECAY)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Puts the averaged weights into the model, and the model's in their place."""
        for name, weight in self.model.named_parameters():
            if name in self._average:
                kept = weight.detach().clone()
                weight.copy_(self._average[name])
                self._average[name] = kept

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
        return self._read_at(index, axis, dilation_grid(low, high, count, all_round(group)))

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

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "readings": self.readings,
            "losses": self.losses,
            "starts": self.starts,
            "ranges": self._ranges,
            "windows": self._windows,
            "average": self._average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.readings = state["readings"]
        self.losses = state["losses"]
        self.starts = state["starts"]
        self._ranges = state["ranges"]
        self._windows = state["windows"]
        devices = {name: weight.device for name, weight in self.model.named_parameters()}
        self._average = {name: average.to(devices[name]) for name, average in state["average"].items()}


def dilation_grid(low: float, high: float, count: int, whole: bool) -> list[float]:
    """At most `count` dilations from `low` to `high`, evenly spaced in their logarithm; integers if `whole`.

    >>> dilation_grid(1.0, 32.0, 6, whole=True)
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    """
    steps = [low * (high / low) ** (place / max(1, count - 1)) for place in range(count)]
    return sorted({float(max(1, round(value))) for value in steps} if whole else set(steps))


def curve_minimum(curve: dict[float, float]) -> float:
    """Where a loss curve is least: the vertex of the parabola, in the logarithm, through the three lowest in a row.

    >>> round(curve_minimum({2.0: 0.69, 4.0: 0.0, 8.0: 0.69}), 2)
    4.0
    """
    dilations = sorted(curve)
    place = min(range(len(dilations)), key=lambda index: curve[dilations[index]])
    if place in (0, len(dilations) - 1):
        return dilations[place]
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(d), curve[d]) for d in dilations[place - 1 : place + 2]), strict=True)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not curvature > 0:
        return dilations[place]
    vertex = (x0 + x1) / 2 - left / (2 * curvature)
    return math.exp(min(max(vertex, x0), x2))
