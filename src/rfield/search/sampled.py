"""Search without a start value: train at random dilations, evaluate the loss curve, keep the best dilation."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers.dilation import integer_range
from rfield.search.base import LossFunction, Search
from rfield.search.certainty import Verdict, judge
from rfield.search.curve import NO_HELD_OUT, check_held_out, curve_minimum, dilation_grid, mean_curve
from rfield.search.ema import AveragedWeights
from rfield.search.factors import (
    current_dilation,
    dilation_range,
    gather_rows,
    override_dilation,
    reshard,
    runs_at_integers,
    set_effective_dilation,
)
from rfield.search.paired import standard_errors
from rfield.search.sets import Rate, ReadPaths, parallel_factors, read_combinations, shares

# {share of the steps: ratio}. After that share of the steps, the window extends from the minimum by that ratio to each
# side.
NARROWINGS = {0.25: 2.5, 0.4: 1.75, 0.6: 1.35}


class SampledSearch(Search):
    """Search that needs no start value: train at random dilations and keep the one with the least held-out loss.

    Every step runs at a dilation drawn log-uniformly from a window. The window is at first the whole range, so that the
    weights learn to work at all dilations. Then the loss on held-out training images, evaluated across the window with
    the exponential moving average (EMA) of these shared weights, is a receptive-field curve. After each evaluation the
    window becomes narrower and is centred on the curve's minimum, so that the weights train mostly on the dilations
    that matter. Small dilations are learned faster, and a minimum that was found too early is corrected by the next
    evaluations. The search ends at the minimum of the last one, snapped to an integer. When the search is `done`, the
    held-out images can be used for training again.

    With several factors, all dilations are drawn independently. An evaluation varies one factor and axis at a time,
    with the others at their best dilations, and is repeated until no minimum moves.

    Factors of parallel branches form a set, see `parallel_factors`. Their windows are at first adjacent shares of the
    range, in the order of the branches, so that the branches become different: branches that all draw from the whole
    range stay alike. With `read_paths`, the dilations of a set are chosen together: each branch is evaluated once for
    each candidate, and all combinations are scored by adding the branches' logits. The first such evaluation also finds
    which rates are of use: the range from the smallest of them to 1.5 times the largest is divided into new shares.

    Args:
        model, loss_fn, steps, seed: see `Search`.
        held_out: batches of training images that the search does not train on; every evaluation iterates over them.
            The standard errors are taken over the batches, so batches of one image give the most reliable ones. If it
            has a method `half`, as `rfield.search.held_out.HeldOut` has, the evaluations before the last one, which
            only choose the next windows, iterate over what that returns.
        narrowings: {share of the steps: ratio}: when to evaluate the curve before the end, and how far the window then
            extends from the minimum, as a ratio to each side. Do not evaluate too early: weights that have learned
            little prefer dilations at which the kernel's outer taps leave the map.
        candidates: number of dilations at which the whole range is evaluated; a narrower window gets its share of them.
        read_paths: `read_paths(model, batch)` returns the logits of each branch, for models whose logits are the sum
            of parallel branches that hold all learned factors, in their order. Logits of further branches, which have
            no factor, may follow; the search still ends with as many branches as there are factors.
        fewest: with `read_paths`, end with the fewest branches whose loss is within one standard error of the best
            combination's, instead of with all.

    Attributes:
        averaged: the EMA of the weights, which works at all dilations of the range; empty in a finished search that was
            loaded.
        sets: for each set of parallel branches the indices of its factors.
        set_readings: with `read_paths`, all evaluations of combinations so far, see `Combinations.describe`; `chosen`
            are the rates that were chosen, and `class_costs` tells which branch serves which class.
        left_out: once the search is `done`, the indices of the branches, as `read_paths` orders them, that were not
            chosen.
        readings: for each (factor, axis), all curves evaluated so far, as (step, {dilation: held-out loss}).
        losses: the same, with the list of the losses of all held-out batches, of all processes, in place of each loss.

    Raises:
        ValueError: for `narrowings` or `candidates` out of range, for held-out batches that are empty or can be
            iterated over only once, or as `Search` does.
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
        read_paths: ReadPaths | None = None,
        fewest: bool = False,
    ) -> None:
        if any(not 0 < share <= 1 or reach < 1 for share, reach in narrowings.items()) or candidates < 1:
            raise ValueError(
                "narrowings must be shares of the steps above 0 and up to 1, with a reach of at least 1, and "
                f"candidates at least 1; got {dict(narrowings)} and {candidates}"
            )
        check_held_out(held_out)
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
        self.sets = parallel_factors(model, self.groups)
        if read_paths is not None and self.sets != [[*range(len(self.groups))]]:
            raise ValueError(
                "read_paths needs a model whose learned factors are those of one set of parallel branches (the members "
                f"of one nn.ModuleList, one factor each), got {len(self.groups)} factors with the sets {self.sets}"
            )
        if fewest and read_paths is None:
            raise ValueError("fewest needs read_paths, since other branches are not evaluated apart")
        self.read_paths = read_paths
        self.fewest = fewest
        self.left_out: list[int] = []
        self.set_readings: list[dict[str, Any]] = []
        self._ranges: list[tuple[float, float]] = []
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}
        self.averaged = AveragedWeights(model)
        self._freeze_factors()

    def loss(self, batch: Any) -> Tensor:
        if not self.done:
            self.begin_step(batch)
        return self._call_loss_fn(batch)[0]

    def begin_step(self, batch: Any) -> None:
        """Make the layers run at this step's dilations, for a training loop that computes the loss by itself.

        `step` ends it. The first call runs `loss_fn` on the batch, for the layers to record the sizes of their maps.
        """
        if not self._windows:
            for group in self.groups:  # with an override, a regulator respects its memory budget
                override_dilation(group, group[0].effective_dilation[: group[0].log_factor.numel()])
            with torch.no_grad():
                self._call_loss_fn(batch)  # for the layers to record their map sizes
            reshard(self.model)
            self._clear_overrides()
            self._check_layers()
            self._ranges = [dilation_range(group) for group in self.groups]
            self._windows = {key: self._ranges[key[0]] for key in self.readings}
            for members in self.sets:
                self._share_range(members, *self._set_range(members))
        for index, group in enumerate(self.groups):
            draw = self._random("dilation", index)
            dilation = [self._draw_dilation(index, axis, draw) for axis in range(group[0].log_factor.numel())]
            override_dilation(group, dilation, draw)
        self._keep_overrides()

    def _set_range(self, members: Sequence[int]) -> tuple[float, float]:
        """Return the range that a set's branches share: up to half the map, since larger kernels see mostly zeros."""
        low = max(self._ranges[index][0] for index in members)
        high = min(self._ranges[index][1] for index in members)
        sizes = [layer.map_size for index in members for layer in self.groups[index] if layer.map_size is not None]
        return low, max(low, min(high, max(max(size) for size in sizes) // 2))

    def _share_range(self, members: Sequence[int], low: float, high: float) -> None:
        """Make a set's windows adjacent shares of a range."""
        for index, window in zip(members, shares(low, high, len(members)), strict=True):
            for axis in range(self.groups[index][0].log_factor.numel()):
                self._windows[index, axis] = window

    def _draw_dilation(self, index: int, axis: int, draw: random.Random) -> float:
        """Draw a dilation from the window, log-uniform and stratified.

        There are as many strata as candidates, and each round draws from every stratum once. Weights adapt to the
        dilations that they saw last, and without strata a run of large dilations before an evaluation would make large
        dilations look better than they are.
        """
        low, high = self._windows[index, axis]
        strata = self._candidate_count(index, low, high)
        rounds, place = divmod(self.step_index, strata)
        order = random.Random(repr((self.seed, "round", index, axis, rounds, strata))).sample(range(strata), strata)
        return low * math.pow(high / low, (order[place] + draw.random()) / strata)

    def _candidate_count(self, index: int, low: float, high: float) -> int:
        """Return a window's share of the candidates."""
        least, greatest = self._ranges[index]
        share = math.log(high / low) / math.log(greatest / least) if greatest > least else 0.0
        return 1 + math.ceil((self.candidates - 1) * share)

    def _update_factors(self) -> None:
        self._record()
        self.averaged.update()
        last = self.step_index >= self.steps
        if last or self.step_index in self.narrowings:
            self._evaluate_curves()
        if last:
            self._finalize()

    def curve(self, index: int = 0, axis: int = 0) -> dict[float, float]:
        """Return {dilation: held-out loss} for one factor and axis, with each dilation's last evaluation."""
        merged: dict[float, float] = {}
        for _, reading in self.readings[index, axis]:
            merged |= reading
        return dict(sorted(merged.items()))

    def errors(self, index: int = 0, axis: int = 0) -> dict[float, float]:
        """Return the standard errors of `curve`: of each loss's difference to the least loss of its evaluation."""
        merged: dict[float, float] = {}
        for _, losses in self.losses[index, axis]:
            merged |= standard_errors([losses])
        return dict(sorted(merged.items()))

    def verdict(
        self, index: int = 0, axis: int = 0, chance: float | None = None, random_backbone: bool = False
    ) -> Verdict:
        """Return how reliable the result for one factor and axis is, compared with the dilation at the start.

        Args:
            index: which factor.
            axis: 0 for the height, 1 for the width.
            chance: the held-out loss of always predicting the classes' shares, see `class_share_loss`. Default: the
                network's loss is not compared with it.
            random_backbone: whether the backbone is frozen at random weights.

        Raises:
            ValueError: if no curve has been evaluated yet.
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

    def _certainty(self, index: int, axis: int) -> str:
        return f"; {self.verdict(index, axis)}" if self.losses[index, axis] else ""

    def _evaluate_curves(self) -> None:
        """Evaluate all curves, set each factor to its best dilation, and narrow the windows around that."""
        with self.averaged.swapped_in():
            try:
                losses = self._evaluate_each() if self.read_paths is None else self._evaluate_set(self.read_paths)
            finally:
                self._clear_overrides()
        reach = self.narrowings.get(self.step_index, 1.0)
        for (index, axis), batch_losses in losses.items():
            self.readings[index, axis].append((self.step_index, mean_curve(batch_losses)))
            self.losses[index, axis].append((self.step_index, batch_losses))
            low, high = self._ranges[index]
            best = self.groups[index][0].effective_dilation[axis]
            self._windows[index, axis] = max(low, best / reach), min(high, best * reach)
        if len(self.set_readings) == 1:
            self._share_range(self.sets[0], *self._wanted_range())

    def _evaluate_each(self) -> dict[tuple[int, int], dict[float, list[float]]]:
        """Evaluate one factor and axis at a time, until no minimum moves."""
        losses: dict[tuple[int, int], dict[float, list[float]]] = {}
        for _ in range(3 if len(self.readings) > 1 else 1):
            moved = [self._minimize(index, axis, losses) for index, axis in self.readings]
            if not any(moved):
                break
        return losses

    def _evaluate_set(self, read_paths: ReadPaths) -> dict[tuple[int, int], dict[float, list[float]]]:
        """Evaluate all combinations, set the factors to the best, and return the curves of each factor around it."""
        candidates: list[list[Rate]] = [
            [*itertools.product(*(self._grid(index, axis) for axis in range(group[0].log_factor.numel())))]
            for index, group in enumerate(self.groups)
        ]
        table = read_combinations(self.model, self.groups, read_paths, self._batches(), candidates)
        draw = self._random("set")
        wanted = len(self.groups)
        table.search(1, wanted, draw)  # for the losses of fewer branches
        best = table.search_guided(table.search(wanted, wanted, draw))
        if not math.isfinite(table.loss(best)):
            raise ValueError(f"step {self.step_index}: no combination of dilations has a finite loss")
        if self.step_index >= self.steps:
            best = table.fewest() if self.fewest else best
            self.left_out = [index for index, place in enumerate(best) if place is None]
        self.set_readings.append(table.describe(self.step_index, best))
        for group, rate in zip(self.groups, table.rates(best), strict=False):  # those without a factor come last
            if rate is not None:
                set_effective_dilation(group, rate)
        return {(index, axis): table.curve(best, index, axis) for index, axis in self.readings}

    def _wanted_range(self) -> tuple[float, float]:
        """Return the smallest dilation of the best combination, paths left out or not, and 1.5 times its largest."""
        rates = self.set_readings[0]["best"][0]["rates"]
        wanted = [rate for rate in rates[: len(self.groups)] if rate is not None]
        low, high = self._set_range(self.sets[0])
        return max(low, min(map(min, wanted))), min(high, 1.5 * max(map(max, wanted)))

    def _minimize(self, index: int, axis: int, losses: dict[tuple[int, int], dict[float, list[float]]]) -> bool:
        """Set one factor and axis to the minimum of its curve, store its losses, and return whether it moved far."""
        before = self.groups[index][0].effective_dilation[axis]
        losses[index, axis] = self._evaluate_curve(index, axis)
        try:
            best = curve_minimum(mean_curve(losses[index, axis]))
        except ValueError as error:
            side = ("height", "width")[axis]
            name = self._layer_names(self.groups[index])
            raise ValueError(f"step {self.step_index}, the learned layer {name}, {side}: {error}") from error
        values = list(self.groups[index][0].effective_dilation[: self.groups[index][0].log_factor.numel()])
        values[axis] = best
        set_effective_dilation(self.groups[index], values)
        return abs(math.log(best / before)) > 0.1

    @torch.no_grad()
    def _evaluate_curve(self, index: int, axis: int) -> dict[float, list[float]]:
        """Return {dilation: loss of each held-out batch} across the window of one factor and axis.

        All other factors and axes stay at their best dilations.
        """
        for group in self.groups:
            override_dilation(group, current_dilation(group))
        return self._evaluate_dilations(index, axis, self._grid(index, axis))

    def _batches(self) -> Iterable[Any]:
        """Return the held-out batches of an evaluation."""
        half: Callable[[], Iterable[Any]] | None = getattr(self.held_out, "half", None)
        return self.held_out if half is None or self.step_index >= self.steps else half()

    def _grid(self, index: int, axis: int) -> list[float]:
        """Return the dilations at which a window is evaluated."""
        group = self.groups[index]
        low, high = self._windows[index, axis]
        count = max(7 if self.step_index >= self.steps else 4, self._candidate_count(index, low, high))
        grid = dilation_grid(low, high, count, runs_at_integers(group))
        # Rounding may move the grid's ends out of the range, and the next window would be empty.
        if runs_at_integers(group) and (integers := integer_range(*self._ranges[index])):
            grid = sorted({float(min(max(dilation, integers[0]), integers[1])) for dilation in grid})
        return grid

    def _evaluate_dilations(self, index: int, axis: int, dilations: list[float]) -> dict[float, list[float]]:
        group = self.groups[index]
        rows = [torch.empty(0, len(dilations), dtype=torch.float64)]
        for batch in self._batches():
            row = []
            for dilation in dilations:
                values = current_dilation(group)
                values[axis] = dilation
                override_dilation(group, values)
                row.append(self._call_loss_fn(batch)[1][index].double().cpu())
            rows.append(torch.stack(row)[None])
        reshard(self.model)
        losses = gather_rows(torch.cat(rows))
        if not len(losses):
            raise ValueError(NO_HELD_OUT)
        return dict(zip(dilations, losses.T.tolist(), strict=True))

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "narrowings": self.narrowings,
            "readings": self.readings,
            "losses": self.losses,
            "set_readings": self.set_readings,
            "left_out": self.left_out,
            "ranges": self._ranges,
            "windows": self._windows,
            "average": {}
            if self.done
            else self.averaged.weights,  # not needed any more, and checkpoints become smaller
        }

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.narrowings = state["narrowings"]
        self.readings = state["readings"]
        self.losses = state["losses"]
        self.set_readings = state["set_readings"]
        self.left_out = state["left_out"]
        self._ranges = state["ranges"]
        self._windows = state["windows"]
        self.averaged.load(state["average"])
