"""After a search every layer has its own integer dilation, also if layers share a factor."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rfield import adapt, fuse
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch, learned_layers


def conv(dilation: int | tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, padding=dilation, dilation=dilation)


class Block(nn.Module):
    """Parallel branches in a list."""

    def __init__(self, *dilations: Any) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv(dilation) for dilation in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def image() -> torch.Tensor:
    return torch.randn(1, 2, 15, 17, generator=torch.Generator().manual_seed(1))


def learn(model: nn.Module, kind: str, steps: int = 4) -> Search:
    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    if kind == "sampled":
        search: Search = SampledSearch(model, loss_fn, steps, [image()], candidates=3, narrowings={})
    else:
        search = {"gradient": GradientSearch, "spsa": SpsaSearch}[kind](model, loss_fn, steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        search.loss(image()).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
    assert search.done
    return search


@pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
@pytest.mark.parametrize("share", [None, "parallel", "layer", "stage"])
@pytest.mark.parametrize(
    ("bases", "axes"), [((1, 2, 3), 1), (((1, 3), (2, 2), (5, 1)), 1), (((1, 3), (2, 2), (5, 1)), 2)]
)
def test_every_layer_is_at_an_integer_and_fuse_changes_nothing(kind: str, share: Any, bases: Any, axes: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(*bases), conv(bases[1]))
    layers = adapt(model, "*", share=share, axes=axes)
    search = learn(model, kind)
    dilations = [layer.effective_dilation for layer in layers]
    assert all(value == int(value) >= 1 for pair in dilations for value in pair)
    for group, ended in zip(search.groups, search.unsnapped, strict=True):
        assert len(ended) == axes
        for layer in group:
            factor = [base / end for base, end in zip(group[0].base_dilation, ended, strict=False)]
            exact = [base / factor[min(axis, axes - 1)] for axis, base in enumerate(layer.base_dilation)]
            assert all(
                abs(a - b) <= 0.5 + 1e-4 or b < 0.5 for a, b in zip(layer.effective_dilation, exact, strict=True)
            )
    plain = fuse(model)
    assert [module.dilation for module in plain.modules() if isinstance(module, nn.Conv2d)] == dilations
    assert torch.equal(plain(image()), model(image()))
    reopened = nn.Sequential(Block(*bases), conv(bases[1]))
    adapt(reopened, "*", share=share, axes=axes)
    reopened.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(reopened(image()), model(image()))


@pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
def test_regulators_and_convolutions_that_share_a_factor(kind: str) -> None:
    torch.manual_seed(0)
    regulator = ReceptiveFieldRegulator(nn.Sequential(conv(2), nn.ReLU(), conv((3, 4))))
    model = nn.Sequential(regulator, AdaptiveConv2d.from_conv(conv(5)), ReceptiveFieldRegulator(conv(3)))
    for layer in (model[1], model[2]):
        layer.share_factor(model[0])
    assert [len(group) for group in learned_layers(model)] == [3]
    learn(model, kind)
    assert all(layer.snapped and layer.dilation_override is None for layer in model)
    assert all(value == int(value) for layer in model for value in layer.effective_dilation)
    assert torch.equal(fuse(model)(image()), model(image()))


def test_evaluation_and_snapping_round_alike(toy: Any) -> None:
    """2.5 runs as 3 during the search and is snapped to 3."""
    model = toy.model(5)
    search = SpsaSearch(model, toy.loss(2.5), 1)
    search.loss(toy.image)
    model[0].set_factor(2.0)
    search._log_dilation[0].data.fill_(torch.tensor(2.5).log())
    search._loss_pairs.clear()
    search.step()
    assert search.unsnapped == [[pytest.approx(2.5)]]
    assert model[0].effective_dilation == (3, 3)


def test_the_snapped_dilation_stays_within_the_bounds(toy: Any) -> None:
    """The best is the bound of 4.6, and 5 lies outside."""
    model = toy.model(4, min_factor=4 / 4.6)
    search = SampledSearch(model, toy.loss(9.0), 6, [toy.image])
    toy.run(search, 6)
    assert model[0].effective_dilation == (4, 4)
    assert max(search.curve()) == 4
    assert max(dilations[0] for _, dilations in search.trajectory) == 4


class TestSecondSearch:
    def test_frozen_and_snapped_layers_stay(self, toy: Any) -> None:
        model = toy.model(3, 5, 2)
        model[0].freeze_factor()
        model[1].set_factor(1.3)
        model[1].snap()
        for kind in ("gradient", "spsa", "sampled"):
            copied = copy.deepcopy(model)
            search = learn_toy(toy, kind, copied)
            assert [layer.effective_dilation for layer in copied[:2]] == [(3, 3), (4, 4)]
            assert [group[0] for group in search.groups] == [copied[2]]
            assert not copied[0].snapped

    def test_a_snapped_regulator_is_not_moved(self, toy: Any) -> None:
        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=4, dilation=4), factor=1.3)
        regulator.snap()
        model = nn.Sequential(regulator, toy.layer(2))
        SpsaSearch(model, toy.loss(2.0), 2)
        assert regulator.effective_dilation == (3, 3)
        assert regulator.module.dilation == (3, 3)
        assert not regulator.log_factor.requires_grad

    def test_a_layer_that_was_loaded_snapped_stays(self, toy: Any) -> None:
        """A state dict does not contain whether the factor is frozen."""
        source, model = toy.model(3, 5), toy.model(3, 5)
        source[0].set_factor(0.6)
        source[0].snap()
        model.load_state_dict(source.state_dict())
        assert model[0].log_factor.requires_grad
        search = learn_toy(toy, "sampled", model)
        assert search.groups == [[model[1]]]
        assert model[0].effective_dilation == (5, 5)

    def test_nothing_to_search(self, toy: Any) -> None:
        model = toy.model(3, 5)
        model[0].freeze_factor()
        model[1].snap()
        for kind in ("gradient", "spsa", "sampled"):
            with pytest.raises(ValueError, match="all frozen or snapped, which leaves none to search"):
                learn_toy(toy, kind, model)

    def test_an_unfrozen_layer_is_learned_again(self, toy: Any) -> None:
        model = toy.model(3)
        learn_toy(toy, "sampled", model, best=8)
        assert model[0].effective_dilation == (8, 8)
        model[0].freeze_factor(False)
        learn_toy(toy, "sampled", model, best=5)
        assert model[0].effective_dilation == (5, 5)

    def test_takes_over_from_one_that_has_not_ended(self, toy: Any) -> None:
        model = toy.model(3)
        SpsaSearch(model, toy.loss(5.0), 9)
        assert not model[0].log_factor.requires_grad
        search = GradientSearch(model, toy.loss(5.0), 9)
        assert model[0].log_factor.requires_grad
        assert search.groups == [[model[0]]]
        assert SampledSearch(model, toy.loss(5.0), 9, [toy.image]).groups == [[model[0]]]

    def test_a_factor_that_was_frozen_after_an_abandoned_search_stays(self, toy: Any) -> None:
        """It may be frozen through any of the layers that share it."""
        model = toy.model(3, 5, 4)
        model[1].share_factor(model[0])
        SpsaSearch(model, toy.loss(5.0, 5.0), 9)
        model[1].freeze_factor()
        assert SpsaSearch(model, toy.loss(5.0), 9).groups == [[model[2]]]

    def test_adapted_again_after_fuse(self, toy: Any) -> None:
        model = toy.model(3, 5)
        learn_toy(toy, "sampled", model, best=8)
        again = fuse(model)
        layers = adapt(again, "*")
        learn_toy(toy, "sampled", again, best=4)
        assert [layer.effective_dilation for layer in layers] == [(4, 4), (4, 4)]
        adapted = adapt(model := nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2), *fuse(again)), "0")
        assert adapt(model, "1")[0] is not adapted[0]
        assert len(SpsaSearch(model, toy.loss(1.0), 2).groups) == 2


def learn_toy(toy: Any, kind: str, model: nn.Module, best: float = 7) -> Search:
    """Return the search after its end; it has one loss per learned factor."""

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        groups = learned_layers(model)
        return toy.loss(*[best] * len(groups))(model, batch)[1].sum() + 0 * model(batch).sum()

    if kind == "sampled":
        search: Search = SampledSearch(model, loss_fn, 6, [toy.image])
    else:
        search = {"gradient": GradientSearch, "spsa": SpsaSearch}[kind](model, loss_fn, 6)
    toy.run(search, 6)
    return search


def test_the_parameter_stands_for_the_first_layer_s_dilation(toy: Any) -> None:
    """For code that reads only the parameter, for example of a layer that shares its factor with no other."""
    model = toy.model(2, 3)
    model[1].share_factor(model[0])
    search = SampledSearch(model, lambda m, x: toy.loss(7.4)(m, x)[1].sum() + 0 * m(x).sum(), 3, [toy.image])
    toy.run(search, 3)
    assert [layer.effective_dilation[0] for layer in model] == [7, 11]
    assert model[0].log_factor.exp().item() == pytest.approx(2 / 7)
