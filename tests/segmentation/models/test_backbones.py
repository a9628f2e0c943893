from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torchvision.models import VGG16_Weights, vgg16
from torchvision.transforms.v2 import functional as transforms

from rfield.segmentation.models import largefov_vgg16

HEAD_CHANNELS = 16


@pytest.fixture(scope="module")
def conv_state() -> dict[str, Tensor]:
    """torchvision's keys of the conv layers in half precision: a random number per output channel.

    Expanded views, since torch.save keeps them as small as they are.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in vgg16().features.state_dict().items()}
    numbers = {key: torch.randn(shape[0]).half() for key, shape in shapes.items()}
    return {key: numbers[key].reshape(-1, *[1] * (len(shape) - 1)).expand(shape) for key, shape in shapes.items()}


def save(state: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_conv_layers_alone(suffix: str, conv_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(conv_state, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({key: value.contiguous() for key, value in conv_state.items()}, path)
    network = largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights=path)
    layers = network.backbone.state_dict()
    assert layers["layers.conv1_1.weight"].dtype == torch.float32
    assert len(layers) == len(conv_state) == 26
    for got, want in zip(layers.values(), conv_state.values(), strict=True):
        assert torch.equal(got, want.float())
    assert not network.head.state_dict()["layers.module.fc6.bias"].any()


def test_a_whole_file_fills_fc6_and_fc7(conv_state: dict[str, Tensor], tmp_path: Path) -> None:
    channels = torch.arange(4096.0)
    state = conv_state | {
        "classifier.0.weight": torch.arange(25088.0).expand(4096, 25088),
        "classifier.0.bias": channels,
        "classifier.3.weight": channels.expand(4096, 4096),
        "classifier.3.bias": -channels,
        "classifier.6.weight": torch.zeros(1).expand(1000, 4096),
        "classifier.6.bias": torch.zeros(1000),
    }
    path = save(state, tmp_path)
    head = largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights=path).head.state_dict()
    kept = channels[::256]
    assert torch.equal(head["layers.module.fc6.bias"], kept)
    assert torch.equal(head["layers.module.fc7.bias"], -kept)
    assert torch.equal(head["layers.module.fc7.weight"], kept.reshape(1, -1, 1, 1).expand(16, 16, 1, 1))
    # Input channel c, row y, column x of the 7x7 kernel hold 49 c + 7 y + x.
    taps = torch.tensor([[0.0, 3.0, 6.0], [21.0, 24.0, 27.0], [42.0, 45.0, 48.0]])
    expected = taps + 49 * torch.arange(512.0).reshape(-1, 1, 1)
    assert torch.equal(head["layers.module.fc6.weight"], expected.expand(16, -1, -1, -1))
    with pytest.raises(ValueError, match="has 4096 channels to fill fc6 and fc7 from, but head_channels is 4097"):
        largefov_vgg16(2, head_channels=4097, weights=path)


def test_mismatches_are_named_and_nothing_is_loaded(conv_state: dict[str, Tensor], tmp_path: Path) -> None:
    def load(state: object) -> None:
        largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights=save(state, tmp_path))

    state = dict(conv_state)
    del state["features.28.bias"]
    state["features.30.weight"] = torch.zeros(1)
    state["features.2.bias"] = torch.zeros(65)
    expected = (
        r"missing features.28.bias, unknown features.30.weight, features.2.bias has shape \(65,\) instead of \(64,\)"
    )
    with pytest.raises(ValueError, match=expected):
        load(state)
    with pytest.raises(ValueError, match=r"missing classifier.0.weight, missing classifier.3.weight"):
        load(conv_state | {"classifier.0.bias": torch.zeros(4096), "classifier.3.bias": torch.zeros(4096)})
    for wrong in ([1, 2], {"state_dict": [conv_state]}):
        with pytest.raises(ValueError, match="holds no flat dict from layer name to tensor"):
            load(wrong)


def test_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*missing.pth; give \"imagenet\" or"):
        largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights=missing)
    for suffix in ("pth", "safetensors"):
        damaged = tmp_path / f"damaged.{suffix}"
        damaged.write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"damaged.{suffix} cannot be read as weights"):
            largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights=damaged)


def test_imagenet_weights_come_from_torchvision(conv_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *args, **kwargs: conv_state)
    network = largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights="imagenet")
    expected = conv_state["features.0.weight"].float()
    assert torch.equal(network.backbone.state_dict()["layers.conv1_1.weight"], expected)

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", offline)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*no network.*; give the path of a local"):
        largefov_vgg16(2, head_channels=HEAD_CHANNELS, weights="imagenet")


@pytest.mark.shared
def test_real_weights_on_an_image(shared: Path) -> None:
    from PIL import Image

    path = shared / "weights" / "vgg16_features_imagenet_fp16.pth"
    network = largefov_vgg16(21, head_channels=HEAD_CHANNELS, weights=path).eval()
    reference = vgg16().features.eval()
    state = torch.load(path, weights_only=True)
    reference.load_state_dict({key.removeprefix("features."): value.float() for key, value in state.items()})

    path = min((shared / "data" / "msrc21_voc" / "JPEGImages").glob("*.jpg"))
    image = transforms.to_dtype(transforms.pil_to_tensor(Image.open(path).convert("RGB")), torch.float32, scale=True)
    image = transforms.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None, :, :65, :81]
    with torch.inference_mode():
        theirs = image
        # Stage by stage from the same map, since DeepLab's 3x3 pools between them differ from torchvision's 2x2 ones.
        for start, stop in ((0, 4), (5, 9), (10, 16)):
            ours, theirs = network.backbone.layers[start:stop](theirs), reference[start:stop](theirs)
            assert torch.equal(ours, theirs)
            theirs = reference[stop](theirs)
        features = network.backbone(network.pad(image))
        assert features.shape == (1, 512, 9, 11)
        assert features.isfinite().all()
        assert 0.05 < (features > 0).float().mean() < 1
        assert network(image).isfinite().all()
