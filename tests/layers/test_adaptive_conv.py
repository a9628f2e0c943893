import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.ops import reference


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 12, "dilation": 12},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 4, "groups": 2},
    {"kernel_size": (5, 3), "padding": (4, 3), "dilation": (2, 3), "stride": (1, 2), "bias": False},
    {"kernel_size": 3, "padding": 0, "dilation": 3},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
class TestDropIn:
    def test_is_the_plain_convolution_bit_for_bit(self, options: dict[str, Any]) -> None:
        conv = nn.Conv2d(4, 6, **options)
        adaptive = AdaptiveConv2d.from_conv(conv)
        adaptive.freeze_factor()
        assert torch.equal(adaptive(features(2, 4, 27, 25)), conv(features(2, 4, 27, 25)))
        with torch.no_grad():
            adaptive.freeze_factor(frozen=False)
            assert torch.equal(adaptive(features(2, 4, 27, 25)), conv(features(2, 4, 27, 25)))

    def test_state_dicts_go_both_ways(self, options: dict[str, Any]) -> None:
        conv, adaptive = nn.Conv2d(4, 6, **options), AdaptiveConv2d(4, 6, **options)
        adaptive.load_state_dict(conv.state_dict())
        torch.testing.assert_close(adaptive(features(1, 4, 27, 25)), conv(features(1, 4, 27, 25)))
        assert conv.load_state_dict(adaptive.state_dict(), strict=False).missing_keys == []

    def test_size_does_not_depend_on_the_dilation(self, options: dict[str, Any]) -> None:
        adaptive = AdaptiveConv2d(4, 6, **options)
        size = adaptive(features(1, 4, 27, 25)).shape
        for factor in (0.8, 1.3, 2.9):
            adaptive.set_factor(factor)
            assert adaptive(features(1, 4, 27, 25)).shape == size


class TestLearning:
    def test_gradient_of_the_factor_against_the_loop_oracle(self) -> None:
        adaptive = AdaptiveConv2d(2, 2, 3, padding=2, dilation=2, factor=(0.83, 1.37)).double()
        input = features(1, 2, 7, 6).double()
        (gradient,) = torch.autograd.grad(adaptive(input).pow(2).sum(), adaptive.log_factor)
        step = 1e-6
        for axis in (0, 1):
            losses = []
            for sign in (1, -1):
                shifted = adaptive.log_factor.detach().clone()
                shifted[axis] += sign * step
                output = reference.fractional_conv2d(
                    input,
                    adaptive.weight.detach(),
                    adaptive.bias,
                    2 / shifted.exp(),
                    padding=(2, 2),
                    base_dilation=(2, 2),
                )
                losses.append(output.pow(2).sum())
            torch.testing.assert_close(gradient[axis], (losses[0] - losses[1]) / (2 * step), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_learns_the_dilation_of_a_smooth_teacher(self) -> None:
        """Blurred noise seen at distance 3, from a start at 2: the exact gradient finds it."""
        torch.manual_seed(0)
        box = torch.ones(1, 1, 5, 5) / 25
        input = nn.functional.conv2d(features(8, 1, 40, 40), box)
        teacher = nn.Conv2d(1, 4, 3, padding=3, dilation=3)
        student = AdaptiveConv2d(1, 4, 3, padding=2, dilation=2)
        student.load_state_dict(teacher.state_dict())
        optimizer = torch.optim.Adam([student.log_factor], lr=0.02)
        target = teacher(input)[..., 3:-3, 3:-3].detach()
        for _ in range(80):
            optimizer.zero_grad()
            (student(input)[..., 3:-3, 3:-3] - target).square().mean().backward()
            optimizer.step()
        assert student.effective_dilation[0] == pytest.approx(3.0, rel=0.03)

    def test_held_dilation_is_realised_and_let_go(self) -> None:
        conv = nn.Conv2d(2, 2, 3, padding=5, dilation=5)
        adaptive = AdaptiveConv2d(2, 2, 3, padding=2, dilation=2)
        adaptive.load_state_dict(conv.state_dict())
        before = adaptive(features(1, 2, 12, 12))
        adaptive.dilation_override = (5.0, 5.0)
        assert torch.equal(adaptive(features(1, 2, 12, 12)), conv(features(1, 2, 12, 12)))
        adaptive.dilation_override = None
        assert torch.equal(adaptive(features(1, 2, 12, 12)), before)

    def test_range_is_1_to_the_map(self) -> None:
        adaptive = AdaptiveConv2d(2, 2, 3, padding=4, dilation=4)
        for log_factor, expected in ((9.0, 1.0), (-9.0, 12.0)):
            with torch.no_grad():
                adaptive.log_factor.fill_(log_factor)
            adaptive(features(1, 2, 12, 12))
            assert adaptive.effective_dilation == pytest.approx((expected, expected))

    def test_shared_factor(self) -> None:
        first, second = (AdaptiveConv2d(2, 2, 3, padding=d, dilation=d) for d in (2, 4))
        second.share_factor(first)
        first.set_factor(0.5)
        assert (first.effective_dilation[0], second.effective_dilation[0]) == pytest.approx((4.0, 8.0))

    def test_survives_a_deep_copy(self) -> None:
        adaptive = AdaptiveConv2d(2, 2, 3, padding=2, dilation=2, factor=0.7)
        assert torch.equal(copy.deepcopy(adaptive)(features(1, 2, 9, 9)), adaptive(features(1, 2, 9, 9)))


class TestBadInput:
    def test_even_kernel(self) -> None:
        with pytest.raises(ValueError, match="kernel 4x4 is even along an axis"):
            AdaptiveConv2d(2, 2, 4)

    def test_padding_mode(self) -> None:
        with pytest.raises(ValueError, match="pads with padding_mode='reflect'"):
            AdaptiveConv2d.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))

    @pytest.mark.parametrize("shape", [(2, 5, 5), (0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
    def test_input(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"map \(N, C, h, w\) that is not empty, got shape"):
            AdaptiveConv2d(2, 2, 3)(torch.zeros(*shape))
