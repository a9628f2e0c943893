"""Drawing dilations, evaluating the curve, narrowing the window, and the EMA of the weights."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import SampledSearch, curve_minimum, dilation_grid


class TestCurve:
    def test_grid(self) -> None:
        assert dilation_grid(1.0, 41.0, 14, whole=True)[:4] == [1.0, 2.0, 3.0, 4.0]
        assert len(dilation_grid(1.0, 41.0, 14, whole=False)) == 14
        assert dilation_grid(2.5, 2.5, 3, whole=True) == [3.0]

    def test_minimum(self) -> None:
        assert curve_minimum({1.0: 0.1, 2.0: 0.2, 3.0: 0.3}) == 1.0
        assert curve_minimum({1.0: 0.3, 2.0: 0.1, 4.0: 0.1, 8.0: 0.3}) == pytest.approx(math.sqrt(8))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_loss_that_is_not_finite_never_wins(self, bad: float) -> None:
        assert curve_minimum({1.0: bad, 2.0: 0.5, 4.0: 0.3}) == 4.0
        assert curve_minimum({1.0: 0.5, 2.0: bad, 4.0: 0.3, 8.0: 0.4}) == 4.0
        assert curve_minimum({1.0: 0.5, 2.0: 0.3, 4.0: bad}) == 2.0
        assert curve_minimum({1.0: bad, 2.0: 0.3, 4.0: bad}) == 2.0

    def test_no_finite_loss(self) -> None:
        with pytest.raises(ValueError, match=r"no loss of the curve is finite: \{1.0: nan, 2.0: inf\}"):
            curve_minimum({1.0: math.nan, 2.0: math.inf})

    def test_a_curve_without_finite_loss_names_the_layer(self, toy: Any) -> None:
        model = toy.model(3, 5, factor=(1.0, 1.0))

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            loss, factor_losses = toy.loss(3.0, 3.0)(model, batch)
            return loss, factor_losses + torch.tensor([0.0, math.nan])

        search = SampledSearch(model, loss_fn, 8, [toy.image])
        with pytest.raises(ValueError, match=r"step 2, the learned layer 1, height: no loss of the curve is finite"):
            toy.run(search, 8)
        assert model[1].dilation_override is None


class TestDraws:
    def test_each_round_has_every_stratum_once_in_an_order_of_its_own(self, toy: Any) -> None:
        orders = []
        for seed in (0, 1):
            search = SampledSearch(toy.model(3), toy.loss(3.0), 100, [toy.image], seed, narrowings={})
            search._ranges, search._windows = [(1.0, 2.0**10)], {(0, 0): (1.0, 2.0**10)}
            for start in (0, 10, 20):
                values = []
                for search.step_index in range(start, start + 10):
                    values.append(math.log2(search._draw_dilation(0, 0, search._random("dilation", 0))))
                orders.append([int(value) for value in values])
        assert all(sorted(order) == list(range(10)) != order for order in orders)
        assert len({tuple(order) for order in orders}) == 6

    def test_another_seed_gives_other_draws_and_the_same_one_the_same(self, toy: Any) -> None:
        def drawn(seed: int) -> list[list[float]]:
            search = SampledSearch(toy.model(3, 3), toy.loss(3.0, 3.0), 30, [toy.image], seed, narrowings={})
            toy.run(search, 20)
            return [dilations for _, dilations in search.trajectory]

        assert drawn(0) == drawn(0) != drawn(1)
        first, second = zip(*drawn(0), strict=True)
        assert first != second


class TestEvaluation:
    def test_range_and_window_of_a_map_that_is_no_square(self, toy: Any) -> None:
        """The range is that of the tighter axis of 12 x 24 px; the first window is clipped to it at both ends."""
        model = toy.model(5)
        search = SampledSearch(model, toy.loss(1.0), 20, [toy.image], narrowings={0.25: 1.5, 0.5: 100.0})
        toy.run(search, 5)
        assert search._ranges == [(1.0, 12.0)]
        assert search._windows[0, 0] == (1.0, 1.5)
        # A window gets its share of the ten candidates.
        assert [search._candidate_count(0, 1.0, high) for high in (12.0, 1.5, 1.0)] == [10, 3, 1]
        toy.run(search, 5)
        assert search._windows[0, 0] == (1.0, 12.0)

    def test_the_first_and_the_last_evaluation(self, toy: Any) -> None:
        search = SampledSearch(toy.model(5), toy.loss(6.0), 12, [toy.image], narrowings={0.5: 1.2}, candidates=4)
        toy.run(search, 12)
        (_, first), (_, last) = search.readings[0, 0]
        assert list(first) == [1, 2, 5, 12]
        # 6 +- 1.2: seven candidates, rounded to integers.
        assert list(last) == [5, 6, 7]

    def test_the_last_evaluation_has_seven_candidates(self) -> None:
        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=5, dilation=5))

        def loss_fn(model: Any, batch: Any) -> Any:
            return model(batch).mean() * 0 + math.log(model.realised_dilation[0] / 6) ** 2

        image = torch.randn(1, 1, 12, 12)
        search = SampledSearch(regulator, loss_fn, 12, [image], narrowings={0.5: 1.2}, candidates=4)
        for _ in range(12):
            search.loss(image)
            search.step()
        assert [len(curve) for _, curve in search.readings[0, 0]] == [4, 7]

    def test_factors_that_depend_on_each_other_are_evaluated_in_rounds(self, toy: Any) -> None:
        """The first layer is evaluated first, and its best dilation is that of the second, which changes."""

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            first, second = (layer.realised_dilation[0] for layer in model)
            return model(batch).mean(), torch.tensor([math.log(first / second) ** 2, math.log(second / 8) ** 2])

        model = toy.model(2, 2)
        search = SampledSearch(model, loss_fn, 1, [toy.image], narrowings={}, candidates=12)
        toy.run(search, 1)
        assert [layer.effective_dilation[0] for layer in model] == [8, 8]

    def test_a_regulator_runs_at_the_dilation_drawn_and_a_convolution_at_an_integer(self, toy: Any) -> None:
        from rfield.search.factors import current_dilation, override_dilation

        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=4, dilation=4))
        layer = toy.layer(2)
        layer.share_factor(regulator)
        override_dilation([regulator, layer], [3.7])
        assert (regulator.dilation_override, layer.dilation_override) == ((3.7, 3.7), (2, 2))
        override_dilation([layer], [3.7, 3.4])
        assert layer.dilation_override == (4, 3)
        override_dilation([layer], [0.2])
        assert layer.dilation_override == (1, 1)
        layer.set_factor(2 / 3.7)
        assert current_dilation([layer]) == [4]
        assert current_dilation([regulator]) == [pytest.approx(7.4)]

    def test_a_tenth_is_far(self, toy: Any) -> None:
        model = toy.model(5)
        search = SampledSearch(model, toy.loss(6.0), 20, [toy.image])
        toy.run(search, 1)
        for away, is_far in ((1.08, False), (1 / 1.08, False), (1.15, True), (1 / 1.15, True)):
            model[0].set_factor(5 / (6 * away))
            assert search._minimize(0, 0, {}) is is_far
            assert model[0].effective_dilation == pytest.approx((6, 6), rel=1e-3)


class TestBounds:
    def test_a_window_around_an_integer_dilation_outside_the_range(self, toy: Any) -> None:
        """Between 2.2 and 3.1 px the curve is evaluated at 3 only."""
        model = toy.model(6, factor=6 / 2.5, min_factor=6 / 3.1, max_factor=6 / 2.2)
        search = SampledSearch(model, toy.loss(1.0), 20, [toy.image], narrowings={0.25: 1.05, 0.5: 1.02})
        toy.run(search, 20)
        assert search.done
        assert {dilations[0] for _, dilations in search.trajectory} == {3}
        assert model[0].effective_dilation == (3, 3)

    @pytest.mark.parametrize("best", [1.0, 2.2, 2.5, 5.0, 40.0])
    @pytest.mark.parametrize("reach", [1.0, 1.01, 1.3])
    def test_no_window_ends_before_it_begins(self, toy: Any, best: float, reach: float) -> None:
        model = toy.model(4, min_factor=4 / 8.6)
        search = SampledSearch(model, toy.loss(best), 20, [toy.image], narrowings={0.25: reach, 0.5: reach})
        for _ in range(20):
            toy.run(search, 1)
            low, high = search._windows[0, 0]
            assert 1 <= low <= high <= 8.6 + 1e-6

    @pytest.mark.parametrize("kind", ["sampled", "spsa", "gradient"])
    def test_bounds_without_an_integer_dilation(self, toy: Any, kind: str) -> None:
        from rfield.search import GradientSearch, SpsaSearch

        model = nn.Sequential(toy.layer(1), toy.layer(6, factor=6 / 2.5, min_factor=6 / 2.8, max_factor=6 / 2.2))
        search = {
            "sampled": lambda: SampledSearch(model, toy.loss(3.0, 3.0), 5, [toy.image]),
            "spsa": lambda: SpsaSearch(model, toy.loss(3.0, 3.0), 5),
            "gradient": lambda: GradientSearch(model, lambda m, x: m(x).sum(), 5),
        }[kind]()
        with pytest.raises(ValueError, match=r"learned layer 1: its bounds .* dilations 2.2 to 2.8, none .* whole"):
            toy.run(search, 5)

    @pytest.mark.parametrize(
        "options",
        [
            {"narrowings": {0.5: 2.0, 0.6: 0.9}},
            {"narrowings": {0.5: 2.0, 1.5: 2.0}},
            {"narrowings": {0.0: 2.0}},
            {"candidates": 0},
        ],
    )
    def test_options(self, toy: Any, options: dict[str, Any]) -> None:
        search = SampledSearch(toy.model(3), toy.loss(3.0), 100, [toy.image])
        assert (search.seed, search.candidates, search.narrowings) == (0, 10, {25: 2.5, 40: 1.75, 60: 1.35})
        search = SampledSearch(
            toy.model(3), toy.loss(3.0), 3, [toy.image], narrowings={0.1: 1.0, 1.0: 1.0}, candidates=1
        )
        assert search.narrowings == {1: 1.0, 3: 1.0}
        with pytest.raises(ValueError, match="narrowings must be shares of the steps"):
            SampledSearch(toy.model(3), toy.loss(3.0), 5, [toy.image], **options)


class TestHeldOut:
    @pytest.mark.parametrize("once", [iter([1]), (x for x in [1]), map(str, [1]), zip([1], [2], strict=True)])
    def test_an_iterator_is_refused(self, toy: Any, once: Iterator[Any]) -> None:
        with pytest.raises(ValueError, match=r"held_out is a .*, which can be gone through once"):
            SampledSearch(toy.model(3), toy.loss(3.0), 5, once)

    @pytest.mark.parametrize("empty", [[], (), torch.zeros(0, 1, 9, 9), range(0)])
    def test_empty(self, toy: Any, empty: Any) -> None:
        with pytest.raises(ValueError, match="reads its curve on held-out batches, but there is none"):
            SampledSearch(toy.model(3), toy.loss(3.0), 5, empty)

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_loader_without_a_length(self, toy: Any, count: int) -> None:
        class Stream(IterableDataset[torch.Tensor]):
            def __iter__(self) -> Iterator[torch.Tensor]:
                return itertools.islice(itertools.repeat(toy.image[0]), count)

        loader = DataLoader(Stream(), batch_size=1)
        if count:
            toy.run(search := SampledSearch(toy.model(3), toy.loss(3.0), 2, loader), 2)
            assert search.done
        else:
            with pytest.raises(ValueError, match="there is none"):
                SampledSearch(toy.model(3), toy.loss(3.0), 5, loader)


class TestEma:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_follows_the_weights_by_three_percent_a_step(self, toy: Any, dtype: torch.dtype) -> None:
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1)).to(dtype)
        weight = model[1].weight
        with torch.no_grad():
            weight.fill_(1.0)
        search = SampledSearch(model, lambda m, x: m(x.to(dtype)).float().mean(), 50, [toy.image], narrowings={})
        toy.run(search, 1)
        with torch.no_grad():
            weight.fill_(1.1)
        for _ in range(10):
            toy.run(search, 1)
        kept = search.averaged.weights["1.weight"]
        assert kept.dtype == torch.promote_types(dtype, torch.float32)
        moved = (kept.item() - 1) / (weight.item() - 1)
        assert moved == pytest.approx(1 - 0.97**10, rel=1e-3)

    def test_is_used_for_evaluation_only(self, toy: Any) -> None:
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1))
        seen = []

        def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
            seen.append((torch.is_grad_enabled(), model[1].weight.item()))
            return model(batch).mean()

        with torch.no_grad():
            model[1].weight.fill_(0.0)
        search = SampledSearch(model, loss_fn, 2, [toy.image], narrowings={})
        toy.run(search, 1)
        with torch.no_grad():
            model[1].weight.fill_(1.0)
        seen.clear()
        toy.run(search, 1)
        (averaged,) = {weight for learning, weight in seen if not learning}
        assert averaged == pytest.approx(0.03)
        assert {weight for learning, weight in seen if learning} == {1.0}
        assert model[1].weight.item() == 1.0
        assert search.state_dict()["average"] == {}

    def test_a_bfloat16_model_keeps_its_weights_through_an_evaluation(self, toy: Any) -> None:
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1)).bfloat16()
        search = SampledSearch(model, lambda m, x: m(x.bfloat16()).float().mean(), 8, [toy.image])
        toy.run(search, 1)
        with torch.no_grad():
            model[1].weight.mul_(1.3)
        weight, average = model[1].weight.clone(), search.averaged.weights["1.weight"].clone()
        toy.run(search, 1)
        assert len(search.readings[0, 0]) == 1
        assert torch.equal(model[1].weight, weight)
        assert torch.equal(search.averaged.weights["1.weight"], average.lerp(weight.float(), 0.03))

    def test_frozen_weights_do_not_change(self, toy: Any) -> None:
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1).requires_grad_(False))
        search = SampledSearch(model, lambda m, x: m(x).mean(), 8, [toy.image])
        toy.run(search, 1)
        assert set(search.averaged.weights) == {"0.weight", "0.bias"}


def test_layers_that_share_a_factor_lose_their_overrides(toy: Any) -> None:
    model = toy.model(2, 4)
    model[1].share_factor(model[0])
    search = SampledSearch(model, lambda m, x: m(x).mean(), 3, [toy.image])
    toy.run(search, 3)
    assert [layer.dilation_override for layer in model] == [None, None]
    assert all(isinstance(layer, AdaptiveConv2d) and layer.snapped for layer in model)
