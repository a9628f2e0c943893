import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import Inflation2d, Interpolation2d, ReceptiveFieldRegulator
from rfield.ops import reference
from rfield.search import SampledSearch, SpsaSearch
from rfield.search.base import Search


def dilated(channels: int = 3, classes: int = 2, dilation: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=dilation, dilation=dilation), nn.ReLU(), nn.Conv2d(4, classes, 1)
    )


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class TestForward:
    def test_factor_one_is_the_bare_module(self) -> None:
        module, input = dilated(), features(2, 3, 9, 7)
        torch.testing.assert_close(ReceptiveFieldRegulator(module)(input), module(input))

    def test_label_resolution_at_factor_one_is_aligned_interpolation(self) -> None:
        module, input = dilated(), features(1, 3, 5, 6)
        expected = F.interpolate(module(input), size=(33, 41), mode="bilinear", align_corners=True)
        torch.testing.assert_close(ReceptiveFieldRegulator(module)(input, output_size=(33, 41)), expected)
        input, factor = input.double(), torch.ones(1, dtype=torch.float64)
        expected = F.interpolate(input, size=(33, 40), mode="bilinear", align_corners=True)
        actual = Interpolation2d()(input, factor, (5, 6), (33, 40))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)

    def test_snapped_one_to_label_resolution_is_the_dilated_module_interpolated(self) -> None:
        regulator, input = ReceptiveFieldRegulator(dilated(), 1.8), features(1, 3, 5, 6)
        regulator.snap()
        expected = F.interpolate(dilated(dilation=1)(input), size=(33, 41), mode="bilinear", align_corners=True)
        torch.testing.assert_close(regulator(input, output_size=(33, 41)), expected)
        assert torch.equal(regulator(input, output_size=(5, 6)), dilated(dilation=1)(input))

    def test_snap_dilates_what_sees_more_than_a_pixel(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 0.4)
        regulator.snap()
        assert [conv.dilation for conv in regulator.module if isinstance(conv, nn.Conv2d)] == [(5, 5), (1, 1)]
        regulator = ReceptiveFieldRegulator(nn.Conv2d(4, 4, 3, padding=(1, 2), dilation=(1, 2)), 0.4)
        regulator.snap()
        assert regulator.module.dilation == (3, 5)

    @pytest.mark.parametrize("factor", [0.6, 1.0, 1.7, (0.8, 1.5)])
    @pytest.mark.parametrize("output_size", [None, (25, 17)])
    def test_equals_the_two_layers_by_hand(
        self, factor: float | tuple[float, float], output_size: tuple[int, int] | None
    ) -> None:
        module, input = dilated().double(), features(1, 3, 7, 5).double()
        regulator = ReceptiveFieldRegulator(module, factor=factor).double()
        f = torch.tensor(factor if isinstance(factor, tuple) else (factor,)).double()
        size = (math.ceil(6 * float(f[0]) - 1e-4) + 1, math.ceil(4 * float(f[-1]) - 1e-4) + 1)
        mapped = module(reference.resize_bilinear(input, f, size))
        target = output_size or (7, 5)
        total = torch.tensor([(target[0] - 1) / 6, (target[1] - 1) / 4], dtype=torch.float64)
        expected = reference.resize_bilinear(mapped, total / f, target)
        torch.testing.assert_close(regulator(input, output_size), expected, rtol=1e-5, atol=1e-6)

    def test_one_pixel_axes(self) -> None:
        regulator = ReceptiveFieldRegulator(nn.Conv2d(3, 2, 3, padding=1), factor=0.5)
        assert regulator(features(1, 3, 1, 5)).shape == (1, 2, 1, 5)
        assert regulator(features(1, 3, 1, 1), output_size=(8, 8)).shape == (1, 2, 8, 8)
        assert regulator(features(1, 3, 5, 5), output_size=(1, 1)).shape == (1, 2, 1, 1)

    def test_larger_factor_smaller_receptive_field(self) -> None:
        conv = nn.Conv2d(1, 1, 3, padding=4, dilation=4, bias=False).double()
        nn.init.constant_(conv.weight, 1.0)
        reach = {}
        for factor in (0.5, 1.0, 2.0, 4.0):
            input = torch.zeros(1, 1, 41, 41, dtype=torch.float64, requires_grad=True)
            ReceptiveFieldRegulator(conv, factor)(input)[0, 0, 20, 20].backward()
            assert input.grad is not None
            reach[factor] = int((input.grad[0, 0, 20] > 1e-9).nonzero().max()) - 20
        assert reach == {0.5: 8, 1.0: 4, 2.0: 2, 4.0: 1}


class TestGradients:
    @pytest.mark.parametrize("output_size", [None, (17, 21)])
    @pytest.mark.parametrize("factor", [0.63, 1.21, (0.83, 1.37)])
    def test_gradcheck(self, factor: float | tuple[float, float], output_size: tuple[int, int] | None) -> None:
        module = nn.Conv2d(2, 2, 3, padding=2, dilation=2)
        regulator = ReceptiveFieldRegulator(module, factor).double()
        input = features(1, 2, 5, 6).double().requires_grad_()

        def run(x: Tensor, log_factor: Tensor) -> Tensor:
            return torch.func.functional_call(regulator, {"log_factor": log_factor}, (x, output_size))

        assert torch.autograd.gradcheck(run, (input, regulator.log_factor.detach().clone().requires_grad_()))

    @pytest.mark.parametrize("factor", [1.0, 0.7, (0.9, 1.4)])
    @pytest.mark.parametrize("output_size", [None, (33, 33)])
    def test_two_terms_sum_to_the_factors_gradient(
        self, factor: float | tuple[float, float], output_size: tuple[int, int] | None
    ) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), factor)
        regulator.record_gradients = True
        for seed in range(2):  # Two backward passes: gradient accumulation.
            output = regulator(features(2, 3, 9, 9) * (seed + 1), output_size)
            output.square().sum().backward()
        inflation, interpolation = regulator.pop_factor_gradients()
        assert inflation.abs().min() > 0
        assert interpolation.abs().min() > 0
        assert regulator.log_factor.grad is not None
        torch.testing.assert_close(inflation + interpolation, regulator.log_factor.grad / regulator.factor)
        with pytest.raises(RuntimeError, match="no gradients recorded"):
            regulator.pop_factor_gradients()

    def test_a_frozen_factor_has_no_terms_to_record(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 1.3)
        regulator.record_gradients = True
        regulator.freeze_factor()
        regulator(features(2, 3, 9, 9)).square().sum().backward()
        with pytest.raises(RuntimeError, match="no gradients recorded"):
            regulator.pop_factor_gradients()

    def test_interpolation_term_is_the_layers_own(self) -> None:
        """G_inter = dL/df' * (-F / f^2), with the module and the inflation held still."""
        regulator = ReceptiveFieldRegulator(dilated().double(), 1.3).double()
        regulator.record_gradients = True
        input = features(1, 3, 6, 6).double()
        regulator(input).square().sum().backward()
        _, interpolation = regulator.pop_factor_gradients()
        factor = regulator.factor.clone().requires_grad_()
        mapped = regulator.module(Inflation2d()(input, factor.detach())).detach()
        Interpolation2d()(mapped, factor, (6, 6), (6, 6)).square().sum().backward()
        torch.testing.assert_close(interpolation, factor.grad)

    def test_trains_under_autocast(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 1.3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            regulator(features(1, 3, 8, 8)).float().sum().backward()
        assert regulator.log_factor.grad is not None
        assert regulator.log_factor.dtype == torch.float32
        assert regulator.log_factor.grad.isfinite().all()


class TestFactor:
    def test_clamped_in_training_without_losing_the_optimizers_state(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 1.0, min_factor=0.9, max_factor=1.1)
        optimizer = torch.optim.Adam([regulator.log_factor], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            regulator(features(1, 3, 8, 8)).square().sum().backward()
            before = int(optimizer.state[regulator.log_factor].get("step", 0))
            optimizer.step()
            assert optimizer.state[regulator.log_factor]["step"] == before + 1
            regulator(features(1, 3, 8, 8))
            assert 0.9 - 1e-6 <= regulator.factor.item() <= 1.1 + 1e-6

    def test_default_range_keeps_the_effective_dilation_within_1_and_the_map(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(dilation=6))
        assert regulator.factor_bounds((41, 30)) == ((6 / 41, 6 / 30), (6.0, 6.0))
        with torch.no_grad():
            regulator.log_factor.fill_(10.0)
        regulator(features(1, 3, 9, 9))
        assert regulator.effective_dilation == pytest.approx((1.0, 1.0))

    def test_factor_set_by_hand_beyond_the_default_range_is_kept(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(dilation=1), factor=2.0)
        regulator(features(1, 3, 5, 5))
        assert regulator.factor.item() == pytest.approx(2.0)

    def test_eval_never_changes_it(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 1.0, min_factor=0.9, max_factor=1.1).eval()
        with torch.no_grad():
            regulator.log_factor.fill_(math.log(2.0))
        regulator(features(1, 3, 5, 5))
        assert regulator.factor.item() == pytest.approx(2.0)

    def test_set_freeze_share(self) -> None:
        first = ReceptiveFieldRegulator(dilated(), (1.0, 1.0))
        second = ReceptiveFieldRegulator(dilated(), (2.0, 2.0))
        second.share_factor(first)
        first.set_factor((0.5, 1.5))
        assert second.factor.tolist() == pytest.approx([0.5, 1.5])
        assert first.effective_dilation == pytest.approx((4.0, 4 / 3))
        first.freeze_factor()
        (first(features(1, 3, 5, 5)) + second(features(1, 3, 5, 5))).sum().backward()
        assert first.log_factor.grad is None
        first.freeze_factor(frozen=False)
        (first(features(1, 3, 5, 5)) + second(features(1, 3, 5, 5))).sum().backward()
        assert first.log_factor.grad is not None

    def test_memory_budget_holds_the_factor_in_training(self) -> None:
        budget = 3 * 12 * 12 * 4
        regulator = ReceptiveFieldRegulator(dilated(dilation=8), 4.0, memory_budget=budget)
        with pytest.warns(UserWarning, match="over the budget"):
            regulator(features(1, 3, 8, 8))
        inflated = Inflation2d()(features(1, 3, 8, 8), regulator.factor)
        assert inflated.numel() * 4 <= budget
        assert inflated.shape[2] >= 10

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_memory_budget_holds_what_a_search_asks_for(self, training: bool, frozen: bool) -> None:
        budget = 3 * 12 * 12 * 4
        regulator = ReceptiveFieldRegulator(dilated(dilation=8), 1.0, memory_budget=budget).train(training)
        regulator.freeze_factor(frozen)
        regulator.dilation_override = (2.0, 2.0)
        seen = []
        regulator.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        with pytest.warns(UserWarning, match=r"over the budget of .*held at"):
            regulator(features(1, 3, 8, 8))
        assert 3 * 10 * 10 * 4 <= seen[0].numel() * 4 <= budget
        assert regulator.factor.item() == 1.0
        regulator.dilation_override = None
        regulator.in_search = True  # Between steps it may be set to such a dilation.
        regulator.set_factor(4.0)
        regulator(features(1, 3, 8, 8))
        assert 3 * 10 * 10 * 4 <= seen[1].numel() * 4 <= budget
        assert regulator.factor.item() == (4.0 if frozen or not training else pytest.approx(4.0 * 11 / 28))

    @pytest.mark.filterwarnings("ignore:inflating .* over the budget")
    @pytest.mark.parametrize("kind", ["sampled", "spsa"])
    def test_memory_budget_ends_no_search(self, kind: str) -> None:
        regulator = ReceptiveFieldRegulator(dilated(dilation=8), 1.0, memory_budget=3 * 12 * 12 * 4)
        seen = []
        regulator.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).square().mean() * model.realised_dilation[0]  # A small dilation, and so a large map.

        search: Search
        if kind == "sampled":
            search = SampledSearch(regulator, loss, 12, held_out=[features(1, 3, 8, 8)])
        else:
            search = SpsaSearch(regulator, loss, 12, lr=1.0)
        while not search.done:
            search.loss(features(1, 3, 8, 8)).backward()
            search.step()
        assert regulator._warned_of_budget
        assert max(seen) <= 3 * 12 * 12

    @pytest.mark.parametrize("size", [(1, 16), (16, 1), (3, 16)])
    def test_memory_budget_holds_narrow_maps(self, size: tuple[int, int]) -> None:
        regulator = ReceptiveFieldRegulator(dilated(dilation=8), 4.0, memory_budget=3 * 48 * 4)
        seen = []
        regulator.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
        with pytest.warns(UserWarning, match="over the budget"):
            regulator(features(1, 3, *size))
        assert 3 * (35 if 1 in size else 12) <= seen[0] <= 3 * 48

    def test_no_factor_fits_the_budget(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(dilation=8), 4.0, memory_budget=3 * 4)
        for size in ((8, 8), (1, 8)):
            with pytest.raises(ValueError, match="no factor fits it"):
                regulator(features(2, 3, *size))
        with pytest.raises(ValueError, match="no factor fits it"):
            regulator(features(2, 3, 1, 1))

    def test_memory_budget_is_an_error_in_eval(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), 4.0, memory_budget=1000).eval()
        with pytest.raises(ValueError, match="over the budget"):
            regulator(features(1, 3, 8, 8))
        for budget in (3 * 8 * 8 * 4, 3 * 8 * 8 * 4 - 1):
            regulator = ReceptiveFieldRegulator(dilated(), 1.0, memory_budget=budget).eval()
            if budget % 4:
                with pytest.raises(ValueError, match="over the budget"):
                    regulator(features(1, 3, 8, 8))
            else:
                regulator(features(1, 3, 8, 8))

    def test_state_dict_roundtrip(self) -> None:
        first, second = ReceptiveFieldRegulator(dilated(), 1.3), ReceptiveFieldRegulator(dilated(), 0.7)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(features(1, 3, 6, 6)), second(features(1, 3, 6, 6)))


class TestBadInput:
    @pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, (1.0, 0.0), (1.0, 1.0, 1.0)])
    def test_factor(self, factor: float | tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match="factor must be one positive finite number or two"):
            ReceptiveFieldRegulator(dilated(), factor)
        with pytest.raises(ValueError, match="factor must be one positive finite number or two"):
            ReceptiveFieldRegulator(dilated()).set_factor(factor)

    def test_bounds(self) -> None:
        with pytest.raises(ValueError, match="lies outside"):
            ReceptiveFieldRegulator(dilated(), 2.0, max_factor=1.5)
        with pytest.raises(ValueError, match="min_factor must be one positive"):
            ReceptiveFieldRegulator(dilated(), min_factor=-1.0)
        with pytest.raises(ValueError, match="one factor for both axes"):
            ReceptiveFieldRegulator(dilated()).set_factor((1.0, 2.0))

    def test_module_that_changes_the_size(self) -> None:
        with pytest.raises(ValueError, match="must keep the map's size, but turned"):
            ReceptiveFieldRegulator(nn.Conv2d(3, 2, 3))(features(1, 3, 8, 8))

    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 0, 8), (0, 3, 8, 8)])
    def test_input(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="map \\(N, C, h, w\\) that is not empty"):
            ReceptiveFieldRegulator(dilated())(torch.zeros(*shape))
        with pytest.raises(ValueError, match="map \\(N, C, h, w\\) that is not empty"):
            Inflation2d()(torch.zeros(*shape), torch.ones(1))

    def test_diverged_factor(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated())
        with torch.no_grad():
            regulator.log_factor.fill_(math.nan)
        with pytest.raises(ValueError, match="diverged"):
            regulator(features(1, 3, 8, 8))
