"""The operators under torch.func, forward-mode differentiation, on the meta device and without images."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from rfield.layers import AdaptiveConv2d, LearnedFactor, ReceptiveFieldRegulator, weight_gradient
from rfield.ops import fractional_conv2d, resize_bilinear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = random(2, 3, 3, 3)
OF_GROUPS, BIAS = random(6, 1, 3, 5, seed=2), random(6, seed=3)


def convolve(input: Tensor, dilation: Tensor) -> Tensor:
    return fractional_conv2d(input, WEIGHT.to(input.device), None, dilation, padding=(1, 1))


def convolve_by_groups(input: Tensor, dilation: Tensor) -> Tensor:
    weight, bias = OF_GROUPS.to(input.device), BIAS.to(input.device)
    return fractional_conv2d(input, weight, bias, dilation, (1, 2), (2, 4), (2, 1), groups=3)


def resize(input: Tensor, factor: Tensor) -> Tensor:
    return resize_bilinear(input, factor, (6, 5))


# Between pixels, and on pixels, where another algorithm runs and the derivative is the mean of both sides.
OPERATORS = [(convolve, 1.3), (convolve, 2.0), (convolve_by_groups, 1.3), (resize, 1.3), (resize, 1.0), (resize, 0.5)]
Operator = Callable[[Tensor, Tensor], Tensor]


def loss_of(operator: Operator) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, number: operator(x, number).pow(3).sum()


def differentiated(operator: Operator, value: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return an input, a learned number, and autograd's gradients of the loss in both."""
    input = random(2, 3, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    learned = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(loss_of(operator)(input, learned), (input, learned), create_graph=True)
    return input, learned, list(gradients)


@pytest.mark.parametrize(("operator", "value"), OPERATORS)
class TestFunctionTransforms:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_vmap_over_images(self, operator: Operator, value: float, memory_format: torch.memory_format) -> None:
        images = random(4, 3, 6, 5).contiguous(memory_format=memory_format)[:, None]
        learned = torch.tensor([value], dtype=torch.float64)
        mapped = vmap(operator, in_dims=(0, None))(images, learned)
        torch.testing.assert_close(mapped, torch.stack([operator(image, learned) for image in images]))

    def test_grad_and_jvp(self, operator: Operator, value: float) -> None:
        input, learned, expected = differentiated(operator, value)
        leaves = input.detach(), learned.detach()
        for found in (
            grad(loss_of(operator), argnums=(0, 1))(*leaves),
            jacrev(loss_of(operator), argnums=(0, 1))(*leaves),
        ):
            torch.testing.assert_close(list(found), expected)
        towards = random(*input.shape, seed=1), torch.ones_like(learned)
        _, change = jvp(loss_of(operator), leaves, towards)
        directional = sum((one * other).sum() for one, other in zip(expected, towards, strict=True))
        torch.testing.assert_close(change, directional)
        with forward_ad.dual_level():
            dual = loss_of(operator)(*(forward_ad.make_dual(*pair) for pair in zip(leaves, towards, strict=True)))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, directional)

    def test_levels_differ_in_what_they_differentiate(self, operator: Operator, value: float) -> None:
        """Only the outer level differentiates in the learned number."""
        input, learned, (grad_input, grad_learned) = differentiated(operator, value)
        (expected,) = torch.autograd.grad(grad_input.sum(), learned, retain_graph=True)
        mixed = grad(lambda number: grad(loss_of(operator))(input.detach(), number).sum())(learned.detach())
        torch.testing.assert_close(mixed, expected)
        (second,) = torch.autograd.grad(grad_learned, learned)
        found = hessian(lambda number: loss_of(operator)(input.detach(), number))(learned.detach())
        torch.testing.assert_close(found.flatten(), second)

    def test_gradients_image_by_image(self, operator: Operator, value: float) -> None:
        images, learned = random(4, 1, 3, 6, 5), torch.tensor([value], dtype=torch.float64)
        each = grad(loss_of(operator), argnums=1)
        expected = torch.stack([each(image, learned) for image in images])
        torch.testing.assert_close(vmap(each, in_dims=(0, None))(images, learned), expected)

    def test_one_number_an_image_is_an_error(self, operator: Operator, value: float) -> None:
        numbers = torch.full((4, 1), value, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"must have values that can be read: .* vmap maps over$"):
            vmap(operator)(random(4, 1, 3, 6, 5), numbers)

    @pytest.mark.parametrize("on_meta", [True, False])
    def test_shapes_on_the_meta_device(self, operator: Operator, value: float, on_meta: bool) -> None:
        input, learned = random(2, 3, 6, 5), torch.tensor([value])
        found = operator(input.to("meta"), learned.to("meta" if on_meta else "cpu"))
        assert found.is_meta
        assert (found.shape, found.dtype) == (operator(input, learned).shape, input.dtype)
        with pytest.raises(
            ValueError, match=r"must have values that can be read: a tensor on the meta device has none"
        ):
            operator(input, learned.to("meta"))

    @pytest.mark.parametrize("shape", [(3, 6, 5), (6, 5), (2, 3, 0, 5), (2, 3, 6, 0)])
    def test_bad_shapes_are_an_error(self, operator: Operator, value: float, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"input must .*got shape \("):
            operator(random(*shape), torch.tensor([value]))


@pytest.mark.parametrize("dilation", [1.3, 2.0])
def test_convolution_of_no_image(dilation: float) -> None:
    input = torch.zeros(0, 3, 6, 5, requires_grad=True)
    leaves = [
        WEIGHT.float().requires_grad_(),
        torch.ones(2, requires_grad=True),
        torch.tensor([dilation]).requires_grad_(),
    ]
    output = fractional_conv2d(input, *leaves, padding=(1, 1))
    assert output.shape == (0, 2, 6, 5)
    gradients = torch.autograd.grad(output.sum(), [input, *leaves])
    assert [each.shape for each in gradients] == [input.shape, *(each.shape for each in leaves)]
    assert all(each.eq(0).all() for each in gradients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("make", [AdaptiveConv2d.from_conv, ReceptiveFieldRegulator])
def test_layers(make: Callable[..., LearnedFactor], factor: float, training: bool) -> None:
    layer = make(nn.Conv2d(3, 2, 3, padding=2, dilation=2), factor).double().train(training)
    parameters, image = dict(layer.named_parameters()), random(2, 3, 6, 5)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image,)).pow(3).sum()

    expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
    fixed = {name: parameter.detach() for name, parameter in parameters.items()}
    for transform in (grad, jacrev, jacfwd):
        found = transform(loss)(fixed, image)
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name], value)
    each = vmap(grad(loss), in_dims=(None, 0))(fixed, image[:, None])
    torch.testing.assert_close(each["log_factor"].sum(0), expected[list(parameters).index("log_factor")])
    with pytest.raises(ValueError, match="must have values that can be read"):
        vmap(loss)({name: torch.stack([value] * 2) for name, value in fixed.items()}, image[:, None])


def test_weight_gradient() -> None:
    input, mask = random(2, 1, 3, 4, 4), torch.arange(16).view(1, 4, 4) % 3

    def loss(image: Tensor) -> Tensor:
        return weight_gradient(image, mask, [1], 5.0).square().sum()

    expected = torch.stack([2 * image * torch.where(mask == 1, 5.0, 1.0)[:, None] for image in input])
    torch.testing.assert_close(vmap(grad(loss))(input), expected)
    torch.testing.assert_close(jacrev(loss)(input[0]), expected[0])
