import math

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.receptive_field.per_layer import layer_receptive_fields
from rfield.receptive_field.positive_gradients import PositiveGradients
from rfield.receptive_field.probe import Window, extent, output_map, probe_copy, probe_receptive_field, probe_window
from rfield.receptive_field.theoretical import receptive_field_px, theoretical_receptive_field
from rfield.segmentation.models import MODELS, ParsingNetwork, build_model, largefov_vgg16, small_cnn


def with_factor(network: ParsingNetwork, factor: float | tuple[float, float]) -> ParsingNetwork:
    assert isinstance(network.head.layers, ReceptiveFieldRegulator)
    network.head.layers = ReceptiveFieldRegulator(network.head.layers.module, factor)
    return network


@pytest.mark.parametrize(
    ("dilation", "factor", "nominal"),
    [(12, 1.0, 404), (14, 1.0, 436), (6, 1.0, 308), (14, 1.217, 396), (6, 0.632, 364)],
)
def test_figures_of_the_paper(dilation: int, factor: float, nominal: int) -> None:
    network = with_factor(largefov_vgg16(21, dilation=dilation, head_channels=4), factor)
    assert [round(side) for side in receptive_field_px(network)] == [nominal, nominal]
    exact = 227 + 16 * dilation / factor
    assert theoretical_receptive_field(network) == pytest.approx((exact, exact))


def test_factor_per_axis() -> None:
    network = with_factor(small_cnn(2, dilation=6), (2.0, 0.5))
    assert theoretical_receptive_field(network) == receptive_field_px(network) == pytest.approx((39.0, 111.0))


def test_a_plain_head_counts_as_factor_1() -> None:
    plain = small_cnn(2, dilation=6, regulate=False)
    assert theoretical_receptive_field(plain) == theoretical_receptive_field(small_cnn(2, dilation=6)) == (63.0, 63.0)
    assert theoretical_receptive_field(plain.backbone) == (15.0, 15.0)


def test_kernels_strides_and_dilations_that_differ_per_axis() -> None:
    layers = nn.Sequential(
        nn.Conv2d(1, 1, (3, 1), stride=(2, 1)), nn.AvgPool2d((1, 2), stride=(1, 3)), nn.MaxPool2d(3, 1, dilation=2)
    )
    # Height: 1 + 2, then 4 steps of 2 px. Width: 1 + 1, then 4 steps of 3 px.
    assert theoretical_receptive_field(layers) == (11.0, 14.0)


def test_nested_regulators_multiply() -> None:
    inner = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=4, dilation=4), 2.0)
    outer = nn.Sequential(nn.Conv2d(1, 1, 1, stride=2), ReceptiveFieldRegulator(inner, (1.0, 0.5)))
    assert theoretical_receptive_field(outer) == pytest.approx((9.0, 17.0))


class SideBySide(nn.Module):
    """A part of it is called as the method `chain` would be."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.chain = nn.ModuleList(branches)

    def branches(self) -> list[nn.Module]:
        return list(self.chain)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([branch(image) for branch in self.chain]).sum(0)


def test_of_branches_each_axis_takes_the_largest() -> None:
    tall, wide = nn.Conv2d(3, 3, (9, 1), padding=(4, 0)), nn.Conv2d(3, 3, (1, 5), padding=(0, 2))
    model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), SideBySide(tall, nn.Sequential(wide, nn.SELU())))
    assert theoretical_receptive_field(model) == probe_receptive_field(model) == (19, 11)
    assert theoretical_receptive_field(SideBySide(tall)) == (9, 1)
    with pytest.raises(ValueError, match="the branches of SideBySide give maps of several strides"):
        theoretical_receptive_field(SideBySide(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, stride=2)))


def test_unknown_modules_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d \(at '1.0'\) is not known"):
        theoretical_receptive_field(model)
    with pytest.raises(ValueError, match=r"GroupNorm \(at the top\) is not known"):
        theoretical_receptive_field(nn.GroupNorm(1, 1))


def probe(module: nn.Module) -> list[nn.Module]:
    """One-channel layers of the same geometry through which every pixel in the window has a positive gradient."""
    if isinstance(module, nn.Conv2d):
        conv = nn.Conv2d(
            1, 1, module.kernel_size, module.stride, module.padding, module.dilation, bias=False, dtype=torch.float64
        )
        nn.init.ones_(conv.weight)
        return [conv]
    if isinstance(module, nn.MaxPool2d):
        return [nn.AvgPool2d(module.kernel_size, module.stride, module.padding)]
    return [layer for child in module.children() for layer in probe(child)]


@pytest.mark.parametrize("dilation", [1, 5])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_the_support_of_the_gradient(name: str, dilation: int) -> None:
    network = build_model(name, 2, dilation=dilation, head_channels=4, regulate=False)
    if math.isinf(theoretical_receptive_field(network.backbone)[0]):  # of global layers
        assert network.backbone.nominal_receptive_field_px == probe_window(network.backbone, axis=1).local
        return
    for model in (network.backbone, network):
        height, width = theoretical_receptive_field(model)
        side = (int(height) // network.stride // 2 + 2) * 2 * network.stride + 1
        image = torch.zeros(1, 1, side, side, dtype=torch.float64, requires_grad=True)
        output = nn.Sequential(*probe(model))(image)
        centre = output.shape[-1] // 2
        output[0, 0, centre, centre].backward()
        assert image.grad is not None
        rows, columns = image.grad[0, 0].nonzero().unbind(1)
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (height, width)
        # Corner-anchored: the output is centred on input pixel centre * stride.
        assert rows.min() + rows.max() == 2 * centre * network.stride


def test_equals_the_support_of_the_gradient_of_a_regulator() -> None:
    """At factors of 2 and 1/2 every sampled position falls on a pixel, so that no bilinear neighbours blur the edge."""
    conv = nn.Conv2d(1, 1, 3, padding=2, dilation=2, bias=False)
    nn.init.ones_(conv.weight)
    regulator = ReceptiveFieldRegulator(conv, factor=(2.0, 0.5))
    image = torch.zeros(1, 1, 17, 17, requires_grad=True)
    regulator(image)[0, 0, 8, 8].backward()
    assert image.grad is not None
    rows, columns = (image.grad[0, 0] > 1e-3).nonzero().unbind(1)
    extents = (rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item()
    assert extents == pytest.approx(theoretical_receptive_field(regulator)) == (3, 9)


def test_a_module_may_tell_its_own_field_and_upsampling_halves_the_steps() -> None:
    class Told(nn.Module):
        receptive_field = (7.0, math.inf)
        stride = 4

    layers = nn.Sequential(nn.Conv2d(1, 1, 3, stride=2), Told(), nn.Upsample(scale_factor=2.0), nn.Conv2d(1, 1, 3))
    # 1 + 2 * 1, then 6 steps of 2 px, then 2 steps of 2 * 4 / 2 px.
    assert theoretical_receptive_field(layers) == (23.0, math.inf)
    # On a map of twice the size its 6 steps are 3.
    assert theoretical_receptive_field(ReceptiveFieldRegulator(Told(), factor=2.0))[0] == 4.0


def test_a_snapped_regulator_counts_once() -> None:
    regulator = ReceptiveFieldRegulator(nn.Conv2d(3, 3, 3, padding=6, dilation=6), factor=2.1)
    regulator.snap()
    assert theoretical_receptive_field(regulator) == probe_receptive_field(regulator) == (7, 7)
    (layer, output) = layer_receptive_fields(regulator)
    assert (layer.dilation, layer.field, output.field) == ((3, 3), (7, 7), (7, 7))


def test_the_mean_of_a_map_with_channels_last_is_global() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            map_ = image.movedim(1, 3)
            return (map_ + map_.mean((1, 2), keepdim=True)).movedim(3, 1)

    window = probe_window(ChannelsLast(), axis=0, lengths=[33])
    assert (window.size, window.local) == (math.inf, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("regulate", [False, True])
def test_the_probe_agrees_with_the_reckoning(name: str, regulate: bool) -> None:
    network = build_model(name, 2, dilation=3, head_channels=4, regulate=regulate, mechanism="dilation")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    if not regulate:  # The backbone is the same.
        windows = [probe_window(network.backbone, axis) for axis in (0, 1)]
        assert tuple(window.size for window in windows) == theoretical_receptive_field(network.backbone)
        assert windows[0].centre == pytest.approx(windows[0].position * network.stride)
    assert probe_receptive_field(network) == theoretical_receptive_field(network)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == before[key].dtype


def test_the_probe_sees_through_what_swallows_gradients() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Hardswish(),
        nn.Sigmoid(),
        nn.Dropout(0.99),
        nn.MaxPool2d((3, 1), return_indices=False),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
    assert probe_receptive_field(layers) == theoretical_receptive_field(layers) == (8.0, 8.0)


class SqueezeExcite(nn.Module):
    """A 3x3 convolution, gated by the mean of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.conv(image)
        return features * self.gate(features.mean((2, 3), keepdim=True)).sigmoid()


class Attention(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        tokens = image.flatten(2).transpose(1, 2)
        looked = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return image + looked.transpose(1, 2).reshape(image.shape)


@pytest.mark.parametrize(
    ("model", "local"),
    [
        (SqueezeExcite(), 3.0),
        (Attention(), 1.0),
        (nn.Sequential(nn.Conv2d(3, 4, 5), nn.GroupNorm(2, 4)), 5.0),
        (nn.Sequential(nn.Conv2d(3, 4, 5), nn.InstanceNorm2d(4)), 5.0),
        (nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1)), math.inf),
    ],
)
def test_the_probe_says_who_looks_at_the_whole_image(model: nn.Module, local: float) -> None:
    window = probe_window(model, axis=1, lengths=[33, 65])
    assert (window.size, window.local) == (math.inf, local)


def test_the_probe_minds_only_what_the_output_comes_from() -> None:
    class TwoOutputs(SqueezeExcite):
        def forward(self, image: Tensor) -> Tensor:
            features: Tensor = self.conv(image)
            super().forward(image)
            return features

    assert probe_receptive_field(TwoOutputs()) == (3.0, 3.0)


def test_the_probe_of_products_and_of_even_kernels() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(1, 1, 2, stride=2), nn.Conv2d(1, 1, 4, stride=2, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            product: Tensor = self.one(image) * self.other(image)
            return product

    window = probe_window(nn.Sequential(*[Product()], *[nn.Conv2d(1, 1, 2)]), axis=0, channels=1, lengths=[64])
    assert (window.size, window.count) == (6.0, 31)
    assert window.centre == window.position * 2 + 1.5


def test_the_probe_of_what_sees_nothing() -> None:
    class Blind(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.detach()

    with pytest.raises(ValueError, match="no gradient reaches the image"):
        probe_receptive_field(Blind())


class Tower(nn.Module):
    """Groups, an addition in place, and a product of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(12, 12, (5, 1), padding="same", groups=12)
        self.linear = nn.Linear(12, 12)

    def forward(self, image: Tensor) -> Tensor:
        features = self.grouped(self.stem(image))
        wide = self.depthwise(features)
        wide += features
        gate: Tensor = self.linear(wide.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return features * gate


def test_uniform_layers_are_run_cheaply_and_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        image = torch.ones(1, 3, 33, 35, dtype=torch.float64, requires_grad=True)
        with PositiveGradients(axis=0):
            output = probe_copy(Tower())(image)
        output[0, :, 8, 8].sum().backward()
        assert image.grad is not None
        return image.grad

    cheap = gradient()
    monkeypatch.setattr("rfield.receptive_field.gradient_rules.is_uniform", lambda weight: False)
    monkeypatch.setattr("rfield.receptive_field.gradient_rules.is_dense", lambda weight: False)
    torch.testing.assert_close(cheap, gradient(), rtol=1e-12, atol=0)
    # Height: 1 + 2 * 1 + (4 + 4) * 2; width without the depthwise convolution.
    assert probe_receptive_field(Tower()) == (19.0, 11.0)


class Padded(nn.Module):
    """Dilated by 60 px where it pads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, dilation=60)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.conv(nn.functional.pad(image, (60, 60, 60, 60)))
        return output


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding=60, dilation=60),
        nn.Conv2d(1, 1, 3, padding="same", dilation=60),
        AdaptiveConv2d(1, 1, 3, padding=15, dilation=15, factor=0.25),
        AdaptiveConv2d(1, 1, 5, padding=60, dilation=30),
        Padded(),
    ],
)
def test_the_probe_minds_taps_that_jump_over_the_edge(layer: nn.Module) -> None:
    for axis in (0, 1):
        assert probe_window(layer, axis, channels=1, lengths=[65]).size == math.inf
        window = probe_window(nn.Sequential(layer, layer), axis, channels=1, lengths=[65, 129, 257])
        assert (window.size, window.count) == (241, 257)


def test_the_probe_of_a_learned_layer_with_strides_and_of_the_first_strip_that_holds_the_field() -> None:
    layer = AdaptiveConv2d(1, 1, 5, stride=2, padding=30, dilation=15)
    layer.empty = nn.Parameter(torch.empty(0, 3))
    for axis in (0, 1):
        assert probe_window(layer, axis, channels=1, lengths=[33, 65, 129]) == Window(61.0, 61.0, 32.0, 16, 33)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the gradient at the image is not finite"):
            extent(torch.tensor([0.0, bad, 0.0]))


def test_the_map_that_a_model_means() -> None:
    fine, coarse = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 2, 2)
    for output in (coarse, {"aux": fine, "out": coarse}, {"logits": coarse}, (coarse, fine), [fine, (coarse, 1)]):
        assert output_map(output) is coarse
    with pytest.raises(ValueError, match="returns no map but a dict"):
        output_map({})
    with pytest.raises(ValueError, match=r"no map \(N, C, h, w\) but a tensor of shape \(1, 7, 8\)"):
        output_map(torch.zeros(1, 7, 8))


class OwnWay(nn.Sequential):
    """Runs its parts in another way than one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([part(input) for part in self], 1)


def test_a_sequential_with_a_forward_of_its_own_is_no_chain() -> None:
    model = nn.Sequential(nn.ReLU(), OwnWay(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2)))
    with pytest.raises(ValueError, match=r"field of OwnWay \(at '1'\) is not known"):
        theoretical_receptive_field(model)
    assert probe_receptive_field(model) == (5.0, 5.0)
