"""Weights as people have them: wrapped, prefixed, of other classes; and what is refused in one plain line."""

import argparse
import copy
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from rfield.segmentation.files.untrusted import read_weights
from rfield.segmentation.inspection.model_names import open_model
from rfield.segmentation.models import build_model, efficientnet_lite0, largefov_vgg16
from rfield.segmentation.models.efficientnet import efficientnet_lite0_backbone

State = dict[str, Tensor]


class Net(nn.Module):
    """A body, a last layer and an auxiliary one, of any number of classes."""

    def __init__(self, classes: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.head = nn.ConvTranspose2d(4, classes, 2) if transposed else nn.Conv2d(4, classes, 1)
        self.aux_head = nn.Conv2d(4, classes, 1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[nn.Module, str]]:
    """Opens a model of torchvision's, of which `Net` takes the place, with what was saved in a file."""

    def load(content: Any, model: nn.Module | None = None, name: str = "file.pth") -> tuple[nn.Module, str]:
        torch.manual_seed(1)
        model = model or Net()
        monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: model)
        path = tmp_path / name
        save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
        source = open_model("torchvision:resnet18", str(path))
        return source.model, source.weights.replace(str(path), "FILE")

    return load


def state_of(**values: Any) -> State:
    torch.manual_seed(0)
    return Net(**values).state_dict()


def assert_loaded(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[key], state[key]) != key.startswith(but or "-") for key in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
        lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_ema": {key: value + 1 for key, value in state.items()}, "model": state},
        lambda state: {"state_dict_ema": {key: value + 1 for key, value in state.items()}, "state_dict": state},
        lambda state: {"ema": {"module": state, "decay": 0.9}},
        lambda state: {"checkpoint": {"network": state}},
        lambda state: {"unet": state, "lr": 0.1},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"n_averaged": torch.ones(()), **{f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {"loss.weight": torch.ones(2), **{f"model.{k}": v for k, v in state.items()}}},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    ],
)
def test_wrapped_and_prefixed_weights(
    loaded: Callable[..., tuple[nn.Module, str]], wrap: Callable[[State], Any]
) -> None:
    state = state_of()
    model, word = loaded(wrap(state))
    assert_loaded(model, state)
    assert word.startswith("the weights of FILE")
    assert ("the file's loss.weight are not used" in word) == ("loss.weight" in wrap(state).get("state_dict", {}))


def test_parts_apart(tmp_path: Path) -> None:
    parts = {"backbone": {"a": torch.ones(1)}, "head": {"b": torch.ones(2)}, "optimizer": {"c": torch.ones(3)}}
    torch.save(parts, tmp_path / "file.pth")
    assert {key: len(value) for key, value in read_weights(tmp_path / "file.pth").items()} == {
        "backbone.a": 1,
        "head.b": 2,
    }


def test_prefixes_in_safetensors(loaded: Callable[..., tuple[nn.Module, str]]) -> None:
    state = state_of()
    model, word = loaded({f"module.{key}": value for key, value in state.items()}, name="file.safetensors")
    assert_loaded(model, state)
    assert word == "the weights of FILE"


@pytest.mark.parametrize("transposed", [False, True])
def test_another_number_of_classes_keeps_the_last_layers(
    loaded: Callable[..., tuple[nn.Module, str]], transposed: bool
) -> None:
    state, model = state_of(classes=7, transposed=transposed), Net(3, transposed)
    first = copy.deepcopy(model.state_dict())
    _, word = loaded({"state_dict": state}, model)
    assert torch.equal(model.state_dict()["model.0.weight"], state["model.0.weight"])
    for key in ("head.weight", "head.bias", "aux_head.weight"):
        assert torch.equal(model.state_dict()[key], first[key])
    assert word == (
        "the weights of FILE, which have 7 classes instead of 3: the last layers keep their initial values (head, "
        "aux_head)"
    )


def test_an_auxiliary_head_that_the_model_has_not_is_left_out(loaded: Callable[..., tuple[nn.Module, str]]) -> None:
    model = Net()
    del model.aux_head
    _, word = loaded(state_of(), model)
    assert word == "the weights of FILE; the file's aux_head.weight, aux_head.bias are not used"


def test_another_width_inside_is_no_last_layer(loaded: Callable[..., tuple[nn.Module, str]]) -> None:
    model = Net()
    model.model[0], model.model[1] = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    model.model[2] = nn.Conv2d(6, 4, 3)
    with pytest.raises(ValueError, match=r"does not fit the model: model\.0\.weight has shape \(4, 3, 3, 3\)"):
        loaded(state_of(), model)
    model = Net()
    model.aux_head = nn.Conv2d(4, 5, 1)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(7, 4, 1, 1\)"):
        loaded(state_of(classes=7), model)


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.ones(1), "epoch": 3}, r"holds no flat dict .* \(it has conv\.weight, epoch\)"),
        (
            Net(),
            r"cannot be read as weights: it holds a whole pickled model .*\(.*Net\), .*save the model's state_dict",
        ),
        ({"model": Net(), "epoch": 3}, r"cannot be read as weights: it holds a whole pickled model"),
        ({"state_dict": {}, "x": SimpleNamespace()}, r"a whole pickled model or other Python objects \(types\."),
        ([torch.ones(1)], r"holds no flat dict from layer name to tensor, .* \(list\)"),
        ({"epoch": 3, "state_dict": {}}, r"\(it has epoch, state_dict\); save the model's state_dict\(\) alone"),
        ({"optimizer": {"a": torch.ones(1)}}, r"\(it has optimizer\)"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_weights_is_refused_in_one_line(tmp_path: Path, content: Any, message: str, zipped: bool) -> None:
    path = tmp_path / "file.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    text = str(error.value)
    assert "\n" not in text
    assert "weights_only" not in text
    assert len(text) < 400


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read as weights: it is empty; was its download"),
        (
            b"<!DOCTYPE html>\n<html>404",
            r"cannot be read as weights: it holds text, '<!DOCTYPE html>'; was its download",
        ),
        ("дом ".encode() * 40, r"it holds text, 'дом дом"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"cannot be read as weights.*; is it damaged or of another format\?"),
    ],
)
def test_other_files_are_refused_in_readable_words(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(path)
    with pytest.raises(ValueError, match=r"is a folder, not a weights file"):
        read_weights(tmp_path)


def test_a_cut_off_safetensors_file_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(state_of(), path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(
        ValueError, match=r"cannot be read as weights \(.*header.*\); is it damaged or of another format"
    ):
        read_weights(path)


def test_a_cut_off_file_says_nothing_of_the_inside(tmp_path: Path) -> None:
    path = saved(tmp_path, state_of())
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"file\.pth cannot be read as weights; is it damaged or of another format\?"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "file.pth"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="it holds a TorchScript program; save its") as error:
            read_weights(tmp_path / "file.pth")
    assert "\n" not in str(error.value)
    assert not told


def test_backbones_take_wrapped_weights_too(tmp_path: Path) -> None:
    theirs = {
        f"module.features.{index}.{name}": torch.randn(value.shape)
        for index, layer in enumerate(largefov_vgg16(2, head_channels=2).backbone.layers)
        for name, value in layer.state_dict().items()
    }
    path = saved(tmp_path, {"model": {**theirs, "module.classifier.6.bias": torch.ones(7)}, "epoch": 1})
    network = largefov_vgg16(2, head_channels=2, weights=path)
    assert torch.equal(network.backbone.layers[0].weight, theirs["module.features.0.weight"])
    state = efficientnet_lite0_backbone(8).layers.state_dict()
    path = saved(tmp_path, {"state_dict": {f"module.{key}": value for key, value in state.items()}})
    ours = efficientnet_lite0(2, head_channels=2, weights=path).backbone.layers.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in state.items() if value.dim())


def test_networks_of_timm_take_wrapped_weights_too(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    path = saved(tmp_path, {"state_dict": {f"module.{key}": value + 1 for key, value in state.items()}})
    network = build_model("timm:test_resnet", 2, head_channels=2, weights=path)
    ours = [value for key, value in network.backbone.state_dict().items() if key.endswith("net.conv1.0.weight")]
    assert torch.equal(ours[0], state["conv1.0.weight"] + 1)


def test_weights_saved_on_a_gpu_are_read_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"conv.bias": torch.ones(2)}, tmp_path / "gpu.pth")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.pth", weights_only=True)
    bias = read_weights(tmp_path / "gpu.pth")["conv.bias"]
    assert bias.device == torch.device("cpu")
    assert bias.tolist() == [1.0, 1.0]


def test_weights_that_swell_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.bias": torch.zeros(10_000)}, tmp_path / "whole.pth")
    path = tmp_path / "packed.pth"
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"packed.pth cannot be read as weights \(its records are larger"):
        read_weights(path)
