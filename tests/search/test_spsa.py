"""Simultaneous perturbation."""

from typing import Any

import pytest
import torch

from rfield.search import SpsaSearch


class TestSpsa:
    def test_spsa_accumulates_the_mean_difference(self, cues: Any) -> None:
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
