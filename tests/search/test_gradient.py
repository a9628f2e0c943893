"""Search by the exact gradient, which an optimizer applies."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield import adapt, parameter_groups
from rfield.layers import AdaptiveConv2d
from rfield.search import GradientSearch, SampledSearch, learned_layers


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def fit(search: GradientSearch, optimizers: list[torch.optim.Optimizer], toy: Any, steps: int) -> None:
    for _ in range(steps):
        search.loss(toy.image).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        search.step()


class TestOptimizer:
    @pytest.mark.parametrize("steps", [3, 30])
    def test_one_that_was_made_before_adapt_is_named(self, toy: Any, steps: int) -> None:
        model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=3, dilation=3), nn.Conv2d(1, 1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adapt(model)
        search = GradientSearch(model, mean, steps)
        assert search.seed == 0
        # Said at the tenth step, or at the last.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(search, [optimizer], toy, min(9, steps - 1))
        with pytest.raises(ValueError, match="no optimizer that has stepped holds the factor of 0, so that"):
            fit(search, [optimizer], toy, 1)

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: [torch.optim.Adam(parameter_groups(model, 0.01, 0.01))],
            lambda model: [torch.optim.SGD(parameter_groups(model, 0.0, 0.0), lr=0.0)],
            lambda model: [torch.optim.SGD(groups["params"], lr=0.1) for groups in parameter_groups(model, 0.1, 0.1)],
            lambda model: [],
        ],
    )
    def test_others_are_not(self, toy: Any, make: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> None:
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(GradientSearch(model, mean, 12), make(model), toy, 12)

    def test_that_of_another_model_does_not_count(self, toy: Any) -> None:
        model, other = toy.model(3), nn.Conv2d(1, 1, 1)
        other.weight.grad = torch.ones_like(other.weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(GradientSearch(model, mean, 12), [torch.optim.SGD(other.parameters(), lr=0.1)], toy, 12)


def test_a_factor_that_is_no_number_is_named(toy: Any) -> None:
    model = toy.model(3, 4)
    search = GradientSearch(model, mean, 9)
    search.loss(toy.image).backward()
    with torch.no_grad():
        model[1].log_factor.fill_(math.nan)
    with pytest.raises(ValueError, match=r"step 1: the factor of 1 is \[nan\]: the training has diverged"):
        search.step()


class TestLayersThatDoNotRun:
    @pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
    @pytest.mark.parametrize("seen", [False, True])
    def test_one_is_named(self, toy: Any, kind: str, seen: bool) -> None:
        """Also if it has run before the search."""
        from rfield.search import SpsaSearch

        model = nn.ModuleDict({"used": toy.layer(3), "spare": nn.Sequential(toy.layer(5))})
        if seen:
            model["spare"](toy.image)

        def loss_fn(model: Any, batch: Tensor) -> Tensor:
            return model["used"](batch).mean()

        search = {
            "gradient": lambda: GradientSearch(model, loss_fn, 5),
            "spsa": lambda: SpsaSearch(model, loss_fn, 5),
            "sampled": lambda: SampledSearch(model, loss_fn, 5, [toy.image]),
        }[kind]()
        with pytest.raises(ValueError, match=r"learned layer spare.0 has not run in the forward pass"):
            toy.run(search, 1)

    def test_one_that_shares_a_factor_may_rest(self, toy: Any) -> None:
        model = nn.ModuleDict({"spare": toy.layer(6), "used": toy.layer(3)})
        model["used"].share_factor(model["spare"])
        search = SampledSearch(model, lambda m, x: m["used"](x).mean(), 4, [toy.image])
        toy.run(search, 4)
        # Dilations of the first layer on the second layer's map, where the second may have 1 to 12.
        assert search._ranges == [(2.0, 24.0)]
        assert all(layer.effective_dilation[0] == int(layer.effective_dilation[0]) for layer in model.values())

    def test_a_batch_that_does_not_run_a_layer_with_a_loss_of_its_own(self, toy: Any) -> None:
        model = toy.model(3, 5)

        def loss_fn(model: Any, batch: tuple[Tensor, bool]) -> tuple[Tensor, Tensor]:
            image, both = batch
            output = model[1](model[0](image)) if both else model[0](image)
            return output.mean(), torch.stack([output.square().mean(), output.abs().mean()])

        search = GradientSearch(model, loss_fn, 9)
        search.loss((toy.image, True)).backward()
        search.step()
        assert model[1].log_factor.grad is not None
        model.zero_grad()
        search.loss((toy.image, False)).backward()
        assert model[1].log_factor.grad is None
        assert model[0].log_factor.grad.abs() > 0


def test_a_factor_loss_that_is_the_loss_itself_changes_nothing(toy: Any) -> None:
    gradients = []
    for separate in (False, True):
        model = toy.model(3)
        model[0].set_factor(1.1)

        def loss_fn(model: nn.Module, batch: Tensor, separate: bool = separate) -> Any:
            loss = mean(model, batch)
            return (loss, loss[None]) if separate else loss

        search = GradientSearch(model, loss_fn, 9)
        search.loss(toy.image).backward()
        (group,) = learned_layers(model)
        assert isinstance(group[0], AdaptiveConv2d)
        gradients.append(group[0].log_factor.grad)
    assert torch.equal(*gradients)
