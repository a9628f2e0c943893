"""Tiles of large images have the logits of the whole image, or a line says that they do not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.segmentation.inference import tiling
from rfield.segmentation.inference.predict import _labels
from rfield.segmentation.inference.tiling import Tiler, join_tiles
from rfield.segmentation.models import HeadSpec, ParsingNetwork, build_model, small_cnn
from rfield.segmentation.models.backbones import Backbone
from rfield.segmentation.models.heads import SinglePathHead
from rfield.surgery.fuse import fuse


def opinionated(network: ParsingNetwork, factors: tuple[float, ...] = (), snap: bool = True) -> ParsingNetwork:
    """A random network whose logits differ from px to px, also because of biases and zero padding at the borders."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("log_factor"):
            continue
        if parameter.dim() > 1:
            scale = (2 / parameter[0].numel()) ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        else:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.2
    layers = [module for module in network.modules() if isinstance(module, LearnedFactor)]
    for layer, factor in zip(layers, factors, strict=False):
        layer.set_factor(factor)
        if snap:
            layer.snap()
    return network.eval()


def assert_same(network: ParsingNetwork, size: tuple[int, int], budget: float, least: int = 4) -> None:
    """The tiles have the logits of the whole image, also at its borders, and cover it once."""
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    expected = Tiler(network, memory_budget=1e12).whole(image)
    tiler = Tiler(network, memory_budget=budget)
    tiles = list(tiler(image))
    assert len(tiles) >= least
    assert all(top % network.stride == 0 == left % network.stride for top, left, _ in tiles)
    covered = torch.zeros(size)
    for top, left, logits in tiles:
        covered[top : top + logits.shape[1], left : left + logits.shape[2]] += 1
    assert covered.eq(1).all()
    assert expected.std(dim=(1, 2)).max() > 0.05
    largest = float(expected.abs().max())
    torch.testing.assert_close(join_tiles(tiles, size), expected, rtol=0, atol=2e-5 * largest)
    with torch.no_grad():
        torch.testing.assert_close(expected, network(image[None])[0], rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("size", [(150, 171), (161, 230), (97, 340)])
@pytest.mark.parametrize(
    ("values", "factors"),
    [
        ({"regulate": False}, ()),
        ({}, (4 / 7,)),
        ({"mechanism": "dilation"}, (0.73,)),
        ({"paths": 3, "mechanism": "dilation"}, (0.9, 2.0, 0.61)),
        ({"paths": 2, "rectangular": True, "mechanism": "dilation"}, ((2.0, 0.5), (0.55, 3.0))),
        ({"rates": (1, 3, 6)}, ()),
        pytest.param({"decoder": True, "mechanism": "dilation"}, (0.8,), marks=pytest.mark.slow),
        ({"regulate": False, "min_size": (200, 180)}, ()),
    ],
    ids=str,
)
def test_tiles_are_as_the_whole_image(
    values: dict[str, Any], factors: tuple[Any, ...], size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    network = opinionated(small_cnn(4, dilation=4, head_channels=6, **values), factors)
    budget = 3e6 if values.get("decoder") else 4e5
    assert_same(network, size, budget, least=2)
    assert "approximate" not in capsys.readouterr().err


def test_margins_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = opinionated(small_cnn(4, dilation=4, head_channels=6, regulate=False))
    monkeypatch.setattr(Tiler, "_margin_of", lambda *args: 4)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(network, (150, 171), 4e5, least=2)


def test_other_backbones() -> None:
    lite = opinionated(build_model("efficientnet_lite0", 3, dilation=1, head_channels=4, regulate=False))
    assert_same(lite, (801, 63), 1.5e7, least=2)


def test_features_rounded_as_the_cache_rounds_them() -> None:
    network = opinionated(small_cnn(4, dilation=3, head_channels=6, regulate=False))
    image = torch.randn(3, 150, 171)
    expected = Tiler(network, frozen=True, memory_budget=1e12).whole(image)
    assert not torch.equal(expected, Tiler(network, memory_budget=1e12).whole(image))
    tiled = Tiler(network, frozen=True, memory_budget=4e5).whole(image)
    assert (tiled - expected).abs().mean() < 1e-5 * expected.abs().max()
    torch.testing.assert_close(tiled, expected, rtol=0, atol=float(2e-3 * expected.abs().max()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_resizes_see_the_whole_map_while_it_fits(
    fused: bool, decoder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A regulator that is not snapped has a different grid for each size of the map."""
    network = opinionated(small_cnn(4, dilation=4, head_channels=6, decoder=decoder), (1.37,), snap=False)
    network = fuse(network) if fused else network
    network.backbone.layers.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1)  # fresh, as fuse copies
    image = torch.randn(3, 150, 171)
    tiler = Tiler(network, memory_budget=1e12)
    expected = tiler.whole(image)
    backbone, _ = tiler._cost or (0, 0)
    calls: list[tuple[int, ...]] = []
    network.backbone.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[2:]))
    tiler = Tiler(network, memory_budget=1e12)
    tiler._cost = (backbone, 1e-9)
    tiler.memory_budget = backbone * 110 * 110
    torch.testing.assert_close(tiler.whole(image), expected, rtol=0, atol=float(2e-5 * expected.abs().max()))
    assert len(calls) > 1
    assert capsys.readouterr().err == ""
    tiler._cost = (backbone, backbone)
    assert (tiler.whole(image).argmax(0) == expected.argmax(0)).float().mean() > 0.8
    assert capsys.readouterr().err.count("depend on the image's size: an image above the memory budget") == 1


class SqueezeExcite(nn.Module):
    """Scale channels slightly, by a statistic of the whole image."""

    receptive_field = (float("inf"), float("inf"))
    stride = 1

    def forward(self, features: Tensor) -> Tensor:
        return features * (1 + 0.1 * features.mean((2, 3), keepdim=True).sigmoid())


def test_a_whole_image_field_is_said_and_cut_to_the_effective_one(capsys: pytest.CaptureFixture[str]) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), SqueezeExcite(), nn.Conv2d(8, 8, 3, 2, 1))
    head = SinglePathHead(8, 3, HeadSpec(3, 6, regulate=False))
    network = opinionated(ParsingNetwork(Backbone(layers, out_channels=8, stride=4), head))
    image = torch.randn(3, 401, 330)
    expected = Tiler(network).whole(image)
    assert capsys.readouterr().err == "", "said where it matters"
    tiler = Tiler(network, memory_budget=1.5e6)
    tiles = list(tiler(image))
    assert len(tiles) > 1
    list(tiler(image))
    said = capsys.readouterr().err
    assert said.count("approximate") == 1
    assert said.startswith(
        "note: the network sees the whole image, through global pooling, squeeze-excite or attention"
    )
    assert (join_tiles(tiles, (401, 330)) - expected).abs().max() < 0.1 * expected.abs().max()


def test_gates_and_pooling_of_the_image_see_all_of_it() -> None:
    for gates, infinite in (("image", True), ("pixel", False)):
        assert math.isinf(tiling._field(small_cnn(2, gates=gates))) is infinite
    for rates, infinite in (((2, "pool"), True), ((2, "1x1"), False)):
        assert math.isinf(tiling._field(small_cnn(2, rates=rates))) is infinite


@pytest.mark.parametrize(
    ("room", "sides", "margin", "kept"),
    [
        (1, (401, 401), 20, (20, 20)),
        (1, (401, 401), 8, (16, 16)),
        (10_000, (401, 401), 20, (52, 52)),
        (10_000, (61, 401), 20, (61, 104)),
        (10_000, (401, 61), 20, (104, 61)),
        (170_000, (401, 401), 20, (401, 401)),
    ],
)
def test_tiles_fill_the_budget(room: int, sides: tuple[int, int], margin: int, kept: tuple[int, int]) -> None:
    """Of the least size they keep a margin's length, or four strides."""
    tiler = Tiler(small_cnn(2, dilation=1), memory_budget=2 * room)
    tiles = tiler._tiles(torch.zeros(1, 3, *sides), 2.0, margin, sides)
    sizes = [[span.kept_stop - span.kept_start for span in spans] for spans in tiles]
    assert tuple(map(max, zip(*sizes, strict=True))) == kept
    assert sum(height * width for height, width in sizes) == sides[0] * sides[1]


def test_a_margin_is_half_the_field_and_two_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_cnn(2, dilation=1)
    tiler = Tiler(network)
    for field, margin in ((15, 16), (16, 16), (17, 20), (40, 28)):
        monkeypatch.setattr(tiling, "_field", lambda part, field=field: float(field))
        assert tiler._margin_of(network, network, torch.zeros(1, 3, 65, 65)) == margin
    assert not tiler._reasons
    monkeypatch.undo()
    assert tiling._field(nn.Conv2d(3, 2, (3, 9))) == 9


def test_memory_is_estimated_from_the_largest_layer() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 3, 1))
    image = torch.zeros(1, 3, 10, 10)
    output, peak = tiling._peak(lambda: layers(image), layers)
    assert (tuple(output.shape), peak) == ((1, 3, 10, 10), 2 * 4 * (300 + 800))
    assert tiling._peak(lambda: layers(image), layers[1], layers[2])[1] == 2 * 4 * (800 + 200)
    assert tiling._bytes((image, [image.half(), 5], None)) == 1200 + 600
    # On the first 65x65 px of an image: of the backbone a ReLU of 32 channels at stride 2, of the rest a norm
    # of 32 channels at stride 4, beside the features, and the logits at the end.
    network = small_cnn(2, dilation=1, head_channels=4, regulate=False)
    backbone, rest = Tiler(network)._costs(torch.zeros(1, 3, 201, 65))
    assert backbone * 65 * 65 == pytest.approx(2 * 4 * 2 * 32 * 33 * 33)
    assert rest * 65 * 65 == pytest.approx(2 * 4 * 64 * 17 * 17 + 4 * 32 * 17 * 17 + 2 * 4 * 2 * 65 * 65)


def test_tiles_are_joined_and_one_must_be() -> None:
    parts = [(0, 0, torch.ones(2, 3, 4)), (0, 4, torch.zeros(2, 3, 1)), (3, 0, torch.full((2, 1, 5), 2.0))]
    assert join_tiles(parts, (4, 5))[1].tolist() == [[1, 1, 1, 1, 0]] * 3 + [[2] * 5]
    with pytest.raises(ValueError, match="there are no tiles"):
        join_tiles([], (4, 5))


def test_the_effective_field_is_measured_on_images_of_at_most_513_px(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def measure(runs: Any, images: list[Tensor]) -> Tensor:
        seen.extend(tuple(image.shape) for image in images)
        return torch.eye(5)

    monkeypatch.setattr(tiling, "effective_receptive_field", measure)
    for size, stride, sides in (((101, 902), 4, (101, 513)), ((902, 33), 32, (513, 33)), ((600, 60), 3, (511, 60))):
        seen.clear()
        assert tiling._effective_field(nn.Identity(), torch.zeros(1, 3, *size), stride) == 5
        assert [shape[-2:] for shape in seen] == [sides] * 2


def test_resized_labels_are_those_of_the_highest_logit() -> None:
    """Where the middle class is lower than the first, the last is compared with the first."""
    logits = torch.tensor([[5.0, 0, 0, 3], [1, 4, 1, 3], [3, 2, 5, 1]])[:, None]
    assert _labels(logits, (1, 4), None).tolist() == [[0, 1, 2, 0]]
    assert _labels(logits, (1, 4), (2, 4)).tolist() == [[0, 1, 2, 0]] * 2


def test_a_budget_below_the_least_tile_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    network = opinionated(small_cnn(4, dilation=4, head_channels=6, regulate=False))
    assert_same(network, (190, 230), 1e3)
    assert "GiB, more than the memory budget of" in capsys.readouterr().err
