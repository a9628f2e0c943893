"""Search by simultaneous perturbation."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from rfield.search import SpsaSearch


class TestSpsa:
    def test_accumulates_the_mean_difference(self, cues: Any) -> None:
        batches, moved = cues.batches(2), []
        for parts in (batches, [(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))]):
            model = cues.model(9)
            search = SpsaSearch(model, cues.loss, steps=10)
            for part in parts:
                search.loss(part)
            search.step()
            moved.append(model[0].effective_dilation[0])
        assert moved[0] == pytest.approx(moved[1], rel=1e-5)
        assert moved[0] != 9.0

    def test_the_weights_learn_from_both_losses(self, toy: Any) -> None:
        seen = []

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            seen.append(model(batch).mean())
            return seen[-1], seen[-1].bfloat16()[None]

        search = SpsaSearch(toy.model(5), loss_fn, 10)
        loss = search.loss(toy.image)
        assert search._loss_pairs[0].dtype is torch.float32, "to be added up"
        above, below = seen
        assert above.item() != below.item()
        assert loss.item() == pytest.approx((above.item() + below.item()) / 2)

    def test_the_trajectory_is_that_of_the_last_forward_pass(self, cues: Any) -> None:
        """The backward passes run both in reverse order."""
        model = cues.model(9)
        search = SpsaSearch(model, cues.loss, 10)
        loss = search.loss(cues.batches(1)[0])
        realised = model[0].realised_dilation[0]
        loss.backward()
        assert model[0].realised_dilation[0] != realised
        search.step()
        assert search.trajectory == [(1, [realised])]

    def test_draws_another_dilation_each_step_and_with_each_seed(self, toy: Any) -> None:
        def drawn(seed: int) -> list[float]:
            search = SpsaSearch(toy.model(6), toy.loss(6.0), 30, seed)
            draws = []
            for _ in range(12):
                draws.append(search._epsilon(0, search._log_dilation[0]).item())
                toy.run(search, 1)
            return draws

        search = SpsaSearch(toy.model(6), toy.loss(6.0), 10**6)
        assert (search.seed, search.scale, search._optimizer.defaults["lr"]) == (0, 0.6, 0.03)
        assert search._optimizer.defaults["betas"] == (0.9, 0.99)
        center, sizes = search._log_dilation[0], []
        for search.step_index in range(300):
            sizes.append(abs(search._epsilon(0, center).item()))
        assert (min(sizes), max(sizes)) == (pytest.approx(0.05), pytest.approx(1.2, rel=1e-3))
        assert sum(size > 0.6 for size in sizes) / 300 == pytest.approx(0.32, abs=0.06), "half-normal of scale 0.6"
        height, width = search._epsilon(0, torch.zeros(2)).tolist()
        assert len({height, width, search._epsilon(1, center).item()}) == 3, "one for each factor and axis"
        search.step_index = 10**6 - 1
        assert abs(search._epsilon(0, center).item()) == pytest.approx(0.05)
        assert len(set(drawn(0))) == 12
        assert {draw > 0 for draw in drawn(0)} == {True, False}
        assert drawn(0) == drawn(0)
        assert drawn(0) != drawn(1)

    @pytest.mark.parametrize(("best", "bound"), [(0.01, 1.0), (900.0, 12.0)])
    def test_stays_within_the_tighter_axis(self, toy: Any, best: float, bound: float) -> None:
        """On a map of 12 x 24 px."""
        model = toy.model(6)
        search = SpsaSearch(model, toy.loss(best), 40, lr=0.5)
        toy.run(search, 20)
        assert model[0].effective_dilation == pytest.approx((bound, bound))
        assert search._log_dilation[0].item() == pytest.approx(math.log(bound))

    def test_grows_again_while_it_is_larger_than_the_map(self, toy: Any) -> None:
        """From 20, which extends its range, on a map of 12 px: the dilation falls first and grows again."""
        model = toy.model(20)
        best = [10.0]
        search = SpsaSearch(model, lambda m, x: toy.loss(best[0])(m, x), 60, lr=0.1)
        toy.run(search, 4)
        lowest = model[0].effective_dilation[0]
        assert 12 < lowest < 19
        best[0] = 90.0
        toy.run(search, 20)
        assert model[0].effective_dilation[0] == pytest.approx(20)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_names_a_loss_that_is_not_finite(self, toy: Any, bad: float) -> None:
        model = toy.model(3, 5)

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            loss, factor_losses = toy.loss(3.0, 3.0)(model, batch)
            return loss, factor_losses + torch.tensor([0.0, bad if search.step_index == 2 else 0.0])

        search = SpsaSearch(model, loss_fn, 8)
        toy.run(search, 2)
        before = search.state_dict()["log_dilation"]
        with pytest.raises(ValueError, match=rf"step 3: the losses above and below the dilation .* of 1 are {bad} and"):
            toy.run(search, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, search.state_dict()["log_dilation"], strict=True))
