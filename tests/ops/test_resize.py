import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfield.ops import reference, resize_bilinear, resized_size
from rfield.ops.matrices import sample_by_matrices
from rfield.ops.resize import sampled_axes

FORMATS = (torch.contiguous_format, torch.channels_last)
FACTORS = (0.37, 0.5, 1 - 1e-3, 1 + 1e-3, 1.3, 2 - 1e-3, 2 + 1e-3, 2.7)


def random_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_matrices(input: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    return sample_by_matrices(input, scale.reciprocal(), *sampled_axes(scale.detach(), size), "border")


def inflated(size: tuple[int, int], factor: Tensor) -> tuple[int, int]:
    values = factor.tolist()
    return resized_size(size[0], values[0]), resized_size(size[1], values[-1])


class TestResizedSize:
    @given(st.integers(1, 300), st.floats(0.02, 40))
    def test_no_source_pixel_is_lost(self, size: int, factor: float) -> None:
        last_position = (resized_size(size, factor) - 1) / factor
        assert last_position >= size - 1 - 1e-4 / factor - 1e-9
        assert last_position < size - 1 + 1 / factor

    @pytest.mark.parametrize("noise", [-1e-6, 0, 1e-6])
    def test_float_noise_does_not_change_it(self, noise: float) -> None:
        assert resized_size(41, 1 + noise) == 41
        assert resized_size(41, 2 + noise) == 81
        assert resized_size(41, 0.5 + noise) == 21

    @pytest.mark.parametrize(("size", "factor"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, math.nan), (3, math.inf)])
    def test_bad_input(self, size: int, factor: float) -> None:
        with pytest.raises(ValueError, match=r"must be (at least 1|positive and finite), got"):
            resized_size(size, factor)


class TestAgainstTheLoopOracle:
    @settings(max_examples=60, deadline=None)
    @given(
        h=st.integers(1, 7),
        w=st.integers(1, 7),
        target=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        factors=st.lists(st.one_of(st.floats(0.2, 5), st.sampled_from([0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=2),
        seed=st.integers(0, 100),
        memory_format=st.sampled_from(FORMATS),
    )
    def test_output_and_gradients(
        self,
        h: int,
        w: int,
        target: tuple[int, int],
        factors: list[float],
        seed: int,
        memory_format: torch.memory_format,
    ) -> None:
        input = random_map(2, 2, h, w, seed=seed).contiguous(memory_format=memory_format).requires_grad_()
        factor = torch.tensor(factors, dtype=torch.float64, requires_grad=True)
        output = resize_bilinear(input, factor, target)
        torch.testing.assert_close(output, reference.resize_bilinear(input.detach(), factor, target))
        grad_output = random_map(2, 2, *target, seed=seed + 1)
        grad_input, grad_factor = torch.autograd.grad(output, (input, factor), grad_output)
        expected = reference.resize_bilinear_backward(input.detach(), factor.detach(), grad_output)
        torch.testing.assert_close(grad_input, expected[0])
        torch.testing.assert_close(grad_factor, expected[1])


class TestGradients:
    @pytest.mark.parametrize("factor", FACTORS)
    @pytest.mark.parametrize(
        "size", [(1, 1), (1, 4), (2, 3), (5, 5), (7, 6), (11, 3)], ids=lambda size: f"{size[0]}x{size[1]}"
    )
    def test_gradcheck(self, factor: float, size: tuple[int, int]) -> None:
        for seed, memory_format in enumerate(FORMATS):
            input = random_map(1, 2, *size, seed=seed).contiguous(memory_format=memory_format).requires_grad_()
            scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
            target = inflated(size, scale)
            assert torch.autograd.gradcheck(lambda x, f, t=target: resize_bilinear(x, f, t), (input, scale))

    def test_gradcheck_per_axis(self) -> None:
        input = random_map(2, 1, 4, 5).requires_grad_()
        scale = torch.tensor([0.7, 1.9], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, f: resize_bilinear(x, f, (6, 8)), (input, scale))

    @pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
    def test_gradcheck_in_every_memory_format(self, layout: str) -> None:
        base = random_map(2, 3, 5, 4)
        input = {
            "channels_last": base.contiguous(memory_format=torch.channels_last),
            "transposed": base.transpose(2, 3),
            "strided": random_map(2, 3, 5, 8)[..., ::2],
        }[layout]
        assert not input.is_contiguous()
        scale = torch.tensor([1.37], dtype=torch.float64)
        expected = resize_bilinear(input.contiguous(), scale, (6, 7))
        torch.testing.assert_close(resize_bilinear(input, scale, (6, 7)), expected)
        assert torch.autograd.gradcheck(
            lambda x, f: resize_bilinear(x, f, (6, 7)), (input.requires_grad_(), scale.requires_grad_())
        )

    @pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_gradients_of_any_strides(self, factor: float, memory_format: torch.memory_format) -> None:
        input = random_map(2, 3, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        output = resize_bilinear(input, scale, (7, 7))
        for grad in (random_map(2, 3, 7, 1).expand(-1, -1, -1, 7), random_map(2, 3, 7, 7).transpose(2, 3)):
            whole = grad.clone(memory_format=torch.contiguous_format)
            got, want = (torch.autograd.grad(output, (input, scale), each, retain_graph=True) for each in (grad, whole))
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("seed", range(3))
    def test_kinks_against_central_differences(self, factor: float, seed: int) -> None:
        """Every sample lies on a pixel (or every second one): plain autograd of a clamped tent gets this wrong."""
        input = random_map(1, 2, 6, 5, seed=seed).contiguous(memory_format=FORMATS[seed % 2])
        weight = random_map(1, 2, 6, 5, seed=seed + 1)

        def loss(scale: Tensor) -> Tensor:
            return (resize_bilinear(input, scale, (6, 5)) * weight).sum()

        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(scale), scale)
        step = 1e-7
        with torch.no_grad():
            central = (loss(scale + step) - loss(scale - step)) / (2 * step)
        torch.testing.assert_close(gradient[0], central, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 0.5), (0.25, 0.5), (1.0, 0.25), (0.125, 1.0)])
    def test_strides_against_matrices(self, factors: tuple[float, float], memory_format: torch.memory_format) -> None:
        input = random_map(2, 3, 9, 17).contiguous(memory_format=memory_format).requires_grad_()
        size = (round(8 * factors[0]) + 1, round(16 * factors[1]) + 1)
        weight = random_map(2, 3, *size, seed=1)
        scale = torch.tensor(factors, dtype=torch.float64, requires_grad=True)
        output = resize_bilinear(input, scale, size)
        expected = by_matrices(input, scale, size)
        assert type(output.grad_fn).__name__ == "_DifferentiableBackward", "a copy of pixels, and not by matrices"
        assert output.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(output, expected)
        for got, want in zip(
            torch.autograd.grad((output.pow(2) * weight).sum(), (input, scale)),
            torch.autograd.grad((expected.pow(2) * weight).sum(), (input, scale)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)

    def test_a_map_of_one_pixel_at_a_tiny_factor(self) -> None:
        scale = torch.tensor([2.0**-100], dtype=torch.float64, requires_grad=True)
        output = resize_bilinear(random_map(1, 2, 1, 1), scale, (1, 1))
        assert torch.equal(output, random_map(1, 2, 1, 1))
        assert torch.autograd.grad(output.sum(), scale)[0] == 0

    def test_double_backward_to_the_input(self) -> None:
        input = random_map(1, 2, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
        scale = torch.tensor([1.3], dtype=torch.float64)
        assert torch.autograd.gradgradcheck(lambda x: resize_bilinear(x, scale, (5, 5)).pow(3), (input,))

    @pytest.mark.parametrize(("factor", "size"), [(1.3, 5), (1.0, 5), (0.5, 3)])
    def test_mixed_second_derivative(self, factor: float, size: int) -> None:
        """Also where the resize is a copy of pixels."""
        input = random_map(1, 2, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)

        def grad_factor(x: Tensor) -> Tensor:
            output = resize_bilinear(x, scale, (size, size))
            return torch.autograd.grad(output.pow(2).sum(), scale, create_graph=True)[0]

        assert torch.autograd.gradcheck(grad_factor, (input,))

    @pytest.mark.parametrize(("factor", "size"), [(1.0, (5, 4)), (0.5, (3, 3))])
    def test_second_derivatives_of_a_copy(self, factor: float, size: tuple[int, int]) -> None:
        """Compare all four with those of the matrices."""
        input = random_map(2, 2, 5, size[1] if factor == 1 else 5).contiguous(memory_format=torch.channels_last)
        input.requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        found = []
        for output in (
            resize_bilinear(input, scale, size),
            sample_by_matrices(input, scale.reciprocal(), *sampled_axes(scale.detach(), size), "border"),
        ):
            first = torch.autograd.grad(output.pow(3).sum(), (input, scale), create_graph=True)
            second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), (input, scale), retain_graph=True)
            only_input = torch.autograd.grad(output.pow(3).sum(), input, create_graph=True)[0]
            found.append([*first, *second, *torch.autograd.grad(only_input.pow(2).sum(), input)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    def test_an_axis_of_one_pixel_adds_nothing(self) -> None:
        scale = torch.tensor([1.3, 0.8], dtype=torch.float64, requires_grad=True)
        output = resize_bilinear(random_map(1, 2, 1, 6), scale, (4, 5))
        (gradient,) = torch.autograd.grad(output.pow(2).sum(), scale)
        assert gradient[0] == 0
        assert gradient[1] != 0


class TestPrecisionAndCompile:
    def test_factor_one_is_the_identity(self) -> None:
        input = random_map(2, 3, 9, 7).float()
        assert torch.equal(resize_bilinear(input, torch.ones(1), (9, 7)), input)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_input_is_resized_in_float32(self, dtype: torch.dtype) -> None:
        input = random_map(1, 2, 7, 7).to(dtype)
        output = resize_bilinear(input, torch.tensor([1.4]), (9, 9))
        assert output.dtype == dtype
        assert torch.equal(output, resize_bilinear(input.float(), torch.tensor([1.4]), (9, 9)).to(dtype))

    def test_autocast_changes_nothing(self) -> None:
        input = random_map(1, 4, 9, 9).float()
        scale = torch.tensor([0.8], requires_grad=True)
        expected = resize_bilinear(input, scale, (8, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = resize_bilinear(input, scale, (8, 8))
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_memory_format_is_kept(self, memory_format: torch.memory_format) -> None:
        input = random_map(2, 3, 5, 4).contiguous(memory_format=memory_format)
        output = resize_bilinear(input, torch.tensor([1.5]), (7, 6))
        assert output.is_contiguous(memory_format=memory_format)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "backend",
        [
            "aot_eager",
            pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")),
        ],
    )
    def test_compiles_without_graph_breaks(self, backend: str) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(resize_bilinear, backend=backend, fullgraph=True)
        input = random_map(1, 2, 6, 5).requires_grad_()
        for factor in (1.2, 0.9):
            scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
            actual, expected = (op(input, scale, (7, 6)) for op in (compiled, resize_bilinear))
            torch.testing.assert_close(actual, expected)
            for got, want in zip(
                torch.autograd.grad(actual.pow(2).sum(), (input, scale)),
                torch.autograd.grad(expected.pow(2).sum(), (input, scale)),
                strict=True,
            ):
                torch.testing.assert_close(got, want)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_on_a_gpu(self) -> None:
        input, scale = random_map(2, 3, 9, 7), torch.tensor([1.3], dtype=torch.float64)
        results = []
        for device in ("cpu", "cuda"):
            x, f = input.to(device).requires_grad_(), scale.to(device).requires_grad_()
            output = resize_bilinear(x, f, (11, 10))
            results.append([output, *torch.autograd.grad(output.pow(2).sum(), (x, f))])
        for cpu, gpu in zip(*results, strict=True):
            torch.testing.assert_close(gpu.cpu(), cpu)


class TestBadInput:
    @pytest.mark.parametrize(
        ("input", "factor", "size", "message"),
        [
            (torch.rand(3, 4, 4), torch.ones(1), (4, 4), r"4 dimensions .* got shape \(3, 4, 4\)"),
            (torch.rand(1, 3, 0, 4), torch.ones(1), (4, 4), "must not be empty"),
            (torch.rand(1, 3, 4, 4), torch.tensor(1.0), (4, 4), r"shape \(1,\) or \(2,\)"),
            (torch.rand(1, 3, 4, 4), torch.ones(3), (4, 4), r"shape \(1,\) or \(2,\)"),
            (torch.rand(1, 3, 4, 4), torch.zeros(1), (4, 4), r"positive and finite, got \[0.0\]"),
            (torch.rand(1, 3, 4, 4), torch.tensor([-1.0]), (4, 4), "positive and finite"),
            (torch.rand(1, 3, 4, 4), torch.tensor([1.0, math.nan]), (4, 4), "positive and finite"),
            (torch.rand(1, 3, 4, 4), torch.ones(1), (0, 4), "two positive sizes"),
        ],
    )
    def test_values(self, input: Tensor, factor: Tensor, size: tuple[int, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resize_bilinear(input, factor, size)

    def test_types(self) -> None:
        with pytest.raises(TypeError, match=r"input must be a floating-point tensor, got torch\.uint8"):
            resize_bilinear(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.ones(1), (2, 2))
        with pytest.raises(TypeError, match="scale_factor must be a floating-point tensor"):
            resize_bilinear(torch.zeros(1, 1, 2, 2), torch.ones(1, dtype=torch.int64), (2, 2))
