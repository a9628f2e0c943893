"""Properties of every search: gradient accumulation, autocast, train and eval mode, snapping."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from rfield.layers import ReceptiveFieldRegulator
from rfield.search import GradientSearch, SampledSearch, SpsaSearch


class TestRules:
    @pytest.mark.parametrize("kind", [SpsaSearch, SampledSearch])
    def test_gradient_accumulation_sees_one_draw_a_step(self, cues: Any, kind: type) -> None:
        model = cues.model(9)
        options = {"held_out": cues.batches(1)} if kind is SampledSearch else {}
        search = kind(model, cues.loss, 10, **options)
        seen = []
        for batch in cues.batches(3):
            search.loss(batch)
            seen.append(model[0].dilation_override)
        assert len(set(seen)) == 1

    def test_dilations_run_at_integers_and_native(self, cues: Any) -> None:
        model = cues.model(9)
        search = SampledSearch(model, cues.loss, steps=50, held_out=cues.batches(1))
        drawn = set()
        for batch in cues.batches(20):
            search.loss(batch)
            search._record()
            drawn.add(model[0].dilation_override)
        assert all(value == int(value) for pair in drawn for value in pair)
        assert all(height == width for height, width in drawn)
        assert len(drawn) > 6

    def test_autocast(self, cues: Any) -> None:
        model = cues.model(9)
        search = SpsaSearch(model, cues.loss, steps=3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = search.loss(cues.batches(1)[0])
        loss.backward()
        search.step()
        assert math.isfinite(model[0].effective_dilation[0])

    def test_evaluation_keeps_modules_modes(self, cues: Any) -> None:
        model = nn.Sequential(*cues.model(9), nn.Dropout())
        model[1].eval()
        search = SampledSearch(model, cues.loss, steps=1, held_out=cues.batches(1))
        cues.run(search, model, cues.batches(1))
        assert model[3].training
        assert not model[1].training

    def test_after_the_search_it_is_the_plain_network(self, cues: Any) -> None:
        model = cues.model(9)
        search = SampledSearch(model, cues.loss, steps=5, held_out=cues.batches(1))
        cues.run(search, model, cues.batches(6))
        dilation = int(model[0].effective_dilation[0] + 0.5)
        plain = nn.Conv2d(1, 8, 3, padding=dilation, dilation=dilation)
        plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        input = cues.batches(1)[0][0]
        assert torch.equal(model[0](input), plain(input))

    def test_bad_input(self, cues: Any) -> None:
        with pytest.raises(ValueError, match="no learned factor"):
            GradientSearch(nn.Conv2d(1, 1, 1), cues.loss, steps=5)
        with pytest.raises(ValueError, match="at least 1 step"):
            GradientSearch(cues.model(3), cues.loss, steps=0)
        model = cues.model(3)
        with pytest.raises(ValueError, match="held-out batches, but there is none"):
            cues.run(SampledSearch(model, cues.loss, steps=1, held_out=[]), model, cues.batches(1))


class TestSnap:
    def test_regulator_becomes_a_dilated_convolution(self, cues: Any) -> None:
        model = cues.model(14, "regulator")
        model[0].set_factor(14 / 4.8)
        model[0].snap()
        assert model[0].effective_dilation == pytest.approx((5.0, 5.0))
        plain = nn.Conv2d(1, 8, 3, padding=5, dilation=5)
        plain.load_state_dict(model[0].module[0].state_dict())
        input = cues.batches(1)[0][0]
        expected = nn.Sequential(plain, *model[0].module[1:])(input)
        assert torch.equal(model(input), expected)
        loaded = cues.model(14, "regulator")
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(input), expected)

    def test_ordinary_convolutions_keep_their_resizes(self) -> None:
        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=1), factor=0.4)
        regulator.snap()
        assert not regulator.snapped
        assert not regulator.log_factor.requires_grad
        assert regulator.factor.item() == pytest.approx(0.4)
