"""What all layers with a learned receptive field have: the range, the snap, freezing and sharing, state dicts."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rfield import fuse
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.layers.dilation import integer_range, round_dilation
from rfield.layers.factor import LearnedFactor


def conv(dilation: int | tuple[int, int], channels: int = 2) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)


def adaptive(dilation: int | tuple[int, int] = 2, **options: object) -> AdaptiveConv2d:
    return AdaptiveConv2d.from_conv(conv(dilation), **options)


def regulator(dilation: int | tuple[int, int] = 2, **options: object) -> ReceptiveFieldRegulator:
    return ReceptiveFieldRegulator(conv(dilation), **options)


def image() -> Tensor:
    return torch.randn(1, 2, 15, 13, generator=torch.Generator().manual_seed(1))


BOTH = pytest.mark.parametrize("make", [adaptive, regulator])


class TestSnap:
    @pytest.mark.parametrize(("value", "whole"), [(0.1, 1), (1.4, 1), (1.5, 2), (2.5, 3), (2.4999999, 3), (7.95, 8)])
    def test_halves_go_up(self, value: float, whole: int) -> None:
        assert round_dilation(value) == whole
        # An end that is whole but for rounding belongs to the range.
        assert integer_range(3.0, 5.0) == integer_range(3.000001, 4.999999) == (3, 5)
        assert integer_range(3.0001, 4.9999) == (4, 4)

    @BOTH
    @pytest.mark.parametrize(
        ("base", "factor", "whole"), [(5, 2.0, 3), (3, 2.0, 2), (7, 2.0, 4), (2, 5.0, 1), (11, 1.0, 11)]
    )
    def test_is_exact(self, make: type, base: int, factor: float, whole: int) -> None:
        layer = make(base, factor=factor)
        layer.snap()
        assert layer.snapped
        assert layer.effective_dilation == (whole, whole)
        assert not layer.log_factor.requires_grad
        assert torch.equal(layer(image()), conv(whole)(image()))

    @BOTH
    def test_one_factor_for_a_rectangle(self, make: type) -> None:
        layer = make((2, 6), factor=1.3)
        layer.snap()
        assert layer.effective_dilation == (2, 5)
        assert layer.factor.tolist() == pytest.approx([1, 6 / 5])
        assert torch.equal(layer(image()), conv((2, 5))(image()))

    @BOTH
    def test_each_layer_of_a_shared_factor_has_its_own(self, make: type) -> None:
        layers = [make(dilation) for dilation in (1, 2, 3)]
        for other in layers[1:]:
            other.share_factor(layers[0])
        layers[0].set_factor(2 / 2.7)
        for layer in layers:
            layer.snap()
        # A regulator of a plain convolution has nothing to snap.
        dilations = [layer.effective_dilation[0] for layer in layers]
        assert dilations == pytest.approx([1, 3, 4] if make is adaptive else [1.35, 3, 4])
        model = nn.Sequential(*layers[1:])
        assert torch.equal(model(image()), fuse(model)(image()))

    @BOTH
    def test_again_changes_nothing(self, make: type) -> None:
        layer = make(5, factor=2.0)
        layer.snap()
        layer.snap()
        layer.double().to("cpu")
        assert layer.effective_dilation == (3, 3)
        layer.float()
        assert layer.effective_dilation == (3, 3)
        place = layer.log_factor.data_ptr()
        assert layer.float().log_factor.data_ptr() == place

    @BOTH
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_has_float32_whatever_the_default_is(self, make: type, dtype: torch.dtype) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            layer = make(5, factor=1.3)
        finally:
            torch.set_default_dtype(before)
        assert layer.log_factor.dtype is torch.float32
        assert layer.factor.item() == pytest.approx(1.3, rel=1e-6)

    @BOTH
    def test_a_new_factor_takes_it_back(self, make: type) -> None:
        layer, fresh = make(5), make(5, factor=1.7)
        layer.snap()
        layer.set_factor(1.7)
        assert not layer.snapped
        assert torch.equal(layer.eval()(image()), fresh.eval()(image()))

    @BOTH
    def test_learning_resumes_at_the_whole_dilation(self, make: type) -> None:
        layer = make(5, factor=2.1)
        layer.snap()
        layer.freeze_factor(False)
        assert not layer.snapped
        assert layer.effective_dilation == pytest.approx((2, 2))
        layer(image()).square().sum().backward()
        assert layer.log_factor.grad.abs() > 0

    @BOTH
    @pytest.mark.parametrize(
        ("bounds", "factor", "whole"),
        [
            ({"min_factor": 0.87}, 0.88, 4),  # From 4.55, but 5 lies beyond.
            ({"max_factor": 1.7}, 1.7, 3),  # From 2.35, but 2 lies beyond.
            ({"min_factor": 0.8}, 0.81, 5),  # From 4.94; the bound itself is whole.
            ({"min_factor": 0.81, "max_factor": 0.89}, 0.81, 5),  # 4.49 to 4.94 hold none.
        ],
    )
    def test_stays_within_bounds_that_hold_a_whole_dilation(
        self, make: type, bounds: dict[str, float], factor: float, whole: int
    ) -> None:
        layer = make(4, factor=factor, **bounds)
        layer.snap()
        assert layer.effective_dilation == (whole, whole)

    def test_drifts_under_no_optimizer(self) -> None:
        layer = adaptive(5, factor=1.6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for step in range(3):
            if step == 1:
                layer.freeze_factor()
                before = layer.factor.item()
            layer(image()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert layer.factor.item() == before


class TestStateDict:
    @BOTH
    @pytest.mark.parametrize("snapped", [False, True])
    def test_of_a_snapped_layer_into_another(self, make: type, snapped: bool) -> None:
        first, second = make((2, 6), factor=1.3), make((2, 6))
        first.snap()
        if snapped:
            second.snap()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.effective_dilation == (2, 5)
        assert torch.equal(second(image()), first(image()))

    @BOTH
    def test_of_a_learning_layer_into_a_snapped_one(self, make: type) -> None:
        first, second = make(5, factor=1.3).eval(), make(5, factor=2.1).eval()
        second.snap()
        second.load_state_dict(first.state_dict())
        assert not second.snapped
        assert torch.equal(second(image()), first(image()))

    def test_of_a_plain_convolution_leaves_the_dilation(self) -> None:
        layer = adaptive(5, factor=2.1)
        layer.snap()
        layer.load_state_dict(conv(2).state_dict())
        assert layer.effective_dilation == (2, 2)
        assert layer.snapped
        layer.set_factor(1.7)
        layer.load_state_dict(conv(2).state_dict())
        assert layer.factor.item() == pytest.approx(1.7)

    @BOTH
    def test_has_a_key_more_once_snapped_and_shares_nothing(self, make: type) -> None:
        layer = make(5)
        keys = set(layer.state_dict())
        layer.snap()
        state = layer.state_dict()
        assert set(state) - keys == {"snapped"}
        state["snapped"].fill_(7)
        assert layer.effective_dilation == (5, 5)

    @pytest.mark.parametrize("value", [torch.tensor(True), torch.tensor([2, 0]), torch.tensor([2.0, 2.0])])
    def test_bad_snap(self, value: Tensor) -> None:
        with pytest.raises(RuntimeError, match="snapped must be two whole dilations"):
            adaptive().load_state_dict({**adaptive().state_dict(), "snapped": value}, strict=False)


class TestRange:
    @BOTH
    def test_is_not_moved_by_a_set_factor(self, make: type) -> None:
        layer = make(4)
        bounds = layer.factor_bounds((12, 24))
        assert bounds == ((4 / 12, 4 / 24), (4, 4))
        for factor in (0.01, 30.0, 1.5):
            layer.set_factor(factor)
            assert layer.factor_bounds((12, 24)) == bounds

    @BOTH
    def test_holds_the_factor_of_the_start(self, make: type) -> None:
        layer, follower = make(4, factor=0.1), make(4)
        layer(image())
        assert layer.factor.item() == pytest.approx(0.1)
        follower.share_factor(layer)
        assert follower.factor_bounds((12, 24)) == ((0.1, 0.1), (4, 4))
        follower.extend_range([5.0])
        assert follower.factor_bounds((12, 24)) == ((4 / 12, 4 / 24), (5, 5))

    def test_one_factor_has_the_looser_bound_of_both_axes_and_two_have_each_their_own(self) -> None:
        for axes, expected in ((1, [4 / 15]), (2, [4 / 15, 4 / 13])):
            layer = adaptive(4, factor=(1.0,) * axes)
            with torch.no_grad():
                layer.log_factor.fill_(-9.0)
            layer(image())
            assert layer.factor.tolist() == pytest.approx(expected)

    @BOTH
    def test_one_factor_of_a_rectangle_has_the_looser_bounds(self, make: type) -> None:
        layer = make((2, 6))
        for log_factor, expected in ((9.0, 6), (-9.0, 2 / 15)):
            with torch.no_grad():
                layer.log_factor.fill_(log_factor)
            layer(image())
            assert layer.factor.item() == pytest.approx(expected)

    def test_bounds_are_those_of_both_factors(self) -> None:
        for bounds in ({"max_factor": 1.5}, {"min_factor": 1.5}):
            with pytest.raises(ValueError, match="lies outside"):
                adaptive(4, factor=(1.0, 2.0), **bounds)

    @BOTH
    def test_a_frozen_factor_is_not_brought_into_it(self, make: type) -> None:
        layer = make(4)
        layer.freeze_factor()
        layer.set_factor(5.0)
        layer(image())
        assert layer.factor.item() == pytest.approx(5.0)


def test_a_frozen_dilation_near_a_whole_one_is_not_that_one() -> None:
    layer: LearnedFactor = adaptive(8, factor=8 / 7.95)
    layer.freeze_factor()
    assert not torch.equal(layer(image()), conv(8)(image()))
    assert math.isclose(layer.effective_dilation[0], 7.95, rel_tol=1e-6)
