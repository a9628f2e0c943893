import pytest
import torch
from torch import Tensor, nn

from rfield.receptive_field.probe import probe_window
from rfield.receptive_field.theoretical import theoretical_receptive_field
from rfield.segmentation.models import (
    Backbone,
    Decoder,
    HeadSpec,
    MultiPathHead,
    ParsingNetwork,
    SinglePathHead,
    build_model,
    efficientnet_lite0,
    largefov_vgg16,
    small_cnn,
    small_cnn_backbone,
)
from rfield.segmentation.models.decoder import output_layers


def test_finer_maps_are_those_on_the_way() -> None:
    image = torch.randn(1, 3, 33, 17)
    backbone = small_cnn_backbone()
    fine, features = backbone.pyramid(image)
    assert torch.equal(features, backbone(image))
    assert torch.equal(fine, backbone.layers[:2](image))
    assert fine.shape == (1, backbone.fine_channels, 17, 9)

    vgg = largefov_vgg16(2, head_channels=4).backbone
    fine, features = vgg.pyramid(image)
    assert torch.equal(features, vgg(image))
    assert fine.shape == (1, vgg.fine_channels, 9, 5) == (1, 256, 9, 5)
    named = dict(vgg.layers.named_children())
    before = list(named)[: list(named).index("relu3_3") + 1]
    assert torch.equal(fine, nn.Sequential(*[named[name] for name in before])(image))

    lite0 = efficientnet_lite0(2, head_channels=4, output_stride=16).eval().backbone
    fine, features = lite0.pyramid(image)
    assert torch.equal(features, lite0(image))
    assert fine.shape == (1, lite0.fine_channels, 9, 5) == (1, 24, 9, 5)


def test_a_backbone_without_a_finer_map() -> None:
    backbone = Backbone(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), out_channels=8, stride=2)
    with pytest.raises(ValueError, match="no map finer than its features of stride 2"):
        backbone.pyramid(torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="no map finer than its features of stride 2, which a decoder needs"):
        output_layers(backbone, 5, decoder=True)


def test_a_head_must_fit_the_decoder() -> None:
    with pytest.raises(ValueError, match="takes 16 channels, but the head gives 5; build the head with num_classes=16"):
        ParsingNetwork(small_cnn_backbone(), SinglePathHead(32, 5, HeadSpec(1)), decoder=Decoder(16, 32, 5, ratio=2))


@pytest.mark.parametrize(
    ("name", "fine_stride"),
    [("small_cnn", 2), ("largefov_vgg16", 4), ("efficientnet_lite0", 4), ("timm:resnet10t", 4), ("timm:lcnet_035", 4)],
)
def test_logits_lie_on_the_finer_grid(name: str, fine_stride: int) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    network = build_model(name, 3, head_channels=8, decoder=True).eval()
    stride = network.stride
    padded = torch.randn(1, 3, 2 * stride + 1, 3 * stride + 1)
    assert (network.logit_stride, network.num_classes) == (fine_stride, 3)
    logits = network.logits(padded)
    assert logits.shape == (1, 3, 2 * stride // fine_stride + 1, 3 * stride // fine_stride + 1)
    assert network(torch.randn(2, 3, 20, 30)).shape == (2, 3, 20, 30)


def test_a_decoder_is_deeplabs() -> None:
    """A reduction to 48 channels, of which alone a batch norm takes the mean, and two 3x3 convolutions of 256."""
    torch.manual_seed(0)
    channels, decoder = output_layers(small_cnn_backbone(8), 5, decoder=True)
    assert decoder is not None
    assert (channels, decoder.ratio) == (256, 2)
    fine, context = torch.randn(2, 8, 9, 7) + 3, torch.randn(2, 256, 9, 7)
    reduction, norm, _ = decoder.reduce
    first, _, second, _, last = decoder.join
    assert reduction.bias is None
    assert [conv.out_channels for conv in (reduction, first, second, last)] == [48, 256, 256, 5]
    assert [module for module in decoder.modules() if isinstance(module, nn.BatchNorm2d)] == [norm]
    for conv in (first, second, last):
        nn.init.normal_(conv.bias)
    reduced = nn.functional.batch_norm(reduction(fine), None, None, training=True).relu()
    expected = last(second(first(torch.cat([context.relu(), reduced], 1)).relu()).relu())
    torch.testing.assert_close(decoder(fine, context), expected)
    torch.testing.assert_close(decoder(fine, context, (17, 13))[..., ::2, ::2], expected)


def test_a_decoder_starts_for_relus_and_with_small_logits() -> None:
    torch.manual_seed(0)
    decoder = Decoder(16, 64, 300, ratio=2)
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert not any(conv.bias.any() for conv in convolutions[1:])
    fans = [64, (16 + 48) * 9, 256 * 9]
    for conv, fan in zip(convolutions, fans, strict=False):
        assert conv.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
    assert convolutions[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("regulate", [False, True])
@pytest.mark.parametrize("name", ["small_cnn", "largefov_vgg16"])
def test_the_field_grows_by_the_decoder_s_convolutions(name: str, regulate: bool) -> None:
    network = build_model(name, 2, dilation=3, head_channels=4, regulate=regulate, mechanism="dilation", decoder=True)
    plain = build_model(name, 2, dilation=3, head_channels=4, regulate=regulate, mechanism="dilation")
    field = theoretical_receptive_field(plain)[0] + 2 * 2 * network.logit_stride
    assert theoretical_receptive_field(network) == (field, field)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Tensor) -> Tensor:
            return self.network.logits(image)

    window = probe_window(Logits(), axis=0, lengths=[513])
    # Bilinear interpolation looks at one more feature where a convolution's tap falls between two.
    assert field <= window.size <= field + 2 * network.stride
    assert window.centre == pytest.approx(window.position * network.logit_stride)


@pytest.mark.slow
def test_borders_finer_than_the_features_can_be_told() -> None:
    """A step between two columns of one feature: a head alone blurs it, whatever its weights."""
    torch.manual_seed(0)
    step = torch.zeros(1, 3, 33, 33)
    step[..., 15:] = 1.0
    network = small_cnn(2, dilation=1, head_channels=32, decoder=True)
    labels = (step[:, 0] > 0).long()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(step), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network.eval()(step).argmax(1) == labels).float().mean() > 0.98


def test_with_several_paths_and_their_guidance() -> None:
    guidance = {"class_groups": ((0,), (1, 2)), "gradient_weight": 5.0}
    network = small_cnn(3, head_channels=8, paths=2, decoder=True, **guidance)
    assert isinstance(network.head, MultiPathHead)
    image, mask = torch.randn(2, 3, 33, 41), torch.randint(3, (2, 33, 41))
    logits = network.logits(image, output_size=(33, 41), mask=mask)
    nn.functional.cross_entropy(logits, mask).backward()
    assert network.head.path_logits is not None
    guided = [parameter.grad for parameter in network.head.parameters()]
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.zero_grad()
    nn.functional.cross_entropy(network.logits(image, output_size=(33, 41)), mask).backward()
    biases = [index for index, parameter in enumerate(network.head.parameters()) if parameter.dim() == 1]
    pairs = [(guided[index], [*network.head.parameters()][index].grad) for index in biases]
    assert any(not torch.allclose(*pair, rtol=0.01) for pair in pairs), "the labels reach the paths"


def test_the_head_starts_with_features_and_the_decoder_with_small_logits() -> None:
    torch.manual_seed(0)
    network = largefov_vgg16(21, head_channels=64, decoder=True, dropout=0.0, regulate=False)
    features = torch.randn(2, 512, 9, 9).relu()
    assert network.head(features).std() > 0.05
    assert network(torch.randn(1, 3, 33, 33)).std() < 0.5
