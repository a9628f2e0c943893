"""A search that is saved and continued."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch, parameter_groups


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

    def test_state_is_plain(self, cues: Any, tmp_path: Any) -> None:
        model = cues.model(9)
        for search in (
            SpsaSearch(model, cues.loss, steps=3),
            SampledSearch(model, cues.loss, steps=2, held_out=cues.batches(1)),
        ):
            cues.run(search, model, cues.batches(2))
            torch.save(search.state_dict(), tmp_path / "search.pt")
            torch.load(tmp_path / "search.pt", weights_only=True)
