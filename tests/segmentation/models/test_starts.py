"""What networks are before any training: their defaults, arguments, initial values and published weights."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.segmentation.models import (
    MODELS,
    Decoder,
    MultiPathHead,
    SinglePathHead,
    build_model,
    largefov_vgg16,
    small_cnn,
    small_cnn_backbone,
)
from rfield.segmentation.models.heads import Mechanism

# Dilation of fc6, width of the head, dropout and stride.
DEFAULTS = {
    "efficientnet_lite0": (3, 256, 0.1, 8),
    "largefov_vgg16": (12, 1024, 0.5, 8),
    "small_cnn": (4, 32, 0.0, 4),
    "timm:resnet10t": (6, 256, 0.1, 16),
}


def test_every_model_has_its_defaults_tested() -> None:
    assert set(MODELS) < set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    network = build_model(name, 5).eval()
    dilation, width, dropout, stride = DEFAULTS[name]
    head = network.head
    assert isinstance(head, SinglePathHead)
    assert isinstance(head.layers, ReceptiveFieldRegulator)
    layers = head.layers.module
    assert isinstance(layers.fc6, nn.Conv2d)
    assert layers.fc6.dilation == layers.fc6.padding == (dilation, dilation)
    assert layers.fc6.out_channels == layers.fc7.in_channels == layers.fc7.out_channels == width
    assert (layers.drop6.p, layers.drop7.p) == (dropout, dropout)
    assert layers.fc8.out_channels == network.num_classes == 5
    assert head.layers.log_factor.shape == (1,)
    assert head.effective_dilation == (dilation, dilation)
    assert network.decoder is None
    assert (network.stride, network.logit_stride, network.min_size) == (stride, stride, (1, 1))


@pytest.mark.parametrize("name", DEFAULTS)
def test_arguments_reach_the_head(name: str) -> None:
    build = functools.partial(build_model, name)
    sizes = {"dilation": 2, "head_channels": 6, "dropout": 0.25, "min_size": (20, 30)}
    learned = build(5, mechanism="dilation", rectangular=True, decoder=True, **sizes)
    assert isinstance(learned.head.layers, nn.Sequential)
    fc6 = learned.head.layers.fc6
    assert isinstance(fc6, AdaptiveConv2d)
    assert fc6.log_factor.shape == (2,)
    assert fc6.base_dilation == (2, 2)
    assert fc6.weight.shape[:2] == (6, learned.backbone.out_channels)
    assert {module.p for module in learned.head.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert learned.min_size == (20, 30)
    assert learned.head.num_classes == 256
    assert learned.num_classes == 5
    assert learned.logit_stride < learned.stride
    fixed = build(5, regulate=False, **sizes)
    assert fixed.head.factor_layer is None
    assert fixed.head.layers.fc6.dilation == (2, 2)
    assert fixed.decoder is None


def test_convolutions_of_a_backbone_start_as_he_has_it() -> None:
    torch.manual_seed(0)
    for conv in small_cnn_backbone(64).modules():
        if isinstance(conv, nn.Conv2d):
            fan_in = conv.in_channels * 9
            assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
            assert not conv.bias.any()


def test_the_decoder_is_deeplabv3_plus_s() -> None:
    torch.manual_seed(0)
    decoder = Decoder(in_channels=16, fine_channels=8, num_classes=5, ratio=2)
    reduce, norm, _ = decoder.reduce
    first, _, second, _, last = decoder.join
    assert (reduce.in_channels, reduce.out_channels, reduce.kernel_size, reduce.bias) == (8, 48, (1, 1), None)
    assert isinstance(norm, nn.BatchNorm2d)
    assert [(conv.in_channels, conv.out_channels, conv.kernel_size) for conv in (first, second, last)] == [
        (16 + 48, 256, (3, 3)),
        (256, 256, (3, 3)),
        (256, 5, (1, 1)),
    ]
    for conv, std in (
        (reduce, (2 / 8) ** 0.5),
        (first, (2 / (64 * 9)) ** 0.5),
        (second, (2 / (256 * 9)) ** 0.5),
        (last, 0.01),
    ):
        assert conv.weight.std().item() == pytest.approx(std, rel=0.1)
        assert conv.bias is None or not conv.bias.any()

    for conv in (first, second, last):
        nn.init.normal_(conv.bias)
    fine, context = torch.randn(2, 8, 9, 5), torch.randn(2, 16, 9, 5)
    joined = torch.cat([context.relu(), norm(reduce(fine)).relu()], 1)
    expected = last(second(first(joined).relu()).relu())
    torch.testing.assert_close(decoder(fine, context), expected)
    larger = F.interpolate(expected, size=(33, 19), mode="bilinear", align_corners=True)
    torch.testing.assert_close(decoder(fine, context, (33, 19)), larger)


@pytest.mark.parametrize("regulate", [False, True])
def test_a_decoder_s_head_starts_with_features(regulate: bool) -> None:
    torch.manual_seed(0)
    plain, refined = (small_cnn(5, head_channels=64, regulate=regulate, decoder=decoder) for decoder in (False, True))
    for network, std in ((plain, 0.01), (refined, (2 / 64) ** 0.5)):
        fc8 = dict(network.head.named_modules())["layers.module.fc8" if regulate else "layers.fc8"]
        assert fc8.weight.std().item() == pytest.approx(std, rel=0.1)
        assert not fc8.bias.any()


@pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
def test_published_weights_fill_every_path(mechanism: Mechanism, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in vgg16().features.state_dict().items()}
    numbers = {key: torch.randn(1).half().expand(shape) for key, shape in shapes.items()}
    channels = torch.arange(4096.0)
    numbers |= {"classifier.0.weight": torch.arange(25088.0).expand(4096, 25088), "classifier.0.bias": channels}
    numbers |= {"classifier.3.weight": channels.expand(4096, 4096), "classifier.3.bias": -channels}
    torch.save(numbers, tmp_path / "vgg16.pth")
    head = {"dilation": 2, "head_channels": 8, "mechanism": mechanism, "paths": 2}
    network = largefov_vgg16(2, weights=tmp_path / "vgg16.pth", **head)
    assert isinstance(network.head, MultiPathHead)
    for path in network.head.paths:
        layers = dict(path.named_modules())
        prefix = "layers.module." if mechanism == "regulator" else "layers."
        assert torch.equal(layers[f"{prefix}fc6"].bias, channels[::512])
        assert torch.equal(layers[f"{prefix}fc7"].bias, -channels[::512])
        assert torch.equal(layers[f"{prefix}fc6"].weight[3, 0, 0], torch.tensor([0.0, 3.0, 6.0]))
