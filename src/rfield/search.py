"""How factors are learned: by their exact gradient, by SPSA, or by a sampled search that needs no start.

All three are used alike, in a loop that is otherwise an ordinary one:

    search = SampledSearch(model, loss_fn, steps=1000, held_out=batches)
    for batch in loader:
        loss = search.loss(batch)   # loss_fn(model, batch), at the dilations that the search wants to see
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        search.step()               # once an optimizer step; `search.done` tells when the receptive field is final

`search.loss` may be called several times a step (gradient accumulation). All draws derive from (seed, step), so every
process of a distributed run draws the same, and losses are averaged over the processes before they decide anything.
A search runs eager; compile after it is done.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor

LossFunction = Callable[[nn.Module, Any], Tensor]


def learned_layers(model: nn.Module) -> list[list[LearnedFactor]]:
    """The layers that share a factor, group by group, in the order of the model's modules.

    >>> from rfield.layers import AdaptiveConv2d
    >>> [len(group) for group in learned_layers(AdaptiveConv2d(1, 1, 3))]
    [1]
    """
    groups: dict[int, list[LearnedFactor]] = {}
    for module in model.modules():
        if isinstance(module, LearnedFactor):
            groups.setdefault(id(module.log_factor), []).append(module)
    return list(groups.values())


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned factors of a model, each once, in the order of its modules.

    >>> from rfield.layers import AdaptiveConv2d
    >>> len(factor_parameters(AdaptiveConv2d(1, 1, 3)))
    1
    """
    return [group[0].log_factor for group in learned_layers(model)]


def parameter_groups(model: nn.Module, lr: float, factor_lr: float) -> list[dict[str, Any]]:
    """Optimizer-ready groups: the weights, and the factors at their own rate and without weight decay.

    Args:
        model: any module, with or without learned factors inside.
        lr: learning rate of the weights.
        factor_lr: learning rate of the factors (of their logarithm).

    Returns:
        Groups for any torch optimizer; parameters that need no gradient are left out.

    >>> from rfield.layers import AdaptiveConv2d
    >>> [len(group["params"]) for group in parameter_groups(AdaptiveConv2d(1, 1, 3), lr=1e-3, factor_lr=1e-2)]
    [2, 1]
    """
    factors = factor_parameters(model)
    known = {id(parameter) for parameter in factors}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": weights, "lr": lr}]
    learned = [p for p in factors if p.requires_grad]
    if learned:
        groups.append({"params": learned, "lr": factor_lr, "weight_decay": 0.0})
    return groups


class Search:
    """What the three searches share: the groups of layers, the step, the end.

    Args:
        model: holds the layers to learn; may be wrapped (DistributedDataParallel).
        loss_fn: `loss_fn(model, batch)` gives the scalar loss.
        steps: optimizer steps of the search; at their end the factors are snapped.
        seed: of the draws.

    Attributes:
        done: whether the receptive field is final.
        trajectory: (step, the dilations along the height that it ran at, one a factor) of each step.

    Raises:
        ValueError: if there is nothing to learn in the model, or no steps to learn it in.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        self.groups = learned_layers(model)
        if not self.groups:
            raise ValueError("the model has no learned factor: wrap layers in a regulator or an AdaptiveConv2d first")
        if steps < 1:
            raise ValueError(f"a search needs at least 1 step, got {steps}")
        self.model = model
        self.loss_fn = loss_fn
        self.steps = steps
        self.seed = seed
        self.step_index = 0
        self.done = False
        self.trajectory: list[tuple[int, list[float]]] = []

    def loss(self, batch: Any) -> Tensor:
        """The loss to call `backward` on."""
        raise NotImplementedError

    def step(self) -> None:
        """Ends an optimizer step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint beside the model's."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "done": self.done,
            "trajectory": self.trajectory,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; load the model's state first."""
        self.step_index = state["step_index"]
        self.done = state["done"]
        if self.done:
            for group in self.groups:
                group[0].freeze_factor()
        self.trajectory = list(state["trajectory"])

    def _record(self) -> None:
        self.step_index += 1
        self.trajectory.append((self.step_index, [group[0].realised_dilation[0] for group in self.groups]))

    def _finish(self) -> None:
        for group in self.groups:
            for layer in group:
                layer.held = None
                layer.snap()
        self.done = True

    def _random(self, *key: object) -> random.Random:
        return random.Random(repr((self.seed, self.step_index, *key)))


class GradientSearch(Search):
    """The paper's: the factors follow their exact gradient, which the optimizer applies (Wei et al., CVPR 2017)."""

    def loss(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)

    def step(self) -> None:
        if self.done:
            return
        self._record()
        if self.step_index >= self.steps:
            self._finish()


class SpsaSearch(Search):
    """Simultaneous perturbation (Spall 1992) of the logarithm of every effective dilation; local, online.

    Each step sees the same batch at `r e^eps` and at `r e^-eps`; the weights train on the mean of both losses, and
    `(L+ - L-) / (2 eps)` goes to Adam. Every factor draws an eps of its own: half-normal of scale sigma, of random
    sign, within [0.05, 2 sigma]; sigma falls linearly from `scale` to 0. Dilated convolutions run at an integer drawn
    by stochastic rounding. Only every `every`-th step is a probe of two sides; the others train at the present
    dilation.

    Args:
        model, loss_fn, steps, seed: see `Search`.
        scale: sigma at the start.
        every: steps from one probe to the next.
        lr: Adam's rate for the logarithm of the dilation.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        steps: int,
        seed: int = 0,
        scale: float = 0.6,
        lr: float = 0.03,
        every: int = 1,
    ) -> None:
        super().__init__(model, loss_fn, steps, seed)
        self.scale = scale
        self.every = every
        for group in self.groups:
            group[0].freeze_factor()
        self._log_dilation = [_log_dilation(group[0]) for group in self.groups]
        self._optimizer = torch.optim.Adam(self._log_dilation, lr=lr, betas=(0.9, 0.99))
        self._differences: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        if self.done:
            return self.loss_fn(self.model, batch)
        if self.step_index % self.every:
            for index, (group, center) in enumerate(zip(self.groups, self._log_dilation, strict=True)):
                _hold(group, center.exp().tolist(), self._random("round", index))
            return self.loss_fn(self.model, batch)
        losses = []
        for sign in (1.0, -1.0):
            for index, (group, center) in enumerate(zip(self.groups, self._log_dilation, strict=True)):
                dilation = (center + sign * self._epsilon(index, center)).exp().tolist()
                _hold(group, dilation, self._random("round", index, sign))
            losses.append(self.loss_fn(self.model, batch))
        self._differences.append((losses[0] - losses[1]).detach().float())
        return (losses[0] + losses[1]) / 2

    def step(self) -> None:
        if self.done:
            return
        if self._differences:
            difference = mean_over_processes(torch.stack(self._differences).mean())
            self._differences = []
            for index, center in enumerate(self._log_dilation):
                center.grad = difference.to(center) / (2 * self._epsilon(index, center))
            self._optimizer.step()
            for group, center in zip(self.groups, self._log_dilation, strict=True):
                low, high = dilation_range(group[0])
                center.data.clamp_(math.log(low), math.log(high))
                _set_dilation(group, center.exp().tolist())
        self._record()
        if self.step_index >= self.steps:
            self._finish()

    def _sigma(self) -> float:
        return self.scale * (1 - self.step_index / self.steps)

    def _epsilon(self, index: int, center: Tensor) -> Tensor:
        sigma = self._sigma()
        draw = self._random("epsilon", index)
        values = []
        for _ in range(center.numel()):
            size = min(max(abs(draw.gauss(0, sigma)), 0.05), max(2 * sigma, 0.05))
            values.append(size * draw.choice((-1, 1)))
        return center.new_tensor(values)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "log_dilation": [center.detach().clone() for center in self._log_dilation],
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for center, saved in zip(self._log_dilation, state["log_dilation"], strict=True):
            center.data.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])


class SampledSearch(Search):
    """Start-free: train at dilations drawn at random, read the loss curve on held-out images, keep the best.

    Every step runs at a dilation drawn around one of a set of candidates, evenly spaced in their logarithm, so that
    the weights learn to work at all of them. The loss on held-out training images, read at every candidate with these shared
    weights, is then a receptive-field curve. Half of the candidates go at each reading (successive halving, Jamieson
    and Talwalkar, AISTATS 2016): what is left trains on without the others, and is read again, until the least of the
    last reading is kept and snapped. Give the held-out images back to training when `done`.

    With several factors all are drawn independently; a reading takes one factor and axis at a time, the others at
    their best, and goes round until none moves.

    Args:
        model, loss_fn, steps, seed: see `Search`.
        held_out: batches of training images that the search does not train on; gone through at every reading.
        halvings: when to read before the end, as shares of the steps. Not too early: weights that have learned little
            favour dilations at which the kernel's outer taps leave the map.
        candidates: dilations to begin with.

    Attributes:
        readings: for each (factor, axis), all (step, {dilation: held-out loss}) read so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        steps: int,
        held_out: Iterable[Any],
        seed: int = 0,
        halvings: Sequence[float] = (0.5, 0.67, 0.83),
        candidates: int = 14,
    ) -> None:
        super().__init__(model, loss_fn, steps, seed)
        self.held_out = held_out
        self.halvings = {max(1, round(share * steps)) for share in halvings}
        self.candidates = candidates
        self.readings: dict[tuple[int, int], list[tuple[int, dict[float, float]]]] = {
            (index, axis): [] for index, group in enumerate(self.groups) for axis in range(group[0].log_factor.numel())
        }
        self._kept: dict[tuple[int, int], list[float]] = {}
        for group in self.groups:
            group[0].freeze_factor()

    def loss(self, batch: Any) -> Tensor:
        if self.done:
            return self.loss_fn(self.model, batch)
        if not self._kept:
            with torch.no_grad():
                self.loss_fn(self.model, batch)  # Shows the layers how large their maps are.
            for index, axis in self.readings:
                low, high = dilation_range(self.groups[index][0])
                self._kept[index, axis] = dilation_grid(low, high, self.candidates, _whole(self.groups[index]))
        for index, group in enumerate(self.groups):
            draw = self._random("dilation", index)
            _hold(group, [self._draw(index, axis, draw) for axis in range(group[0].log_factor.numel())], draw)
        return self.loss_fn(self.model, batch)

    def _draw(self, index: int, axis: int, draw: random.Random) -> float:
        """A dilation from the cell of a candidate that is left: halfway to its neighbours, in the logarithm."""
        low, high = dilation_range(self.groups[index][0])
        candidate = draw.choice(self._kept[index, axis])
        exponent = draw.uniform(-0.5, 0.5)
        return min(max(candidate * math.pow(self._ratio(index), exponent), low), high)

    def _ratio(self, index: int) -> float:
        """From one candidate to the next."""
        low, high = dilation_range(self.groups[index][0])
        return math.pow(high / low, 1 / max(1, self.candidates - 1))

    def step(self) -> None:
        if self.done:
            return
        self._record()
        last = self.step_index >= self.steps
        if last or self.step_index in self.halvings:
            self._read(refine=last)
        if last:
            self._finish()

    def curve(self, index: int = 0, axis: int = 0) -> dict[float, float]:
        """The held-out loss over the dilations of one factor and axis, from each candidate's last reading."""
        merged: dict[float, float] = {}
        for _, reading in self.readings[index, axis]:
            merged |= reading
        return dict(sorted(merged.items()))

    def _read(self, refine: bool) -> None:
        """Reads every factor and axis, moves it to its minimum, and drops the worse half of its candidates."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            curves: dict[tuple[int, int], dict[float, float]] = {}
            moved = True
            for _ in range(3 if len(self.readings) > 1 else 1):
                if not moved:
                    break
                moved = False
                for index, axis in self.readings:
                    before = self.groups[index][0].effective_dilation[axis]
                    curves[index, axis] = self._curve(index, axis, refine)
                    best = curve_minimum(curves[index, axis])
                    self._move(index, axis, best)
                    moved |= abs(math.log(best / before)) > 0.1
            for key, curve in curves.items():
                self.readings[key].append((self.step_index, curve))
                least = sorted(curve, key=lambda dilation: curve[dilation])
                self._kept[key] = sorted(least[: -(-len(least) // 2)])
        finally:
            for module, training in modes:
                module.training = training

    def _move(self, index: int, axis: int, dilation: float) -> None:
        axes = self.groups[index][0].log_factor.numel()
        values = list(self.groups[index][0].effective_dilation[:axes])
        values[axis] = dilation
        _set_dilation(self.groups[index], values)

    @torch.no_grad()
    def _curve(self, index: int, axis: int, refine: bool) -> dict[float, float]:
        """The held-out loss over the candidates of one factor along one axis, all else at its present best."""
        for group in self.groups:
            _hold(group, _present(group))
        kept = self._kept[index, axis]
        curve = self._losses(index, axis, kept)
        if refine:
            # Between the lowest and its neighbours there are dilations that were no candidates.
            group = self.groups[index]
            low, high = dilation_range(group[0])
            ratio = self._ratio(index)
            lowest = min(curve, key=lambda dilation: curve[dilation])
            finer = dilation_grid(max(low, lowest / ratio), min(high, lowest * ratio), 7, _whole(group))
            curve |= self._losses(index, axis, [dilation for dilation in finer if dilation not in curve])
        return dict(sorted(curve.items()))

    def _losses(self, index: int, axis: int, dilations: list[float]) -> dict[float, float]:
        group = self.groups[index]
        totals = torch.zeros(len(dilations), dtype=torch.float64)
        count = 0
        for batch in self.held_out:
            count += 1
            for place, dilation in enumerate(dilations):
                values = _present(group)
                values[axis] = dilation
                _hold(group, values)
                totals[place] += self.loss_fn(self.model, batch).double().cpu()
        if count == 0:
            raise ValueError("a sampled search reads its curve on held-out batches, but there is none")
        totals = mean_over_processes(totals / count)
        return dict(zip(dilations, totals.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "readings": self.readings, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.readings = state["readings"]
        self._kept = state["kept"]


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


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes of a distributed run; the number itself elsewhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def dilation_range(layer: LearnedFactor) -> tuple[float, float]:
    """The effective dilations that a search may try, along the tighter axis of the last map seen."""
    if layer.map_size is None:
        return 1.0, max(32.0, *layer.base_dilation)
    lower, upper = layer.factor_bounds(layer.map_size)
    least = max(base / bound for base, bound in zip(layer.base_dilation, upper, strict=True))
    greatest = min(base / bound for base, bound in zip(layer.base_dilation, lower, strict=True))
    return least, max(least, greatest)


def _log_dilation(layer: LearnedFactor) -> Tensor:
    axes = layer.log_factor.numel()
    return torch.tensor(layer.effective_dilation[:axes], dtype=torch.float64).log().requires_grad_()


def _set_dilation(group: Sequence[LearnedFactor], dilation: Sequence[float]) -> None:
    """Sets a group's factor so that its first layer has this effective dilation, one number or (height, width)."""
    first = group[0]
    first.set_factor([base / value for base, value in zip(first.base_dilation, dilation, strict=False)])


def _whole(group: Sequence[LearnedFactor]) -> bool:
    return all(layer.rounds for layer in group)


def _present(group: Sequence[LearnedFactor]) -> list[float]:
    """The effective dilation of a group's first layer, one number or (height, width); whole where it is run so."""
    first = group[0]
    values = list(first.effective_dilation[: first.log_factor.numel()])
    return [float(max(1, round(value))) if first.rounds else value for value in values]


def _hold(group: Sequence[LearnedFactor], dilation: Sequence[float], draw: random.Random | None = None) -> None:
    """Has a group's layers realise a dilation of the first, one number or (height, width).

    Layers that run at integers take the nearest, or one drawn by stochastic rounding if `draw` is given.
    """
    first = group[0]
    values = (dilation[0], dilation[-1])
    for layer in group:
        held = [values[axis] * layer.base_dilation[axis] / first.base_dilation[axis] for axis in (0, 1)]
        if layer.rounds:
            noise = [0.5, 0.5] if draw is None else [draw.random(), draw.random()]
            if len(dilation) == 1:  # A square field stays square.
                noise[1] = noise[0]
            held = [float(max(1, math.floor(value + shift))) for value, shift in zip(held, noise, strict=True)]
        layer.held = (held[0], held[1])
