import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import (
    NARROWINGS,
    GradientSearch,
    SampledSearch,
    Search,
    SpsaSearch,
    curve_minimum,
    dilation_grid,
    factor_parameters,
    learned_layers,
    parameter_groups,
)

BEST = 6


def cue_batches(count: int, seed: int = 0, best: int = BEST) -> list[tuple[Tensor, Tensor]]:
    """A pixel's class is the sign of a smooth field `best` px to its right; the field is about half as wide."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        noise = torch.randn(4, 1, 40, 40, generator=generator)
        smooth = F.avg_pool2d(F.avg_pool2d(noise, 3, 1, 1), 3, 1, 1)
        target = torch.zeros(4, 40, 40, dtype=torch.long)
        target[:, :, :-best] = (smooth[:, 0, :, best:] > 0).long()
        target[:, :, -best:] = 255
        batches.append((smooth * 5, target))
    return batches


def cue_model(dilation: int, mechanism: str = "dilation") -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 8, 3, padding=dilation, dilation=dilation)
    tail = (nn.ReLU(), nn.Conv2d(8, 2, 1))
    if mechanism == "dilation":
        return nn.Sequential(AdaptiveConv2d.from_conv(conv), *tail)
    return nn.Sequential(ReceptiveFieldRegulator(nn.Sequential(conv, *tail)))


def cue_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=255)


def run(search: Search, model: nn.Module, batches: list[Any], start: int = 0, end: int | None = None) -> None:
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.02, factor_lr=0.02), lr=0.02)
    for batch in batches[start:end]:
        loss = search.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()


class TestParameterGroups:
    def test_factors_are_apart_and_out_of_weight_decay(self) -> None:
        first, second = (ReceptiveFieldRegulator(nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2))
        second.share_factor(first)
        model = nn.Sequential(nn.Conv2d(3, 2, 1), first, second)
        groups = parameter_groups(model, lr=0.1, factor_lr=0.01)
        assert [(len(group["params"]), group["lr"]) for group in groups] == [(6, 0.1), (1, 0.01)]
        assert groups[1]["weight_decay"] == 0.0
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert grouped == {id(p) for p in model.parameters()}
        assert [len(group) for group in learned_layers(model)] == [2]

    def test_frozen_parameters_are_left_out(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 1).requires_grad_(False), ReceptiveFieldRegulator(nn.Conv2d(2, 2, 1)))
        model[1].freeze_factor()
        assert len(factor_parameters(model)) == 1
        assert [len(group["params"]) for group in parameter_groups(model, lr=0.1, factor_lr=0.01)] == [2]


class TestKnownAnswer:
    @pytest.mark.parametrize("start", [1, 3, 12, 24])
    def test_sampled_search_finds_it_from_any_start(self, start: int) -> None:
        model = cue_model(start)
        search = SampledSearch(model, cue_loss, steps=80, held_out=cue_batches(2, seed=1))
        run(search, model, cue_batches(80))
        assert search.done
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(BEST)
        curve = search.curve()
        assert len(curve) >= 8
        assert curve[min(curve)] > min(curve.values()) < curve[max(curve)]

    def test_window_narrows_around_the_minimum(self) -> None:
        model = cue_model(20)
        search = SampledSearch(model, cue_loss, steps=80, held_out=cue_batches(2, seed=1))
        run(search, model, cue_batches(80))
        readings = search.readings[0, 0]
        assert [step for step, _ in readings] == [20, 32, 48, 80]
        for (step, curve), (end, _), reach in zip(readings, readings[1:], NARROWINGS.values(), strict=False):
            best = curve_minimum(curve)
            drawn = [dilations[0] for at, dilations in search.trajectory if step < at <= end]
            # Stochastic rounding leaves the window by less than 1.
            assert best / reach - 1 < min(drawn) < best < max(drawn) < best * reach + 1
        early = [dilations[0] for at, dilations in search.trajectory if at <= 20]
        assert min(early) <= 2
        assert max(early) >= 25

    def test_a_minimum_read_too_early_is_mended(self) -> None:
        """Here the best dilation goes from 3 to 8 while the weights learn."""

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            best = 3 + 5 * min(1.0, search.step_index / 60)
            distance = abs(math.log(learned_layers(model)[0][0].realised_dilation[0] / best))
            return distance + 0 * cue_loss(model, batch)

        model = cue_model(6)
        search = SampledSearch(model, loss_of, steps=100, held_out=cue_batches(1))
        run(search, model, cue_batches(100))
        minima = [curve_minimum(curve) for _, curve in search.readings[0, 0]]
        assert minima == sorted(minima)
        assert minima[0] < 6
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(8)

    def test_sampled_search_in_a_regulator(self) -> None:
        model = cue_model(16, "regulator")
        search = SampledSearch(model, cue_loss, steps=80, held_out=cue_batches(2, seed=1))
        run(search, model, cue_batches(80))
        regulator = model[0]
        assert regulator.snapped
        assert regulator.effective_dilation[0] == pytest.approx(BEST, abs=1.01)

    @pytest.mark.parametrize("start", [5, 8])
    def test_spsa_finds_it_from_nearby(self, start: int) -> None:
        model = cue_model(start)
        search = SpsaSearch(model, cue_loss, steps=120, scale=0.3)
        run(search, model, cue_batches(120))
        assert search.done
        assert learned_layers(model)[0][0].effective_dilation[0] == pytest.approx(BEST)

    def test_gradient_goes_the_right_way(self) -> None:
        model = cue_model(5)
        run(GradientSearch(model, cue_loss, steps=100), model, cue_batches(99))
        assert 5.4 < learned_layers(model)[0][0].effective_dilation[0] < 6.6

    def test_rectangular_field(self) -> None:
        """The cue lies to the right: the width is found, whatever the height."""
        torch.manual_seed(0)
        conv = AdaptiveConv2d(1, 8, 3, padding=3, dilation=3, factor=(1.0, 1.0))
        model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 2, 1))
        search = SampledSearch(model, cue_loss, steps=120, held_out=cue_batches(2, seed=1))
        run(search, model, cue_batches(120))
        assert conv.effective_dilation[1] == pytest.approx(BEST)
        assert set(search.readings) == {(0, 0), (0, 1)}

    def test_two_factors_at_once(self) -> None:
        """Two layers side by side on channels whose cues lie at different distances."""

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
            return list(zip(cue_batches(count, seed, 3), cue_batches(count, seed + 9, 8), strict=True))

        model = Two()
        search = SampledSearch(model, loss_of, steps=120, held_out=both(2, 1))
        run(search, model, both(120, 0))
        assert (model.near.effective_dilation[0], model.far.effective_dilation[0]) == pytest.approx((3.0, 8.0))


class TestRules:
    @pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
    def test_resumes_in_the_middle(self, kind: str) -> None:
        batches, held_out = cue_batches(30), cue_batches(1, seed=1)

        def make(model: nn.Module) -> Search:
            if kind == "gradient":
                return GradientSearch(model, cue_loss, steps=20)
            if kind == "spsa":
                return SpsaSearch(model, cue_loss, steps=20)
            return SampledSearch(model, cue_loss, steps=20, held_out=held_out)

        def fit(model: nn.Module, search: Search, optimizer: torch.optim.Optimizer, part: list[Any]) -> None:
            for batch in part:
                search.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                search.step()

        whole = cue_model(9)
        search = make(whole)
        optimizer = torch.optim.Adam(parameter_groups(whole, 0.02, 0.02))
        fit(whole, search, optimizer, batches[:13])
        saved = copy.deepcopy((whole.state_dict(), search.state_dict(), optimizer.state_dict()))
        fit(whole, search, optimizer, batches[13:])

        resumed = cue_model(9)
        search = make(resumed)
        optimizer = torch.optim.Adam(parameter_groups(resumed, 0.02, 0.02))
        resumed.load_state_dict(saved[0])
        search.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        fit(resumed, search, optimizer, batches[13:])
        assert search.done
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_state_is_plain(self, tmp_path: Any) -> None:
        model = cue_model(9)
        for search in (
            SpsaSearch(model, cue_loss, steps=3),
            SampledSearch(model, cue_loss, steps=2, held_out=cue_batches(1)),
        ):
            run(search, model, cue_batches(2))
            torch.save(search.state_dict(), tmp_path / "search.pt")
            torch.load(tmp_path / "search.pt", weights_only=True)

    @pytest.mark.parametrize("kind", [SpsaSearch, SampledSearch])
    def test_gradient_accumulation_sees_one_draw_a_step(self, kind: type) -> None:
        model = cue_model(9)
        options = {"held_out": cue_batches(1)} if kind is SampledSearch else {}
        search = kind(model, cue_loss, 10, **options)
        seen = []
        for batch in cue_batches(3):
            search.loss(batch)
            seen.append(model[0].held)
        assert len(set(seen)) == 1

    def test_spsa_accumulates_the_mean_difference(self) -> None:
        batches, moved = cue_batches(2), []
        for parts in (batches, [(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))]):
            model = cue_model(9)
            search = SpsaSearch(model, cue_loss, steps=10)
            for part in parts:
                search.loss(part)
            search.step()
            moved.append(model[0].effective_dilation[0])
        assert moved[0] == pytest.approx(moved[1], rel=1e-5)
        assert moved[0] != 9.0

    def test_dilations_run_at_integers_and_native(self) -> None:
        model = cue_model(9)
        search = SampledSearch(model, cue_loss, steps=50, held_out=cue_batches(1))
        drawn = set()
        for batch in cue_batches(20):
            search.loss(batch)
            search._record()
            drawn.add(model[0].held)
        assert all(value == int(value) for pair in drawn for value in pair)
        assert all(height == width for height, width in drawn)
        assert len(drawn) > 6

    def test_autocast(self) -> None:
        model = cue_model(9)
        search = SpsaSearch(model, cue_loss, steps=3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = search.loss(cue_batches(1)[0])
        loss.backward()
        search.step()
        assert math.isfinite(model[0].effective_dilation[0])

    def test_reading_keeps_modules_modes(self) -> None:
        model = nn.Sequential(*cue_model(9), nn.Dropout())
        model[1].eval()
        search = SampledSearch(model, cue_loss, steps=1, held_out=cue_batches(1))
        run(search, model, cue_batches(1))
        assert model[3].training
        assert not model[1].training

    def test_after_the_search_it_is_the_plain_network(self) -> None:
        model = cue_model(9)
        search = SampledSearch(model, cue_loss, steps=5, held_out=cue_batches(1))
        run(search, model, cue_batches(6))
        dilation = int(model[0].effective_dilation[0] + 0.5)
        plain = nn.Conv2d(1, 8, 3, padding=dilation, dilation=dilation)
        plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        input = cue_batches(1)[0][0]
        assert torch.equal(model[0](input), plain(input))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="no learned factor"):
            GradientSearch(nn.Conv2d(1, 1, 1), cue_loss, steps=5)
        with pytest.raises(ValueError, match="at least 1 step"):
            GradientSearch(cue_model(3), cue_loss, steps=0)
        model = cue_model(3)
        with pytest.raises(ValueError, match="held-out batches, but there is none"):
            run(SampledSearch(model, cue_loss, steps=1, held_out=[]), model, cue_batches(1))


class TestSnap:
    def test_regulator_becomes_a_dilated_convolution(self) -> None:
        model = cue_model(14, "regulator")
        model[0].set_factor(14 / 4.8)
        model[0].snap()
        assert model[0].effective_dilation == pytest.approx((5.0, 5.0))
        plain = nn.Conv2d(1, 8, 3, padding=5, dilation=5)
        plain.load_state_dict(model[0].module[0].state_dict())
        input = cue_batches(1)[0][0]
        expected = nn.Sequential(plain, *model[0].module[1:])(input)
        assert torch.equal(model(input), expected)
        loaded = cue_model(14, "regulator")
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(loaded(input), expected)

    def test_ordinary_convolutions_keep_their_resizes(self) -> None:
        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=1), factor=0.4)
        regulator.snap()
        assert not regulator.snapped
        assert not regulator.log_factor.requires_grad
        assert regulator.factor.item() == pytest.approx(0.4)


def test_curve_helpers() -> None:
    assert dilation_grid(1.0, 41.0, 14, whole=True)[:4] == [1.0, 2.0, 3.0, 4.0]
    assert len(dilation_grid(1.0, 41.0, 14, whole=False)) == 14
    assert curve_minimum({1.0: 0.1, 2.0: 0.2, 3.0: 0.3}) == 1.0
    assert curve_minimum({1.0: 0.3, 2.0: 0.1, 4.0: 0.1, 8.0: 0.3}) == pytest.approx(math.sqrt(8))

    @pytest.mark.parametrize("kind", ["spsa", "sampled"])
    def test_two_processes_have_one_factor(self, kind: str, tmp_path: Path) -> None:
        """They see other images, and so have other losses; what they decide is the same."""
        worker = Path(__file__).with_name("search_worker.py")
        store, outs = tmp_path / "store", [tmp_path / f"{rank}.pt" for rank in range(2)]
        workers = [
            subprocess.Popen([sys.executable, worker, kind, str(rank), store, out], stderr=subprocess.PIPE, text=True)
            for rank, out in enumerate(outs)
        ]
        for process in workers:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        one, two = (torch.load(out, weights_only=True) for out in outs)
        assert one["losses"] != two["losses"]
        for key in ("trajectory", "unsnapped", "readings"):
            assert one[key] == two[key]
        for key in ("factors", "weights"):
            assert all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True))
        assert one["unsnapped"] != [[5.0], [2.0]]

    def test_loss_and_guides_go_their_own_ways(self) -> None:
        """Of two factors each is learned by its own guide; the weights see the loss alone."""

        def guided(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            layers = [group[0] for group in learned_layers(model)]
            distances = [
                abs(math.log(layer.realised_dilation[0] / best)) for layer, best in zip(layers, (3, 9), strict=True)
            ]
            loss = cue_loss(model, batch)
            return loss, torch.tensor(distances) + 0 * loss

        for kind in (SpsaSearch, SampledSearch):
            torch.manual_seed(0)
            convs = [AdaptiveConv2d(1 + 3 * i, 4, 3, padding=5, dilation=5) for i in range(2)]
            model = nn.Sequential(*convs, nn.ReLU(), nn.Conv2d(4, 2, 1))
            options = {"held_out": cue_batches(1)} if kind is SampledSearch else {}
            search = kind(model, guided, 120, **options)
            run(search, model, cue_batches(120))
            assert [conv.effective_dilation[0] for conv in convs] == pytest.approx([3, 9], abs=1.01)

    def test_guides_replace_the_factors_gradient_and_nothing_else(self) -> None:
        def plain(model: nn.Module, batch: Any) -> Tensor:
            return cue_loss(model, batch)

        def weighted(model: nn.Module, batch: Any) -> Tensor:
            losses = F.cross_entropy(model(batch[0]), batch[1], ignore_index=255, reduction="none")
            return (losses * torch.where(batch[1] == 1, 5.0, 1.0)).mean()

        def guided(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            return plain(model, batch), weighted(model, batch)[None]

        gradients = {}
        for name, loss_fn in {"plain": plain, "weighted": weighted, "guided": guided}.items():
            for mechanism in ("regulator", "dilation"):
                model = cue_model(7, mechanism)
                factor_parameters(model)[0].data += 0.1
                search = GradientSearch(model, loss_fn, steps=5)
                loss = search.loss(cue_batches(1)[0])
                loss.backward()
                gradients[name, mechanism] = [p.grad.clone() for n, p in sorted(model.named_parameters())]
                if name == "guided":
                    assert float(loss) == pytest.approx(float(plain(model, cue_batches(1)[0])), rel=1e-5)
        names = [n for n, _ in sorted(cue_model(7).named_parameters())]
        for mechanism in ("regulator", "dilation"):
            names = [n for n, _ in sorted(cue_model(7, mechanism).named_parameters())]
            for index, name in enumerate(names):
                like = "weighted" if name.endswith("log_factor") else "plain"
                expected = gradients[like, mechanism][index]
                assert torch.allclose(gradients["guided", mechanism][index], expected, rtol=1e-4, atol=1e-6), name

    def test_guides_must_be_as_many_as_factors(self) -> None:
        search = GradientSearch(cue_model(3), lambda model, batch: (torch.ones(()), torch.ones(2)), steps=1)
        with pytest.raises(ValueError, match="has 1 factors"):
            search.loss(cue_batches(1)[0])
