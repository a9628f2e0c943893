import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rfield
from rfield.layers import ImageAdaptiveRegulator
from rfield.ops import reference, resized_size


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def shaken(layer: ImageAdaptiveRegulator) -> ImageAdaptiveRegulator:
    """The layer in float64, with a predictor that tells images apart."""
    torch.manual_seed(3)
    for part in (layer.predictor[2], layer.predictor[4]):
        nn.init.normal_(part.weight)
    return layer.double()


def convolution(dilation: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=dilation, dilation=dilation), nn.Tanh())


def naive(layer: ImageAdaptiveRegulator, input: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Image by image with slow resizes, and the prediction by its definition."""
    outputs = []
    for image in input.split(1):
        _, _, first, _, last = layer.predictor
        hidden = (first.weight @ image.mean((0, 2, 3)) + first.bias).clamp(min=0)
        share = 1 / (1 + (-(last.weight @ hidden + last.bias)).exp())
        factor = layer.base_dilation / (layer.least ** (1 - share) * layer.greatest**share)
        sizes = [(side, resized_size(side, float(factor))) for side in image.shape[2:]]
        inflated = reference.resize_bilinear(image, factor, (sizes[0][1], sizes[1][1]))
        total = torch.tensor([(side - 1) / (own - 1) for side, (own, _) in zip(output_size, sizes, strict=True)])
        outputs.append(reference.resize_bilinear(layer.module(inflated), total / factor, output_size))
    return torch.cat(outputs)


@pytest.mark.parametrize("output_size", [None, (7, 9)])
def test_output_is_that_of_slow_resizes_image_by_image(output_size: tuple[int, int] | None) -> None:
    layer, input = shaken(ImageAdaptiveRegulator(convolution(), 2, greatest=3.0)), features(3, 2, 4, 5).double()
    assert len(set(layer.dilations(input).tolist())) == 3
    with torch.no_grad():
        torch.testing.assert_close(layer(input, output_size), naive(layer, input, output_size or (4, 5)))


def test_gradients_of_input_module_and_predictor_against_finite_differences() -> None:
    layer = shaken(ImageAdaptiveRegulator(convolution(), 2, greatest=3.0))
    names = [name for name, _ in layer.named_parameters() if "2." not in name or "predictor" in name]
    weights = [layer.get_parameter(name).detach().requires_grad_() for name in names]

    def run(input: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), input)
        return output

    input = features(2, 2, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (input, *weights), fast_mode=True)
    # With a difference of the oracle, too: the predictor's last bias.
    output = features(2, 2, 4, 5).double()
    bias = layer.predictor[4].bias
    (gradient,) = torch.autograd.grad((layer(input) * output).sum(), bias)
    losses = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            moved.predictor[4].bias.add_(step)
            losses.append(float((naive(moved, input.detach(), (4, 5)) * output).sum()))
    assert float(gradient) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


@pytest.mark.slow
def test_starts_as_the_module_and_learns_what_each_image_needs() -> None:
    """Images of two kinds whose targets are seen at distances 3 and 5, from a start at 2."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, padding=2, dilation=2, bias=False)
    layer = ImageAdaptiveRegulator(conv, 1, greatest=8.0)
    smooth = nn.functional.avg_pool2d(features(4, 1, 24, 24), 7, 1, 3)
    kind = torch.tensor([-0.3, 0.3, -0.3, 0.3])[:, None, None, None]
    input = smooth - smooth.mean((2, 3), keepdim=True) + kind
    torch.testing.assert_close(layer(input), conv(input))
    pairs = zip(input.chunk(4), (3, 5, 3, 5), strict=True)
    target = torch.cat([nn.functional.conv2d(image, conv.weight, None, 1, d, d) for image, d in pairs]).detach()
    optimizer = torch.optim.Adam(layer.predictor.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        (layer(input) - target)[..., 5:-5, 5:-5].square().mean().backward()
        optimizer.step()
    assert layer.dilations(input).tolist() == pytest.approx([3.0, 5.0, 3.0, 5.0], rel=0.1)


BAD: dict[str, Callable[[], object]] = {
    "nothing to regulate": lambda: ImageAdaptiveRegulator(nn.Conv2d(1, 1, 1), 1),
    "0 < least < greatest, got 3 and 2": lambda: ImageAdaptiveRegulator(convolution(), 2, 3.0, 2.0),
    "is not empty, got shape (0, 2, 9, 9)": lambda: ImageAdaptiveRegulator(convolution(), 2)(features(1, 2, 9, 9)[:0]),
    "must keep the map's size": lambda: ImageAdaptiveRegulator(nn.Conv2d(1, 1, 3), 1)(features(1, 1, 9, 9)),
    "0: an ImageAdaptiveRegulator inflates each image": lambda: rfield.fuse(
        nn.Sequential(ImageAdaptiveRegulator(convolution(), 2))
    ),
    "cannot be adapted: it is inside a regulator": lambda: rfield.adapt(
        nn.Sequential(ImageAdaptiveRegulator(convolution(), 2)), "0.module.0"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()
