import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfield.ops import fractional_conv2d, reference


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestIntegerDilation:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("dilation", [1, 2, 5])
    def test_is_the_plain_convolution_bit_for_bit(self, dilation: int, dtype: torch.dtype) -> None:
        input, weight, bias = (random_tensor(*shape).to(dtype) for shape in ((2, 4, 11, 9), (6, 2, 3, 3), (6,)))
        real = torch.tensor([float(dilation)])
        actual = fractional_conv2d(input, weight, bias, real, (2, 1), (3, 3), (3, 3), groups=2)
        expected = F.conv2d(input, weight, bias, (2, 1), dilation, dilation, groups=2)
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("dilation", [(2.0,), (1.0, 3.0)])
    def test_learned_integer_is_too_without_a_gradient(self, dilation: tuple[float, ...]) -> None:
        input, weight, bias = random_tensor(2, 4, 11, 9).float(), random_tensor(6, 4, 3, 3).float(), torch.rand(6)
        real = torch.tensor(dilation, requires_grad=True)
        with torch.no_grad():
            actual = fractional_conv2d(input, weight, bias, real, padding=(1, 1))
        whole = (round(dilation[0]), round(dilation[-1]))
        assert torch.equal(actual, F.conv2d(input, weight, bias, padding=whole, dilation=whole))
        assert fractional_conv2d(input, weight, bias, real, padding=(1, 1)).requires_grad

    @pytest.mark.parametrize("dilation", [(1.0, 4.0), (4.0, 1.0), (2.0, 7.0), (5.0, 3.0)])
    def test_each_axis_is_cropped_and_padded_separately(self, dilation: tuple[float, float]) -> None:
        input, weight, real = random_tensor(1, 2, 13, 12), random_tensor(2, 2, 3, 3), torch.tensor(dilation)
        actual = fractional_conv2d(input, weight, None, real, (1, 2), (1, 0), (4, 3))
        expected = reference.fractional_conv2d(input, weight, None, real, (1, 2), (1, 0), (4, 3))
        torch.testing.assert_close(actual, expected)

    def test_unpadded_convolution_keeps_its_size_and_centres(self) -> None:
        """With padding 0 a smaller dilation would need a negative padding, so the input is cropped."""
        input, weight = random_tensor(1, 1, 12, 12), random_tensor(1, 1, 3, 3)
        actual = fractional_conv2d(input, weight, None, torch.tensor([1.0]), base_dilation=(4, 4))
        assert torch.equal(actual, F.conv2d(input[..., 3:-3, 3:-3], weight))
        torch.testing.assert_close(
            actual, reference.fractional_conv2d(input, weight, None, torch.tensor([1.0]), base_dilation=(4, 4))
        )

    def test_learned_dilation_gives_the_same_values(self) -> None:
        input, weight = random_tensor(1, 2, 9, 8), random_tensor(3, 2, 3, 3)
        real = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        actual = fractional_conv2d(input, weight, None, real, padding=(1, 1))
        torch.testing.assert_close(actual, F.conv2d(input, weight, padding=2, dilation=2))


class TestAgainstTheLoopOracle:
    @settings(max_examples=30, deadline=None)
    @given(
        size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
        kernel=st.sampled_from([(3, 3), (1, 3), (3, 1), (5, 3), (1, 1)]),
        dilation=st.lists(st.floats(0.3, 6.0), min_size=1, max_size=2),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        base=st.integers(1, 2),
        groups=st.sampled_from([1, 2]),
        seed=st.integers(0, 99),
    )
    def test_output_and_gradients(
        self,
        size: tuple[int, int],
        kernel: tuple[int, int],
        dilation: list[float],
        stride: tuple[int, int],
        base: int,
        groups: int,
        seed: int,
    ) -> None:
        padding = (base * (kernel[0] // 2), base * (kernel[1] // 2))
        real = torch.tensor(dilation, dtype=torch.float64)
        leaves = [
            random_tensor(2, 2, *size, seed=seed).requires_grad_(),
            random_tensor(4, 2 // groups, *kernel, seed=seed + 1).requires_grad_(),
            random_tensor(4, seed=seed + 2).requires_grad_(),
        ]
        results = []
        for op in (fractional_conv2d, reference.fractional_conv2d):
            output = op(*leaves, real, stride, padding, (base, base), groups)
            results.append([output, *torch.autograd.grad(output.pow(2).sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


class TestGradients:
    @pytest.mark.parametrize("dilation", [(0.4,), (1.3,), (2.7,), (1 - 1e-3,), (2 + 1e-3,), (1.6, 3.2)])
    def test_gradcheck(self, dilation: tuple[float, ...]) -> None:
        leaves = (
            random_tensor(1, 2, 6, 7).requires_grad_(),
            random_tensor(2, 2, 3, 3).requires_grad_(),
            random_tensor(2).requires_grad_(),
            torch.tensor(dilation, dtype=torch.float64, requires_grad=True),
        )
        assert torch.autograd.gradcheck(lambda *args: fractional_conv2d(*args, (1, 2), (1, 1), (1, 1)), leaves)

    @pytest.mark.parametrize("dilation", [1.0, 2.0, 3.0])
    def test_integers_against_central_differences(self, dilation: float) -> None:
        input, weight, other = random_tensor(1, 2, 8, 7), random_tensor(2, 2, 3, 3), random_tensor(1, 2, 8, 7, seed=1)

        def loss(real: Tensor) -> Tensor:
            return (fractional_conv2d(input, weight, None, real, padding=(1, 1)) * other).sum()

        real = torch.tensor([dilation], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(real), real)
        step = 1e-7
        with torch.no_grad():
            central = (loss(real + step) - loss(real - step)) / (2 * step)
        torch.testing.assert_close(gradient[0], central, rtol=1e-5, atol=1e-6)

    def test_double_backward(self) -> None:
        leaves = (
            random_tensor(1, 2, 5, 4).requires_grad_(),
            random_tensor(2, 2, 3, 3).requires_grad_(),
            torch.tensor([1.3], dtype=torch.float64, requires_grad=True),
        )

        def cubed(input: Tensor, weight: Tensor, real: Tensor) -> Tensor:
            return fractional_conv2d(input, weight, None, real, padding=(1, 1)).pow(3)

        assert torch.autograd.gradgradcheck(cubed, leaves)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("images", "rows"), [(400, 3), (1, 401)])
    def test_bfloat16_sums_in_float32(self, images: int, rows: int, groups: int) -> None:
        """Sum many ones, over images and over the rows of a kernel: a sum of bfloat16 would stay at 256."""
        input, weight, bias = torch.ones(images, 2, 5, 1), torch.ones(2, 2 // groups, rows, 1), torch.ones(2)
        lower = [each.bfloat16().requires_grad_() for each in (input, weight, bias)]
        exact = [each.requires_grad_() for each in (input, weight, bias)]
        found = []
        for leaves in (lower, exact):
            real = torch.tensor([1.5 / rows], requires_grad=True)
            output = fractional_conv2d(*leaves, real, padding=(rows // 2, 0), groups=groups)
            found.append([output, *torch.autograd.grad(output.sum(), [*leaves, real])])
        assert found[1][0].max() > 400 or found[1][2].max() > 400
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual.float(), expected, rtol=0.01, atol=0.01 * expected.abs().max().item())
        assert [each.dtype for each in found[0]] == [torch.bfloat16] * 4 + [torch.float32]

    def test_autocast_casts_it_as_the_plain_convolution(self) -> None:
        input, weight, real = random_tensor(1, 4, 9, 7).float(), random_tensor(4, 4, 3, 3).float(), torch.tensor([1.7])
        with torch.autocast("cpu", torch.bfloat16):
            output = fractional_conv2d(input, weight, None, real, padding=(1, 1))
        assert output.dtype == torch.bfloat16
        expected = fractional_conv2d(input, weight, None, real, padding=(1, 1))
        torch.testing.assert_close(output.float(), expected, rtol=0.03, atol=0.3)

    @pytest.mark.parametrize("dilation", [1.7, 2.0])
    def test_autocast_leaves_float64(self, dilation: float) -> None:
        input, weight, bias = random_tensor(1, 4, 9, 7), random_tensor(4, 4, 3, 3), random_tensor(4)
        real = torch.tensor([dilation], dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            output = fractional_conv2d(input, weight, bias, real, padding=(1, 1))
        assert torch.equal(output, fractional_conv2d(input, weight, bias, real, padding=(1, 1)))

    def test_channels_last(self) -> None:
        input = random_tensor(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
        weight, real = random_tensor(3, 4, 3, 3), torch.tensor([1.7], dtype=torch.float64)
        actual = fractional_conv2d(input, weight, None, real, padding=(1, 1))
        torch.testing.assert_close(actual, fractional_conv2d(input.contiguous(), weight, None, real, padding=(1, 1)))


class TestBadInput:
    @pytest.mark.parametrize(
        ("weight", "dilation", "message"),
        [
            (torch.rand(1, 1, 2, 3), torch.ones(1), "must be odd along both axes .* got 2x3"),
            (torch.rand(1, 1, 3, 3), torch.tensor(1.0), "shape \\(1,\\) or \\(2,\\)"),
            (torch.rand(1, 1, 3, 3), torch.zeros(1), "positive and finite"),
            (torch.rand(1, 1, 3, 3), torch.tensor([math.nan]), "positive and finite"),
            (torch.rand(1, 1, 3, 3), torch.tensor([1.0, math.inf]), "positive and finite"),
            (torch.rand(1, 2, 3, 3), torch.ones(1), r"shape \(1, 2, 3, 3\) in 1 groups does not fit .* \(1, 1, 5, 5\)"),
            (torch.rand(1, 2, 3, 3), torch.tensor([1.5]), "does not fit an input"),
            (torch.rand(1, 3, 3), torch.tensor([1.5]), "does not fit an input"),
        ],
    )
    def test_values(self, weight: Tensor, dilation: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fractional_conv2d(torch.rand(1, 1, 5, 5), weight, None, dilation)

    @pytest.mark.parametrize("dilation", [1.5, 2.0])
    def test_groups_bias_and_types(self, dilation: float) -> None:
        input, weight, real = torch.rand(1, 4, 5, 5), torch.rand(4, 2, 3, 3), torch.tensor([dilation])
        for groups in (1, 3, 4):
            with pytest.raises(ValueError, match=f"in {groups} groups does not fit"):
                fractional_conv2d(input, weight, None, real, groups=groups)
        with pytest.raises(ValueError, match="in 2 groups does not fit"):
            fractional_conv2d(input, weight[:3], None, real, groups=2)
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\).* got shape \(1,\)"):
            fractional_conv2d(input, weight, torch.ones(1), real, groups=2)
        for other in (input.double(), input.bfloat16(), input.to(torch.uint8)):
            with pytest.raises(TypeError, match="floating-point tensors of one dtype, got "):
                fractional_conv2d(other, weight, None, real, groups=2)
        with pytest.raises(TypeError, match="floating-point tensors of one dtype"):
            fractional_conv2d(input.to(torch.uint8), weight.to(torch.uint8), None, real, groups=2)
        with pytest.raises(TypeError, match="floating-point tensors of one dtype"):
            fractional_conv2d(input, weight, torch.ones(4, dtype=torch.float64), real, groups=2)

    @pytest.mark.parametrize("size", [(5, 9), (8, 9), (9, 8)])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_map_smaller_than_the_reach(self, size: tuple[int, int], stride: int) -> None:
        """The kernel spans 8 px and its centre, 9 px: a map of 8 px is too small."""
        rest = (torch.rand(1, 1, 3, 3), None, torch.tensor([1.5]), (stride, stride))
        with pytest.raises(ValueError, match=f"a map of {min(size)} px, .* smaller than the kernel's reach of 8 px"):
            fractional_conv2d(torch.rand(1, 1, *size), *rest, base_dilation=(4, 4))
        assert fractional_conv2d(torch.rand(1, 1, 9, 9), *rest, base_dilation=(4, 4)).shape == (1, 1, 1, 1)
