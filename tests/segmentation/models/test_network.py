"""Every network of `MODELS` goes through the same checks: inherit `NetworkTester` and name the model."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rfield.segmentation.models import (
    MODELS,
    HeadSpec,
    ParsingNetwork,
    SinglePathHead,
    build_model,
    efficientnet_lite0,
    largefov_vgg16,
    small_cnn,
    small_cnn_backbone,
)

# Initial weights take longer than most tests: each network is made once, and copied.
MADE: dict[tuple[type, bool, object], ParsingNetwork] = {}


class NetworkTester:
    model: str
    stride: int
    options: ClassVar[dict[str, Any]] = {}

    def network(self, regulate: bool = True, min_size: int | None = None) -> ParsingNetwork:
        key = (type(self), regulate, min_size)
        if key not in MADE:
            torch.manual_seed(0)
            sizes = {"dilation": 2, "head_channels": 16, "dropout": 0.0}
            MADE[key] = build_model(self.model, 3, regulate=regulate, min_size=min_size, **sizes, **self.options)
        torch.manual_seed(0)
        return copy.deepcopy(MADE[key])

    @pytest.mark.parametrize("regulate", [False, True])
    @pytest.mark.parametrize("size", [(33, 33), (17, 40), (1, 1), (3, 2), (1, 9)])
    def test_logits_have_the_size_of_the_image(self, size: tuple[int, int], regulate: bool) -> None:
        logits = self.network(regulate)(torch.randn(2, 3, *size))
        assert logits.shape == (2, 3, *size)
        assert logits.isfinite().all()

    @pytest.mark.parametrize("regulate", [False, True])
    def test_every_parameter_gets_a_gradient(self, regulate: bool) -> None:
        network = self.network(regulate)
        network(torch.randn(2, 3, 33, 41)).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_channels_last_gives_the_same_logits(self) -> None:
        network, image = self.network(), torch.randn(2, 3, 33, 25)
        expected = network(image)
        network.to(memory_format=torch.channels_last)
        actual = network(image.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)

    def test_features_are_centred_on_multiples_of_the_stride(self) -> None:
        network = self.network()
        assert network.stride == self.stride
        for steps in (0, 1, 5):
            image = torch.randn(1, 3, steps * self.stride + 1, self.stride + 1)
            assert torch.equal(network.pad(image), image)
            assert network.backbone(image).shape[-2:] == (steps + 1, 2)

    def test_pads_right_and_bottom_with_the_image_mean(self) -> None:
        network, image = self.network(), torch.randn(1, 3, 10, self.stride + 2)
        padded = network.pad(image)
        assert all((size - 1) % self.stride == 0 for size in padded.shape[-2:])
        assert torch.equal(padded[..., :10, : self.stride + 2], image)
        assert padded.count_nonzero() == image.count_nonzero()

    def test_forward_is_pad_backbone_head_crop(self) -> None:
        network, image = self.network(), torch.randn(1, 3, 10, 19)
        padded = network.pad(image)
        logits = network.head(network.backbone(padded), output_size=tuple(padded.shape[-2:]))
        assert torch.equal(network(image), logits[..., :10, :19])

    def test_min_size(self) -> None:
        image = torch.randn(1, 3, 10, 60)
        height, width = (-(-(least - 1) // self.stride) * self.stride + 1 for least in (20, 60))
        assert self.network(min_size=33).pad(image).shape == (1, 3, 33, width)
        assert self.network(min_size=(20, 65)).pad(image).shape == (1, 3, height, 65)
        assert self.network(min_size=33)(image).shape == (1, 3, 10, 60)
        for wrong in (0, (33, -1), (33, 33, 33)):
            with pytest.raises(ValueError, match="min_size must be at least 1 px"):
                self.network(min_size=wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("regulate", [False, True])
    def test_state_dict_survives_a_file(self, regulate: bool, tmp_path: Path) -> None:
        network, other = self.network(regulate), self.network(regulate)
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        torch.save(other.state_dict(), tmp_path / "state.pth")
        network.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        image = torch.randn(1, 3, 17, 17)
        assert torch.equal(network(image), other(image))
        for name in ("fc6", "fc7", "fc8"):
            assert f"head.layers.{'module.' if regulate else ''}{name}.weight" in network.state_dict()

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (torch.zeros(3, 9, 9), r"shape \(N, 3, H, W\).*got \(3, 9, 9\)"),
            (torch.zeros(1, 1, 9, 9), r"got \(1, 1, 9, 9\).*grey"),
            (torch.zeros(1, 3, 0, 9), r"got \(1, 3, 0, 9\)"),
            (torch.zeros(9), r"got \(9,\)"),
            (torch.zeros(1, 3, 9, 9, dtype=torch.uint8), r"got torch.uint8; divide by 255"),
        ],
    )
    def test_wrong_images_are_refused(self, image: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.network()(image)


class TestLargeFOVVGG16(NetworkTester):
    model = "largefov_vgg16"
    stride = 8

    def test_321_px_give_41_features(self) -> None:
        with torch.device("meta"):
            features = largefov_vgg16(21).backbone(torch.zeros(1, 3, 321, 321))
        assert features.shape == (1, 512, 41, 41)


class TestEfficientNetLite0(NetworkTester):
    model = "efficientnet_lite0"
    stride = 8

    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_output_strides(self, output_stride: int) -> None:
        network = efficientnet_lite0(2, head_channels=4, output_stride=output_stride)
        assert network.stride == output_stride
        assert network.backbone(torch.zeros(2, 3, 65, 33)).shape == (
            2,
            112,
            64 // output_stride + 1,
            32 // output_stride + 1,
        )
        assert network(torch.zeros(2, 3, 70, 30)).shape == (2, 2, 70, 30)

    def test_360x480_px_give_46x61_features(self) -> None:
        network = efficientnet_lite0(11, head_channels=4).eval()
        assert network.backbone(network.pad(torch.zeros(1, 3, 360, 480))).shape == (1, 112, 46, 61)


class TestSmallCNN(NetworkTester):
    model = "small_cnn"
    stride = 4

    def test_has_no_weights(self) -> None:
        with pytest.raises(ValueError, match="small_cnn has no pretrained weights, got weights='imagenet'"):
            small_cnn(2, weights="imagenet")


class TestDecoder(NetworkTester):
    """On a stride of 8, whose finer map has 4."""

    model = "largefov_vgg16"
    options: ClassVar[dict[str, Any]] = {"decoder": True}
    stride = 8

    def test_forward_is_pad_backbone_head_crop(self) -> None:
        """With the decoder before the crop."""
        network, image = self.network().eval(), torch.randn(1, 3, 10, 19)
        padded = network.pad(image)
        fine, features = network.backbone.pyramid(padded)
        assert network.decoder is not None
        logits = network.decoder(fine, network.head(features, (5, 7)), (17, 25))
        assert torch.equal(network(image), logits[..., :10, :19])


class TestTimmMobileNet(NetworkTester):
    """Of odd kernels, with squeeze-excite."""

    model = "timm:mobilenetv3_small_050"
    stride = 16


class TestTimmConvNeXt(NetworkTester):
    """Of patches, for which the image is padded inside."""

    model = "timm:convnext_atto"
    options: ClassVar[dict[str, Any]] = {"output_stride": 8}
    stride = 8


@pytest.mark.parametrize("name", MODELS)
def test_a_stride_that_a_network_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has an output_stride of \d.*, got 5"):
        build_model(name, 2, head_channels=4, output_stride=5)


def test_every_model_is_tested() -> None:
    assert {tester.model for tester in NetworkTester.__subclasses__()} >= set(MODELS)


def test_head_must_fit_the_backbone() -> None:
    with pytest.raises(ValueError, match="takes 8 channels, but the backbone gives 32"):
        ParsingNetwork(small_cnn_backbone(), SinglePathHead(8, 2, HeadSpec(1)))
