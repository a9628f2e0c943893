"""Models by name: which models are built, and the errors of other names."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rfield.layers import LearnedFactor
from rfield.receptive_field.probe import output_map, probe_receptive_field
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.untrusted import no_pickles
from rfield.segmentation.inspection.model_names import _first_names, _unknown, open_model
from rfield.segmentation.models import small_cnn
from rfield.segmentation.runs import Run, build_network


def shape_of(model: nn.Module, side: int = 64) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(output_map(model(torch.zeros(1, 3, side, side))).shape)


def test_models_of_torchvision_are_random_and_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    source = open_model("torchvision:lraspp_mobilenet_v3_large")
    assert (source.name, source.weights, source.start) == (
        "torchvision:lraspp_mobilenet_v3_large",
        "random weights",
        None,
    )
    assert not source.model.training
    assert shape_of(source.model) == (1, 21, 64, 64)


def test_weights_from_a_file(tmp_path: Path) -> None:
    model = open_model("torchvision:squeezenet1_1").model
    nn.init.constant_(next(model.parameters()), 0.25)
    for path in (tmp_path / "weights.safetensors", tmp_path / "weights.pth"):
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        source = open_model("torchvision:squeezenet1_1", str(path))
        assert source.weights == f"the weights of {path}"
        assert next(source.model.parameters()).unique().tolist() == [0.25]
    with pytest.raises(ValueError, match=r"weights\.pth does not fit the model: missing .* and \d+ more"):
        open_model("torchvision:resnet18", str(path))


def test_published_weights_are_read_without_their_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision

    asked: list[Any] = []
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: asked.append(options) or nn.Identity())
    assert open_model("torchvision:deeplabv3_resnet50", "default").weights == "torchvision's weights"
    assert asked == [{"weights": "DEFAULT", "weights_backbone": None}]
    torch.save({"code": Path}, tmp_path / "pickle.pth")
    with no_pickles(), pytest.raises(Exception, match=r"WeightsUnpickler|weights_only"):
        torch.load(tmp_path / "pickle.pth", weights_only=None)


def test_models_of_smp() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    assert shape_of(open_model("smp:FPN/resnet18").model) == (1, 1, 64, 64)


def test_models_of_timm_give_their_last_map() -> None:
    assert shape_of(open_model("timm:test_resnet").model)[2:] == (2, 2)
    assert shape_of(open_model("timm:test_vit").model)[2:] == (4, 4)


def test_maps_with_channels_last_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    class Last(nn.Module):
        def __init__(self, output_fmt: str) -> None:
            super().__init__()
            self.output_fmt = output_fmt

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image[..., :2], image]

    for layout, shape in (("NHWC", (1, 64, 3, 64)), ("NCHW", (1, 3, 64, 64))):
        monkeypatch.setattr(timm, "create_model", lambda name, layout=layout, **options: Last(layout))
        assert shape_of(open_model("timm:resnet18").model) == shape


def test_lists_of_names_end_early() -> None:
    assert [_first_names("abcde"[:count]) for count in (1, 3, 4, 5)] == [
        "a", "a, b, c", "a, b, c and 1 more", "a, b, c and 2 more"
    ]  # fmt: skip
    names = [f"{letter}{letter}" for letter in "jihgfedcba"]
    assert _unknown("x:?", names) == "x:? is not known; there are aa, bb, cc, dd, ee, ff, gg, hh ..."
    near = ["Unet1", "unet2", "unet3", "unet4", "other"]
    assert _unknown("x:UNET1", near).startswith("x:UNET1 is not known; is it Unet1 or unet")
    assert _unknown("x:y", near, "unet").count(" or ") == 2


def test_folders_of_transformers_and_of_rfield(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=3,
        depths=[1] * 4,
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "theirs")
    source = open_model(f"hf:{tmp_path / 'theirs'}")
    assert source.weights == "its own weights"
    assert shape_of(source.model) == (1, 3, 16, 16)
    notes = {"class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]], "size": None}
    small_cnn(2, dilation=3, head_channels=4).save_pretrained(tmp_path / "ours", config=notes)
    assert shape_of(open_model(f"hf:{tmp_path / 'ours'}").model) == (1, 2, 64, 64)


@pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
def test_a_run_knows_where_it_started(mechanism: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(data="synthetic", out=str(tmp_path), model="small_cnn", dilation=9, mechanism=mechanism)
    network = build_network(config, num_classes=2)
    for module in network.modules():
        if isinstance(module, LearnedFactor):
            module.set_factor(3.0)
            module.snap()
    run = Run(tmp_path, config, ("a", "b"), [(0, 0, 0), (1, 1, 1)], network)
    monkeypatch.setattr("rfield.segmentation.inspection.model_names.load_run", lambda folder: run)
    source = open_model(str(tmp_path))
    assert source.weights == "trained weights"
    assert source.start is not None
    (learned,), (start,) = (
        [module.effective_dilation[0] for module in model.modules() if isinstance(module, LearnedFactor)]
        for model in (source.model, source.start)
    )
    assert (learned, start) == pytest.approx((3, 9))
    assert probe_receptive_field(source.model) == (39, 39)
    assert probe_receptive_field(source.start)[0] == pytest.approx(87, abs=8)
    after, before = source.model.state_dict(), source.start.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if not key.endswith(("log_factor", "snapped")))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:deeplabv3_resnet5", "torchvision:deeplabv3_resnet5 is not known; is it deeplabv3_resnet50"),
        ("torchvision:qqqq", "torchvision:qqqq is not known; there are alexnet, "),
        ("torchvision:", "torchvision: names no model"),
        ("smp:DeeplabV3plus", "is it DeepLabV3Plus"),
        ("smp:Unet/resnet17", r"smp:Unet/resnet17 is not known; is it resnet1"),
        ("smp:Unet/mit_b0/x", "is not known"),
        ("timm:resnet19", "timm:resnet19 is not known; is it resnet"),
        (
            "keras:Unet",
            "keras:Unet is not a model: give torchvision:NAME, smp:NAME, timm:NAME, hf:NAME, FILE.py:NAME or a run",
        ),
    ],
)
def test_names_that_are_not_known(spec: str, message: str) -> None:
    if spec.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ValueError, match=message):
        open_model(spec)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        open_model(str(tmp_path))
    with pytest.raises(ValueError, match="has its own weights"):
        open_model(str(tmp_path), "default")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged or not JSON"):
        open_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("smp:Unet", "segmentation_models_pytorch", "smp"),
        ("timm:resnet18", "timm", "all"),
        ("hf:theirs", "transformers", "hf"),
        ("hf:someone/something", "huggingface_hub", "hub"),
    ],
)
def test_missing_packages(spec: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'rfield\[{extra}\]'"):
        open_model(spec)
