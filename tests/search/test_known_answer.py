"""Each search finds the dilation that is known to be best."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import (
    NARROWINGS,
    GradientSearch,
    SampledSearch,
    SpsaSearch,
    curve_minimum,
    learned_layers,
)


class TestKnownAnswer:
    @pytest.mark.parametrize("start", [1, 3, 12, 24])
    def test_sampled_search_finds_it_from_any_start(self, cues: Any, start: int) -> None:
        model = cues.model(start)
        search = SampledSearch(model, cues.loss, steps=80, held_out=cues.batches(2, seed=1))
        cues.run(search, model, cues.batches(80))
        assert search.done
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(cues.best)
        curve = search.curve()
        assert len(curve) >= 8
        assert curve[min(curve)] > min(curve.values()) < curve[max(curve)]

    def test_window_narrows_around_the_minimum(self, cues: Any) -> None:
        model = cues.model(20)
        search = SampledSearch(model, cues.loss, steps=80, held_out=cues.batches(2, seed=1))
        cues.run(search, model, cues.batches(80))
        readings = search.readings[0, 0]
        assert [step for step, _ in readings] == [20, 32, 48, 80]
        for (step, curve), (end, _), reach in zip(readings, readings[1:], NARROWINGS.values(), strict=False):
            best = curve_minimum(curve)
            drawn = [dilations[0] for at, dilations in search.trajectory if step < at <= end]
            # Stochastic rounding may exceed the window by less than 1.
            assert best / reach - 1 < min(drawn) < best < max(drawn) < best * reach + 1
        early = [dilations[0] for at, dilations in search.trajectory if at <= 20]
        assert min(early) <= 2
        assert max(early) >= 25

    def test_a_minimum_found_too_early_is_corrected(self, cues: Any) -> None:
        """The best dilation changes from 3 to 8 during the training."""

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            best = 3 + 5 * min(1.0, search.step_index / 60)
            distance = abs(math.log(learned_layers(model)[0][0].realised_dilation[0] / best))
            return distance + 0 * cues.loss(model, batch)

        model = cues.model(6)
        search = SampledSearch(model, loss_of, steps=100, held_out=cues.batches(1))
        cues.run(search, model, cues.batches(100))
        minima = [curve_minimum(curve) for _, curve in search.readings[0, 0]]
        assert minima == sorted(minima)
        assert minima[0] < 6
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(8)

    def test_sampled_search_in_a_regulator(self, cues: Any) -> None:
        model = cues.model(16, "regulator")
        search = SampledSearch(model, cues.loss, steps=80, held_out=cues.batches(2, seed=1))
        cues.run(search, model, cues.batches(80))
        regulator = model[0]
        assert regulator.snapped
        assert regulator.effective_dilation[0] == pytest.approx(cues.best, abs=1.01)

    @pytest.mark.parametrize("start", [5, 8])
    def test_spsa_finds_it_from_nearby(self, cues: Any, start: int) -> None:
        model = cues.model(start)
        search = SpsaSearch(model, cues.loss, steps=120, scale=0.3)
        cues.run(search, model, cues.batches(120))
        assert search.done
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(cues.best)

    def test_gradient_goes_the_right_way(self, cues: Any) -> None:
        model = cues.model(5)
        cues.run(GradientSearch(model, cues.loss, steps=100), model, cues.batches(99))
        assert 5.4 < learned_layers(model)[0][0].effective_dilation[0] < 6.6

    def test_rectangular_field(self, cues: Any) -> None:
        """The class depends on a pixel to the right: the width is found, and the height does not matter."""
        torch.manual_seed(0)
        conv = AdaptiveConv2d(1, 8, 3, padding=3, dilation=3, factor=(1.0, 1.0))
        model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 2, 1))
        search = SampledSearch(model, cues.loss, steps=120, held_out=cues.batches(2, seed=1))
        cues.run(search, model, cues.batches(120))
        assert conv.effective_dilation[1] == pytest.approx(cues.best)
        assert set(search.readings) == {(0, 0), (0, 1)}

    def test_two_factors_at_once(self, cues: Any) -> None:
        """Two parallel layers on channels with different best dilations."""

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.near = AdaptiveConv2d(1, 8, 3, padding=5, dilation=5)
                self.far = AdaptiveConv2d(1, 8, 3, padding=5, dilation=5)
                self.heads = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(2))

            def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
                paths = (self.near(input[:, :1]), self.far(input[:, 1:]))
                near, far = (head(path.relu()) for head, path in zip(self.heads, paths, strict=True))
                return near, far

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            outputs = model(torch.cat([batch[0][0], batch[1][0]], dim=1))
            losses = [F.cross_entropy(o, b[1], ignore_index=255) for o, b in zip(outputs, batch, strict=True)]
            return torch.stack(losses).sum()

        def both(count: int, seed: int) -> list[Any]:
            return list(zip(cues.batches(count, seed, 3), cues.batches(count, seed + 9, 8), strict=True))

        model = Two()
        search = SampledSearch(model, loss_of, steps=120, held_out=both(2, 1))
        cues.run(search, model, both(120, 0))
        assert (model.near.effective_dilation[0], model.far.effective_dilation[0]) == pytest.approx((3.0, 8.0))
