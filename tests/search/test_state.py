"""A search is saved and continued."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch, parameter_groups
from rfield.search.factors import names_by_id

KINDS = pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])


def make(kind: str, model: nn.Module, loss_fn: Any, held_out: list[Any], steps: int, seed: int = 0) -> Search:
    if kind == "sampled":
        return SampledSearch(model, loss_fn, steps, held_out, seed)
    return (GradientSearch if kind == "gradient" else SpsaSearch)(model, loss_fn, steps, seed)


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class TestState:
    @pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
    def test_resumes_in_the_middle(self, cues: Any, kind: str) -> None:
        batches, held_out = cues.batches(30), cues.batches(1, seed=1)

        def make(model: nn.Module) -> Search:
            if kind == "gradient":
                return GradientSearch(model, cues.loss, steps=20)
            if kind == "spsa":
                return SpsaSearch(model, cues.loss, steps=20)
            return SampledSearch(model, cues.loss, steps=20, held_out=held_out)

        def fit(model: nn.Module, search: Search, optimizer: torch.optim.Optimizer, part: list[Any]) -> None:
            for batch in part:
                search.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                search.step()

        whole = cues.model(9)
        search = make(whole)
        optimizer = torch.optim.Adam(parameter_groups(whole, 0.02, 0.02))
        fit(whole, search, optimizer, batches[:13])
        saved = copy.deepcopy((whole.state_dict(), search.state_dict(), optimizer.state_dict()))
        fit(whole, search, optimizer, batches[13:])

        resumed = cues.model(9)
        search = make(resumed)
        optimizer = torch.optim.Adam(parameter_groups(resumed, 0.02, 0.02))
        resumed.load_state_dict(saved[0])
        search.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        fit(resumed, search, optimizer, batches[13:])
        assert search.done
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    @KINDS
    def test_is_plain(self, cues: Any, kind: str, tmp_path: Path) -> None:
        """During a search, when the state has all its parts."""
        model = cues.model(9)
        search = make(kind, model, cues.loss, cues.batches(1), steps=4)
        cues.run(search, model, cues.batches(2))
        torch.save(search.state_dict(), tmp_path / "search.pt")
        loaded = torch.load(tmp_path / "search.pt", weights_only=True)
        assert same(loaded, search.state_dict())
        assert loaded["step_index"] == 2
        if kind == "sampled":
            assert set(loaded["average"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
            assert loaded["readings"][0, 0]

    @KINDS
    def test_is_a_copy_both_ways(self, cues: Any, kind: str) -> None:
        model, batches, held_out = cues.model(9), cues.batches(4), cues.batches(1)
        search = make(kind, model, cues.loss, held_out, steps=4)
        cues.run(search, model, batches[:2])
        state = search.state_dict()
        kept = copy.deepcopy(state)
        cues.run(search, model, batches[2:3])
        assert same(state, kept)
        other_model = cues.model(9)
        other = make(kind, other_model, cues.loss, held_out, steps=4)
        other.load_state_dict(state)
        cues.run(other, other_model, batches[2:])
        assert other.done
        assert same(state, kept)

    @KINDS
    def test_goes_on_with_its_own_seed_steps_and_start(self, toy: Any, kind: str) -> None:
        """Also from a start larger than the map, which extends the range."""

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            loss, factor_losses = toy.loss(90.0)(model, batch)
            # The gradient search gets the loss only.
            return loss if kind == "gradient" else (loss, factor_losses)

        whole, resumed = toy.model(20), toy.model(20)
        whole[0].set_factor(20 / 30)
        search = make(kind, whole, loss_fn, [toy.image], steps=8, seed=3)
        toy.run(search, 3)
        state, weights = search.state_dict(), copy.deepcopy(whole.state_dict())
        assert state["starts"] == [[pytest.approx(30)]]
        toy.run(search, 5)
        other = make(kind, resumed, loss_fn, [toy.image], steps=5)
        resumed.load_state_dict(weights)
        other.load_state_dict(state)
        toy.run(other, 5)
        assert other.done
        assert other.trajectory == search.trajectory
        assert other.unsnapped == search.unsnapped
        assert resumed[0].effective_dilation == whole[0].effective_dilation

    @KINDS
    def test_of_a_search_that_has_ended_freezes_the_factors(self, toy: Any, kind: str) -> None:
        search = make(kind, model := toy.model(3), mean, [toy.image], steps=2)
        toy.run(search, 2)
        other = make(kind, again := toy.model(3), mean, [toy.image], steps=2)
        again[0].log_factor.requires_grad_(True)
        again.load_state_dict(model.state_dict())
        other.load_state_dict(search.state_dict())
        assert other.done
        assert not again[0].log_factor.requires_grad
        with pytest.raises(ValueError, match="all frozen or snapped"):
            make(kind, again, mean, [toy.image], steps=2)
        before = again[0].effective_dilation
        toy.run(other, 2)
        assert other.step_index == 2
        assert again[0].effective_dilation == before

    def test_of_another_search_or_model(self, toy: Any) -> None:
        state = make("spsa", toy.model(3), mean, [], steps=2).state_dict()
        with pytest.raises(ValueError, match=r"of a SpsaSearch that started at \[\[3.0\]\], and cannot be loaded"):
            make("gradient", toy.model(3), mean, [], steps=2).load_state_dict(state)
        with pytest.raises(ValueError, match=r"a SpsaSearch that started at \[\[3.0\], \[4.0\]\]"):
            make("spsa", toy.model(3, 4), mean, [], steps=2).load_state_dict(state)
        sampled = make("sampled", nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1)), mean, [toy.image], steps=4)
        toy.run(sampled, 2)
        with pytest.raises(ValueError, match=r"averages weights that the model does not have: 1\.weight, 1\.bias"):
            make("sampled", toy.model(3), mean, [toy.image], steps=4).load_state_dict(sampled.state_dict())


class TestWrappedModels:
    @pytest.mark.parametrize("wrapped_first", [False, True])
    def test_a_state_goes_from_wrapped_to_plain_and_back(self, cues: Any, wrapped_first: bool) -> None:
        states = []
        for wrapped in (wrapped_first, not wrapped_first):
            model = cues.model(9)
            outer = nn.DataParallel(model) if wrapped else model
            search = make("sampled", outer, cues.loss, cues.batches(1), steps=6)
            if states:
                model.load_state_dict(states[0][0])
                search.load_state_dict(states[0][1])
            cues.run(search, model, cues.batches(6), search.step_index, search.step_index + 3)
            states.append((copy.deepcopy(model.state_dict()), search.state_dict()))
        assert search.done
        assert states[1][1]["step_index"] == 6

    def test_parameters_that_are_exchanged_under_the_search(self, toy: Any) -> None:
        """By `load_state_dict(assign=True)`, or by sharding."""
        model = nn.Sequential(toy.layer(3), nn.Conv2d(1, 1, 1))
        search = make("sampled", model, mean, [toy.image], steps=4)
        toy.run(search, 1)
        state = copy.deepcopy(model.state_dict())
        state["1.weight"] += 1
        before = search.state_dict()["average"]["1.weight"].item()
        model.load_state_dict(state, assign=True)
        toy.run(search, 1)
        assert search.state_dict()["average"]["1.weight"].item() == pytest.approx(before + 0.03)
        toy.run(search, 2)
        assert search.done
        assert model[0].snapped

    def test_names_are_those_without_wrappers(self) -> None:
        plain = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 1)))
        plain.add_module("module", nn.Conv2d(1, 1, 1))
        expected = {id(weight): name for name, weight in plain.named_parameters()}
        plain[1][0] = torch.compile(plain[1][0], backend="eager")
        for wrapped in (plain, torch.compile(plain), nn.DataParallel(torch.compile(nn.DataParallel(plain)))):
            names = names_by_id(wrapped)
            assert {id(weight): names[id(weight)] for weight in wrapped.parameters()} == expected
        assert names_by_id(conv := nn.Conv2d(1, 1, 1))[id(conv)] == "Conv2d"
