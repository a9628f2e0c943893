"""timm's networks against timm itself, and their place on the grid against gradients."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rfield.receptive_field.probe import Window, probe_receptive_field, probe_window
from rfield.receptive_field.theoretical import receptive_field_px, theoretical_receptive_field
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.conventions import IMAGENET_MEAN as MEAN
from rfield.segmentation.conventions import IMAGENET_STD as STD
from rfield.segmentation.models import build_model, find_model
from rfield.segmentation.models import timm_backbone as timm_backbone_module
from rfield.segmentation.models.timm_backbone import TimmBackbone, _Placement, load_timm_weights, timm_backbone
from rfield.segmentation.runs import build_network

timm = pytest.importorskip("timm")


def randomise(network: torch.nn.Module) -> None:
    """Batch statistics and norms that matter, so that equal outputs mean equal weights."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif value.dim() == 1 and value.is_floating_point():
            value.uniform_(0.5, 1.5)


def filled(name: str, output_stride: int, weights: str | Path) -> TimmBackbone:
    backbone = timm_backbone(name, output_stride)
    load_timm_weights(backbone, weights)
    return backbone


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("resnet18", 8),
        ("resnet18", 16),
        ("resnet18", 32),
        ("mobilenetv3_small_050", 8),
        ("mobilenetv3_small_050", 32),
        ("tf_efficientnet_lite0", 16),
        ("tf_efficientnet_lite0", 32),
        ("regnetx_002", 8),
        ("regnetx_002", 32),
    ],
)
def test_features_are_timms(name: str, output_stride: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
    whole = timm.create_model(name, **options if name == "resnet18" else {}).eval()
    randomise(whole)
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    theirs = timm.create_model(name, features_only=True, **options).eval()
    backbone = filled(name, output_stride, tmp_path / "timm.pth").eval()
    theirs.load_state_dict(backbone.net.state_dict())
    image = torch.randn(1, 3, 3 * output_stride + 1, 2 * output_stride + 1)
    with torch.inference_mode():
        features = backbone(image)
        maps = theirs(image if backbone.normalise is None else backbone.normalise(image))
        assert torch.equal(features, maps[-1])
        if name == "resnet18":
            assert torch.equal(features, whole.forward_features(image))
        fine, same = backbone.pyramid(image)
    assert torch.equal(same, features)
    assert features.shape == (1, backbone.out_channels, 4, 3)
    ratio = output_stride // 4
    assert fine.shape == (1, backbone.fine_channels, 3 * ratio + 1, 2 * ratio + 1)
    assert torch.equal(fine, maps[1])
    assert (backbone.stride, backbone.fine_stride) == (output_stride, 4)
    assert abs(backbone.offset_px) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output_stride", "field"),
    [
        ("resnet18", 8, 435),
        ("resnet18", 32, 435),
        ("convnext_atto", 8, 1136),
        ("test_convnext", 32, 920),
        ("vgg11", 32, 150),
        ("densenet121", 32, 2071),
    ],
)
def test_the_place_and_the_field_are_the_gradient_s(name: str, output_stride: int, field: int) -> None:
    """Through the backbone itself: its padding and its crop too."""
    backbone = timm_backbone(name, output_stride)
    assert theoretical_receptive_field(backbone) == (field, field)
    lengths = [output_stride * (field // output_stride + 4) + 1]
    thickness = output_stride + 1

    class Fine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, image: Tensor) -> Tensor:
            return self.backbone.pyramid(image)[0]

    for model, stride in ((backbone, output_stride), (Fine(), backbone.fine_stride)):
        for axis in (0, 1):
            window = probe_window(model, axis, thickness=thickness, lengths=lengths)
            assert abs(window.centre - window.position * stride) <= (0.51 if model is backbone else stride / 2)
            if model is backbone:
                assert window.size == field
                assert window.centre - window.position * stride == pytest.approx(backbone.offset_px, abs=0.01)


def test_squeeze_excite_sees_the_whole_image() -> None:
    network = build_model("timm:mobilenetv3_small_050", 2, dilation=3, head_channels=4)
    infinite = (float("inf"), float("inf"))
    assert theoretical_receptive_field(network) == infinite
    assert probe_receptive_field(network.backbone) == infinite
    local = 639 + 2 * 3 * 16
    assert receptive_field_px(network) == (local, local)


def test_attention_leaves_the_head_s_own_share_to_record() -> None:
    network = build_model("timm:efficientvit_b0", 2, dilation=3, head_channels=4, output_stride=32)
    assert theoretical_receptive_field(network) == (float("inf"), float("inf"))
    assert receptive_field_px(network) == (1 + 2 * 3 * 32, 1 + 2 * 3 * 32)


def test_the_field_of_a_network() -> None:
    network = build_model("timm:resnet18", 2, dilation=3, head_channels=4, output_stride=8)
    assert theoretical_receptive_field(network) == receptive_field_px(network) == (435 + 48, 435 + 48)


def test_a_network_trained_on_other_pixels_gets_those() -> None:
    backbone = timm_backbone("tf_efficientnet_lite0")  # mean and deviation 0.5
    assert backbone.normalise is not None
    assert timm_backbone("resnet18").normalise is None
    pixels = torch.rand(1, 3, 5, 7)
    mean, std = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(STD).reshape(3, 1, 1)
    torch.testing.assert_close(backbone.normalise((pixels - mean) / std), (pixels - 0.5) / 0.5)


def test_padding_inside_is_the_mean_colour_too() -> None:
    """An image on a ground of the mean colour is the same image, padded by a network of patches itself."""
    backbone = timm_backbone("convnext_atto", 8).double().eval()
    assert backbone.placement.before + backbone.placement.after == 7
    image = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    before, after = backbone.placement.before, backbone.placement.after
    padded = torch.nn.functional.pad(image, (before, after, before, after))
    with torch.inference_mode():
        assert torch.equal(backbone(image), backbone.net(padded)[-1])


class Corner(torch.nn.Module):
    """Features of 3x3 px from the corner on, whose middles lie a whole px off the grid."""

    feature_info = SimpleNamespace(reduction=lambda: [4], channels=lambda: [2])

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 3, stride=4)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.conv(image)]


def test_padding_is_split_so_that_features_lie_on_the_grid() -> None:
    backbone = TimmBackbone(Corner(), {}, "corner", 4)
    placement = backbone.placement
    assert (placement.before, placement.after, placement.offset) == (1, 2, 0.0)
    image = torch.randn(1, 3, 9, 13)
    assert torch.equal(backbone(image), backbone.net(torch.nn.functional.pad(image, (1, 2, 1, 2)))[0])
    assert theoretical_receptive_field(backbone) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("resnet10t", ".pth"),
        ("resnet10t", ".safetensors"),
        ("convnext_atto", ".pth"),
        ("xception41", ".safetensors"),
        ("legacy_xception", ".pth"),
        ("xcit_nano_12_p16_224", ".safetensors"),
    ],
)
def test_local_files_with_timms_keys(name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of wrapper that timm has, from half precision."""
    monkeypatch.setattr(timm_backbone_module, "_measure", lambda backbone, name: _Placement(0, 0, 0, 0.0, 1.0, 1.0))
    monkeypatch.setattr(timm_backbone_module, "_PLACEMENTS", {})
    whole = timm.create_model(name)
    randomise(whole)
    state = {key: value.half() if value.is_floating_point() else value for key, value in whole.state_dict().items()}
    path = tmp_path / f"timm{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    net = filled(name, 32 if "legacy" in name else 16, path).net.state_dict()
    flat = {key.replace(".", "_"): value for key, value in state.items()}
    assert len(net) > 20
    for key, value in net.items():
        expected = flat[key.removeprefix("model.").removeprefix("body.").replace(".", "_")]
        assert torch.equal(value, expected.to(value.dtype)) or key.endswith("num_batches_tracked")


def test_mismatches_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "ten.pth")
    with pytest.raises(ValueError, match=r"ten.pth does not fit timm:resnet18: missing \S+, .* and \d+ more; give a"):
        filled("resnet18", 16, tmp_path / "ten.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights file .*none.pth"):
        filled("resnet10t", 16, tmp_path / "none.pth")


def test_imagenet_weights_come_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    asked = []

    def downloaded(name: str, pretrained: bool = False, **options: Any) -> Any:
        net = create(name, **options)
        if pretrained:
            asked.append((name, options))
            randomise(net)
        return net

    monkeypatch.setattr(timm, "create_model", downloaded)
    backbone = filled("resnet10t", 8, "imagenet")
    assert asked == [("resnet10t", {"features_only": True, "output_stride": 8})]
    expected = create("resnet10t", features_only=True, output_stride=8)
    randomise(expected)
    assert torch.equal(backbone.net.state_dict()["bn1.bias"], expected.state_dict()["bn1.bias"])

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise RuntimeError("no network.\nsecond line")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"resnet10t cannot be downloaded \(no network\); give the path"):
        filled("resnet10t", 8, "imagenet")


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("resnet19", 16, r"timm has no network 'resnet19'; did you mean resnet18, .*\?"),
        ("zzzqqq", 16, r"timm has no network 'zzzqqq'; timm.list_models\(\) has them all"),
        (
            "resnet18.nonsense",
            16,
            r"gives no feature maps \(timm's features_only\): Invalid pretrained tag \(nonsense\)",
        ),
        ("resnet18", 4, "timm:resnet18 has an output_stride of 8, 16 or 32, got 4"),
        (
            "ghostnet_100",
            16,
            "cannot be dilated to an output_stride of 16, its .* 8, 16, 32; give --output-stride 32, or",
        ),
        ("vgg11", 8, "timm:vgg11 cannot be dilated to an output_stride of 8, its maps have strides 1, 2, 4"),
        ("vit_tiny_patch16_224", 32, "has no map of output_stride 32, its maps have strides 16"),
        ("vit_tiny_patch16_224", 16, "cannot be a backbone for images of any size: Input height .33. doesn't match"),
        ("inception_v3", 32, "timm:inception_v3 cannot be a backbone for images of any size: "),
    ],
)
def test_what_cannot_be_is_said_in_one_line(name: str, output_stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        timm_backbone(name, output_stride)
    assert "\n" not in str(error.value)


def test_a_network_without_features_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> Any:
        raise RuntimeError("features_only not implemented for resnet10t models.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        ValueError, match=r"resnet10t gives no feature maps .*: features_only not implemented for resnet"
    ):
        timm_backbone("resnet10t", 16)


def test_layers_after_the_wanted_map_are_left_out() -> None:
    backbone = timm_backbone("efficientvit_m0", 32)  # strides 16, 32, 64
    assert backbone(torch.zeros(1, 3, 65, 97)).shape == (1, backbone.out_channels, 3, 4)
    assert not [name for name, _ in backbone.named_parameters() if "stages_2" in name]


def test_a_network_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = timm_backbone("resnet10t", 16)
    monkeypatch.setattr("rfield.segmentation.models.timm_backbone.probe_window", None)
    assert timm_backbone("resnet10t", 16).placement == first.placement


def test_the_model_of_a_run(tmp_path: Path) -> None:
    config = TrainConfig(data="synthetic", out="x", model="timm:resnet10t", output_stride=8, head_channels=4)
    network = build_network(config, 3)
    assert isinstance(network.backbone, TimmBackbone)
    assert network.stride == 8
    assert build_network(config.replace(output_stride=None), 3).stride == 16
    with pytest.raises(ValueError, match="timm has no network 'resnet10x'; did you mean resnet10t"):
        build_network(config.replace(model="timm:resnet10x"), 3)
    with pytest.raises(ValueError, match=r"'resnet10t' is not known; the known ones are .*, small_cnn and timm:NAME"):
        find_model("resnet10t")


@pytest.mark.parametrize(
    ("measured", "local", "more", "before", "offset"),
    [
        (1.5, 9.0, 3, 1, 0.5),
        (1.6, 9.0, 3, 2, -0.4),
        (-1.0, 9.0, 3, 0, -1.0),
        (4.0, 9.0, 3, 3, 1.0),
        (2.0, 9.0, 0, 0, 2.0),
        # What lies more than a stride off, or sees everything, is no centre.
        (4.1, 9.0, 3, 1, 0.5),
        (-4.1, 9.0, 0, 0, 0.0),
        (1.0, float("inf"), 3, 1, 0.5),
        (1.0, float("inf"), 0, 0, 0.0),
    ],
)
def test_padding_goes_where_the_measured_centre_is(
    measured: float, local: float, more: int, before: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Window(9.0, local, 5 * 4 + measured, 5, 11)
    monkeypatch.setattr(timm_backbone_module, "probe_window", lambda *args, **options: window)
    backbone: Any = SimpleNamespace(stride=4, fine_stride=0)
    place = timm_backbone_module._placement(backbone, more)
    assert (place.before, place.after) == (before, more - before)
    assert place.offset == pytest.approx(offset)
