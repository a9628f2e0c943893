"""Factors with their own losses, and searches of several processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import GradientSearch, SampledSearch, SpsaSearch, factor_parameters, learned_layers


class TestFactorLosses:
    @pytest.mark.parametrize("kind", ["spsa", "sampled"])
    def test_two_processes_have_one_factor(self, kind: str, tmp_path: Path, in_processes: Any) -> None:
        """The processes see different images and have different losses; their decisions are the same."""
        store, outs = str(tmp_path / "store"), [str(tmp_path / f"{rank}.pt") for rank in range(2)]
        own = [{"kind": kind, "rank": rank, "store": store, "out": out} for rank, out in enumerate(outs)]
        in_processes(Path(__file__).with_name("worker.py"), *own)
        one, two = (torch.load(out, weights_only=True) for out in outs)
        assert one["losses"] != two["losses"]
        for key in ("trajectory", "unsnapped", "readings"):
            assert one[key] == two[key]
        for key in ("factors", "weights"):
            assert all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True))
        assert one["unsnapped"] != [[5.0], [2.0]]

    @pytest.mark.slow
    def test_weights_follow_the_loss_and_factors_their_own_losses(self, cues: Any) -> None:
        """Each of two factors is learned by its own loss; the weights by the common loss only."""

        def separate(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            layers = [group[0] for group in learned_layers(model)]
            distances = [
                abs(math.log(layer.realised_dilation[0] / best)) for layer, best in zip(layers, (3, 9), strict=True)
            ]
            loss = cues.loss(model, batch)
            return loss, torch.tensor(distances) + 0 * loss

        for kind in (SpsaSearch, SampledSearch):
            torch.manual_seed(0)
            convs = [AdaptiveConv2d(1 + 3 * i, 4, 3, padding=5, dilation=5) for i in range(2)]
            model = nn.Sequential(*convs, nn.ReLU(), nn.Conv2d(4, 2, 1))
            options = {"held_out": cues.batches(1)} if kind is SampledSearch else {}
            search = kind(model, separate, 120, **options)
            cues.run(search, model, cues.batches(120))
            assert [conv.effective_dilation[0] for conv in convs] == pytest.approx([3, 9], abs=1.01)

    def test_factor_losses_replace_the_factors_gradient_and_nothing_else(self, cues: Any) -> None:
        def plain(model: nn.Module, batch: Any) -> Tensor:
            return cues.loss(model, batch)

        def weighted(model: nn.Module, batch: Any) -> Tensor:
            losses = F.cross_entropy(model(batch[0]), batch[1], ignore_index=255, reduction="none")
            return (losses * torch.where(batch[1] == 1, 5.0, 1.0)).mean()

        def separate(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            return plain(model, batch), weighted(model, batch)[None]

        gradients = {}
        for name, loss_fn in {"plain": plain, "weighted": weighted, "separate": separate}.items():
            for mechanism in ("regulator", "dilation"):
                model = cues.model(7, mechanism)
                factor_parameters(model)[0].data += 0.1
                search = GradientSearch(model, loss_fn, steps=5)
                loss = search.loss(cues.batches(1)[0])
                loss.backward()
                gradients[name, mechanism] = [p.grad.clone() for n, p in sorted(model.named_parameters())]
                if name == "separate":
                    assert loss.item() == pytest.approx(plain(model, cues.batches(1)[0]).item(), rel=1e-5)
        names = [n for n, _ in sorted(cues.model(7).named_parameters())]
        for mechanism in ("regulator", "dilation"):
            names = [n for n, _ in sorted(cues.model(7, mechanism).named_parameters())]
            for index, name in enumerate(names):
                like = "weighted" if name.endswith("log_factor") else "plain"
                expected = gradients[like, mechanism][index]
                assert torch.allclose(gradients["separate", mechanism][index], expected, rtol=1e-4, atol=1e-6), name

    def test_factor_losses_must_be_as_many_as_factors(self, cues: Any) -> None:
        search = GradientSearch(cues.model(3), lambda model, batch: (torch.ones(()), torch.ones(2)), steps=1)
        with pytest.raises(ValueError, match="has 1 factors"):
            search.loss(cues.batches(1)[0])
